"""Small CLIPs for the tests, with random weights from open_clip's own initialisation."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clip_finetune.engine.clip.architecture import Architecture
from clip_finetune.engine.clip.full_clip import FullCLIP, file_metadata
from clip_finetune.engine.clip.network import random_full_clip
from clip_finetune.engine.clip.tensor_files import same_bits

TINY = Architecture(
    embed_dim=32,
    image_size=32,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    vision_heads=2,
    vision_mlp_width=256,
    context_length=77,
    vocab_size=49408,
    text_width=64,
    text_layers=2,
    text_heads=2,
    text_mlp_width=256,
    activation="quick_gelu",
)
# A file of 50 kB.
SMALL = Architecture(
    embed_dim=16,
    image_size=16,
    patch_size=8,
    vision_width=16,
    vision_layers=1,
    vision_heads=1,
    vision_mlp_width=64,
    context_length=8,
    vocab_size=64,
    text_width=16,
    text_layers=1,
    text_heads=1,
    text_mlp_width=64,
    activation="quick_gelu",
)
VIT_L_14 = Architecture(
    embed_dim=768,
    image_size=224,
    patch_size=14,
    vision_width=1024,
    vision_layers=24,
    vision_heads=16,
    vision_mlp_width=4096,
    context_length=77,
    vocab_size=49408,
    text_width=768,
    text_layers=12,
    text_heads=12,
    text_mlp_width=3072,
    activation="quick_gelu",
)

# The text tower that SD and SDXL load, with a tiny vision tower.
CLIP_L = dataclasses.replace(
    VIT_L_14, image_size=32, patch_size=8, vision_width=64, vision_layers=2, vision_heads=2, vision_mlp_width=256
)
# The second stage has two blocks, so that one of them is not the first of its stage.
TINY_RESNET = dataclasses.replace(
    TINY,
    image_size=64,
    patch_size=None,
    vision_width=16,
    vision_layers=(1, 2, 1, 1),
    vision_heads=8,
    vision_mlp_width=None,
)
RESNET_50 = dataclasses.replace(
    TINY_RESNET,
    embed_dim=1024,
    image_size=224,
    vision_width=64,
    vision_layers=(3, 4, 6, 3),
    vision_heads=32,
    text_width=512,
    text_layers=12,
    text_heads=8,
    text_mlp_width=2048,
)


def random_clip(
    architecture: Architecture = TINY, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes
) -> FullCLIP:
    """Return a full CLIP of this architecture; vectors, which start at one or zero, get noise so that all differ."""
    model = random_full_clip(dataclasses.replace(architecture, **changes), seed)
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: (tensor + 0.02 * torch.randn(tensor.shape, generator=generator) if tensor.ndim == 1 else tensor).to(dtype)
        for name, tensor in model.state_dict.items()
    }
    return FullCLIP(model.architecture, state)


def random_resnet(
    architecture: Architecture = TINY_RESNET, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> FullCLIP:
    """Return a new ResNet CLIP whose blocks and statistics matter.

    open_clip initialises blocks that add nothing, and statistics that change nothing.
    """
    model = random_clip(architecture, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    changed = {
        name: 0.5 + torch.rand(tensor.shape, generator=generator)
        for name, tensor in model.state_dict.items()
        if name.endswith((".running_var", ".bn3.weight"))
    } | {
        name: 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in model.state_dict.items()
        if name.endswith(".running_mean")
    }
    model = model.derive(changed, step="disturbed")
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict.items()}
    return dataclasses.replace(model, state_dict=state, provenance={})


def broken_clip(*tensor_names: str, value: float = torch.nan, row: int = -1, model: FullCLIP | None = None) -> FullCLIP:
    """Return a full CLIP with `value` as the last element in a row of these tensors."""
    model = model or random_clip()
    changed = {name: model.state_dict[name].clone() for name in tensor_names}
    for tensor in changed.values():
        tensor.view(len(tensor) if tensor.ndim else 1, -1)[row, -1] = value
    return model.derive(changed, step="broken")


def write_unchecked(model: FullCLIP, path: str | Path) -> None:
    """Write what `save_full_clip` writes, for a model that it refuses too."""
    save_file(dict(model.state_dict), path, file_metadata(model))


def identical(one: FullCLIP, other: FullCLIP) -> bool:
    """Return whether two models have the same tensors, bit by bit."""
    return one.state_dict.keys() == other.state_dict.keys() and all(
        same_bits(other.state_dict[name], tensor) for name, tensor in one.state_dict.items()
    )


def disturbed(model, share, seed=1):
    """Every matrix changed by noise of this share of its own deviation."""
    generator = torch.Generator().manual_seed(seed)
    changed = {
        name: (tensor + share * tensor.float().std() * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in model.state_dict.items()
        if tensor.ndim > 1
    }
    return model.derive(changed, step="disturbed")


@contextlib.contextmanager
def gigabytes_above():
    """A list that gets by how much the process grew at its peak."""
    status, found, done = Path("/proc/self/status"), [], threading.Event()
    if not status.exists():
        pytest.skip("memory is read from /proc")

    def resident():
        return int(status.read_text().split("VmRSS:")[1].split()[0]) / 2**20

    before, peak = resident(), []

    def watch():
        while not done.wait(0.01):
            peak.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append(max(peak, default=before) - before)
