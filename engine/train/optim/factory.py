"""The optimizers that a user can choose.

An optimizer here must change nothing in a step if its attribute `found_inf` (a tensor with one value, as torch's
gradient scaler sets it) is not 0: the device itself skips a step that is not finite, and the host need not ask. To add
one, write its build function and its record in OPTIMIZERS, and add it to the tests in test_optimizers.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...settings import Settings, setting
from ..schedules import SCHEDULES

Groups = list[dict[str, Any]]
OnNote = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class OptimizerInfo:
    """An optimizer that the user can choose; `help` follows the name.

    `build` takes parameter groups with their own weight decay, the learning rate, both betas and a callback for notes;
    decay must be decoupled. `state_bytes` returns the size of the state kept for one parameter.
    """

    name: str
    build: Callable[[Groups, float, tuple[float, float], OnNote], torch.optim.Optimizer]
    state_bytes: Callable[[Tensor], int]
    help: str


def _adabelief(groups: Groups, lr: float, betas: tuple[float, float], on_note: OnNote) -> torch.optim.Optimizer:
    from .adabelief import ChunkedAdaBelief  # slow to import

    return ChunkedAdaBelief(groups, lr=lr, betas=betas, on_note=on_note)


class _Adafactor(torch.optim.Adafactor):
    """torch's Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), without momentum: the betas do nothing.

    torch's own knows no `found_inf`; here the host reads it, which makes it wait for the device.
    """

    def step(self, closure: Any = None) -> Any:
        if not bool(self.__dict__.pop("found_inf", False)):
            return super().step(closure)
        return None


def _two_moments(parameter: Tensor) -> int:
    return 2 * parameter.nbytes


def _rows_and_columns(parameter: Tensor) -> int:
    """Adafactor keeps one value per row and per column of a matrix, and one per value of a vector."""
    if parameter.dim() < 2:
        return parameter.nbytes
    rows, columns = (parameter.numel() // parameter.shape[axis] for axis in (-1, -2))
    return (rows + columns) * parameter.itemsize


_RECORDS = (
    OptimizerInfo("adabelief", _adabelief, _two_moments, "steps are larger where the gradient is as predicted"),
    OptimizerInfo(
        "adamw",
        lambda groups, lr, betas, _: torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True),
        _two_moments,
        "torch's own, and the most widely used",
    ),
    OptimizerInfo(
        "adafactor",
        lambda groups, lr, *_: _Adafactor(groups, lr=lr),
        _rows_and_columns,
        "needs the least memory; its learning_rate is relative to the size of each weight, so set it about 50 times "
        "higher than for the others",
    ),
)
OPTIMIZERS: dict[str, OptimizerInfo] = {optimizer.name: optimizer for optimizer in _RECORDS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """How the weights move: the optimizer, its learning-rate schedule and multipliers."""

    optimizer: str = setting("adabelief", "The optimizer.", choices=OPTIMIZERS)
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
    schedule: str = setting("one_cycle", "How the learning rate changes.", choices=SCHEDULES)
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


def build_optimizer(
    config: OptimizerConfig,
    learning_rate: float,
    groups: Iterable[Mapping[str, Any]],
    on_note: OnNote = lambda note: None,
) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name, over these parameter groups."""
    info = OPTIMIZERS[config.optimizer]
    return info.build([dict(group) for group in groups], learning_rate, (config.beta1, config.beta2), on_note)


def undo_steps(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Undo `count` skipped steps in the optimizer's host-side step counters; a negative count advances them."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), int):
            state["step"] -= count
