"""The exact gradient of a batch that is larger than memory, computed in micro-batches (GradCache).

Gao et al. 2021, arXiv:2101.06983. (1) Encode all micro-batches without a graph. (2) Compute one loss over all features,
and its gradient with respect to each feature. (3) Encode each micro-batch again with a graph, and backpropagate the
gradient of its features. The result is exact for everything that the loss reads, `logit_scale` included: a large batch
brings real negatives, which gradient accumulation does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Side:
    """One tower's part in a batch: its `inputs` [b, …], `encode` to features [m, d], and whether the tower trains."""

    encode: Callable[[Tensor], Tensor]
    inputs: Tensor
    trains: bool

    @torch.no_grad()
    def features(self, micro_batch: int, check_cancelled: Callable[[], None] = lambda: None) -> Tensor:
        """Return the features [b, d] of all inputs, without a graph."""
        features = []
        for inputs in self.inputs.split(micro_batch):
            check_cancelled()
            features.append(self.encode(inputs))
        return torch.cat(features)

    def features_with_graph(self, inputs: Tensor) -> Tensor:
        """Return the features [m, d] of these inputs, with a graph if the tower trains."""
        with torch.set_grad_enabled(self.trains):
            return self.encode(inputs)


def batch_gradients(
    sides: tuple[Side, Side],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    micro_batch: int,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    check_cancelled: Callable[[], None] = lambda: None,
    timed: Callable[[str], contextlib.AbstractContextManager] = lambda phase: contextlib.nullcontext(),
) -> Tensor:
    """Add the gradient of `scale(loss)` to each parameter's `.grad`, and return the loss itself, detached and unscaled.

    `scale` multiplies the loss by a constant, as `GradScaler.scale` does. `loss` takes the features [b, d] of both
    sides. A batch of at most `micro_batch` goes through in one piece. `encode` must be a function of each input alone,
    or step 3 would not repeat step 1 (CLIP has no dropout, and its BatchNorm is a `StoredNorm`). `check_cancelled` may
    raise between micro-batches; `timed` measures "forward", "loss" and "backward".
    """
    if len(sides[0].inputs) <= micro_batch:
        with timed("forward"):
            images, texts = (side.features_with_graph(side.inputs) for side in sides)
        with timed("loss"):
            value = loss(images, texts)
        with timed("backward"):
            scale(value).backward()
        return value.detach()

    with timed("forward"):
        images, texts = (side.features(micro_batch, check_cancelled).requires_grad_(side.trains) for side in sides)
    with timed("loss"):
        value = loss(images, texts)
        scale(value).backward()
    for side, features in zip(sides, (images, texts), strict=True):
        if features.grad is None:  # this tower does not train
            continue
        for inputs, gradient in zip(side.inputs.split(micro_batch), features.grad.split(micro_batch), strict=True):
            check_cancelled()
            with timed("forward"):
                again = side.features_with_graph(inputs)
            with timed("backward"):
                again.backward(gradient)
    return value.detach()
