"""The part of the vision tower that never trains, run once for each picture: all of it, or what is below the first
block that trains."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..clip.architecture import Architecture
from ..clip.full_clip import FullCLIP, fingerprint_of
from ..data.dataset import ClipDataset
from ..data.feature_cache import MEMORY_BYTES, FeatureCache, FeatureSpec
from ..data.images.image_cache import ImageCache
from ..data.images.transforms import Transform
from ..data.loader import Batch
from .config import TrainConfig
from .device import to_device
from .optim.parameter_info import layers_of, parameter_info

if TYPE_CHECKING:
    from .step import TrainingStep

# How many pictures go through at once, at most. What a picture gives must not depend on those beside it, so that a run
# that goes on gets the same bits: a processor takes one at a time, which costs it little, and elsewhere a part that is
# not full is filled.
_PART = 64


@dataclasses.dataclass(frozen=True)
class FrozenFeatures:
    """`blocks` of the tower are frozen with what is before them; None for the whole tower. `kept` is what they gave."""

    work: TrainingStep
    blocks: int | None
    kept: FeatureCache

    @classmethod
    def of(
        cls, work: TrainingStep, dataset: ClipDataset, transform: Transform, cache: ImageCache | None
    ) -> FrozenFeatures | None:
        """None where nothing of the tower is frozen, where every epoch has other pictures, or where what is frozen
        below other blocks gives more than may be kept."""
        config, architecture = work.config, work.model.architecture
        blocks = frozen_blocks(architecture, config)
        random = transform.is_random
        if blocks == 0 or not config.memory.cache_features or (random and not config.images.cached_views):
            return None
        shape = (architecture.embed_dim,) if blocks is None else (architecture.grid**2 + 1, architecture.vision_width)
        made_by = f"{_fingerprint(work.model, blocks)} {blocks} {work.device.type} {config.layers.scale_neurons}"
        spec = FeatureSpec(shape, work.network.dtype, made_by, views=config.images.cached_views if random else 1)
        size = len(dataset) * spec.views * spec.bytes
        if blocks is not None and size > 0.9 * (MEMORY_BYTES + (cache.limit if cache is not None else 0)):
            work.say(
                f"What the frozen blocks of the vision tower give would take {size / 1e9:.1f} GB, more than is kept "
                "(image_cache_gb), so they run in every step."
            )
            return None
        return cls(work, blocks, FeatureCache(dataset, transform, spec, cache))

    def inputs(self, batch: Batch) -> Tensor:
        """What the frozen part gives for each pair [b, …], on the CPU; what was not kept is computed, and kept."""
        if all(kept is not None for kept in batch.features):
            return torch.stack(list(batch.features))
        found = torch.empty(batch.pairs, *self.kept.spec.shape, dtype=self.kept.spec.dtype)
        places: list[int] = []  # of the pictures that are new
        rows: list[int] = []  # among the batch's images
        image = 0
        for place, kept in enumerate(batch.features):
            if kept is None:
                # It may have come since the batch was made.
                kept = self.kept.get(batch.indices[place], batch.views[place])
                if kept is None:
                    places.append(place)
                    rows.append(image)
                image += 1
            if kept is not None:
                found[place] = kept
        part = _at_once(self.work)
        for start in range(0, len(places), part):
            self.work.check_cancelled()
            images = batch.images[rows[start : start + part]]
            filled = torch.cat([images, images.new_zeros(part - len(images), *images.shape[1:])])
            with torch.no_grad():
                made = self._run(self.work.pictures(filled)).cpu()
            for place, features in zip(places[start : start + part], made, strict=False):  # without the filling
                found[place] = features
                self.kept.put(batch.indices[place], batch.views[place], features)
        return found

    def encode(self, inputs: Tensor) -> Tensor:
        """Features [b, d] of what `inputs` gave; here is what trains."""
        inputs = to_device(inputs, self.work.device)
        return inputs if self.blocks is None else self.work.network.image_features(inputs, self.blocks)

    def _run(self, pictures: Tensor) -> Tensor:
        network = self.work.network
        return network.encode_image(pictures) if self.blocks is None else network.image_states(pictures, self.blocks)


def _at_once(work: TrainingStep) -> int:
    return 1 if work.device.type == "cpu" else min(_PART, work.micro_batch)


def frozen_blocks(architecture: Architecture, config: TrainConfig) -> int | None:
    """How many blocks of the vision tower never train, with all that is before them; None if nothing of it trains."""
    if config.towers == "text":
        return None
    if architecture.resnet or not config.layers.freeze_embeddings:
        return 0
    # The last block is never kept apart: of it only one position is computed.
    return min(config.layers.freeze_vision_blocks, layers_of("vision", architecture) - 1)


def _fingerprint(model: FullCLIP, blocks: int | None) -> str:
    """Of the frozen part's tensors."""
    frozen = {
        name: tensor
        for name, tensor in model.state_dict.items()
        if name.startswith("visual.") and (blocks is None or parameter_info(name, model.architecture).depth <= blocks)
    }
    return fingerprint_of(model.architecture, frozen)
