"""A tower as other programs load it: its tensors under Hugging Face's names, if they would compute the same with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import UserError
from ..files import AnyPath
from ..notes import OnNote, ignore_note
from . import names
from .architecture import Activation, Architecture
from .full_clip import FullCLIP
from .gmp import plain_weights
from .health import require_finite
from .tensor_files import MIXED, cast

_PROJECTION = "text_projection.weight"
# (width, layers, MLP width, heads) of the text towers that diffusion models load.
CLIP_L = (768, 12, 3072, 12)
CLIP_G = (1280, 32, 5120, 20)
# The name of each, the activation that image programs compute in it, the model that has it, and who loads it.
_TEXT_HOSTS: dict[tuple[int, ...], tuple[str, Activation, str, str]] = {
    CLIP_L: ("CLIP-L", "quick_gelu", "ViT-L/14", "SD1.5 or SDXL"),
    CLIP_G: ("CLIP-G", "gelu", "OpenCLIP's ViT-bigG/14", "SDXL"),
}
# (width, layers, MLP width, heads, patch size, image size, embedding width) of the vision towers that ComfyUI knows.
_VISION_HOSTS: dict[tuple[int, ...], tuple[str, Activation]] = {
    (1024, 24, 4096, 16, 14, 224, 768): ("ViT-L/14", "quick_gelu"),
    (1024, 24, 4096, 16, 14, 336, 768): ("ViT-L/14@336", "quick_gelu"),
    (1280, 32, 5120, 16, 14, 224, 1024): ("ViT-H/14", "gelu"),
    (1664, 48, 8192, 16, 14, 224, 1280): ("ViT-bigG/14", "gelu"),
}


def text_sizes(architecture: Architecture) -> tuple[int, int, int, int]:
    """Return (width, layers, MLP width, heads) of the text tower, to compare with `CLIP_L` and `CLIP_G`."""
    return architecture.text_width, architecture.text_layers, architecture.text_mlp_width, architecture.text_heads


def require_text_tower(full_clip: FullCLIP, sizes: tuple[int, int, int, int]) -> None:
    """Raise `UserError` unless the text tower is `CLIP_L` (SD1.5, SDXL, SD3, Flux) or `CLIP_G` (SDXL, SD3), and image
    programs compute its activation."""
    width, layers, mlp_width, heads = text_sizes(full_clip.architecture)
    if (width, layers, mlp_width, heads) != sizes:
        name, _, model, programs = _TEXT_HOSTS[sizes]
        raise UserError(
            f"This model's text tower is not a {name}: it is {width} wide with {layers} layers, {heads} heads and an "
            f"MLP width of {mlp_width}, where {name} has {sizes[0]}, {sizes[1]}, {sizes[3]} and {sizes[2]}. Train "
            f"{model} to get one for {programs}."
        )
    _check_text_activation(full_clip.architecture)


def text_encoder_state_dict(
    full_clip: FullCLIP, *, dtype: str | None = None, on_note: OnNote = ignore_note
) -> dict[str, Tensor]:
    """Return the text tower's tensors under Hugging Face's names, without `logit_scale`; a GmP model is folded.

    `dtype` is fp16, bf16 or fp32; None keeps each tensor's own. Raises `UserError` for an activation that image
    programs would run wrongly, and for weights of either tower that are not finite.
    """
    _check_text_activation(full_clip.architecture)
    return hf_state_dict(full_clip, "The text encoder", dtype=dtype, on_note=on_note, belongs=names.is_text_name)


def vision_encoder_state_dict(
    full_clip: FullCLIP, *, dtype: str | None = None, on_note: OnNote = ignore_note
) -> dict[str, Tensor]:
    """Return the vision tower's tensors under Hugging Face's names, as ComfyUI's CLIPVisionLoader reads them.

    As `text_encoder_state_dict`; raises `UserError` also for a tower that ComfyUI does not know.
    """
    a = full_clip.architecture
    host = None
    if not a.resnet:
        sizes = (a.vision_width, a.vit.layers, a.vit.mlp_width, a.vision_heads, a.vit.patch_size, a.image_size)
        host = _VISION_HOSTS.get((*sizes, a.embed_dim))
    if host is None:
        known = ", ".join(name for name, _ in _VISION_HOSTS.values())
        raise UserError(f"ComfyUI's CLIPVisionLoader does not know this vision tower; it opens those of {known}.")
    _check_activation(f"{host[0]}'s vision tower", a.activation, host[1])
    return hf_state_dict(full_clip, "The vision encoder", dtype=dtype, on_note=on_note, belongs=names.is_vision_name)


def hf_state_dict(
    full_clip: FullCLIP, what: AnyPath, *, dtype: str | None, on_note: OnNote, belongs: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Return the tensors that belong, by their OpenAI names, under Hugging Face's; a GmP model is folded with a note.

    Raises `UserError`, which begins with `what`, for weights that are not finite or too large for the dtype.
    """
    if dtype == MIXED:
        raise UserError(f"The dtype {MIXED} is one of full CLIPs under OpenAI's names; choose fp16, bf16 or fp32.")
    require_finite(full_clip, f"{what} was not written")
    state = plain_weights(full_clip, on_note).state_dict
    return cast(names.to_hf({name: tensor for name, tensor in state.items() if belongs(name)}), dtype, what)


def mix_text_encoders(
    original: Mapping[str, Tensor], trained: Mapping[str, Tensor], strength: float, *, projection: bool = False
) -> dict[str, Tensor]:
    """Return original + strength · (trained − original) in the trained tensors' dtypes, under Hugging Face's names.

    Unless `projection`, the projection stays the trained one: the CLIP-L of image models has none that can be trusted,
    while CLIP-G has. Raises `UserError` if the two differ in shape or the mix holds values that are not finite.
    """
    mixed = {}
    for name, tensor in trained.items():
        if name == _PROJECTION and not projection:
            mixed[name] = tensor
            continue
        if name not in original or original[name].shape != tensor.shape:
            raise UserError(f"The connected CLIP has no {name} of this shape, so the two cannot be mixed.")
        mixed[name] = torch.lerp(original[name].double(), tensor.double(), float(strength)).to(tensor.dtype)
        if not torch.isfinite(mixed[name]).all():
            raise UserError(
                f"The mixed text encoder was not made: {name} would hold values that are not numbers. "
                "Lower strength, choose dtype fp32, or connect another clip."
            )
    return mixed


def _check_text_activation(architecture: Architecture) -> None:
    if host := _TEXT_HOSTS.get(text_sizes(architecture)):
        _check_activation(host[0], architecture.activation, host[1])


def _check_activation(tower: str, own: str, hosts: str) -> None:
    if own != hosts:
        raise UserError(
            f"This {tower} was trained with {own}, but image programs run every {tower} with {hosts}: the export would "
            "give wrong images. Use a model with that activation (for ViT-L/14: OpenAI's)."
        )
