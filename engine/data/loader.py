"""From a data set to batches: pictures decoded ahead by threads, with the captions and the chance of their turn."""

from __future__ import annotations

import array
import collections
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from .dataset import ClipDataset
from .feature_cache import FeatureCache
from .images.decoding import BrokenImage, MissingImage
from .images.image_cache import ImageCache
from .images.transforms import Transform
from .sampler import CaptionPolicy, Pair, Sampler, rng_of
from .tokenizer import Tokenizer

T = TypeVar("T")
R = TypeVar("R")

# Threads serve inside ComfyUI and outside alike: decoders, resizers and copies work without holding Python's lock.
THREADS = min(16, os.cpu_count() or 1)
MEMORY_BYTES = 512 * 2**20
# How many pictures are decoded before a training begins, to see whether they are broken.
_PROBED = 64


class Batch(NamedTuple):
    """`images` uint8 [b, 3, s, s], `tokens` int64 [b, context]; `originals` and `texts` int64 [b], equal where two
    pairs share the picture or the caption; `indices` into the data set. A picture with features that are kept, which
    `kept` has in its place, is not among the images; `views` go with it."""

    images: Tensor
    tokens: Tensor
    originals: Tensor
    texts: Tensor
    indices: list[int]
    kept: Sequence[Tensor | None] = ()
    views: Sequence[int] = ()

    @property
    def pairs(self) -> int:
        return len(self.tokens)


class Pictures:
    """The pictures of a data set by sample, each decoded once: kept in a cache on the disk, and what is not there in
    memory, up to a bound. `broken` are the names and reasons of those that could not be decoded."""

    def __init__(
        self,
        dataset: ClipDataset,
        transform: Transform,
        cache: ImageCache | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ):
        self.dataset, self.transform, self.cache = dataset, transform, cache
        self.broken: dict[str, str] = {}
        self._kept: dict[int, Tensor] = {}
        self._room = memory_bytes
        self._lock = threading.Lock()

    def base(self, index: int) -> Tensor | None:
        """What `Transform.base` gives, or None for a broken picture, whose reason is noted. Raises `MissingImage`."""
        if index in self._kept:
            return self._kept[index]
        path = self.dataset.path(index)
        key = None
        if self.cache is not None:
            key = self.cache.key(path, self.transform)
            picture = self.cache.get(key)
            if picture is not None:
                return picture
        try:
            picture = self.transform.base(path)
        except MissingImage:
            raise
        except BrokenImage as error:
            with self._lock:
                self.broken[self.dataset.names[index]] = str(error)
            return None
        # A file that was written to meanwhile has another key now.
        if self.cache is not None and key == self.cache.key(path, self.transform) and self.cache.put(key, picture):
            return picture
        with self._lock:
            if self._room >= picture.nbytes:
                self._room -= picture.nbytes
                self._kept[index] = picture
        return picture


class TrainLoader:
    """Batches of a training. Which pairs a step has depends on the seed and the step alone."""

    def __init__(
        self,
        dataset: ClipDataset,
        image_size: int,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        *,
        transform: Transform | None = None,
        policy: CaptionPolicy | None = None,
        cache: ImageCache | None = None,
        max_broken: float = 1.0,
        kept: FeatureCache | None = None,
    ):
        self.kept = kept
        self.dataset, self.tokenizer, self.batch_size = dataset, tokenizer, batch_size
        self.epochs = Sampler(dataset, seed, policy)
        self.steps_per_epoch = self.epochs.length // batch_size
        self.pictures = Pictures(dataset, transform or Transform(image_size=image_size), cache)
        self.max_broken = max_broken
        self.cut: set[int] = set()  # hashes of the captions that did not fit
        self._originals = array.array("q", bytes(8 * len(dataset)))  # hashes of their places, 0 before the first turn
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="clip-finetune-pictures")

    @property
    def broken(self) -> dict[str, str]:
        """Names and reasons of the pictures that could not be decoded; they are missing in their batches."""
        return self.pictures.broken

    def probe(self) -> None:
        """Decode some pictures, evenly spread. Raises `UserError` if clearly more of them are broken than may be."""
        count = len(self.dataset)
        probed = [place * count // _PROBED for place in range(_PROBED)] if count > _PROBED else range(count)
        for _ in _ordered(self._pool, self._base, probed, len(probed)):
            pass
        allowed = allowed_broken(self.max_broken, len(probed))
        # Of a part, by three standard deviations, so that chance does not refuse a good data set.
        doubt = 3 * allowed**0.5 if len(probed) < count else 0.0
        if len(self.broken) > allowed + doubt:
            raise self._too_many(len(probed))

    def iterate(self, start_step: int = 0) -> Iterator[tuple[int, Batch]]:
        """(steps done before, batch) from optimizer step `start_step` (0-based) on, without end.

        Raises `UserError` for a batch with fewer than two good pictures, and once more than `max_broken` of the data
        set are known to be broken.
        """
        allowed = allowed_broken(self.max_broken, len(self.dataset))
        for step, samples in self._decoded(start_step):
            if len(self.broken) > allowed:
                raise self._too_many(len(self.dataset))
            good = [sample for sample in samples if sample.image is not None or sample.kept is not None]
            if len(good) < 2:
                name, reason = next(iter(self.broken.items()))
                raise UserError(
                    f"Of the {len(samples)} pictures of a batch {len(good)} could be opened (for example {name}: "
                    f"{reason}); run clip-finetune info on the data set to see which are broken."
                )
            yield (
                step,
                Batch(
                    self._stacked([sample.image for sample in good if sample.image is not None]),
                    self.tokenizer(sample.pair.caption for sample in good),
                    _numbered([sample.original for sample in good]),
                    _numbered([sample.pair.meaning for sample in good]),
                    [sample.pair.sample for sample in good],
                    [sample.kept for sample in good],
                    [sample.view for sample in good],
                ),
            )

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _turns(self, start_step: int) -> Iterator[tuple[int, int, Pair]]:
        """(step, epoch, pair) of every turn from a step on."""
        number, position = divmod(start_step, self.steps_per_epoch)
        while True:
            epoch = self.epochs.epoch(number)
            for place in range(position * self.batch_size, self.steps_per_epoch * self.batch_size):
                yield number * self.steps_per_epoch + place // self.batch_size, number, epoch[place]
            number, position = number + 1, 0

    def _decoded(self, start_step: int) -> Iterator[tuple[int, list[_Sample]]]:
        samples: list[_Sample] = []
        turns, ahead = self._turns(start_step), 2 * self.batch_size + THREADS
        for sample in _ordered(self._pool, self._sample, turns, ahead, self._at_hand):
            samples.append(sample)
            if len(samples) == self.batch_size:
                yield sample.step, samples
                samples = []

    def _at_hand(self, turn: tuple[int, int, Pair]) -> _Sample | None:
        """The sample of a turn for which no thread is needed."""
        if self.kept is None:
            return None
        step, epoch, pair = turn
        view = self.kept.view_of(epoch)
        kept = self.kept.at_hand(pair.sample, view)
        return None if kept is None else self._complete(step, pair, None, kept, view)

    def _sample(self, turn: tuple[int, int, Pair]) -> _Sample:
        step, epoch, pair = turn
        view = self.kept.view_of(epoch) if self.kept is not None else 0
        kept = self.kept.get(pair.sample, view) if self.kept is not None else None
        image = None if kept is not None else self._image(pair, epoch, view)
        if image is None and kept is None:
            return _Sample(step, pair, None, 0)
        return self._complete(step, pair, image, kept, view)

    def _complete(self, step: int, pair: Pair, image: Tensor | None, kept: Tensor | None, view: int) -> _Sample:
        if self.tokenizer.truncated(pair.caption):  # which keeps the tokens, too
            self.cut.add(hash(pair.caption))
        original = self._originals[pair.sample]
        if not original:
            original = self._originals[pair.sample] = hash(self.dataset.original(pair.sample))
        return _Sample(step, pair, image, original, kept, view)

    def _image(self, pair: Pair, epoch: int, view: int) -> Tensor | None:
        """The picture of a turn; a view that is kept is the same in each epoch that it comes in."""
        base, transform = self._base(pair.sample), self.pictures.transform
        if base is None or not transform.is_random:
            return base
        seed = self.epochs.seed
        turn = (seed, epoch, pair.entry, "picture") if self.kept is None else (seed, view, pair.sample, "view")
        return transform.finish(base, rng_of(*turn))

    def _stacked(self, images: list[Tensor]) -> Tensor:
        size = self.pictures.transform.image_size
        return torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)

    def _base(self, index: int) -> Tensor | None:
        try:
            return self.pictures.base(index)
        except MissingImage as error:
            raise UserError(
                f"{self.dataset.path(index)} was there when the training began and is gone; put it back and start the "
                "same run again: it goes on from where it is. Without the picture it is another run."
            ) from error

    def _too_many(self, looked_at: int) -> UserError:
        return too_many_broken(self.broken, looked_at, self.max_broken, self.dataset.name)


class _Sample(NamedTuple):
    """A turn with its picture uint8 [3, s, s], or what is kept of it; neither for a broken picture. `original` is equal
    for copies of one picture."""

    step: int
    pair: Pair
    image: Tensor | None
    original: int
    kept: Tensor | None = None
    view: int = 0


def allowed_broken(share: float, count: int) -> float:
    """How many of so many pictures may be broken; unless none may, a single one never stops a training."""
    return max(1.0, share * count) if share else 0.0


def too_many_broken(broken: dict[str, str], looked_at: int, allowed: float, name: str) -> UserError:
    """What is told when more pictures than max_broken allows cannot be used; `broken` has a reason by name."""
    shown = "; ".join(f"{file}: {reason}" for file, reason in list(broken.items())[:3])
    return UserError(
        f"{len(broken)} of {looked_at} pictures of {name} cannot be used ({shown}), more than max_broken allows "
        f"({allowed:.0%}); mend or remove them (clip-finetune info names them all), or raise max_broken."
    )


def _numbered(values: Sequence[Hashable]) -> Tensor:
    """int64 [n]: equal numbers for equal values."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def _ordered(
    pool: ThreadPoolExecutor,
    function: Callable[[T], R],
    items: Iterable[T],
    ahead: int,
    at_hand: Callable[[T], R | None] = lambda item: None,
) -> Iterator[R]:
    """`function` of each item in order, computed by the pool at most `ahead` items before it is asked for; but what
    `at_hand` gives of an item, if it gives anything, which is cheaper than a turn of a thread."""
    waiting: collections.deque[tuple[Future | None, R | None]] = collections.deque()

    def first() -> R:
        future, found = waiting.popleft()
        return found if future is None else future.result()

    try:
        for item in items:
            found = at_hand(item)
            waiting.append((pool.submit(function, item) if found is None else None, found))
            if len(waiting) > ahead:
                yield first()
        while waiting:
            yield first()
    finally:
        for future, _ in waiting:
            if future is not None:
                future.cancel()


def in_threads(function: Callable[[T], R], items: Iterable[T], ahead: int = 64) -> Iterator[R]:
    """`function` of each item, in order, computed in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from _ordered(pool, function, items, ahead)


def image_batches(pictures: Pictures, indices: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """(sample indices, uint8 [b, 3, s, s]) in order, nothing random. Broken pictures are left out and noted in
    `pictures`."""
    good: list[int] = []
    images: list[Tensor] = []

    def load(index: int) -> tuple[int, Tensor | None]:
        try:
            return index, pictures.base(index)
        except MissingImage as error:
            pictures.broken[pictures.dataset.names[index]] = str(error)
            return index, None

    for index, image in in_threads(load, indices, ahead=2 * batch_size):
        if image is None:
            continue
        good.append(index)
        images.append(image)
        if len(good) == batch_size:
            yield good, torch.stack(images)
            good, images = [], []
    if good:
        yield good, torch.stack(images)
