"""AdaBelief on CUDA as one Triton kernel: one launch steps all tensors, and reads and writes each value once.

It rounds exactly as torch's CUDA operations do, of which adabelief-pytorch is made: `add_` with alpha, `addcmul_` and
`addcdiv_` are one fma(factor, term, self) each; every other operation rounds by itself; division and root are IEEE
754's; subnormal numbers are kept. Sources: torch's ATen/native/cuda/DeviceAddCmulCdiv.cuh, the machine code of torch
2.15 for sm_90, and this kernel's PTX. Nobody has run it on a GPU yet. There, `verified_kernel` in adabelief.py compares
the bits before the first step, and the kernel is not used if torch, Triton or the GPU rounds differently.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import to_device

BLOCK = 2048  # values per program
_ALIGNMENT = 16  # bytes that a thread loads at once
# Without these two, the compiler would fuse multiplications and additions and flush subnormal numbers to zero.
OPTIONS = dict(num_warps=8, enable_fp_fusion=False, enable_reflect_ftz=False)

Row = tuple[Tensor, Tensor, Tensor, Tensor]  # weights, gradients, first moment, second moment
Numbers = tuple[float, ...]  # a `StepNumbers`


# The functions under @triton.jit run on the GPU; their parameters are pointers or vectors there.
@triton.jit
def _step(
    weights: tl.tensor,
    gradients: tl.tensor,
    averages: tl.tensor,
    variances: tl.tensor,
    inside: tl.tensor | None,
    numbers: tl.tensor,
) -> None:
    """Step the values at these pointers: those where `inside` is true, or all if it is None.

    `numbers` points to the eight fields of a `StepNumbers`. The order of operations is that of `_update`.
    """
    gradient = tl.load(gradients, mask=inside)
    average = tl.fma(tl.load(numbers + 2), gradient, tl.load(averages, mask=inside) * tl.load(numbers + 1))
    surprise = gradient - average
    eps = tl.load(numbers + 5)
    variance = tl.load(variances, mask=inside) * tl.load(numbers + 3)
    variance = tl.fma(tl.load(numbers + 4), surprise * surprise, variance) + eps
    # Before rectification the divisor is 1, which changes no bit.
    divisor = tl.where(tl.load(numbers + 7) != 0, tl.sqrt_rn(variance) + eps, 1.0)
    weight = tl.load(weights, mask=inside) * tl.load(numbers)
    weight = tl.fma(tl.load(numbers + 6), tl.div_rn(average, divisor), weight)
    tl.store(averages, average, mask=inside)
    tl.store(variances, variance, mask=inside)
    tl.store(weights, weight, mask=inside)


@triton.jit
def _pointers(address: tl.tensor, offset: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return pointers to BLOCK floats. Knowing their alignment, the compiler loads four values at once."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)) + offset + tl.arange(0, BLOCK), 16)


@triton.jit
def adabelief_kernel(
    tensors: tl.tensor, numbers: tl.tensor, owners: tl.tensor, found_inf: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Step BLOCK values of one tensor, unless `found_inf` (one value) is not 0.

    `tensors` [n, 7] int64, per tensor: the four addresses of its `Row`, its size, its row in `numbers`, and the number
    of its first program. `numbers` [m, 8] float32: rows of `StepNumbers`. `owners` int32: each program's row in
    `tensors`.
    """
    if tl.load(found_inf) == 0:
        program = tl.program_id(0)
        tensor = tensors + tl.load(owners + program) * 7
        offset = (program - tl.load(tensor + 6)) * BLOCK
        weights = _pointers(tl.load(tensor), offset, BLOCK)
        gradients = _pointers(tl.load(tensor + 1), offset, BLOCK)
        averages = _pointers(tl.load(tensor + 2), offset, BLOCK)
        variances = _pointers(tl.load(tensor + 3), offset, BLOCK)
        size, row = tl.load(tensor + 4), numbers + tl.load(tensor + 5) * 8
        if offset + BLOCK <= size:
            _step(weights, gradients, averages, variances, None, row)
        else:  # the last block of a tensor ends within it
            _step(weights, gradients, averages, variances, offset + tl.arange(0, BLOCK) < size, row)


class AdaBeliefKernel:
    """Launches the kernel on one device.

    The tables of tensors stay on the device while sizes and addresses do; a step then sends only the numbers of its
    groups.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._zero = torch.zeros(1, device=device)
        self._sizes: list[int] = []
        self._described: list[list[int]] = []

    def takes(self, row: Row) -> bool:
        """Return whether the kernel can step these tensors; it needs contiguous, aligned float32 on its device."""
        return all(
            tensor.dtype == torch.float32
            and tensor.is_contiguous()
            and tensor.device == self.device
            and tensor.data_ptr() % _ALIGNMENT == 0
            for tensor in row
        )

    def __call__(self, work: Sequence[tuple[Row, Numbers]], found_inf: Tensor | None) -> None:
        """Step the weights and both moments in place, unless `found_inf` (one value) is not 0."""
        if not work:
            return
        index_of = {numbers: index for index, numbers in enumerate(dict.fromkeys(numbers for _, numbers in work))}
        self._update_tables([row for row, _ in work], [index_of[numbers] for _, numbers in work])
        with torch.cuda.device_of(self._zero):
            adabelief_kernel[(len(self._owners),)](
                self._tensors,
                to_device(torch.tensor(list(index_of), dtype=torch.float32), self.device),
                self._owners,
                self._zero if found_inf is None else found_inf,
                BLOCK=BLOCK,
                **OPTIONS,
            )

    def _update_tables(self, rows: Sequence[Row], indices: Sequence[int]) -> None:
        """Send the tables again if they changed: `owners` depends on the sizes only, `tensors` on the addresses too."""
        sizes = [row[0].numel() for row in rows]
        if sizes != self._sizes:
            programs = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
            self._sizes, self._firsts = sizes, (programs.cumsum(0) - programs).tolist()
            owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(programs)
            self._owners = to_device(owners, self.device)
        described = [
            [*(tensor.data_ptr() for tensor in row), size, index, first]
            for row, size, index, first in zip(rows, sizes, indices, self._firsts, strict=True)
        ]
        if described != self._described:
            self._described, self._tensors = described, to_device(torch.tensor(described), self.device)
