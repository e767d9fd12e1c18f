"""What the frozen part of a vision tower makes of each picture, kept so that it runs once."""

from __future__ import annotations

import hashlib
import threading

import torch
from torch import Tensor

from .dataset import ClipDataset
from .images.image_cache import ImageCache
from .images.transforms import Transform

MEMORY_BYTES = 512 * 2**20


class FeatureCache:
    """Tensors of `shape` and `dtype` by sample and view: in memory up to a bound, and in the cache of pictures.

    `made_by` says what made them: another one finds nothing of it in the cache, nor does a picture whose file changed.
    A transform with chance has `views` variants of each picture; one without has one. Safe to use from several threads.
    """

    def __init__(
        self,
        dataset: ClipDataset,
        transform: Transform,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        made_by: str,
        *,
        views: int = 1,
        cache: ImageCache | None = None,
    ):
        self.dataset, self.transform, self.cache, self.views = dataset, transform, cache, views
        self.shape, self.dtype, self.made_by = shape, dtype, made_by
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._bytes = torch.Size(shape).numel() * dtype.itemsize
        self._room = MEMORY_BYTES
        self._lock = threading.Lock()

    def view_of(self, epoch: int) -> int:
        return epoch % self.views

    def at_hand(self, sample: int, view: int) -> Tensor | None:
        """As `get`, but only what is in memory."""
        return self._kept.get((sample, view))

    def get(self, sample: int, view: int) -> Tensor | None:
        """The tensor on the CPU, or None for one that is not here."""
        found = self.at_hand(sample, view)
        if found is not None or self.cache is None:
            return found
        stored = self.cache.get(self._key(sample, view))
        if stored is None:
            return None
        found = stored.view(-1)[: self._bytes].view(self.dtype).view(self.shape)
        self._keep(sample, view, found)
        return found

    def put(self, sample: int, view: int, features: Tensor) -> None:
        features = features.detach().to("cpu", self.dtype, copy=True)
        self._keep(sample, view, features)
        if self.cache is not None:
            # The cache holds pictures of three channels.
            stored = torch.zeros(-(-self._bytes // 3) * 3, dtype=torch.uint8)
            stored[: self._bytes] = features.reshape(-1).view(torch.uint8)
            self.cache.put(self._key(sample, view), stored.view(3, 1, -1))

    def _keep(self, sample: int, view: int, features: Tensor) -> None:
        with self._lock:
            if self._room >= self._bytes and (sample, view) not in self._kept:
                self._room -= self._bytes
                self._kept[sample, view] = features

    def _key(self, sample: int, view: int) -> bytes | None:
        picture = self.cache.key(self.dataset.path(sample), self.transform)
        if picture is None:
            return None
        made = f"{self.made_by}\0{self.shape}\0{self.dtype}\0{view}\0{self.transform.chance_name}"
        return hashlib.blake2b(picture + made.encode(), digest_size=16).digest()
