"""Neuron scaling: multiply the output of chosen `c_fc` units of the vision tower during training.

This is the published "manipulate neurons" recipe: the weights learn around the scaled units, and validation and the
saved model run without the scaling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..clip.architecture import Architecture
from ..errors import UserError

_ENTRY = re.compile(r"(\d+)\s*:\s*(\d+)\s*=\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")
EXAMPLE = "23:281=100, 20:168=100, 20:1297=100, 22:2432=1000"


def parse_neurons(text: str, architecture: Architecture) -> dict[int, dict[int, float]]:
    """Parse "block:unit=factor, …" into {block: {unit: factor}}. Raises `UserError` for what the tower does not
    have."""
    if not text.strip():
        return {}
    if architecture.resnet:
        raise UserError(
            "scale_neurons scales units of a vision tower's MLPs, and this model's vision tower, a ResNet, has none; "
            "leave it empty."
        )
    _, blocks, width = architecture.vit
    neurons: dict[int, dict[int, float]] = {}
    for entry in filter(None, (entry.strip() for entry in text.split(","))):
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise UserError(f"scale_neurons has the entry {entry!r}; write block:unit=factor, such as {EXAMPLE}.")
        block, unit, factor = int(match[1]), int(match[2]), float(match[3])
        if block >= blocks or unit >= width:
            raise UserError(
                f"scale_neurons names unit {unit} of block {block}; the vision tower has the blocks 0 to {blocks - 1} "
                f"with the units 0 to {width - 1}."
            )
        neurons.setdefault(block, {})[unit] = factor
    return neurons


def scale_neurons(network: nn.Module, neurons: Mapping[int, Mapping[int, float]]) -> None:
    """Hook the factors onto the outputs [.., width] of `c_fc` in these blocks; they apply in training mode only."""
    for block, factors in neurons.items():
        layer = network.get_submodule(f"visual.transformer.resblocks.{block}.mlp.c_fc")
        layer.register_forward_hook(_scaling_hook(factors))


def _scaling_hook(factors: Mapping[int, float]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def scale(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not layer.training:
            return output
        multipliers = torch.ones(output.shape[-1], dtype=output.dtype)
        multipliers[list(factors)] = torch.tensor(list(factors.values()), dtype=output.dtype)
        return output * multipliers.to(output.device, non_blocking=True)

    return scale
