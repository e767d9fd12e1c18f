"""Neuron scaling: named units of the vision tower's `c_fc` layers made louder while training, the published "manipulate
neurons" recipe. The weights learn around the scaled units; validation and the saved model run without the scaling."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..clip.architecture import Architecture
from ..errors import UserError

_ENTRY = re.compile(r"^(\d+)\s*:\s*(\d+)\s*=\s*([0-9.eE+-]+)$")
EXAMPLE = "23:281=100, 20:168=100, 20:1297=100, 22:2432=1000"


def parse_neurons(text: str, architecture: Architecture) -> dict[int, dict[int, float]]:
    """{block: {unit: factor}} from "block:unit=factor, …"; raises `UserError` for what the tower does not have."""
    found: dict[int, dict[int, float]] = {}
    if text.strip() and architecture.resnet:
        raise UserError(
            "scale_neurons makes units of a vision tower's MLPs louder, and this model's, a ResNet, has none; leave it "
            "empty."
        )
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        match = _ENTRY.match(entry)
        try:
            block, unit, factor = int(match[1]), int(match[2]), float(match[3])
        except (TypeError, ValueError) as error:
            raise UserError(
                f"scale_neurons has the entry {entry!r}; write block:unit=factor, such as {EXAMPLE}."
            ) from error
        if block >= architecture.vision_layers or unit >= architecture.vision_mlp_width:
            raise UserError(
                f"scale_neurons names unit {unit} of block {block}; the vision tower has the blocks 0 to "
                f"{architecture.vision_layers - 1} with the units 0 to {architecture.vision_mlp_width - 1}."
            )
        found.setdefault(block, {})[unit] = factor
    return found


def scale_neurons(network: nn.Module, neurons: Mapping[int, Mapping[int, float]]) -> None:
    """Hook the factors onto the outputs [.., width] of `c_fc` in these blocks; they act in training mode only."""
    for block, units in neurons.items():
        layer = network.visual.transformer.resblocks[block].mlp.c_fc
        layer.register_forward_hook(_scaling(units))


def _scaling(units: Mapping[int, float]) -> Callable:
    def scale(layer: nn.Module, inputs, output: Tensor) -> Tensor:
        if not layer.training:
            return output
        factors = torch.ones(output.shape[-1], dtype=output.dtype)
        factors[list(units)] = torch.tensor(list(units.values()), dtype=output.dtype)
        return output * factors.to(output.device, non_blocking=True)

    return scale
