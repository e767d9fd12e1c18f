"""How much memory a training needs, estimated before its first step, and how many pairs fit through the model at once.

The activations are those of the forward pass in clip/network.py, counted by hand: in units of a tower's residual
stream a block keeps 16 (inputs and outputs of the norms, queries, keys and values, the output of attention, and four
times the width before and after the activation), the last block 4, because all but one position ends there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..clip.architecture import Architecture
from ..clip.variants.resnet import resnet_values
from ..errors import UserError
from ..settings import Settings, setting
from .freezing import LayersConfig
from .optim.factory import OPTIMIZERS

# The last three were not counted but read off torch's allocator on a CPU: in backward's first block beside what is
# kept, in the block that it goes through last, and in a block of a forward pass without backward.
_KEPT_OF_BLOCK, _KEPT_OF_LAST, _PASSING, _WHOLE_BLOCK, _FORWARD = 16, 4, 3, 22, 14
# Matrices [b, b] in fp32 that a loss and its gradient hold at one time.
_LOGITS = 8
# Bytes in fp32 that RN50 keeps on the CPU (102 MB an image, or 40 MB checkpointed, for 6.3 M values that its stem and
# blocks give out), in values, and a quarter more for the workspaces of a GPU's convolutions.
_KEPT_OF_RESNET, _KEPT_OF_RESNET_CHECKPOINTED = 5, 2
# Of the free memory: the rest is for fragments, and for what other programs take meanwhile.
_SHARE_OF_FREE = 0.9
# A CPU gains nothing from more activations than this at once.
_CPU_ACTIVATIONS = 4e9
_GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig(Settings):
    """What trades memory, disk space and speed for each other; only `precision` changes the result."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "auto",
        "Number format of the computation; the weights are kept in fp32. auto: bf16 where it is fast, else fp32.",
    )
    micro_batch: int = setting(
        0,
        "Pairs that go through the model at once. Changes memory and speed, never the mathematics of the result. "
        "0 chooses it by the free memory.",
        min=0,
        max=65_536,
        bookkeeping=True,
    )
    activation_checkpointing: bool = setting(
        False, "Needs about a tenth of the memory and a third more time; the result is the same.", bookkeeping=True
    )
    compile: bool = setting(
        False,
        "Compile each block with torch.compile: faster on GPUs, after a minute of compiling at the start. Needs a C "
        "compiler, which portable ComfyUI for Windows lacks.",
        bookkeeping=True,
    )
    image_cache_gb: float = setting(
        20.0,
        "Cache decoded images on disk, up to this size and half of the free space, so that each is decoded once and "
        "not once an epoch. 0 caches none.",
        min=0.0,
        max=100_000.0,
        step=1.0,
        bookkeeping=True,
    )
    cache_features: bool = setting(
        True,
        "If the vision tower, or its embeddings and first blocks, are frozen: run that part once per image and cache "
        "its output, within image_cache_gb.",
        bookkeeping=True,
    )


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes per pair in one tower.

    `kept` for backward, `passing` beside that while backward starts, `block` in the last block that backward goes
    through, and `forward` in a forward pass alone.
    """

    kept: int
    passing: int
    block: int = 0
    forward: int = 0

    @property
    def without_backward(self) -> Activations:
        return Activations(0, 0, 0, self.forward)

    def times(self, pairs: int) -> Activations:
        return Activations(*(pairs * each for each in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Bytes by purpose; `activations` are those of `micro_batch` pairs. `peak` is the most at one time."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    micro_batch: int

    def __str__(self) -> str:
        parts = (
            f"weights {self.weights / _GB:.2f}, gradients {self.gradients / _GB:.2f}, optimizer "
            f"{self.optimizer / _GB:.2f}, activations of {self.micro_batch} pairs {self.activations / _GB:.2f}"
        )
        return f"Estimated peak memory: {self.peak / _GB:.2f} GB ({parts}; not all at the same time)."


@dataclasses.dataclass(frozen=True)
class TensorBytes:
    """Bytes that do not depend on the batch.

    `largest` is the largest gradient in the network's dtype; `copied` says that gradients are copied to another one.
    """

    weights: int
    gradients: int
    vision_gradients: int
    optimizer: int
    largest: int
    copied: bool

    @classmethod
    def of(cls, trained: Mapping[str, Tensor], network: nn.Module, itemsize: int, optimizer: str) -> TensorBytes:
        """For the trained tensors by name, and the network, of `itemsize`, that computes with them or with copies."""
        masters = {id(tensor) for tensor in trained.values()}
        others = [tensor for tensor in (*network.parameters(), *network.buffers()) if id(tensor) not in masters]
        return cls(
            weights=_bytes(trained.values()) + _bytes(others),
            gradients=_bytes(trained.values()),
            vision_gradients=_bytes(tensor for name, tensor in trained.items() if name.startswith("visual.")),
            optimizer=sum(OPTIMIZERS[optimizer].state_bytes(tensor) for tensor in trained.values()),
            largest=max(tensor.numel() for tensor in trained.values()) * itemsize,
            copied=any(tensor.itemsize > itemsize for tensor in trained.values()),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What the memory of a training step depends on, apart from the batch. `itemsize` is that of the network."""

    tensors: TensorBytes
    architecture: Architecture
    layers: LayersConfig
    itemsize: int
    checkpointed: bool
    trains_vision: bool
    trains_text: bool

    def forecast(self, pairs: int, micro_batch: int, text_length: int) -> Forecast:
        """Estimate the memory of batches of `pairs`, `micro_batch` at once, with captions of `text_length` tokens."""
        at_once, tensors = min(micro_batch, pairs), self.tensors
        vision, text = activations_of(
            self.architecture, self.layers, self.itemsize, text_length, checkpointed=self.checkpointed
        )
        vision = (vision if self.trains_vision else vision.without_backward).times(at_once)
        text = (text if self.trains_text else text.without_backward).times(at_once)
        if at_once == pairs:  # both towers forward, then backward through the text tower and through the vision tower
            beside = max(vision.passing, tensors.largest if tensors.copied else 0)
            moments = (
                max(vision.kept, vision.forward),
                vision.kept + max(text.kept + text.passing, text.forward),
                vision.kept + beside + tensors.gradients - tensors.vision_gradients,
                tensors.gradients + vision.block,
            )
        else:  # micro-batches of the vision tower, then of the text tower; each one's gradient is added to a sum
            moments = (
                tensors.vision_gradients + max(vision.kept + vision.passing, vision.block, vision.forward),
                tensors.gradients + max(text.kept + text.passing, text.forward, tensors.largest),
            )
        peak = tensors.weights + tensors.optimizer + max(moments) + _logits_bytes(pairs)
        kept = vision.kept + text.kept
        return Forecast(tensors.weights, tensors.gradients, tensors.optimizer, kept, peak, at_once)

    def fitting_micro_batch(self, pairs: int, device: torch.device) -> int:
        """Return the most pairs at once whose activations fit into the memory that is free now, at least 1."""
        fitting, low, high, free = 1, 1, pairs, free_bytes(device)
        while low <= high:
            middle = (low + high) // 2
            forecast = self.forecast(pairs, middle, self.architecture.context_length)
            needed = forecast.activations if device.type == "cpu" else forecast.peak - forecast.weights
            if needed <= free:
                fitting, low = middle, middle + 1
            else:
                high = middle - 1
        return fitting

    def require(self, pairs: int, text_length: int, device: torch.device, remedies: Sequence[str]) -> None:
        """Raise `UserError`, which names the remedies, if not even one pair at a time fits on the device."""
        total, least = total_bytes(device), self.forecast(pairs, 1, text_length).peak
        if total is None or least <= total:
            return
        remedies = [*remedies]
        if _logits_bytes(pairs) > 0.1 * total:
            remedies.append(f"lower batch_size (it is {pairs})")
        raise UserError(
            f"This training takes {least / _GB:.1f} GB of memory even with micro_batch 1, and the device has "
            f"{total / _GB:.1f} GB; {', or '.join(remedies) or 'choose a smaller model'}."
        )


def _logits_bytes(pairs: int) -> int:
    """Return the bytes of the similarities of a batch, which grow with its square."""
    return _LOGITS * 4 * pairs**2


def activations_of(
    architecture: Architecture, layers: LayersConfig, itemsize: int, text_length: int, *, checkpointed: bool
) -> tuple[Activations, Activations]:
    """Return those of the vision and of the text tower, for weights of `itemsize` bytes."""
    a = architecture
    # Blocks that nothing below trains keep nothing.
    frozen = (layers.freeze_text_blocks, layers.freeze_vision_blocks) if layers.freeze_embeddings else (0, 0)
    text = _transformer(text_length * a.text_width, a.text_layers - frozen[0], itemsize, checkpointed)
    if a.resnet:
        kept = _KEPT_OF_RESNET_CHECKPOINTED if checkpointed else _KEPT_OF_RESNET
        return Activations(kept * resnet_values(a.vision_width, a.stages, a.grid) * itemsize, 0), text
    stream = (a.grid**2 + 1) * a.vision_width
    vision = _transformer(stream, a.vit.layers - frozen[1], itemsize, checkpointed)
    before = 0 if layers.freeze_embeddings else (stream + 3 * a.image_size**2) * itemsize  # the patches, the image
    return dataclasses.replace(vision, kept=vision.kept + before, forward=vision.forward + 2 * before), text


def _transformer(stream: int, layers: int, itemsize: int, checkpointed: bool) -> Activations:
    """For a residual stream of this many values per pair."""
    unit = stream * itemsize
    if checkpointed:
        return Activations(layers * unit, _WHOLE_BLOCK * unit, _WHOLE_BLOCK * unit, _FORWARD * unit)
    kept = max(0, _KEPT_OF_BLOCK * (layers - 1) + _KEPT_OF_LAST) * unit
    return Activations(kept, _PASSING * unit, _WHOLE_BLOCK * unit, _FORWARD * unit)


def total_bytes(device: torch.device) -> float | None:
    """Return all the GPU memory that this process may use; None on a CPU."""
    return _gpu_bytes(device) if device.type == "cuda" else None


def free_bytes(device: torch.device) -> float:
    """Return what a training may use beside its weights."""
    if device.type != "cuda":
        return _CPU_ACTIVATIONS
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free = min(torch.cuda.mem_get_info(device)[0] + reserved, _gpu_bytes(device)) - allocated
    return _SHARE_OF_FREE * free


def _gpu_bytes(device: torch.device) -> float:
    # Set by `torch.cuda.set_per_process_memory_fraction`; torch before 2.8 cannot tell.
    allowed = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return allowed * torch.cuda.mem_get_info(device)[1]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
