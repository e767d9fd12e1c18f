"""Parameter groups of the optimizer, and their learning rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import torch
from torch import nn

from ...clip.architecture import Architecture
from ...errors import UserError
from .factory import OptimizerConfig
from .parameter_info import KINDS, SCALARS, ParameterInfo, layers_of, parameter_info


class ParameterGroup(TypedDict):
    """What torch's optimizers take as a group; they keep our entries beside their own."""

    name: str
    info: ParameterInfo  # of the first parameter; all have its tower and kind
    names: list[str]
    params: list[nn.Parameter]
    weight_decay: float
    multiplier: float  # of the learning rate; 1 for the fastest group


@dataclasses.dataclass(frozen=True)
class LearningRateMultipliers:
    """The setting lr_multipliers, such as "vision=0.5, embeddings=0.1, text.theta=2"."""

    multipliers: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> LearningRateMultipliers:
        """Raises `UserError` for an unknown name, and for a multiplier that is not a number above 0."""
        groups = {f"{tower}.{kind}" for tower in ("text", "vision") for kind in KINDS}
        known = {*KINDS, *SCALARS, "text", "vision", *groups}
        multipliers = {}
        for entry in filter(None, (entry.strip() for entry in text.split(","))):
            name, _, value = (word.strip() for word in entry.partition("="))
            try:
                multiplier = float(value)
            except ValueError:
                multiplier = 0.0
            if name not in known or not 0 < multiplier < 1e6:
                raise UserError(
                    f"lr_multipliers has the entry {entry!r}; write for example vision=0.5, text.embeddings=0.1, with "
                    f"numbers above 0 and names from: text, vision, {', '.join((*KINDS, *SCALARS))}."
                )
            multipliers[name] = multiplier
        return cls(multipliers)

    def of(self, info: ParameterInfo) -> float:
        """Return the product of the multipliers of the parameter's tower, kind and group."""
        product = 1.0
        # In a fixed order, which decides the last bit; a scalar's group is its tower.
        for name in dict.fromkeys((info.tower, info.kind, info.group)):
            product *= self.multipliers.get(name, 1.0)
        return product


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], architecture: Architecture, config: OptimizerConfig
) -> list[ParameterGroup]:
    """Put each named parameter into one group: one per tower and kind, and with layer decay one per depth too.

    Layer decay multiplies by `layer_decay` once per layer below the top (Clark et al. 2020, arXiv:2003.10555). Weight
    decay applies to the matrices of attention, MLPs and projections, to patches and convolutions; not to embeddings,
    norms, biases, `r`, `theta`, `logit_scale` and `logit_bias`.
    """
    multipliers = LearningRateMultipliers.parse(config.lr_multipliers)
    groups: dict[str, ParameterGroup] = {}
    for name, parameter in parameters:
        info = parameter_info(name, architecture)
        label, multiplier = info.group, multipliers.of(info)
        if config.layer_decay != 1 and info.kind:
            label = f"{label}.{info.depth}"
            multiplier *= config.layer_decay ** (layers_of(info.tower, architecture) + 1 - info.depth)
        if label not in groups:
            weight_decay = config.weight_decay if info.decays else 0.0
            groups[label] = ParameterGroup(
                name=label, info=info, names=[], params=[], weight_decay=weight_decay, multiplier=multiplier
            )
        groups[label]["names"].append(name)
        groups[label]["params"].append(parameter)
    fastest = max((group["multiplier"] for group in groups.values()), default=1.0)
    for group in groups.values():
        group["multiplier"] /= fastest
    return sorted(groups.values(), key=lambda group: (group["info"].group, group["info"].depth))


def group_table(groups: Sequence[ParameterGroup], learning_rate: float) -> list[dict[str, str]]:
    """Return a row per tower and kind; with layer decay the peak learning rate is a range."""
    members_of: dict[str, list[ParameterGroup]] = {}
    for group in groups:
        members_of.setdefault(group["info"].group, []).append(group)
    rows = []
    for name, members in members_of.items():
        peaks = sorted({group["multiplier"] * learning_rate for group in members})
        rows.append(
            {
                "group": name,
                "tensors": str(sum(len(group["params"]) for group in members)),
                "parameters": f"{sum(parameter.numel() for group in members for parameter in group['params']):,}",
                "peak learning rate": f"{peaks[0]:.3g}" if len(peaks) == 1 else f"{peaks[0]:.3g} to {peaks[-1]:.3g}",
                "weight decay": f"{members[0]['weight_decay']:g}",
            }
        )
    return rows


def set_learning_rates(optimizer: torch.optim.Optimizer, peak: float, schedule: float) -> dict[str, float]:
    """Set each group's learning rate to its peak times the schedule's multiple, and return them by group name."""
    for group in optimizer.param_groups:
        group["lr"] = peak * group["multiplier"] * schedule
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
