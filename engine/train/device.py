"""Where and in which number format a training computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

# Measured on cores with AVX512-BF16: bf16 takes 1.1 times as long as fp32 at a width of 64, 0.57 at 256, 0.41 at 512.
_WIDE = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: torch.device | str | None) -> torch.device:
    """Return the device to train on, with its index where it has one: "cuda" becomes cuda:0, the current GPU.

    None picks CUDA if there is a GPU, else the CPU. Some of torch.cuda's functions refuse a device without an index.
    Raises `UserError` for a device that does not work here.
    """
    try:
        # Only using a device shows that it works, and the tensor's own device always has the index.
        probe = torch.zeros(1, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        probe.cpu()
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"The device {str(device)!r} cannot be used here ({str(error).strip().splitlines()[0]}); choose cpu, or "
            "cuda where there is an NVIDIA or AMD graphics card."
        ) from error


def resolve_precision(precision: str, device: torch.device, width: int) -> str:
    """auto becomes bf16 where it is fast, fp16 on CUDA cards without it, fp32 elsewhere. Processors need instructions
    for it, and a model at least so wide that multiplying takes most of the time; `width` is that of the text tower."""
    if precision == "fp16" and device.type not in ("cuda", "cpu"):
        raise UserError(f"precision fp16 works on CUDA and the CPU, but this training runs on {device}; choose bf16.")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch asks about the current GPU, which may be another one
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and width >= _WIDE and _multiplies_bf16() else "fp32"


def _multiplies_bf16() -> bool:
    """Whether this processor has instructions for products of bf16 matrices, as far as torch tells."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor on the CPU that the host does not wait for: to CUDA out of memory that is pinned."""
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the device or the machine has no memory left."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch has no class of its own for the CPU.
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate memory" in words or "not enough memory" in words)
