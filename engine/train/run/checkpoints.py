"""A training's state as named tensors and plain numbers, and back: weights, what the loss learnt, optimizer, scaler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MODEL, _LOSS, _OPTIMIZER = "model.", "loss.", "optimizer."


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
