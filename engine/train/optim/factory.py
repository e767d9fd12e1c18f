"""Parameter groups, their rates, and the optimizers.

An optimizer here leaves everything as it is when its attribute `found_inf` (a tensor of one value, as torch's gradient
scaler sets it) is not 0: a step that is not finite is undone on the device, without the host asking.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from ...clip.architecture import Architecture
from ...errors import UserError
from ...settings import Settings, setting
from ..schedules import SCHEDULES
from .parameter_info import KINDS, SCALARS, Part, layers_of, parameter_info


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """How the weights move: the optimizer, its learning-rate schedule and multipliers."""

    optimizer: Literal["adabelief", "adamw", "adafactor"] = setting(
        "adabelief",
        "The optimizer. adafactor needs the least memory, because it keeps no moments the size of the weights; its "
        "learning_rate is relative to the size of each weight, so set it about 50 times higher than for the others.",
    )
    weight_decay: float = setting(
        0.01,
        "Pulls the weights of linear layers towards zero, in proportion to the learning rate.",
        min=0.0,
        max=1.0,
        step=0.001,
    )
    beta1: float = setting(0.9, "Decay rate of the optimizer's average gradient.", min=0.0, max=0.999, step=0.01)
    beta2: float = setting(
        0.999, "Decay rate of the optimizer's average gradient size.", min=0.0, max=0.99999, step=0.001
    )
    max_grad_norm: float = setting(
        1.0, "Clip the gradient norm to this before each step; 0 does not clip.", min=0.0, max=1e6, step=0.1
    )
    schedule: str = setting(
        "one_cycle",
        "How the learning rate falls after the warm-up: along half a cosine, linearly, or not at all. one_cycle is a "
        "cosine whose warm-up is a cosine too.",
        choices=SCHEDULES,
    )
    warmup: float = setting(
        0.1, "The share of steps in which the learning rate rises to its peak.", min=0.0, max=0.9, step=0.05
    )
    min_lr_ratio: float = setting(
        0.01,
        "The learning rate of the last step as a share of the peak; the constant schedule ignores it.",
        min=0.0,
        max=1.0,
        step=0.01,
    )
    lr_multipliers: str = setting(
        "",
        "Gives parameter groups lower or higher learning rates than others, such as vision=0.5, text.embeddings=0.1. "
        "The fastest group gets learning_rate.",
    )
    layer_decay: float = setting(
        1.0,
        "Below 1, the learning rate of each layer is this multiple of the one above it, such as 0.8.",
        min=0.05,
        max=1.0,
        step=0.05,
    )


# ---- groups ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LearningRateMultipliers:
    """What the user says of the rates of groups, such as "vision=0.5, embeddings=0.1, text.theta=2"."""

    factors: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> LearningRateMultipliers:
        groups = {f"{tower}.{kind}" for tower in ("text", "vision") for kind in KINDS}
        known = {*KINDS, *SCALARS, "text", "vision", *groups}
        factors = {}
        for entry in filter(None, (entry.strip() for entry in text.split(","))):
            name, _, value = (word.strip() for word in entry.partition("="))
            try:
                factor = float(value)
            except ValueError:
                factor = 0.0
            if name not in known or not 0 < factor < 1e6:
                raise UserError(
                    f"lr_multipliers has the entry {entry!r}; write for example vision=0.5, text.embeddings=0.1, with "
                    f"numbers above 0 and names from: text, vision, {', '.join((*KINDS, *SCALARS))}."
                )
            factors[name] = factor
        return cls(factors)

    def of(self, part: Part) -> float:
        """The product of what is said of the part's tower, kind and group."""
        factor = 1.0
        for name in {part.tower, part.kind, part.group} - {""}:
            factor *= self.factors.get(name, 1.0)
        return factor


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], architecture: Architecture, config: OptimizerConfig
) -> list[dict]:
    """Each of the named parameters in exactly one group: one per tower and kind, and with layer-wise decay per depth.

    A group has `name`, `names`, `params`, `weight_decay`, and `factor`: its rate as a share of `learning_rate`, 1 for
    the fastest group. Layer-wise decay multiplies by `layer_decay` for each layer below the top (Clark et al. 2020,
    arXiv:2003.10555). Decay acts on the matrices of attention, MLP and projections, on patches and convolutions; not on
    embeddings, norms, biases, `r`, `theta`, `logit_scale` and `logit_bias`.
    """
    rates = LearningRateMultipliers.parse(config.lr_multipliers)
    groups: dict[str, dict] = {}
    for name, parameter in parameters:
        part = parameter_info(name, architecture)
        layered = config.layer_decay != 1 and part.kind
        label = f"{part.group}.{part.depth}" if layered else part.group
        group = groups.setdefault(
            label,
            {
                "name": label,
                "part": part,
                "names": [],
                "params": [],
                "weight_decay": config.weight_decay if part.decays else 0.0,
                "factor": rates.of(part)
                * (config.layer_decay ** (layers_of(part.tower, architecture) + 1 - part.depth) if layered else 1.0),
            },
        )
        group["names"].append(name)
        group["params"].append(parameter)
    fastest = max((group["factor"] for group in groups.values()), default=1.0)
    for group in groups.values():
        group["factor"] /= fastest
    return sorted(groups.values(), key=lambda group: (group["part"].group, group["part"].depth))


def group_table(groups: Sequence[Mapping], learning_rate: float) -> list[dict[str, str]]:
    """A row for each tower and kind: parameters, peak rate (lowest to highest with layer-wise decay), weight decay."""
    rows: dict[str, list[Mapping]] = {}
    for group in groups:
        rows.setdefault(group["part"].group, []).append(group)
    table = []
    for name, members in rows.items():
        rates = sorted({group["factor"] * learning_rate for group in members})
        table.append(
            {
                "group": name,
                "tensors": str(sum(len(group["params"]) for group in members)),
                "parameters": f"{sum(parameter.numel() for group in members for parameter in group['params']):,}",
                "peak rate": f"{rates[0]:.3g}" if len(rates) == 1 else f"{rates[0]:.3g} to {rates[-1]:.3g}",
                "weight decay": f"{members[0]['weight_decay']:g}",
            }
        )
    return table


def set_learning_rates(optimizer: torch.optim.Optimizer, learning_rate: float, factor: float) -> dict[str, float]:
    """Set every group's rate to `factor` of its peak; returns the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["factor"] * factor
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


# ---- optimizers ------------------------------------------------------------------------------------------------------


def build_optimizer(
    config: OptimizerConfig,
    learning_rate: float,
    groups: Iterable[dict],
    say: Callable[[str], None] = lambda note: None,
) -> torch.optim.Optimizer:
    """AdaBelief of adabelief-pytorch (Zhuang et al. 2020, arXiv:2010.07468), torch's AdamW or torch's Adafactor
    (Shazeer and Stern 2018, arXiv:1804.04235), which has no momentum, so that the betas do nothing; decay is decoupled.
    `say` gets a sentence for the user.
    """
    betas = (config.beta1, config.beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    if config.optimizer == "adafactor":
        return _Adafactor(groups, lr=learning_rate)
    from .adabelief import ChunkedAdaBelief

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
        return ChunkedAdaBelief(
            list(groups),
            lr=learning_rate,
            betas=betas,
            eps=1e-16,
            weight_decouple=True,
            rectify=True,
            print_change_log=False,
            say=say,
        )


class _Adafactor(torch.optim.Adafactor):
    """It asks the device whether the step is finite, and waits for the answer."""

    def step(self, closure=None):
        stopped = self.__dict__.pop("found_inf", False)  # which torch's own does not take
        if not bool(stopped):
            super().step(closure)


def undo_steps(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Take back the last `count` steps, which `found_inf` made do nothing, from counters that are kept on the host."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), int):
            state["step"] -= count
