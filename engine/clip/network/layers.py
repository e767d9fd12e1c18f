"""Layers that replace some of open_clip's, with the same parameters under the same names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), computed as SiLU(1.702 x) / 1.702.

    That keeps one tensor for backward instead of two. It overwrites its input, which is allowed: the linear layer
    before it does not need its output again.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        return F.silu(inputs.mul_(1.702)).div_(1.702)


class StoredNorm(nn.Module):
    """BatchNorm of [n, c, h, w] by the stored statistics, which it never updates, in training mode too.

    So an image's features do not depend on other images, which gradient caching needs, and a small batch, whose own
    statistics would be noise, does no harm. It takes over the tensors of a BatchNorm2d except its counter.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
