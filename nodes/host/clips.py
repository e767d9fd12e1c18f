"""CLIP and CLIP_VISION sockets: made from files and tensors, read as tensors, and with one text encoder replaced.

A CLIP of ComfyUI holds one to four text encoders by name (`clip_l`, `clip_g`, …), here called its parts. Tensors have
Hugging Face's names throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import comfy.clip_vision
import comfy.sd
import folder_paths
import torch

from ...engine.errors import UserError

CLIP_L, CLIP_G = "clip_l", "clip_g"
_POSITIONS = "text_model.embeddings.position_embedding.weight"


def clip_from_file(path: Path) -> comfy.sd.CLIP:
    """Return a CLIP with this text encoder alone, as CLIPLoader does."""
    return comfy.sd.load_clip(
        [str(path)], folder_paths.get_folder_paths("embeddings"), comfy.sd.CLIPType.STABLE_DIFFUSION
    )


def clip_from_tensors(*text_encoders: Mapping[str, torch.Tensor]) -> comfy.sd.CLIP:
    """Return a CLIP with one text encoder, or with SDXL's two."""
    copies = [dict(tensors) for tensors in text_encoders]  # ComfyUI changes the dicts that it gets
    return comfy.sd.load_text_encoder_state_dicts(
        copies, folder_paths.get_folder_paths("embeddings"), comfy.sd.CLIPType.STABLE_DIFFUSION
    )


def text_encoder_tensors(clip: comfy.sd.CLIP, part: str) -> dict[str, torch.Tensor]:
    """Return one text encoder of a CLIP, with its LoRAs applied, as copies on the CPU."""
    clip.load_model()
    prefix = f"{part}.transformer."
    tensors = {
        name.removeprefix(prefix): torch.as_tensor(tensor).detach().to("cpu", copy=True)
        for name, tensor in clip.state_dict_for_saving().items()
        if name.startswith(prefix)
    }
    if not tensors:
        raise _missing(part)
    return tensors


def replace_text_encoder(clip: comfy.sd.CLIP, part: str, tensors: Mapping[str, torch.Tensor]) -> comfy.sd.CLIP:
    """Return a clone of the CLIP with one text encoder replaced; the original and the other parts stay untouched.

    A CLIP-L with another number of positions (Long-CLIP) does not fit into a clone: a new CLIP is built, for SD1.5 and
    SDXL only. Shapes are checked here because ComfyUI would ignore unknown names and fail on wrong shapes much later.
    """
    present, prefix = clip.patcher.model.state_dict(), f"{part}.transformer."
    unknown = [name for name in tensors if prefix + name not in present]
    if len(unknown) == len(tensors):
        raise _missing(part)
    if unknown:
        raise UserError(f"The connected CLIP has no {unknown[0]}; connect another one.")
    for name, tensor in tensors.items():
        shape = tuple(present[prefix + name].shape)
        if shape == tuple(tensor.shape):
            continue
        if name == _POSITIONS and part == CLIP_L and shape[1:] == tuple(tensor.shape[1:]):
            return _rebuild_with_positions(clip, tensors)
        raise UserError(
            f"The {_display_name(part)} of the connected CLIP has another shape: {name} is {shape} there and "
            f"{tuple(tensor.shape)} in the trained model. Connect a CLIP of the kind that was trained."
        )
    clone = clip.clone()
    applied = clone.add_patches({prefix + name: ("set", (tensor,)) for name, tensor in tensors.items()})
    if rejected := [name for name in tensors if prefix + name not in applied]:
        raise UserError(f"ComfyUI rejected {rejected[0]} of the new {_display_name(part)}; nothing was replaced.")
    return clone


def _rebuild_with_positions(clip: comfy.sd.CLIP, clip_l: Mapping[str, torch.Tensor]) -> comfy.sd.CLIP:
    kind = type(clip.cond_stage_model).__name__
    if kind not in ("SD1ClipModel", "SDXLClipModel"):
        raise UserError(
            f"The trained text encoder reads {len(clip_l[_POSITIONS])} tokens, which ComfyUI supports for SD1.5 and "
            "SDXL only. Connect the clip of such a model, or none."
        )
    others = [text_encoder_tensors(clip, CLIP_G)] if kind == "SDXLClipModel" else []
    rebuilt = clip_from_tensors(clip_l, *others)
    rebuilt.clip_layer(clip.layer_idx)
    return rebuilt


def _missing(part: str) -> UserError:
    models = "an SD1.5, SDXL, SD3 or Flux model" if part == CLIP_L else "an SDXL or SD3 model"
    return UserError(f"The connected CLIP holds no {_display_name(part)}; connect that of {models}.")


def _display_name(part: str) -> str:
    return part.upper().replace("_", "-")


def vision_encoder_tensors(clip_vision: comfy.clip_vision.ClipVisionModel) -> dict[str, torch.Tensor]:
    """Return the tensors of a CLIP_VISION as copies on the CPU."""
    tensors = clip_vision.get_sd()
    if not any(name.startswith("vision_model.") for name in tensors):
        raise UserError("The connected clip_vision is not a CLIP's vision tower; connect that of a ViT-L/14.")
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def vision_activation(clip_vision: comfy.clip_vision.ClipVisionModel) -> str | None:
    """Return the activation that ComfyUI computes in the MLPs of a CLIP_VISION, where it is known."""
    return clip_vision.config.get("hidden_act")
