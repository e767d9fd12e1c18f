"""ComfyUI's device, its memory, and its cancel button."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import comfy.model_management as management
import torch


def torch_device() -> torch.device:
    """Return the device on which ComfyUI computes."""
    return management.get_torch_device()


def check_cancelled() -> None:
    """Raise ComfyUI's interrupt, a `BaseException`, if the user pressed Cancel."""
    management.throw_exception_if_processing_interrupted()


@contextlib.contextmanager
def exclusive_device() -> Iterator[None]:
    """Unload ComfyUI's own models and mark the device as used for training."""
    management.unload_all_models()
    management.soft_empty_cache()
    before = getattr(management, "in_training", False)
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before
        management.soft_empty_cache()
