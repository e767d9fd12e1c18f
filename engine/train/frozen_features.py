"""The part of the vision tower that never trains: run once per image, and its output cached.

It is the whole tower, or the blocks below the first one that trains together with what comes before them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..clip.architecture import Architecture
from ..clip.full_clip import FullCLIP, fingerprint_of
from ..data.feature_cache import MEMORY_BYTES, FeatureCache, FeatureSpec
from ..data.images.decoding import normalize
from ..data.images.image_cache import ImageCache
from ..data.loader import Batch
from .config import TrainConfig
from .device import to_device
from .optim.parameter_info import layers_of, parameter_info
from .setup import TrainSetup

# How many images go through at once, at most. The output for an image must not depend on those beside it, so that a
# resumed run gets the same bits: on a CPU one goes through at a time, which costs little there, and elsewhere a batch
# that is not full is filled up.
_IMAGES = 64


@dataclasses.dataclass(frozen=True)
class FrozenFeatures:
    """The frozen part of a vision tower: its first `blocks` blocks, or the whole tower where `blocks` is None."""

    network: Any  # clip.network.CLIP, a class that is made when it is first needed
    device: torch.device
    blocks: int | None
    cache: FeatureCache
    check_cancelled: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, setup: TrainSetup, network: Any, image_cache: ImageCache | None) -> FrozenFeatures | None:
        """Return the frozen part of a training's network.

        None where nothing is frozen, where every epoch has other images, or where the output of frozen blocks is more
        than may be cached.
        """
        config, architecture, transform = setup.config, setup.model.architecture, setup.transform
        blocks = frozen_blocks(architecture, config)
        views = config.images.cached_views if transform.is_random else 1
        if blocks == 0 or not config.memory.cache_features or not views:
            return None
        shape = (architecture.embed_dim,) if blocks is None else (architecture.grid**2 + 1, architecture.vision_width)
        device = setup.plan.device
        made_by = f"{_fingerprint(setup.model, blocks)} {blocks} {device.type} {config.layers.scale_neurons}"
        spec = FeatureSpec(shape, network.dtype, made_by, views=views)
        size = len(setup.train_set) * views * spec.bytes
        if blocks is not None and size > 0.9 * (MEMORY_BYTES + (image_cache.limit if image_cache is not None else 0)):
            setup.notes.add(
                f"The output of the frozen vision blocks would take {size / 1e9:.1f} GB, more than may be cached "
                "(image_cache_gb), so these blocks run in every step."
            )
            return None
        cache = FeatureCache(setup.train_set, transform, spec, image_cache)
        return cls(network, device, blocks, cache, setup.callbacks.check_cancelled)

    def inputs(self, batch: Batch, micro_batch: int) -> Tensor:
        """Return the output of the frozen part for each pair [b, …] on the CPU; computes and caches what is missing."""
        cached = [features for features in batch.features if features is not None]
        if len(cached) == batch.pairs:
            return torch.stack(cached)
        outputs = torch.empty(batch.pairs, *self.cache.spec.shape, dtype=self.cache.spec.dtype)
        missing: list[tuple[int, int]] = []  # (pair, row of batch.images)
        row = 0
        for pair, features in enumerate(batch.features):
            if features is None:
                # It may have come into the cache since the batch was loaded.
                features = self.cache.get(batch.indices[pair], batch.views[pair])
                if features is None:
                    missing.append((pair, row))
                row += 1
            if features is not None:
                outputs[pair] = features
        at_once = _at_once(self.device, micro_batch)
        for start in range(0, len(missing), at_once):
            self.check_cancelled()
            chunk = missing[start : start + at_once]
            images = batch.images[[row for _, row in chunk]]
            filled = torch.cat([images, images.new_zeros(at_once - len(images), *images.shape[1:])])
            for (pair, _), features in zip(chunk, self._run(filled), strict=False):  # leaves out the filling
                outputs[pair] = features
                self.cache.put(batch.indices[pair], batch.views[pair], features)
        return outputs

    def encode(self, inputs: Tensor) -> Tensor:
        """Return features [b, d] from the frozen part's output; this part may train."""
        inputs = to_device(inputs, self.device)
        return inputs if self.blocks is None else self.network.image_features(inputs, self.blocks)

    def _run(self, images_u8: Tensor) -> Tensor:
        images = normalize(to_device(images_u8, self.device), self.network.dtype)
        with torch.no_grad():
            if self.blocks is None:
                return self.network.encode_image(images).cpu()
            return self.network.image_states(images, self.blocks).cpu()


def _at_once(device: torch.device, micro_batch: int) -> int:
    return 1 if device.type == "cpu" else min(_IMAGES, micro_batch)


def frozen_blocks(architecture: Architecture, config: TrainConfig) -> int | None:
    """Return how many blocks of the vision tower never train, with everything below them; None for the whole tower."""
    if config.towers == "text":
        return None
    if architecture.resnet or not config.layers.freeze_embeddings:
        return 0
    # Not the last block: only one position of its output is computed.
    return min(config.layers.freeze_vision_blocks, layers_of("vision", architecture) - 1)


def _fingerprint(model: FullCLIP, blocks: int | None) -> str:
    frozen = {
        name: tensor
        for name, tensor in model.state_dict.items()
        if name.startswith("visual.") and (blocks is None or parameter_info(name, model.architecture).depth <= blocks)
    }
    return fingerprint_of(model.architecture, frozen)
