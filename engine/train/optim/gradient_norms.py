"""Gradient norms of a step, in total, per parameter group and per layer; clipping, and warnings about them.

Nothing here makes the host wait for the device.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...clip.architecture import Architecture
from .parameter_groups import ParameterGroup
from .parameter_info import ParameterInfo, layer_name, parameter_info

# A layer gets a warning if its gradient norm is this many times the median of its tower's layers, or more or less.
EXPLODING, VANISHING = 100.0, 1e-5


@dataclasses.dataclass(frozen=True)
class GradientNorms:
    """Norms before clipping, on the device: of the whole gradient, per group [groups] and per layer [layers]."""

    total: Tensor
    by_group: Tensor
    by_layer: Tensor


class GradientMeter:
    """Measures and clips the gradients of an optimizer's parameters.

    `groups` are names such as text.mlp; `layers` are (tower, depth): a block, what comes before or after the blocks, or
    a scalar. Norms come in the order of these two lists.
    """

    def __init__(self, groups: Sequence[ParameterGroup], architecture: Architecture) -> None:
        self.architecture = architecture
        self.members: list[tuple[nn.Parameter, ParameterInfo]] = [
            (parameter, parameter_info(name, architecture))
            for group in groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]
        self.groups: list[str] = sorted({info.group for _, info in self.members})
        self.layers: list[tuple[str, int]] = sorted({(info.tower, info.depth) for _, info in self.members})
        self._warned: set[tuple[str, str, int]] = set()
        self._indices: tuple[list[ParameterInfo], Tensor, Tensor] | None = None

    def measure(self) -> GradientNorms:
        """Return the norms of the current gradients, from one reduction over all tensors."""
        gradients, infos = [], []
        for parameter, info in self.members:
            if parameter.grad is not None:
                gradients.append(parameter.grad)
                infos.append(info)
        squares = torch.stack(torch._foreach_norm(gradients)).square()
        groups, layers = self._indices_of(infos, squares.device)
        return GradientNorms(
            squares.sum().sqrt(),
            squares.new_zeros(len(self.groups)).index_add_(0, groups, squares).sqrt(),
            squares.new_zeros(len(self.layers)).index_add_(0, layers, squares).sqrt(),
        )

    def clip(self, norms: GradientNorms, limit: float) -> None:
        """Scale the gradients down to a total norm of `limit` if it is larger, as torch's `clip_grad_norm_` does."""
        scale = (limit / (norms.total + 1e-6)).clamp(max=1.0)
        if scale.device.type == "cpu" and scale == 1:  # on another device the comparison would make the host wait
            return
        torch._foreach_mul_([parameter.grad for parameter, _ in self.members if parameter.grad is not None], scale)

    def _indices_of(self, infos: list[ParameterInfo], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return each tensor's index in `groups` and in `layers`. They stay on the device until other tensors come."""
        if self._indices is None or self._indices[0] != infos:
            groups = torch.tensor([self.groups.index(info.group) for info in infos], device=device)
            layers = torch.tensor([self.layers.index((info.tower, info.depth)) for info in infos], device=device)
            self._indices = (infos, groups, layers)
        return self._indices[1:]

    # ---- messages, from norms on the host --------------------------------------------------------------------------

    def nonfinite_layers(self, by_layer: Sequence[float]) -> str:
        """Say where the gradient is not finite; of several layers, name the first."""
        nonfinite = [layer for layer, norm in zip(self.layers, by_layer, strict=True) if not math.isfinite(norm)]
        if not nonfinite:
            return "its sum is too large"
        if len(nonfinite) == len(self.layers):
            return "everywhere"
        return f"first in {layer_name(*nonfinite[0], self.architecture)}"

    def warnings(self, by_layer: Sequence[float]) -> list[str]:
        """Return a warning for each layer whose gradient explodes or vanishes beside its tower's others, once each."""
        warnings = []
        for tower in ("text", "vision"):
            norms = {
                depth: norm
                for (name, depth), norm in zip(self.layers, by_layer, strict=True)
                if name == tower and norm > 0
            }
            if len(norms) < 3:
                continue
            median = statistics.median(norms.values())
            highest, lowest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
            if norms[highest] > EXPLODING * median and self._is_new("explodes", tower, highest):
                warnings.append(
                    f"The gradient explodes in {layer_name(tower, highest, self.architecture)}: its norm is "
                    f"{norms[highest] / median:,.0f} times that of the tower's median layer. Lower learning_rate or "
                    "max_grad_norm, or check the model with clip-finetune info."
                )
            if norms[lowest] < VANISHING * median and self._is_new("vanishes", tower, lowest):
                warnings.append(
                    f"The gradient vanishes in {layer_name(tower, lowest, self.architecture)}: its norm is 1/"
                    f"{median / norms[lowest]:,.0f} of the tower's median layer's, so this layer hardly learns. Set "
                    "precision to fp32 (or bf16 instead of fp16), or raise its learning rate with lr_multipliers."
                )
        return warnings

    def _is_new(self, problem: str, tower: str, depth: int) -> bool:
        is_new = (problem, tower, depth) not in self._warned
        self._warned.add((problem, tower, depth))
        return is_new
