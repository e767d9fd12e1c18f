"""Training data loader: decodes images in background threads and yields batches."""

from __future__ import annotations

import array
import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .dataset import ClipDataset
from .decoded_images import DecodedImages, allowed_broken, too_many_broken
from .feature_cache import FeatureCache
from .images.decoding import MissingImage
from .images.image_cache import ImageCache
from .images.transforms import Transform
from .sampler import CaptionsConfig, Pair, Sampler, rng_of
from .threads import THREADS, ordered
from .tokenizer import Tokenizer

_PROBED = 64  # images that are decoded before a training begins, to see whether they are broken


class Batch(NamedTuple):
    """One training batch.

    `images` uint8 [m, 3, s, s] and `tokens` int64 [b, context]. `originals` and `texts` int64 [b] hold equal numbers
    where two pairs share an image or a caption. `indices` are samples of the dataset. `features` has the cached
    features of each pair, or None; an image with cached features is not among `images`, so m <= b. `views` says which
    variant of its image each pair has.
    """

    images: Tensor
    tokens: Tensor
    originals: Tensor
    texts: Tensor
    indices: list[int]
    features: Sequence[Tensor | None] = ()
    views: Sequence[int] = ()

    @property
    def pairs(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoaderOptions:
    """`max_broken` is the share of the dataset's images that may be broken before the training stops."""

    batch_size: int
    seed: int = 0
    max_broken: float = 1.0
    cache: ImageCache | None = None
    feature_cache: FeatureCache | None = None


class TrainLoader:
    """Batches of a training. The pairs of a step depend on the seed and the step alone, not on the threads.

    `truncated` holds a hash of each caption seen so far that did not fit the context.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        tokenizer: Tokenizer,
        transform: Transform,
        captions: CaptionsConfig,
        options: LoaderOptions,
    ):
        self.dataset, self.tokenizer, self.options = dataset, tokenizer, options
        self.sampler = Sampler(dataset, options.seed, captions)
        self.steps_per_epoch = self.sampler.length // options.batch_size
        self.images = DecodedImages(dataset, transform, options.cache)
        self.truncated: set[int] = set()
        self._originals = array.array("q", bytes(8 * len(dataset)))  # hashes of original paths; 0: not needed yet
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="clip-finetune-images")

    @property
    def broken(self) -> dict[str, str]:
        """Names and reasons of images that could not be decoded; their batches come without them."""
        return self.images.broken

    def probe(self) -> None:
        """Decode some images from all over the dataset. Raises `UserError` if clearly too many of them are broken."""
        count = len(self.dataset)
        indices = [number * count // _PROBED for number in range(_PROBED)] if count > _PROBED else range(count)
        for _ in ordered(self._pool, self._base, indices, len(indices)):
            pass
        allowed = allowed_broken(self.options.max_broken, len(indices))
        # Only a part was decoded: allow three standard deviations more, so that bad luck refuses no good dataset.
        margin = 3 * allowed**0.5 if len(indices) < count else 0.0
        if len(self.broken) > allowed + margin:
            raise self._too_many_broken(len(indices))

    def iterate(self, start_step: int = 0) -> Iterator[tuple[int, Batch]]:
        """Yield (steps done before, batch) from optimizer step `start_step` (0-based) on, without end.

        Raises `UserError` for a batch with fewer than two good images, and once more than `max_broken` of the dataset
        are known to be broken.
        """
        size = self.options.batch_size
        allowed = allowed_broken(self.options.max_broken, len(self.dataset))
        samples = ordered(self._pool, self._load, self._pairs(start_step), 2 * size + THREADS, self._load_from_memory)
        for step in itertools.count(start_step):
            batch = list(itertools.islice(samples, size))
            if len(self.broken) > allowed:
                raise self._too_many_broken(len(self.dataset))
            good = [sample for sample in batch if sample.image is not None or sample.features is not None]
            if len(good) < 2:
                raise self._too_few_images(len(good))
            yield step, self._batch(good)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _pairs(self, start_step: int) -> Iterator[tuple[int, Pair]]:
        """Yield (epoch, pair) from a step on."""
        size = self.options.batch_size
        epoch, step = divmod(start_step, self.steps_per_epoch)
        while True:
            pairs = self.sampler.epoch(epoch)
            for position in range(step * size, self.steps_per_epoch * size):
                yield epoch, pairs[position]
            epoch, step = epoch + 1, 0

    # ---- one pair; in the background -------------------------------------------------------------------------------

    def _load_from_memory(self, item: tuple[int, Pair]) -> _Sample | None:
        """Return a pair whose image has features in memory; such a pair needs no thread."""
        cache = self.options.feature_cache
        if cache is None:
            return None
        epoch, pair = item
        view = cache.view_of(epoch)
        features = cache.in_memory(pair.sample, view)
        return None if features is None else self._sample(pair, None, features, view)

    def _load(self, item: tuple[int, Pair]) -> _Sample:
        epoch, pair = item
        cache = self.options.feature_cache
        view = cache.view_of(epoch) if cache is not None else 0
        features = cache.get(pair.sample, view) if cache is not None else None
        image = None if features is not None else self._image(pair, epoch, view)
        if image is None and features is None:
            return _Sample(pair, None, None, 0, 0)
        return self._sample(pair, image, features, view)

    def _sample(self, pair: Pair, image: Tensor | None, features: Tensor | None, view: int) -> _Sample:
        if self.tokenizer.truncated(pair.caption):  # this also caches the caption's token ids, in the background
            self.truncated.add(hash(pair.caption))
        original = self._originals[pair.sample]
        if not original:
            original = self._originals[pair.sample] = hash(self.dataset.original(pair.sample))
        return _Sample(pair, image, features, view, original)

    def _image(self, pair: Pair, epoch: int, view: int) -> Tensor | None:
        """Return the augmented image. With a feature cache it depends on the view, so that it comes again."""
        base, transform = self._base(pair.sample), self.images.transform
        if base is None or not transform.is_random:
            return base
        # The words are part of the seed: other words would change every training.
        if self.options.feature_cache is None:
            rng = rng_of(self.options.seed, epoch, pair.entry, "picture")
        else:
            rng = rng_of(self.options.seed, view, pair.sample, "view")
        return transform.finish(base, rng)

    def _base(self, index: int) -> Tensor | None:
        try:
            return self.images.base(index)
        except MissingImage as error:
            raise UserError(
                f"{self.dataset.path(index)} was deleted during the training. Put it back and start the same run "
                "again to continue it; without this image it would be another run."
            ) from error

    # ---- a batch ---------------------------------------------------------------------------------------------------

    def _batch(self, samples: Sequence[_Sample]) -> Batch:
        images = [sample.image for sample in samples if sample.image is not None]
        size = self.images.transform.image_size
        return Batch(
            torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8),
            self.tokenizer(sample.pair.caption for sample in samples),
            _group_numbers([sample.original for sample in samples]),
            _group_numbers([sample.pair.meaning for sample in samples]),
            [sample.pair.sample for sample in samples],
            [sample.features for sample in samples],
            [sample.view for sample in samples],
        )

    def _too_few_images(self, good: int) -> UserError:
        name, reason = next(iter(self.broken.items()))
        return UserError(
            f"Only {good} of the {self.options.batch_size} images of a batch can be opened (for example {name}: "
            f"{reason}). Run clip-finetune info on the dataset to list the broken ones."
        )

    def _too_many_broken(self, examined: int) -> UserError:
        return too_many_broken(self.broken, examined, self.options.max_broken, self.dataset.name)


class _Sample(NamedTuple):
    """A pair with its image, uint8 [3, s, s], or its cached features; neither if the image is broken.

    `original` is equal for copies of one image.
    """

    pair: Pair
    image: Tensor | None
    features: Tensor | None
    view: int
    original: int


def _group_numbers(values: Sequence[Hashable]) -> Tensor:
    """Return int64 [n] with equal numbers for equal values."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])
