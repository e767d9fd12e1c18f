"""What trains: the towers, blocks and embeddings that a run leaves alone, and those that wait for a later stage."""

from __future__ import annotations

import math

from ..clip.architecture import Architecture
from ..errors import UserError
from .config import TrainConfig
from .optim.parameter_info import SCALARS, layers_of, parameter_info


def trains_at_all(name: str, architecture: Architecture, config: TrainConfig) -> bool:
    """Whether the parameter of this name is trained at any time of the run. A projection belongs to its tower."""
    if name == "logit_scale":
        return config.train_logit_scale
    if name in SCALARS:
        return True
    part = parameter_info(name, architecture)
    if config.towers not in ("both", part.tower):
        return False
    if part.depth == 0:
        return not config.freeze_embeddings
    return part.depth > _frozen_blocks(part.tower, config)


def trains_in_stage(name: str, architecture: Architecture, stage: int, stages: int) -> bool:
    """Whether the parameter has been unfrozen by `stage` (0-based) of `stages`.

    From the top of each tower down, an equal share of the blocks a stage, and what is before the blocks with the last.
    """
    if name in SCALARS or stage >= stages - 1:
        return True
    part = parameter_info(name, architecture)
    layers = layers_of(part.tower, architecture)
    return part.depth > layers - math.ceil(layers * (stage + 1) / stages)


def stage_at(step: int, total_steps: int, stages: int) -> int:
    """The stage (0-based) of optimizer step `step` (0-based): stages are equally long."""
    return min(stages - 1, step * stages // max(total_steps, 1))


def check_freezing(architecture: Architecture, config: TrainConfig) -> None:
    """Raise `UserError` for more frozen blocks or stages than there are blocks, and if nothing would train."""
    for tower in ("text", "vision"):
        layers, frozen = layers_of(tower, architecture), _frozen_blocks(tower, config)
        if frozen > layers:
            raise UserError(f"freeze_{tower}_blocks is {frozen}, but the {tower} tower has {layers} blocks.")
        if config.unfreeze_stages > layers:
            raise UserError(
                f"unfreeze_stages is {config.unfreeze_stages}, but the {tower} tower has {layers} blocks; a stage "
                "needs a block at least."
            )


def _frozen_blocks(tower: str, config: TrainConfig) -> int:
    return config.freeze_text_blocks if tower == "text" else config.freeze_vision_blocks
