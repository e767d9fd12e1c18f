"""AdaBelief (Zhuang et al. 2020, arXiv:2010.07468), computed over chunks of many tensors or by one Triton kernel."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from adabelief_pytorch import AdaBelief
from torch import Tensor

from ...errors import one_line

if TYPE_CHECKING:
    from .adabelief_kernel import AdaBeliefKernel, Row

_CPU_CHUNK = 2**18  # values per chunk: its temporaries stay in the CPU's cache
_DEVICE_CHUNK = 2**24  # few launches, and temporaries of 64 MB


class StepNumbers(NamedTuple):
    """What a step computes with besides tensors, in the order in which the kernel reads it."""

    decay: float  # 1 - learning rate * weight decay
    beta1: float
    beta1_rest: float  # 1 - beta1
    beta2: float
    beta2_rest: float  # 1 - beta2
    eps: float
    move: float  # - step size * learning rate
    rectified: bool  # whether the step divides by the root of the second moment


class ChunkedAdaBelief(AdaBelief):
    """The AdaBelief of adabelief-pytorch at its default options, bit for bit, for parameters in float32 and float64.

    If the attribute `found_inf` (a tensor with one value) is not 0, a step changes no parameter and no moment, without
    asking the host; only the host's step counters go on (see `undo_steps`). On CUDA, one Triton kernel does the step if
    Triton works; `on_note` gets a sentence if it does not. Set `use_kernel` to False to leave it untried.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        on_note: Callable[[str], None] = lambda note: None,
    ) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # the library prints its options
            super().__init__(params, lr, betas, eps, weight_decay, print_change_log=False)
        self.on_note, self.use_kernel = on_note, True
        self._kernel: AdaBeliefKernel | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self._try_kernel()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        guard = _Guard(found_inf)
        for_kernel: list[tuple[Row, StepNumbers]] = []
        for rows, numbers in self._rows_and_numbers():
            others = []
            for row in rows:
                if self._kernel is not None and self._kernel.takes(row):
                    for_kernel.append((row, numbers))
                else:
                    others.append(row)
            for chunk in _chunks(others):
                _update(chunk, numbers, guard)
        if self._kernel is not None:
            self._kernel(for_kernel, found_inf)

    def _rows_and_numbers(self) -> Iterator[tuple[list[Row], StepNumbers]]:
        """Count the step and yield the parameters that have a gradient, those with the same numbers together."""
        for group in self.param_groups:
            rows_by_step: dict[int, list[Row]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_var"] = torch.zeros_like(parameter)
                state["step"] += 1
                row = (parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_var"])
                rows_by_step.setdefault(state["step"], []).append(row)
            for step, rows in rows_by_step.items():
                yield rows, _step_numbers(group, step)

    def _try_kernel(self) -> None:
        """Make the kernel before the first step that has a parameter on CUDA; try only once."""
        device = _cuda_device(self.param_groups) if self.use_kernel and self._kernel is None else None
        if device is None:
            return
        try:
            self._kernel = verified_kernel(device)
        except Exception as error:  # Triton is missing, or its compiler or the driver raised anything at all
            self.use_kernel = False
            self.on_note(
                f"AdaBelief's Triton kernel does not work here ({type(error).__name__}: {one_line(error)}); training "
                "continues with torch's own operations, which are slower and give the same weights."
            )


class _Guard:
    """Scalars of a step that neutralise it if `found_inf` is not 0, without the host reading that value.

    If `found_inf` is 0 the step has the same bits as without a guard; without `found_inf` the scalars stay floats.
    """

    def __init__(self, found_inf: Tensor | None) -> None:
        self.skip = None if found_inf is None else found_inf.reshape(()) != 0

    def __call__(self, value: float, neutral: float) -> float | Tensor:
        """Return `value`, or `neutral` if the step is skipped."""
        if self.skip is None:
            return value
        # In float64, as Python's own numbers are, so that a scalar rounds the same way. MPS has no float64.
        dtype = torch.float32 if self.skip.device.type == "mps" else torch.float64
        if_skipped, otherwise = (torch.full((), n, dtype=dtype, device=self.skip.device) for n in (neutral, value))
        return torch.where(self.skip, if_skipped, otherwise)


Chunk = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]  # the columns of rows, or of pieces of rows


def _chunks(rows: Sequence[Row]) -> Iterator[Chunk]:
    """Yield chunks of about as many values as fit the cache: small tensors share one, large ones are cut into several.

    A tensor that is not contiguous stays whole.
    """
    limit = _CPU_CHUNK if rows and rows[0][0].device.type == "cpu" else _DEVICE_CHUNK
    chunk: Chunk = ([], [], [], [])
    filled = 0
    for row in rows:
        contiguous = all(tensor.is_contiguous() for tensor in row)
        pieces = zip(*(tensor.view(-1).split(limit) for tensor in row), strict=True) if contiguous else [row]
        for piece in pieces:
            if filled and filled + piece[0].numel() > limit:
                yield chunk
                chunk, filled = ([], [], [], []), 0
            for column, tensor in zip(chunk, piece, strict=True):
                column.append(tensor)
            filled += piece[0].numel()
    if filled:
        yield chunk


def _update(chunk: Chunk, numbers: StepNumbers, guard: _Guard) -> None:
    """Do a step on these tensors in place, in the library's order of operations, which decides the last bit.

    Per value, with gradient g, first moment m, second moment v and weight w:

        w = decay * w;  m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * (g - m)² + eps
        w = w + move * m / (sqrt(v) + eps), or w + move * m before rectification

    Adding eps to v at every step, and again to its root, is the library's way.
    """
    weights, gradients, averages, variances = chunk
    skip = guard.skip
    if skip is not None:
        for gradient in gradients:
            gradient.masked_fill_(skip, 0.0)  # it may be NaN, and 0 * NaN is NaN
    if numbers.decay != 1.0:
        torch._foreach_mul_(weights, guard(numbers.decay, 1.0))
    torch._foreach_mul_(averages, guard(numbers.beta1, 1.0))
    torch._foreach_add_(averages, gradients, alpha=numbers.beta1_rest)
    surprises = torch._foreach_sub(gradients, averages)
    if skip is not None:
        torch._foreach_mul_(surprises, guard(1.0, 0.0))
    torch._foreach_mul_(variances, guard(numbers.beta2, 1.0))
    torch._foreach_addcmul_(variances, surprises, surprises, value=numbers.beta2_rest)
    eps = guard(numbers.eps, 0.0)
    if isinstance(eps, Tensor):
        torch._foreach_add_(variances, eps, alpha=1)  # without alpha the host would read the value
    else:
        torch._foreach_add_(variances, eps)
    if numbers.rectified:
        roots = torch._foreach_sqrt(variances)
        torch._foreach_add_(roots, numbers.eps)
        if skip is not None:
            torch._foreach_div_(roots, guard(1.0, 0.0))  # infinite for a skipped step, so that the weights move by 0
        torch._foreach_addcdiv_(weights, averages, roots, value=numbers.move)
    else:
        moves = averages if skip is None else torch._foreach_mul(averages, guard(1.0, 0.0))
        torch._foreach_add_(weights, moves, alpha=numbers.move)


def _step_numbers(group: Mapping[str, Any], step: int) -> StepNumbers:
    (beta1, beta2), eps, learning_rate = group["betas"], group["eps"], group["lr"]
    rectified, step_size = rectification(step, beta1, beta2)
    decay = 1.0 - learning_rate * group["weight_decay"]
    return StepNumbers(decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, -step_size * learning_rate, rectified)


def rectification(step: int, beta1: float, beta2: float) -> tuple[bool, float]:
    """Return whether a step (from 1) uses the second moment, and its step size for a learning rate of 1.

    RAdam's rule (Liu et al. 2019, arXiv:1908.03265) in the library's order of operations. In the first steps, five at
    the default betas, the variance of the second moment is intractable (`rho` < 5) and the first moment alone moves the
    weights.
    """
    beta2_power = beta2**step
    rho_max = 2 / (1 - beta2) - 1
    rho = rho_max - 2 * step * beta2_power / (1 - beta2_power)
    bias_correction = 1 - beta1**step
    if rho < 5:
        return False, 1.0 / bias_correction
    squared = (1 - beta2_power) * (rho - 4) / (rho_max - 4) * (rho - 2) / rho * rho_max / (rho_max - 2)
    return True, math.sqrt(squared) / bias_correction


def _cuda_device(groups: Iterable[Mapping[str, Any]]) -> torch.device | None:
    devices = (parameter.device for group in groups for parameter in group["params"])
    return next((device for device in devices if device.type == "cuda"), None)


def verified_kernel(device: torch.device) -> AdaBeliefKernel:
    """Return the Triton kernel once its bits equal those of torch's operations on this device.

    Tried before and after rectification starts, with values of all sizes, subnormal ones included. Raises whatever goes
    wrong.
    """
    from .adabelief_kernel import BLOCK, AdaBeliefKernel

    kernel, generator = AdaBeliefKernel(device), torch.Generator().manual_seed(0)
    group = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.1)
    scales = torch.logspace(-42, 3, 2 * BLOCK + 3)
    for step in (1, 10):
        numbers = _step_numbers(group, step)
        values = [torch.randn(len(scales), generator=generator) * scales for _ in range(4)]
        values[3].abs_()  # the second moment
        torchs, ours = ([value.to(device, copy=True) for value in values] for _ in range(2))
        _update(([torchs[0]], [torchs[1]], [torchs[2]], [torchs[3]]), numbers, _Guard(None))
        kernel([((ours[0], ours[1], ours[2], ours[3]), numbers)], None)
        if not all(torch.equal(one, other) for one, other in zip(torchs, ours, strict=True)):
            raise RuntimeError("its last bits are not those of torch's operations")
    return kernel
