"""AdaBelief on CUDA as one Triton kernel: a step of all tensors is one launch, which reads and writes each value once.

It rounds as torch's CUDA operations do, of which adabelief-pytorch is made: `add_` with alpha, `addcmul_` and
`addcdiv_` are one fma(factor, term, self) each, all else is rounded by itself, division and root as IEEE 754 wants, and
numbers below the smallest normal one are kept. That is read off torch (ATen/native/cuda/DeviceAddCmulCdiv.cuh, and the
machine code of torch 2.15 for sm_90), and off this kernel's PTX; nobody has yet run it on a card. There `tried_kernel`
in adabelief.py compares the bits before the first step: where torch, Triton or the card rounds otherwise, the kernel is
not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import to_device

BLOCK = 2048  # values of a program
_ALIGNED = 16  # bytes, of what a thread loads at once
# Nothing is contracted but what the kernel says, and numbers below the smallest normal one stay.
OPTIONS = dict(num_warps=8, enable_fp_fusion=False, enable_reflect_ftz=False)

Row = tuple[Tensor, Tensor, Tensor, Tensor]  # parameter, gradient, exp_avg, exp_avg_var
Numbers = tuple[float, ...]  # decay, beta1, 1 - beta1, beta2, 1 - beta2, eps, step size · -rate, 1 if rectified else 0


@triton.jit
def _move(parameters, gradients, averages, variances, inside, numbers):
    """A step of the values at these pointers, where `inside` is true or None."""
    gradient = tl.load(gradients, mask=inside)
    average = tl.fma(tl.load(numbers + 2), gradient, tl.load(averages, mask=inside) * tl.load(numbers + 1))
    surprise = gradient - average
    eps = tl.load(numbers + 5)
    variance = tl.load(variances, mask=inside) * tl.load(numbers + 3)
    variance = tl.fma(tl.load(numbers + 4), surprise * surprise, variance) + eps
    divisor = tl.where(tl.load(numbers + 7) != 0, tl.sqrt_rn(variance) + eps, 1.0)
    parameter = tl.load(parameters, mask=inside) * tl.load(numbers)
    parameter = tl.fma(tl.load(numbers + 6), tl.div_rn(average, divisor), parameter)
    tl.store(averages, average, mask=inside)
    tl.store(variances, variance, mask=inside)
    tl.store(parameters, parameter, mask=inside)


@triton.jit
def _floats(address, offset, BLOCK: tl.constexpr):
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)) + offset + tl.arange(0, BLOCK), 16)


@triton.jit
def adabelief_kernel(tensors, numbers, owners, found_inf, BLOCK: tl.constexpr):
    """`tensors` [n, 7] int64: the addresses of a `Row`, its size, its row in `numbers`, and its first program.
    `numbers` [m, 8] float32, see `Numbers`. `owners` int32: the tensor of each program. `found_inf`: one value."""
    if tl.load(found_inf) == 0:
        program = tl.program_id(0)
        tensor = tensors + tl.load(owners + program) * 7
        offset = (program - tl.load(tensor + 6)) * BLOCK
        parameters = _floats(tl.load(tensor), offset, BLOCK)
        gradients = _floats(tl.load(tensor + 1), offset, BLOCK)
        averages = _floats(tl.load(tensor + 2), offset, BLOCK)
        variances = _floats(tl.load(tensor + 3), offset, BLOCK)
        size, row = tl.load(tensor + 4), numbers + tl.load(tensor + 5) * 8
        if offset + BLOCK <= size:
            _move(parameters, gradients, averages, variances, None, row)
        else:
            _move(parameters, gradients, averages, variances, offset + tl.arange(0, BLOCK) < size, row)


class AdaBeliefKernel:
    """Steps of tensors on one device. What it tells the device again each step are a few numbers for each group."""

    def __init__(self, device: torch.device):
        self.device = device
        self._none_found = torch.zeros(1, device=device)
        self._sizes: list[int] = []
        self._described: list[list[int]] = []

    def takes(self, row: Row) -> bool:
        return all(
            tensor.dtype == torch.float32
            and tensor.is_contiguous()
            and tensor.device == self.device
            and tensor.data_ptr() % _ALIGNED == 0
            for tensor in row
        )

    def __call__(self, work: Sequence[tuple[Row, Numbers]], found_inf: Tensor | None) -> None:
        """Move the parameters and the moments in place, or nothing if `found_inf` (one value) is not 0."""
        if not work:
            return
        numbers = {each: place for place, each in enumerate(dict.fromkeys(each for _, each in work))}
        self._describe([row for row, _ in work], [numbers[each] for _, each in work])
        with torch.cuda.device_of(self._none_found):
            adabelief_kernel[(len(self._owners),)](
                self._tensors,
                to_device(torch.tensor(list(numbers), dtype=torch.float32), self.device),
                self._owners,
                self._none_found if found_inf is None else found_inf,
                BLOCK=BLOCK,
                **OPTIONS,
            )

    def _describe(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        """Bring the tables up to date: owners by the sizes, the rest by the addresses too."""
        sizes = [row[0].numel() for row in rows]
        if sizes != self._sizes:
            programs = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
            self._sizes, self._firsts = sizes, (programs.cumsum(0) - programs).tolist()
            owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(programs)
            self._owners = to_device(owners, self.device)
        described = [
            [*(tensor.data_ptr() for tensor in row), size, place, first]
            for row, size, place, first in zip(rows, sizes, places, self._firsts, strict=True)
        ]
        if described != self._described:
            self._described, self._tensors = described, to_device(torch.tensor(described), self.device)
