"""The device and the precision of a training."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Narrower models are slower in bf16 than in fp32. Time in bf16 / time in fp32, measured on cores with AVX512-BF16: 1.1
# at width 64, 0.57 at 256, 0.41 at 512.
_MIN_WIDTH_FOR_BF16 = 256


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
            "cuda if there is an NVIDIA or AMD GPU."
        ) from error


def resolve_precision(precision: str, device: torch.device, width: int) -> str:
    """Return the precision to compute in, with "auto" replaced by the fastest safe one.

    That is bf16 where the hardware multiplies in bf16 and the model is wide enough to gain from it, fp16 on GPUs
    without bf16, and fp32 elsewhere. `width` is that of the text tower. Raises `UserError` for fp16 on a device that is
    neither CUDA nor a CPU.
    """
    if precision == "fp16" and device.type not in ("cuda", "cpu"):
        raise UserError(f"precision fp16 works on CUDA and the CPU, but this training runs on {device}; choose bf16.")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch asks about the current GPU, which may be another one
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and width >= _MIN_WIDTH_FOR_BF16 and _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    """Return whether the CPU has instructions for bf16 matrix products. Older versions of torch do not say."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without making the host wait; for CUDA that needs pinned memory."""
    if device.type == "cuda":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that the device or the host ran out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # torch has no exception class for running out of CPU memory.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough memory" in text)
