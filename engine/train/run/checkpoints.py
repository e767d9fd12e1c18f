"""A training's state as named tensors and plain numbers, and back: weights, what the loss learnt, optimizer, scaler."""

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


def pack(
    model: Mapping[str, Tensor], loss: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """(tensors, and per parameter those entries of the optimizer's state that are numbers)."""
    tensors: dict[str, Tensor] = {f"{_MODEL}{name}": tensor for name, tensor in model.items()}
    tensors |= {f"{_LOSS}{name}": tensor for name, tensor in loss.state_dict().items()}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{name}.{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def unpack(
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Tensor],
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put what `pack` gave back into a freshly built training, of the model into those tensors that are given."""
    with torch.no_grad():
        for prefix, kept in ((_MODEL, model), (_LOSS, loss.state_dict())):
            for name, tensor in kept.items():
                tensor.copy_(tensors[prefix + name])
    states: dict[str, dict[str, Tensor]] = {}
    for name in tensors:
        if name.startswith(_OPTIMIZER):
            parameter_name, _, key = name.removeprefix(_OPTIMIZER).rpartition(".")
            states.setdefault(parameter_name, {})[key] = tensors[name]
    for name, parameter in named_parameters(optimizer):
        found: dict[str, Any] = dict(numbers.get(name, {}))
        found |= {key: value.to(parameter.device, copy=True) for key, value in states.get(name, {}).items()}
        if found:
            optimizer.state[parameter] = found


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
