"""Cached outputs of the frozen part of a vision tower, so that it runs once per image."""

from __future__ import annotations

import dataclasses
import hashlib
import threading

import torch
from torch import Tensor

from .dataset import ClipDataset
from .images.image_cache import ImageCache
from .images.transforms import Transform

MEMORY_BYTES = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class FeatureSpec:
    """The tensors of a feature cache.

    `made_by` identifies the network: features of another one are not found. With a random transform each image has
    `views` variants, which take turns by epoch; without one it has a single view.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    made_by: str
    views: int = 1

    @property
    def bytes(self) -> int:
        """Bytes of one tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class FeatureCache:
    """Tensors by sample and view, in up to `MEMORY_BYTES` of memory and in the image cache.

    The features of an image whose file has changed are not found. Safe to use from several threads.
    """

    def __init__(self, dataset: ClipDataset, transform: Transform, spec: FeatureSpec, cache: ImageCache | None = None):
        self.dataset, self.transform, self.spec, self.cache = dataset, transform, spec, cache
        self._memory: dict[tuple[int, int], Tensor] = {}
        self._free_bytes = MEMORY_BYTES
        self._lock = threading.Lock()

    def view_of(self, epoch: int) -> int:
        return epoch % self.spec.views

    def in_memory(self, sample: int, view: int) -> Tensor | None:
        return self._memory.get((sample, view))

    def get(self, sample: int, view: int) -> Tensor | None:
        """Return the tensor on the CPU, or None if it is not cached."""
        features = self.in_memory(sample, view)
        if features is not None or self.cache is None:
            return features
        stored = self.cache.get(self._key(self.cache, sample, view))
        if stored is None:
            return None
        features = stored.view(-1)[: self.spec.bytes].view(self.spec.dtype).view(self.spec.shape)
        self._remember(sample, view, features)
        return features

    def put(self, sample: int, view: int, features: Tensor) -> None:
        features = features.detach().to("cpu", self.spec.dtype, copy=True)
        self._remember(sample, view, features)
        if self.cache is not None:
            # The image cache holds uint8 [3, h, w], so the bytes are padded to a multiple of three.
            stored = torch.zeros(-(-self.spec.bytes // 3) * 3, dtype=torch.uint8)
            stored[: self.spec.bytes] = features.reshape(-1).view(torch.uint8)
            self.cache.put(self._key(self.cache, sample, view), stored.view(3, 1, -1))

    def _remember(self, sample: int, view: int, features: Tensor) -> None:
        with self._lock:
            if self._free_bytes >= self.spec.bytes and (sample, view) not in self._memory:
                self._free_bytes -= self.spec.bytes
                self._memory[sample, view] = features

    def _key(self, cache: ImageCache, sample: int, view: int) -> bytes | None:
        image_key = cache.key(self.dataset.path(sample), self.transform)
        if image_key is None:
            return None
        spec = self.spec
        source = f"{spec.made_by}\0{spec.shape}\0{spec.dtype}\0{view}\0{self.transform.augmentation_name}"
        return hashlib.blake2b(image_key + source.encode(), digest_size=16).digest()
