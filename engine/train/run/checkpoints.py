"""Checkpoints: the state of a training as named tensors and plain values, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...settings import Settings, setting

_MODEL, _LOSS, _OPTIMIZER = "model.", "loss.", "optimizer."


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointsConfig(Settings):
    """When to validate and to save, and when to give up."""

    validate_every: int = setting(
        0, "Validate every this many steps; 0 validates once an epoch.", min=0, max=1_000_000_000
    )
    save_every_steps: int = setting(
        0,
        "Save a checkpoint every this many steps; 0 leaves it to save_every_minutes.",
        min=0,
        max=1_000_000_000,
        bookkeeping=True,
    )
    save_every_minutes: float = setting(
        10.0,
        "Save a checkpoint this often, so that a power failure costs little; 0 never does.",
        min=0.0,
        max=100_000.0,
        bookkeeping=True,
    )
    keep_checkpoints: int = setting(1, "How many of the newest checkpoints to keep.", min=1, max=1000, bookkeeping=True)
    max_broken: float = setting(
        0.05,
        "Stop, or do not start, if more than this share of the images is missing or damaged. A single one is always "
        "left out and named, unless this is 0.",
        min=0.0,
        max=1.0,
        step=0.01,
        bookkeeping=True,
    )
    profile: bool = setting(False, "Measure where the time of a step goes, and report it at the end.", bookkeeping=True)


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validation of a run so far."""

    step: int
    loss: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepState:
    """The state of a training step: tensors by name (of the model, the loss and the optimizer), and plain values.

    `optimizer` holds, by parameter, the values of its optimizer state that are not tensors.
    """

    tensors: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Any]]
    scaler: Mapping[str, Any]
    micro_batch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a training after `step` optimizer steps, from which it resumes with the same bits.

    `schedule` and `sampler` say where those stood. Both are functions of the seed and the step, so no generator has a
    state to save.
    """

    step: int
    total_steps: int
    best: Best | None
    metrics_bytes: int
    schedule: Mapping[str, Any]
    sampler: Mapping[str, Any]
    state: StepState

    def as_json(self) -> dict[str, Any]:
        """Return everything but the tensors."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        state: StepState = fields.pop("state")
        fields |= {"best": self.best and dataclasses.asdict(self.best)}
        return fields | {"optimizer": state.optimizer, "scaler": state.scaler, "micro_batch": state.micro_batch}

    @classmethod
    def from_json(cls, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> Checkpoint:
        """Put `as_json` and the tensors together again. Raises `KeyError` or `TypeError` for other values."""
        names = ("optimizer", "scaler", "micro_batch")
        state = StepState(tensors=tensors, **{name: values.pop(name) for name in names})
        best = values.pop("best")
        return cls(state=state, best=best and Best(**best), **values)


def pack(
    model: Mapping[str, Tensor], loss: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the tensors by name, and by parameter the values of the optimizer state that are not tensors."""
    tensors: dict[str, Tensor] = {f"{_MODEL}{name}": tensor for name, tensor in model.items()}
    tensors |= {f"{_LOSS}{name}": tensor for name, tensor in loss.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in _named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{name}.{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def unpack(state: StepState, model: Mapping[str, Tensor], loss: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copy a saved state into a newly built model (the tensors given), loss and optimizer."""
    with torch.no_grad():
        for prefix, targets in ((_MODEL, model), (_LOSS, loss.state_dict())):
            for name, target in targets.items():
                target.copy_(state.tensors[prefix + name])
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.tensors.items():
        if name.startswith(_OPTIMIZER):
            parameter_name, _, key = name.removeprefix(_OPTIMIZER).rpartition(".")
            moments.setdefault(parameter_name, {})[key] = tensor
    for name, parameter in _named_parameters(optimizer):
        values = dict(state.optimizer.get(name, {}))
        values |= {key: value.to(parameter.device, copy=True) for key, value in moments.get(name, {}).items()}
        if values:
            optimizer.state[parameter] = values


def _named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
