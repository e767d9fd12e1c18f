"""The text tower as a file of its own, under the names that ComfyUI, diffusers, Forge and kohya load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from . import names
from .architecture import Architecture
from .files import write_safetensors
from .full_clip import FullCLIP, cast
from .gmp import fold_gmp

# (width, layers, MLP width, heads) of the text towers that diffusion models load, and the activation their hosts use.
_PROJECTION = "text_projection.weight"
CLIP_L = (768, 12, 3072, 12)
CLIP_G = (1280, 32, 5120, 20)
_HOST_ACTIVATION = {CLIP_L: ("CLIP-L", "quick_gelu"), CLIP_G: ("CLIP-G", "gelu")}


def require_clip_l(full_clip: FullCLIP) -> None:
    """Raise `UserError` unless the text tower is that of ViT-L/14, which SD1.5, SDXL, SD3 and Flux know as CLIP-L."""
    a = full_clip.architecture
    found = _text_sizes(a)
    if found != CLIP_L:
        raise UserError(
            f"This model's text tower is not a CLIP-L: it is {a.text_width} wide with {a.text_layers} layers and an "
            f"MLP width of {a.text_mlp_width}, where CLIP-L has 768, 12 and 3072. Train a ViT-L/14 to get a text "
            "encoder for SD1.5 or SDXL."
        )
    _check_activation(a)


def text_encoder_state_dict(full_clip: FullCLIP, *, dtype: str | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The text tower's tensors under Hugging Face's names, and sentences on what was done.

    GmP is folded. `logit_scale` is left out. `dtype` is fp16, bf16 or fp32; None keeps each tensor's own. Raises
    `UserError` for an activation that image programs would run wrongly, and for weights that are not finite.
    """
    _check_activation(full_clip.architecture)
    done = []
    if full_clip.parameterization == "gmp":
        full_clip = fold_gmp(full_clip)
        done.append("The model was in GmP form; it was folded to plain weights for the export.")
    text = {name: tensor for name, tensor in full_clip.state_dict.items() if names.is_text_name(name)}
    broken = [name for name, tensor in text.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"The text encoder was not exported: {broken[0]} holds values that are not numbers (NaN or infinite). "
            "Export a model from before the training broke, such as the run's best.safetensors."
        )
    return cast(names.to_hf(text), dtype, "The text encoder"), done


def export_text_encoder(full_clip: FullCLIP, path: str | os.PathLike, *, dtype: str | None = "fp16") -> Path:
    """Write the text tower as a text encoder file; it is read back and compared before it takes its place."""
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors.")
    tensors, _ = text_encoder_state_dict(full_clip, dtype=dtype)
    return write_safetensors(tensors, path, {"format": "pt"})


def mix_text_encoders(
    original: Mapping[str, Tensor], trained: Mapping[str, Tensor], strength: float
) -> dict[str, Tensor]:
    """original + strength · (trained − original), in the trained tensors' dtypes; both under Hugging Face's names.

    The projection stays the trained one: text encoders of image programs carry none that can be trusted. Raises
    `UserError` if the two differ in shape or the mix holds values that are not numbers.
    """
    mixed = {_PROJECTION: trained[_PROJECTION]}
    for name in trained.keys() - mixed.keys():
        tensor = trained[name]
        if name not in original or original[name].shape != tensor.shape:
            raise UserError(f"The connected CLIP-L has no {name} of this shape, so the two cannot be mixed.")
        mixed[name] = torch.lerp(original[name].double(), tensor.double(), float(strength)).to(tensor.dtype)
        if not torch.isfinite(mixed[name]).all():
            raise UserError(
                f"The mixed text encoder was not made: {name} would hold values that are not numbers. "
                "Lower strength, choose dtype fp32, or connect another clip."
            )
    return {name: mixed[name] for name in trained}


def text_shapes(architecture: Architecture) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a text encoder file's tensors for this architecture."""
    expected = {
        name: torch.empty(shape, device="meta")
        for name, shape in architecture.shapes("linear").items()
        if names.is_text_name(name)
    }
    return {name: tuple(tensor.shape) for name, tensor in names.to_hf(expected).items()}


def _text_sizes(a: Architecture) -> tuple[int, int, int, int]:
    return a.text_width, a.text_layers, a.text_mlp_width, a.text_heads


def _check_activation(a: Architecture) -> None:
    name, activation = _HOST_ACTIVATION.get(_text_sizes(a), ("", a.activation))
    if activation != a.activation:
        raise UserError(
            f"This {name} was trained with {a.activation}, but image programs run every {name} with {activation}: the "
            "export would give wrong pictures. Use a model with that activation (for CLIP-L: OpenAI's)."
        )
