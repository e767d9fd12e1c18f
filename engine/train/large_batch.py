"""The gradient of a whole batch through micro-batches that fit in memory (gradient caching, GradCache).

Gao et al. 2021, arXiv:2101.06983: features of all micro-batches without a graph, one loss over the whole batch, then
each micro-batch again with a graph, driven by the loss's gradient at its features. It is exact, for everything that
the loss reads, `logit_scale` included: a large batch brings real negatives, which accumulation does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Side:
    """One tower's part of a batch: `inputs` [b, …], `encode` to features [m, d], and whether the tower trains."""

    encode: Callable[[Tensor], Tensor]
    inputs: Tensor
    trains: bool


def batch_gradients(
    sides: tuple[Side, Side],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    micro_batch: int,
    loss_factor: Tensor | float = 1.0,
    check_cancelled: Callable[[], None] = lambda: None,
) -> Tensor:
    """Add the gradient of `loss_factor` · loss to every parameter's `.grad`; returns the loss (detached, no factor).

    `loss` takes the features [b, d] of both sides. A batch of at most `micro_batch` goes through at once. The
    forward must be a function of its inputs alone (CLIP has no dropout). `check_cancelled` may raise between
    micro-batches.
    """
    if len(sides[0].inputs) <= micro_batch:
        features = [_encode(side, side.inputs, side.trains) for side in sides]
        value = loss(*features)
        (value * loss_factor).backward()
        return value.detach()

    cached = []
    for side in sides:
        parts = []
        for inputs in side.inputs.split(micro_batch):
            check_cancelled()
            parts.append(_encode(side, inputs, grad=False))
        cached.append(torch.cat(parts).requires_grad_(side.trains))
    value = loss(*cached)
    (value * loss_factor).backward()
    for side, features in zip(sides, cached, strict=True):
        if not side.trains:
            continue
        for inputs, grad in zip(side.inputs.split(micro_batch), features.grad.split(micro_batch), strict=True):
            check_cancelled()
            _encode(side, inputs, grad=True).backward(grad)
    return value.detach()


def _encode(side: Side, inputs: Tensor, grad: bool) -> Tensor:
    with torch.set_grad_enabled(grad):
        return side.encode(inputs)
