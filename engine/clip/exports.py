"""A tower as a file of its own, under the names that ComfyUI, diffusers, Forge and kohya load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_safetensors
from . import names
from .architecture import Architecture
from .full_clip import MIXED, FullCLIP, cast
from .gmp import fold_gmp

_PROJECTION = "text_projection.weight"
# (width, layers, MLP width, heads) of the text towers that diffusion models load.
CLIP_L = (768, 12, 3072, 12)
CLIP_G = (1280, 32, 5120, 20)
# What each is called, what its hosts compute, and which model has it.
_TEXT_HOSTS = {
    CLIP_L: ("CLIP-L", "quick_gelu", "ViT-L/14", "SD1.5 or SDXL"),
    CLIP_G: ("CLIP-G", "gelu", "OpenCLIP's ViT-bigG/14", "SDXL"),
}
# (width, layers, MLP width, heads, patch size, picture size, embedding width) of the vision towers that ComfyUI knows.
_VISION_HOSTS = {
    (1024, 24, 4096, 16, 14, 224, 768): ("ViT-L/14", "quick_gelu"),
    (1024, 24, 4096, 16, 14, 336, 768): ("ViT-L/14@336", "quick_gelu"),
    (1280, 32, 5120, 16, 14, 224, 1024): ("ViT-H/14", "gelu"),
    (1664, 48, 8192, 16, 14, 224, 1280): ("ViT-bigG/14", "gelu"),
}


def require_text_tower(full_clip: FullCLIP, sizes: tuple[int, int, int, int]) -> None:
    """Raise `UserError` unless the text tower is `CLIP_L` (SD1.5, SDXL, SD3, Flux) or `CLIP_G` (SDXL, SD3) and runs as
    image programs run it."""
    a = full_clip.architecture
    if text_sizes(a) != sizes:
        name, _, model, programs = _TEXT_HOSTS[sizes]
        raise UserError(
            f"This model's text tower is not a {name}: it is {a.text_width} wide with {a.text_layers} layers, "
            f"{a.text_heads} heads and an MLP width of {a.text_mlp_width}, where {name} has {sizes[0]}, {sizes[1]}, "
            f"{sizes[3]} and {sizes[2]}. Train {model} to get one for {programs}."
        )
    _check_activation(a)


def text_encoder_state_dict(full_clip: FullCLIP, *, dtype: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The text tower's tensors under Hugging Face's names, and sentences on what was done.

    GmP is folded. `logit_scale` is left out. `dtype` is fp16, bf16 or fp32; None keeps each tensor's own. Raises
    `UserError` for an activation that image programs would run wrongly, and for weights that are not finite.
    """
    _check_activation(full_clip.architecture)
    return _tower(full_clip, names.is_text_name, dtype, "text encoder")


def vision_encoder_state_dict(full_clip: FullCLIP, *, dtype: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The vision tower's tensors under Hugging Face's names as ComfyUI's CLIPVisionLoader reads them, and sentences.

    As `text_encoder_state_dict`; raises `UserError` also for a tower that ComfyUI does not know.
    """
    a = full_clip.architecture
    sizes = (
        a.vision_width,
        a.vision_layers,
        a.vision_mlp_width,
        a.vision_heads,
        a.patch_size,
        a.image_size,
        a.embed_dim,
    )
    if sizes not in _VISION_HOSTS:
        known = ", ".join(name for name, _ in _VISION_HOSTS.values())
        raise UserError(f"ComfyUI's CLIPVisionLoader does not know this vision tower; it opens those of {known}.")
    name, activation = _VISION_HOSTS[sizes]
    if activation != a.activation:
        raise _other_activation(f"{name}'s vision tower", a.activation, activation)
    return _tower(full_clip, names.is_vision_name, dtype, "vision encoder")


def _tower(
    full_clip: FullCLIP, belongs: Callable[[str], bool], dtype: str | None, what: str
) -> tuple[dict[str, Tensor], list[str]]:
    done = []
    if full_clip.parameterization == "gmp":
        full_clip = fold_gmp(full_clip)
        done.append("The model was in GmP form; it was folded to plain weights for the export.")
    tower = {name: tensor for name, tensor in full_clip.state_dict.items() if belongs(name)}
    if dtype == MIXED:
        raise UserError(f"The dtype {MIXED} is one of full CLIPs; for a {what} choose fp16, bf16 or fp32.")
    broken = [name for name, tensor in tower.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"The {what} was not exported: {broken[0]} holds values that are not numbers (NaN or infinite). "
            "Export a model from before the training broke, such as the run's best.safetensors."
        )
    return cast(names.to_hf(tower), dtype, f"The {what}"), done


def export_text_encoder(full_clip: FullCLIP, path: str | os.PathLike, *, dtype: str | None = "fp16") -> Path:
    """Write the text tower as a text encoder file; it is read back and compared before it takes its place."""
    return _write(text_encoder_state_dict(full_clip, dtype=dtype)[0], path)


def export_vision_encoder(full_clip: FullCLIP, path: str | os.PathLike, *, dtype: str | None = "fp16") -> Path:
    """Write the vision tower as a file for ComfyUI's CLIPVisionLoader; read back and compared likewise."""
    return _write(vision_encoder_state_dict(full_clip, dtype=dtype)[0], path)


def _write(tensors: dict[str, Tensor], path: str | os.PathLike) -> Path:
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors.")
    return write_safetensors(tensors, path, {"format": "pt"})


def mix_text_encoders(
    original: Mapping[str, Tensor], trained: Mapping[str, Tensor], strength: float, *, projection: bool = False
) -> dict[str, Tensor]:
    """original + strength · (trained − original), in the trained tensors' dtypes; both under Hugging Face's names.

    Unless `projection`, the projection stays the trained one: image programs' CLIP-L carries none that can be trusted,
    while CLIP-G does. Raises `UserError` if the two differ in shape or the mix holds values that are not numbers.
    """
    kept = [] if projection else [_PROJECTION]
    mixed = {name: trained[name] for name in kept}
    for name in trained.keys() - mixed.keys():
        tensor = trained[name]
        if name not in original or original[name].shape != tensor.shape:
            raise UserError(f"The connected CLIP has no {name} of this shape, so the two cannot be mixed.")
        mixed[name] = torch.lerp(original[name].double(), tensor.double(), float(strength)).to(tensor.dtype)
        if not torch.isfinite(mixed[name]).all():
            raise UserError(
                f"The mixed text encoder was not made: {name} would hold values that are not numbers. "
                "Lower strength, choose dtype fp32, or connect another clip."
            )
    return {name: mixed[name] for name in trained}


def text_sizes(a: Architecture) -> tuple[int, int, int, int]:
    """(width, layers, MLP width, heads) of the text tower, as `CLIP_L` and `CLIP_G` are."""
    return a.text_width, a.text_layers, a.text_mlp_width, a.text_heads


def _check_activation(a: Architecture) -> None:
    if text_sizes(a) in _TEXT_HOSTS:
        name, activation = _TEXT_HOSTS[text_sizes(a)][:2]
        if activation != a.activation:
            raise _other_activation(name, a.activation, activation)


def _other_activation(name: str, own: str, hosts: str) -> UserError:
    return UserError(
        f"This {name} was trained with {own}, but image programs run every {name} with {hosts}: the export would give "
        "wrong pictures. Use a model with that activation (for ViT-L/14: OpenAI's)."
    )
