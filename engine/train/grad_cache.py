"""The gradient of a whole batch through micro-batches that fit in memory (gradient caching, GradCache).

Gao et al. 2021, arXiv:2101.06983: features of all micro-batches without a graph, one loss over the whole batch, then
each micro-batch again with a graph, driven by the loss's gradient at its features. It is exact, for everything that
the loss reads, `logit_scale` included: a large batch brings real negatives, which accumulation does not.
"""

from __future__ import annotations

import contextlib
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

    def features(self, micro_batch: int, check_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        """Features [b, d] of all inputs, without a graph."""
        parts = []
        for inputs in self.inputs.split(micro_batch):
            check_cancelled()
            with torch.no_grad():
                parts.append(self.encode(inputs))
        return torch.cat(parts)

    def features_with_graph(self, inputs: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.trains):
            return self.encode(inputs)


def batch_gradients(
    sides: tuple[Side, Side],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    micro_batch: int,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    check_cancelled: Callable[[], None] = lambda: None,
    timed: Callable[[str], contextlib.AbstractContextManager] = lambda part: contextlib.nullcontext(),
) -> Tensor:
    """Add the gradient of `scale(loss)` to every parameter's `.grad`; return the loss itself, detached and unscaled.

    `scale` multiplies the loss by a constant, as `GradScaler.scale` does: cached features then get scaled gradients.
    `loss` takes the features [b, d] of both sides. A batch of at most `micro_batch` goes through at once. The
    forward must be a function of each input alone (CLIP has no dropout, and its BatchNorm is a `StoredNorm`).
    `check_cancelled` may raise between micro-batches; `timed` measures "forward", "loss" and "backward".
    """
    if len(sides[0].inputs) <= micro_batch:
        with timed("forward"):
            features = [side.features_with_graph(side.inputs) for side in sides]
        with timed("loss"):
            value = loss(*features)
        with timed("backward"):
            scale(value).backward()
        return value.detach()

    with timed("forward"):
        cached = [side.features(micro_batch, check_cancelled).requires_grad_(side.trains) for side in sides]
    with timed("loss"):
        value = loss(*cached)
        scale(value).backward()
    for side, features in zip(sides, cached, strict=True):
        if not side.trains:
            continue
        for inputs, grad in zip(side.inputs.split(micro_batch), features.grad.split(micro_batch), strict=True):
            check_cancelled()
            with timed("forward"):
                again = side.features_with_graph(inputs)
            with timed("backward"):
                again.backward(grad)
    return value.detach()
