"""The gradients of a step told truly: their lengths by group and layer, clipping, and what is wrong with them in words.

Nothing here makes the host wait for the device.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...clip.architecture import Architecture
from .parameter_info import SCALARS, Part, layer_in_words, parameter_info

# A layer is told of when its gradient is this many times longer (or shorter) than the median layer's of its tower.
EXPLODING, VANISHING = 100.0, 1e-5


@dataclasses.dataclass(frozen=True)
class Norms:
    """Lengths on the device: of the whole gradient, by group [groups] and by layer [layers]."""

    total: Tensor
    by_group: Tensor
    by_layer: Tensor


class GradientMeter:
    """Measures the gradients of an optimizer's parameters. A layer is a place in a tower: a block, what is before the
    blocks or after them, or a scalar."""

    def __init__(self, groups: Sequence[Mapping], architecture: Architecture):
        self.architecture = architecture
        self.members: list[tuple[nn.Parameter, Part]] = [
            (parameter, parameter_info(name, architecture))
            for group in groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]
        self.groups: list[str] = sorted({part.group for _, part in self.members})
        self.layers: list[tuple[str, int]] = sorted({(part.tower, part.depth) for _, part in self.members})
        self._told: set[tuple[str, str, int]] = set()
        self._indices: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    def measure(self) -> Norms:
        """The lengths of the gradients that are there now; one reduction over all tensors."""
        present = tuple(number for number, (parameter, _) in enumerate(self.members) if parameter.grad is not None)
        gradients = [self.members[number][0].grad for number in present]
        squares = torch.stack(torch._foreach_norm(gradients)).square()
        groups, layers = self._places(present, squares.device)
        return Norms(
            squares.sum().sqrt(),
            squares.new_zeros(len(self.groups)).index_add_(0, groups, squares).sqrt(),
            squares.new_zeros(len(self.layers)).index_add_(0, layers, squares).sqrt(),
        )

    def clip(self, norms: Norms, limit: float) -> None:
        """Shorten the whole gradient to `limit`, as torch's `clip_grad_norm_` does; longer ones only."""
        factor = (limit / (norms.total + 1e-6)).clamp(max=1.0)
        if factor.device.type == "cpu" and factor == 1:  # elsewhere the host would wait to know it
            return
        torch._foreach_mul_([parameter.grad for parameter, _ in self.members if parameter.grad is not None], factor)

    def _places(self, present: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        if self._indices is None or self._indices[0] != present:
            parts = [self.members[number][1] for number in present]
            groups = torch.tensor([self.groups.index(part.group) for part in parts], device=device)
            layers = torch.tensor([self.layers.index((part.tower, part.depth)) for part in parts], device=device)
            self._indices = (present, groups, layers)
        return self._indices[1:]

    # ---- in words, from numbers on the host ------------------------------------------------------------------------

    def broken_place(self, by_layer: Sequence[float]) -> str:
        """The layers whose gradient is not a number, the first by name."""
        broken = [place for place, norm in zip(self.layers, by_layer, strict=True) if not math.isfinite(norm)]
        if not broken:
            return "its sum is too large"
        if len(broken) == len(self.layers):
            return "everywhere"
        return f"first in {layer_in_words(*broken[0], self.architecture)}"

    def warnings(self, by_layer: Sequence[float]) -> list[str]:
        """A sentence for each tower with a layer whose gradient explodes or vanishes beside the other layers'; once for
        each layer."""
        found = []
        for tower in ("text", "vision"):
            norms = {
                depth: norm
                for (name, depth), norm in zip(self.layers, by_layer, strict=True)
                if name == tower and name not in SCALARS and norm > 0
            }
            if len(norms) < 3:
                continue
            usual = statistics.median(norms.values())
            highest, lowest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
            if norms[highest] > EXPLODING * usual and self._first_time("explodes", tower, highest):
                found.append(
                    f"The gradient explodes in {layer_in_words(tower, highest, self.architecture)}: it is "
                    f"{norms[highest] / usual:,.0f} times longer than in the tower's other layers. Lower learning_rate "
                    "or max_grad_norm, or check the model with clip-finetune info."
                )
            if norms[lowest] < VANISHING * usual and self._first_time("vanishes", tower, lowest):
                found.append(
                    f"The gradient vanishes in {layer_in_words(tower, lowest, self.architecture)}: it is "
                    f"{usual / norms[lowest]:,.0f} times shorter than in the tower's other layers, which hardly "
                    "learns. Set precision to fp32 (or bf16 in place of fp16), or raise its rate in lr_multipliers."
                )
        return found

    def _first_time(self, *what) -> bool:
        new = what not in self._told
        self._told.add(what)
        return new
