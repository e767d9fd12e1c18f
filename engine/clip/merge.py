"""A text encoder put into a full CLIP, which gives the vision tower, both projections and `logit_scale`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from . import names
from .architecture import check_shapes
from .files import read_tensors
from .full_clip import FullCLIP, find_file
from .gmp import fold_gmp

_PROJECTION = "text_projection.weight"


def merge_text_encoder(
    text_encoder: str | os.PathLike | Mapping[str, Tensor], full_clip: FullCLIP, *, source: str = "the text encoder"
) -> FullCLIP:
    """`full_clip` with the text tower of `text_encoder`: a file, a checkpoint that holds one, or its tensors.

    Known are Hugging Face's names with the prefixes of SDXL and SD1.5 checkpoints and of ComfyUI's saved CLIPs, and
    OpenAI's names. `text_projection` and `logit_scale` always are the full CLIP's: diffusion files carry none that
    can be trusted. Tensors keep their dtypes. `source` names tensors that do not come from a file, for messages.

    Raises `UserError` for a file without a text encoder or with one of another shape, for GmP tensors, values that
    are not finite, and the mark of a well-known broken merge (every out_proj equal to v_proj).
    """
    if not isinstance(text_encoder, Mapping):
        source = str(text_encoder)
        text_encoder, _ = read_tensors(find_file(text_encoder)[0])
    base = fold_gmp(full_clip) if full_clip.parameterization == "gmp" else full_clip
    text = _find_text_tower(names.unwrapped(text_encoder), source)
    projection = text.pop(_PROJECTION, None)
    tower = _to_openai(text, source)
    _check(tower, base, source)
    notes = _warnings(tower, projection, base)
    if base is not full_clip:
        notes.append("The full CLIP was in GmP form; it was folded to plain weights first.")
    return base.derive(tower, step=f"text tower replaced by that of {Path(source).name}", notes=notes)


def _find_text_tower(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The text tower's tensors under Hugging Face's or OpenAI's names, without a prefix."""
    for prefix in names.TEXT_ENCODER_PREFIXES:
        if f"{prefix}text_model.embeddings.token_embedding.weight" in tensors:
            wanted = (f"{prefix}text_model.", f"{prefix}{_PROJECTION}")
            return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(wanted)}
    if "token_embedding.weight" in tensors:
        found = {name: tensor for name, tensor in tensors.items() if names.is_text_name(name)}
        if "text_projection" in found:
            found[_PROJECTION] = found.pop("text_projection").t()
        return found
    raise UserError(
        f"{source} holds no CLIP text encoder; give a text encoder file, or an SD1.5 or SDXL checkpoint "
        f"(looked for {' and '.join(prefix + 'text_model.' for prefix in names.TEXT_ENCODER_PREFIXES)})."
    )


def _to_openai(text: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    unfolded = [name for name in text if name.endswith((".r", ".theta"))]
    if unfolded:
        raise UserError(
            f"{source} is in GmP form ({unfolded[0]}), which no text encoder may be; fold it first with FoldGmP or "
            "clip-finetune fold."
        )
    if not any(name.startswith("text_model.") for name in text):
        return text
    try:
        return names.from_hf(text)
    except KeyError as error:
        raise UserError(f"{source} is not a whole text encoder: {error.args[0]} is missing; get it anew.") from error


def _check(tower: dict[str, Tensor], base: FullCLIP, source: str) -> None:
    rest = {name: tensor for name, tensor in base.state_dict.items() if name not in tower and not _in_tower(name)}
    try:
        check_shapes({name: tuple(tensor.shape) for name, tensor in (rest | tower).items()}, base.architecture)
    except UserError as error:
        raise UserError(f"{source} does not fit this full CLIP: {error}") from error
    for name, tensor in tower.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise UserError(f"{source} is damaged: {name} holds values that are not numbers; get the file anew.")
    if all(_out_equals_v(tower, layer) for layer in range(base.architecture.text_layers)):
        raise UserError(
            f"{source} was made by a broken merge script: in every layer attn.out_proj equals v_proj. "
            "Use the text encoder that it was made from."
        )


def _in_tower(name: str) -> bool:
    """True for what a text encoder must bring itself: all of the text tower but the projection."""
    return names.is_text_name(name) and name != "text_projection"


def _out_equals_v(tower: Mapping[str, Tensor], layer: int) -> bool:
    attention = f"transformer.resblocks.{layer}.attn."
    return torch.equal(tower[f"{attention}in_proj_weight"].chunk(3)[2], tower[f"{attention}out_proj.weight"])


def _warnings(tower: Mapping[str, Tensor], projection: Tensor | None, base: FullCLIP) -> list[str]:
    notes = []
    swapped = [layer for layer in range(base.architecture.text_layers) if _looks_swapped(tower, base, layer)]
    if swapped:
        notes.append(
            f"In {len(swapped)} of the text tower's layers the query looks swapped with the key or the value, compared "
            f"with the full CLIP (the first is layer {swapped[0]}); this text encoder may have been converted wrongly."
        )
    own = base.state_dict["text_projection"]
    if projection is None:
        return notes
    given = projection.float()
    if given.shape == own.shape and torch.allclose(given, own.float(), atol=1e-3) and not torch.equal(own, own.t()):
        notes.append(
            "The text encoder's projection is the transpose of the full CLIP's; it was ignored, and the full CLIP's is "
            "used."
        )
    elif given.shape != own.t().shape or not torch.allclose(given, own.float().t(), atol=1e-3):
        what = (
            "not finite" if not torch.isfinite(given).all() else "an identity" if _is_identity(given) else "another one"
        )
        notes.append(f"The text encoder's own projection is {what}; it was ignored, and the full CLIP's is used.")
    return notes


def _is_identity(projection: Tensor) -> bool:
    return projection.ndim == 2 and torch.equal(projection, torch.eye(*projection.shape))


def _looks_swapped(tower: Mapping[str, Tensor], base: FullCLIP, layer: int) -> bool:
    """True where the query is clearly nearer to the base's key (or value), and that to the base's query; towers that
    have nothing in common are about as far either way."""
    name = f"transformer.resblocks.{layer}.attn.in_proj_weight"
    q, k, v = tower[name].float().chunk(3)
    base_q, base_k, base_v = base.state_dict[name].float().chunk(3)

    def crossed(one: Tensor, other: Tensor, base_one: Tensor, base_other: Tensor) -> bool:
        straight = (one - base_one).norm() + (other - base_other).norm()
        return bool((one - base_other).norm() + (other - base_one).norm() < 0.75 * straight)

    return crossed(q, k, base_q, base_k) or crossed(q, v, base_q, base_v)
