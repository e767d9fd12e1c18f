"""Which parameters train: the towers, blocks and embeddings that stay frozen, and those that unfreeze later."""

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

    def frozen_blocks(self, tower: str) -> int:
        return self.freeze_text_blocks if tower == "text" else self.freeze_vision_blocks


def trains_at_all(
    name: str, architecture: Architecture, towers: Towers, layers: LayersConfig, *, train_logit_scale: bool
) -> bool:
    """Return whether the parameter trains at any time of the run. A projection belongs to its tower."""
    if name == "logit_scale":
        return train_logit_scale
    if name in SCALARS:
        return True
    info = parameter_info(name, architecture)
    if towers not in ("both", info.tower):
        return False
    if info.depth == 0:
        return not layers.freeze_embeddings
    return info.depth > layers.frozen_blocks(info.tower)


def trains_in_stage(name: str, architecture: Architecture, stage: int, stages: int) -> bool:
    """Return whether the parameter is unfrozen in `stage` (from 0) of `stages`.

    Each stage unfreezes an equal share of each tower's blocks, from the top down; the last also what is before them.
    """
    if name in SCALARS or stage >= stages - 1:
        return True
    info = parameter_info(name, architecture)
    blocks = layers_of(info.tower, architecture)
    return info.depth > blocks - math.ceil(blocks * (stage + 1) / stages)


def stage_at(step: int, total_steps: int, stages: int) -> int:
    """Return the stage (from 0) of an optimizer step (from 0). Stages are equally long."""
    return min(stages - 1, step * stages // max(total_steps, 1))


def check_freezing(architecture: Architecture, layers: LayersConfig) -> None:
    """Raise `UserError` if a tower has fewer blocks than are to be frozen, or than there are stages."""
    for tower in ("text", "vision"):
        blocks, frozen = layers_of(tower, architecture), layers.frozen_blocks(tower)
        if frozen > blocks:
            raise UserError(f"freeze_{tower}_blocks is {frozen}, but the {tower} tower has {blocks} blocks.")
        if layers.unfreeze_stages > blocks:
            raise UserError(
                f"unfreeze_stages is {layers.unfreeze_stages}, but the {tower} tower has {blocks} blocks; each stage "
                "needs at least one."
            )
