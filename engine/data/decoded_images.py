"""The images of a dataset, decoded once, and what happens to those that cannot be decoded."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .dataset import ClipDataset
from .images.decoding import BrokenImage, MissingImage
from .images.image_cache import ImageCache
from .images.transforms import Transform
from .threads import in_threads

MEMORY_BYTES = 512 * 2**20


class DecodedImages:
    """Decoded images by sample, kept in the image cache and, if that takes no more, in up to `memory_bytes` of memory.

    `broken` maps the name of each image that could not be decoded to the reason. Safe to use from several threads.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        transform: Transform,
        cache: ImageCache | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ):
        self.dataset, self.transform, self.cache = dataset, transform, cache
        self.broken: dict[str, str] = {}
        self._memory: dict[int, Tensor] = {}
        self._free_bytes = memory_bytes
        self._lock = threading.Lock()

    def base(self, index: int) -> Tensor | None:
        """Return `Transform.base` of a sample's image, or None for a broken one. Raises `MissingImage`."""
        if index in self._memory:
            return self._memory[index]
        path = self.dataset.path(index)
        key = self.cache.key(path, self.transform) if self.cache is not None else None
        if self.cache is not None and (cached := self.cache.get(key)) is not None:
            return cached
        try:
            image = self.transform.base(path)
        except MissingImage:
            raise
        except BrokenImage as error:
            with self._lock:
                self.broken[self.dataset.names[index]] = str(error)
            return None
        # The key of a file that changed while it was being read is another one now.
        if self.cache is not None and key == self.cache.key(path, self.transform) and self.cache.put(key, image):
            return image
        with self._lock:
            if self._free_bytes >= image.nbytes:
                self._free_bytes -= image.nbytes
                self._memory[index] = image
        return image


def image_batches(images: DecodedImages, indices: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (sample indices, uint8 [b, 3, s, s]) in order, without augmentation.

    Broken and missing images are left out and noted in `images.broken`.
    """

    def load(index: int) -> tuple[int, Tensor | None]:
        try:
            return index, images.base(index)
        except MissingImage as error:
            images.broken[images.dataset.names[index]] = str(error)
            return index, None

    batch: list[tuple[int, Tensor]] = []
    for index, image in in_threads(load, indices, ahead=2 * batch_size):
        if image is not None:
            batch.append((index, image))
        if len(batch) == batch_size:
            yield _stacked(batch)
            batch = []
    if batch:
        yield _stacked(batch)


def _stacked(batch: Sequence[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    indices, images = zip(*batch, strict=True)
    return list(indices), torch.stack(images)


def allowed_broken(share: float, count: int) -> float:
    """Return how many of `count` images may be broken: at least one, unless the share is 0."""
    return max(1.0, share * count) if share else 0.0


def too_many_broken(broken: Mapping[str, str], examined: int, share: float, name: str) -> UserError:
    """Return the error for a dataset with more broken images than max_broken, `share`, allows."""
    examples = "; ".join(f"{file}: {reason}" for file, reason in list(broken.items())[:3])
    return UserError(
        f"{len(broken)} of {examined} images of {name} cannot be used ({examples}), more than max_broken allows "
        f"({share:.0%}). Repair or remove them (clip-finetune info lists them all), or raise max_broken."
    )
