"""How much memory a training takes, told before its first step, and how much of a batch goes through at once.

The activations are those of the forward pass in clip/network.py, counted by hand: in units of a tower's residual
stream a block keeps 16 (the norms' inputs and outputs, queries, keys and values, what attention found, and four times
the width before and behind the activation), the last block 4, because all but one position ends there.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch

from ..clip.architecture import Architecture
from ..clip.variants.resnet import resnet_values
from ..errors import UserError
from ..settings import Settings, setting
from . import master_weights as weights_module
from .freezing import LayersConfig
from .optim.factory import OPTIMIZERS

if TYPE_CHECKING:
    from .step import TrainingStep

# The last three are not counted but read off torch's allocator on a processor: in backward's first block beside what is
# kept, in the block that it goes through last, and in a block of a forward pass without backward.
_KEPT_OF_BLOCK, _KEPT_OF_LAST, _PASSING, _WHOLE_BLOCK, _FORWARD = 16, 4, 3, 22, 14
# Matrices [b, b] in fp32 that a loss and its gradient hold at one time.
_LOGITS = 8
# Bytes in fp32 that RN50 keeps on the CPU (102 MB a picture, or 40 MB checkpointed, for 6.3 M values that its stem and
# blocks give out), in values, and a quarter more for the workspaces of a graphics card's convolutions.
_KEPT_OF_RESNET, _KEPT_OF_RESNET_CHECKPOINTED = 5, 2
# Of the memory that is free: the rest is for fragments, and for what other programs take meanwhile.
_SHARE_OF_FREE = 0.9
# A processor gains nothing by more than this at once.
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
    """Bytes of one pair in a tower: what it keeps for backward, what is needed beside that while backward begins, what
    is left in the last block that backward goes through, and what a forward pass alone needs."""

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
    """Bytes by what they are for; `activations` are those of `micro_batch` pairs. `peak` is the most at one time."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    micro_batch: int

    def __str__(self) -> str:
        parts = (
            f"weights {self.weights / _GB:.2f}, gradients {self.gradients / _GB:.2f}, optimizer "
            f"{self.optimizer / _GB:.2f}, what {self.micro_batch} pairs at once keep {self.activations / _GB:.2f}"
        )
        return f"The training takes about {self.peak / _GB:.2f} GB of memory ({parts}; not all at the same time)."


def forecast(work: TrainingStep, pairs: int, micro_batch: int, text_length: int) -> Forecast:
    """For batches of `pairs`, of which `micro_batch` go through at once, with texts of `text_length` tokens."""
    trained, network = work.trained.values(), [*work.network.parameters(), *work.network.buffers()]
    weights = _bytes(trained) + _bytes(tensor for tensor in network if not any(tensor is other for other in trained))
    config = work.config
    vision, text = activations_of(
        work.model.architecture,
        config.layers,
        work.network.dtype.itemsize,
        text_length,
        checkpointed=config.memory.activation_checkpointing,
    )
    at_once = min(micro_batch, pairs)
    vision = (vision if work.trains_vision else vision.without_backward).times(at_once)
    text = (text if work.trains_text else text.without_backward).times(at_once)
    of_vision = _bytes(master for name, master in work.trained.items() if name.startswith("visual."))
    gradients, itemsize = _bytes(trained), work.network.dtype.itemsize
    largest = max(parameter.numel() for parameter in trained) * itemsize
    if at_once == pairs:  # both towers forward, then backward through the text tower and through the vision tower
        beside = max(vision.passing, largest if itemsize < weights_module.MASTER_DTYPE.itemsize else 0)
        moments = (
            max(vision.kept, vision.forward),
            vision.kept + max(text.kept + text.passing, text.forward),
            vision.kept + beside + gradients - of_vision,
            gradients + vision.block,
        )
    else:  # part after part, of the vision tower and then of the text tower; each part's gradient is added to a sum
        moments = (
            of_vision + max(vision.kept + vision.passing, vision.block, vision.forward),
            gradients + max(text.kept + text.passing, text.forward, largest),
        )
    optimizer = optimizer_bytes(work)
    peak = weights + optimizer + max(moments) + _LOGITS * 4 * pairs**2
    return Forecast(weights, gradients, optimizer, vision.kept + text.kept, peak, at_once)


def activations_of(
    a: Architecture, config: LayersConfig, itemsize: int, text_length: int, *, checkpointed: bool
) -> tuple[Activations, Activations]:
    """Of the vision and of the text tower, for weights of `itemsize` bytes."""
    # Blocks that nothing below trains keep nothing.
    frozen = (config.freeze_text_blocks, config.freeze_vision_blocks) if config.freeze_embeddings else (0, 0)
    text = _transformer(text_length * a.text_width, a.text_layers - frozen[0], itemsize, checkpointed)
    if a.resnet:
        kept = _KEPT_OF_RESNET_CHECKPOINTED if checkpointed else _KEPT_OF_RESNET
        return Activations(kept * resnet_values(a.vision_width, a.vision_layers, a.grid) * itemsize, 0), text
    stream = (a.grid**2 + 1) * a.vision_width
    vision = _transformer(stream, a.vision_layers - frozen[1], itemsize, checkpointed)
    before = 0 if config.freeze_embeddings else (stream + 3 * a.image_size**2) * itemsize  # the patches, the picture
    return dataclasses.replace(vision, kept=vision.kept + before, forward=vision.forward + 2 * before), text


def _transformer(stream: int, layers: int, itemsize: int, checkpointed: bool) -> Activations:
    """For a residual stream of so many values a pair."""
    unit = stream * itemsize
    if checkpointed:
        return Activations(layers * unit, _WHOLE_BLOCK * unit, _WHOLE_BLOCK * unit, _FORWARD * unit)
    kept = max(0, _KEPT_OF_BLOCK * (layers - 1) + _KEPT_OF_LAST) * unit
    return Activations(kept, _PASSING * unit, _WHOLE_BLOCK * unit, _FORWARD * unit)


def optimizer_bytes(work: TrainingStep) -> int:
    """Return the size of the optimizer's state."""
    state_bytes = OPTIMIZERS[work.config.optimizer.optimizer].state_bytes
    return sum(state_bytes(parameter) for parameter in work.trained.values())


def fitting_micro_batch(work: TrainingStep, pairs: int) -> int:
    """The most pairs at once whose activations fit in the memory that is free now, at least 1."""
    length = work.model.architecture.context_length
    fits, low, high = 1, 1, pairs
    room = free_bytes(work.device)
    while low <= high:
        middle = (low + high) // 2
        found = forecast(work, pairs, middle, length)
        needed = found.activations if work.device.type == "cpu" else found.peak - found.weights
        if needed <= room:
            fits, low = middle, middle + 1
        else:
            high = middle - 1
    return fits


def require_memory(work: TrainingStep, pairs: int, text_length: int) -> None:
    """Raise `UserError` if not even one pair at a time fits in all the memory that the device has."""
    total = total_bytes(work.device)
    least = forecast(work, pairs, 1, text_length)
    if total is None or least.peak <= total:
        return
    config = work.config
    ways = [
        "set towers to text" if config.towers == "both" else "",
        "set optimizer to adafactor" if config.optimizer.optimizer != "adafactor" else "",
        "" if config.memory.activation_checkpointing else "switch on activation_checkpointing",
        f"lower batch_size (it is {pairs})" if _LOGITS * 4 * pairs**2 > 0.1 * total else "",
    ]
    raise UserError(
        f"This training takes {least.peak / _GB:.1f} GB of memory even with micro_batch 1, and the device has "
        f"{total / _GB:.1f} GB; {', or '.join(filter(None, ways)) or 'choose a smaller model'}."
    )


def total_bytes(device: torch.device) -> float | None:
    """All the memory of a graphics card that this process may have; None where it is not told."""
    if device.type != "cuda":
        return None
    # Set by `torch.cuda.set_per_process_memory_fraction`; torch before 2.8 does not tell it.
    allowed = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(device)
    return allowed * torch.cuda.mem_get_info(device)[1]


def free_bytes(device: torch.device) -> float:
    """What a training may take beside its weights."""
    if device.type != "cuda":
        return _CPU_ACTIVATIONS
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free = min(torch.cuda.mem_get_info(device)[0] + reserved, total_bytes(device)) - allocated
    return _SHARE_OF_FREE * free


def _bytes(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)
