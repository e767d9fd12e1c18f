"""AdaBelief (Zhuang et al. 2020, arXiv:2010.07468) in chunks of many tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from adabelief_pytorch import AdaBelief
from torch import Tensor, nn

from ...errors import one_line

if TYPE_CHECKING:
    from .adabelief_kernel import AdaBeliefKernel, Numbers

_CHUNK = 2**18  # elements of a chunk on a CPU: its temporaries stay in the cache
_CHUNK_ON_DEVICE = 2**24  # elsewhere: few launches, and temporaries of 64 MB

Columns = list[list[Tensor]]  # parameters, gradients, exp_avg, exp_avg_var: flat pieces of the same sizes


class ChunkedAdaBelief(AdaBelief):
    """adabelief-pytorch's AdaBelief to the last bit, for parameters in float32 and float64 and its settings
    `weight_decouple`, `rectify` and `degenerated_to_sgd`, which are its defaults.

    With the attribute `found_inf` (a tensor of one value) not 0, a step changes no parameter and no moment; the host's
    step counters go on (see `undo_steps`). On CUDA one Triton kernel does the step where Triton works; `say` gets a
    sentence where it does not. With `use_kernel` false it is not tried.
    """

    def __init__(self, params, *, say: Callable[[str], None] = lambda note: None, **settings):
        super().__init__(params, **settings)
        self.say, self.use_kernel = say, True
        self._kernel: AdaBeliefKernel | None = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self._try_kernel()
        stopped = getattr(self, "found_inf", None)
        brake = None if stopped is None else _Brake(stopped)
        work = []
        for group in self.param_groups:
            by_step: dict[int, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_step.setdefault(self._counted(parameter), []).append(parameter)
            for number, parameters in by_step.items():
                rows = [(p.data, p.grad, self.state[p]["exp_avg"], self.state[p]["exp_avg_var"]) for p in parameters]
                if self._kernel is not None:
                    taken = [self._kernel.takes(row) for row in rows]
                    numbers = _numbers(group, number)
                    work += [(row, numbers) for row, fits in zip(rows, taken, strict=True) if fits]
                    rows = [row for row, fits in zip(rows, taken, strict=True) if not fits]
                for columns in _chunks(rows):
                    _step_columns(columns, group, number, brake)
        if self._kernel is not None:
            self._kernel(work, stopped)

    def _try_kernel(self) -> None:
        """Once, before the first step with a parameter on CUDA changes anything."""
        device = _cuda_device(self.param_groups) if self.use_kernel and self._kernel is None else None
        if device is None:
            return
        try:
            self._kernel = tried_kernel(device)
        except Exception as error:  # Triton is missing, or whatever its compiler and the driver raise
            self.use_kernel = False
            self.say(
                f"AdaBelief's Triton kernel does not work here ({type(error).__name__}: {one_line(error)}); the "
                "training goes on with torch's own operations, which are slower and give the same weights."
            )

    def _counted(self, parameter: nn.Parameter) -> int:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_var"] = torch.zeros_like(parameter)
        state["step"] += 1
        return state["step"]


class _Brake:
    """Makes a step do nothing where `found_inf` is not 0, and leaves its bits alone where it is."""

    def __init__(self, found_inf: Tensor):
        self.on = found_inf.reshape(()) != 0
        # In double precision, as Python's own numbers are, so that the factors round as those do.
        self.dtype = torch.float32 if found_inf.device.type == "mps" else torch.float64

    def factor(self, value: float) -> Tensor:
        """`value`, or 1 while the brake is on."""
        return torch.where(self.on, self.number(1.0), self.number(value))

    def term(self, value: float) -> Tensor:
        """`value`, or 0 while the brake is on."""
        return torch.where(self.on, self.number(0.0), self.number(value))

    def number(self, value: float) -> Tensor:
        return torch.full((), value, dtype=self.dtype, device=self.on.device)


def _chunks(rows: Sequence[tuple[Tensor, ...]]) -> Iterable[Columns]:
    limit = _CHUNK if rows and rows[0][0].device.type == "cpu" else _CHUNK_ON_DEVICE
    columns: Columns = [[] for _ in range(4)]
    filled = 0
    for row in rows:
        whole = not all(tensor.is_contiguous() for tensor in row)
        for piece in [row] if whole else zip(*(tensor.view(-1).split(limit) for tensor in row), strict=True):
            if filled and filled + piece[0].numel() > limit:
                yield columns
                columns, filled = [[] for _ in range(4)], 0
            for column, tensor in zip(columns, piece, strict=True):
                column.append(tensor)
            filled += piece[0].numel()
    if filled:
        yield columns


def _step_columns(columns: Columns, group: Mapping, step: int, brake: _Brake | None) -> None:
    """The library's update in its order of operations, which decides the last bit: eps is added into the second moment
    at each step, and again to its root."""
    parameters, gradients, averages, variances = columns
    (beta1, beta2), eps, rate = group["betas"], group["eps"], group["lr"]
    rectified, step_size = rectification(step, beta1, beta2)
    if brake is not None:
        for gradient in gradients:
            gradient.masked_fill_(brake.on, 0.0)
    if group["weight_decay"]:
        decay = 1.0 - rate * group["weight_decay"]
        torch._foreach_mul_(parameters, decay if brake is None else brake.factor(decay))
    torch._foreach_mul_(averages, beta1 if brake is None else brake.factor(beta1))
    torch._foreach_add_(averages, gradients, alpha=1 - beta1)
    surprises = torch._foreach_sub(gradients, averages)
    if brake is not None:
        torch._foreach_mul_(surprises, brake.term(1.0))
    torch._foreach_mul_(variances, beta2 if brake is None else brake.factor(beta2))
    torch._foreach_addcmul_(variances, surprises, surprises, value=1 - beta2)
    if brake is None:
        torch._foreach_add_(variances, eps)
    else:
        torch._foreach_add_(variances, brake.term(eps), alpha=1)  # without alpha the host would ask for the number
    if rectified:
        roots = torch._foreach_sqrt(variances)
        torch._foreach_add_(roots, eps)
        if brake is not None:
            torch._foreach_div_(roots, brake.term(1.0))  # infinite while the brake is on
        torch._foreach_addcdiv_(parameters, averages, roots, value=-step_size * rate)
    else:
        moves = averages if brake is None else torch._foreach_mul(averages, brake.term(1.0))
        torch._foreach_add_(parameters, moves, alpha=-step_size * rate)


def _numbers(group: Mapping, step: int) -> Numbers:
    (beta1, beta2), eps, rate = group["betas"], group["eps"], group["lr"]
    rectified, step_size = rectification(step, beta1, beta2)
    decay = 1.0 - rate * group["weight_decay"]
    return decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, -step_size * rate, float(rectified)


def _cuda_device(groups: Iterable[Mapping]) -> torch.device | None:
    devices = (parameter.device for group in groups for parameter in group["params"])
    return next((device for device in devices if device.type == "cuda"), None)


def tried_kernel(device: torch.device) -> AdaBeliefKernel:
    """The Triton kernel, after it gave the bits of torch's own operations on the device, before rectification and
    after, with numbers below the smallest normal one among them. Raises whatever keeps it from that."""
    from .adabelief_kernel import BLOCK, AdaBeliefKernel

    kernel, generator = AdaBeliefKernel(device), torch.Generator().manual_seed(0)
    group = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.1)
    scales = torch.logspace(-42, 3, 2 * BLOCK + 3)
    for step in (1, 10):
        values = [torch.randn(len(scales), generator=generator) * scales for _ in range(4)]
        values[3].abs_()
        theirs, ours = [value.to(device) for value in values], tuple(value.to(device, copy=True) for value in values)
        _step_columns([[value] for value in theirs], group, step, None)
        kernel([(ours, _numbers(group, step))], None)
        if not all(torch.equal(one, other) for one, other in zip(theirs, ours, strict=True)):
            raise RuntimeError("its last bits are not those of torch's operations")
    return kernel


def rectification(step: int, beta1: float, beta2: float) -> tuple[bool, float]:
    """(whether the second moment is used, the step size without the rate) at a step counted from 1.

    RAdam's rule (Liu et al. 2019, arXiv:1908.03265) as the library computes it; before it holds, momentum alone moves
    the weights.
    """
    decayed = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * decayed / (1 - decayed)
    unbiased = 1 - beta1**step
    if length < 5:
        return False, 1.0 / unbiased
    shrink = (1 - decayed) * (length - 4) / (longest - 4) * (length - 2) / length * longest / (longest - 2)
    return True, math.sqrt(shrink) / unbiased
