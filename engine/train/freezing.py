"""What trains: the towers, blocks and embeddings that a run leaves alone, and those that wait for a later stage."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ..clip.architecture import Architecture
from ..errors import UserError
from ..settings import Settings, setting
from .neuron_scaling import EXAMPLE
from .optim.parameter_info import SCALARS, layers_of, parameter_info

Towers = Literal["both", "text", "vision"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersConfig(Settings):
    """Which layers train, and from when."""

    freeze_embeddings: bool = setting(
        False, "Freeze everything before the first block: token and position embeddings, and the patch embedding."
    )
    freeze_text_blocks: int = setting(0, "Freeze this many of the text tower's first blocks.", min=0, max=1000)
    freeze_vision_blocks: int = setting(0, "Freeze this many of the vision tower's first blocks.", min=0, max=1000)
    unfreeze_stages: int = setting(
        1,
        "Above 1: train only the top blocks at first and unfreeze the others from the top down, in this many equally "
        "long stages.",
        min=1,
        max=1000,
    )
    scale_neurons: str = setting(
        "",
        "An experiment: scales units of the vision tower's MLPs during training, as block:unit=factor, such as "
        f"{EXAMPLE}. Validation and the saved model leave it out.",
    )


def trains_at_all(
    name: str, architecture: Architecture, towers: Towers, layers: LayersConfig, *, train_logit_scale: bool
) -> bool:
    """Return whether the parameter trains at any time of the run. A projection belongs to its tower."""
    if name == "logit_scale":
        return train_logit_scale
    if name in SCALARS:
        return True
    part = parameter_info(name, architecture)
    if towers not in ("both", part.tower):
        return False
    if part.depth == 0:
        return not layers.freeze_embeddings
    return part.depth > _frozen_blocks(part.tower, layers)


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


def check_freezing(architecture: Architecture, config: LayersConfig) -> None:
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


def _frozen_blocks(tower: str, config: LayersConfig) -> int:
    return config.freeze_text_blocks if tower == "text" else config.freeze_vision_blocks
