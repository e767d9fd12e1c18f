"""One tower of a full CLIP replaced: by a text encoder's, by a vision encoder's, or by that of another full CLIP."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError, one_line
from . import names
from .architecture import Architecture, check_shapes
from .full_clip import FullCLIP, our_metadata
from .gmp import fold_gmp
from .health import BROKEN_MERGE, made_by_a_broken_merge
from .sources import find_model_source
from .tensor_files import read_contents
from .variants.long_clip import LONG_CONTEXT, with_one_table

_PROJECTION = "text_projection"
_VISION_PROJECTION = "visual.proj"
# Two training runs of one model leave its projections nearly parallel; those of two models have nothing in common.
_SAME_PROJECTION = 0.5


def merge_text_encoder(
    text_encoder: str | os.PathLike | Mapping[str, Tensor], full_clip: FullCLIP, *, source: str = "the text encoder"
) -> FullCLIP:
    """`full_clip` with the text tower of `text_encoder`: a file, a checkpoint that holds one, or its tensors.

    Known are Hugging Face's names and OpenAI's, with the prefixes of SDXL, SD1.5, SD2 and SD3 checkpoints and of
    ComfyUI's saved CLIPs; of several text encoders the one that is as wide is taken. `text_projection` and
    `logit_scale` always are the full CLIP's: diffusion files carry none that can be trusted. Tensors keep their dtypes.
    `source` names tensors that do not come from a file, for messages.

    Raises `UserError` for a file without a text encoder or with one of another shape, for GmP tensors, values that
    are not finite, and the mark of a well-known broken merge (every out_proj equal to v_proj).
    """
    piece = _read(text_encoder, source)
    source = piece.source
    base, notes = _plain(full_clip)
    tower = _text_tower(piece, base.architecture.text_width)
    projection = tower.pop(_PROJECTION, None)
    _check(tower, base, source)
    _check_told(piece, base.architecture, "text")
    notes = _warnings(tower, projection, base) + notes
    return base.derive(tower, step=f"text tower replaced by that of {Path(source).name}", notes=notes)


def merge_vision_encoder(
    vision_encoder: str | os.PathLike | Mapping[str, Tensor], full_clip: FullCLIP, *, source: str = "the vision encoder"
) -> FullCLIP:
    """`full_clip` with the vision tower of `vision_encoder`: a file for ComfyUI's CLIPVisionLoader, or its tensors.

    Its own projection is taken too if it is one of the same model (the cosine with the full CLIP's is above 0.5);
    where there is none, or one of uninitialised memory, the full CLIP's stays, and a note says so. Tensors keep their
    dtypes. Raises `UserError` as `merge_text_encoder` does.
    """
    piece = _read(vision_encoder, source)
    source = piece.source
    base, notes = _plain(full_clip)
    _refuse_gmp(piece.tensors, source)
    tower = {name: t for name, t in _openai_names(piece.tensors, source).items() if names.is_vision_name(name)}
    if not tower:
        raise UserError(f"{source} holds no CLIP vision encoder; give a file that ComfyUI's CLIPVisionLoader opens.")
    projection = tower.pop(_VISION_PROJECTION, None)
    _check(tower, base, source)
    _check_told(piece, base.architecture, "vision")
    if projection is not None and _of_the_same_model(projection, base.state_dict[_VISION_PROJECTION]):
        tower[_VISION_PROJECTION] = projection
    elif projection is not None:
        notes.append("The vision encoder's own projection is of no use; the full CLIP's is used.")
    return base.derive(tower, step=f"vision tower replaced by that of {Path(source).name}", notes=notes)


def transplant_tower(text_from: FullCLIP, vision_from: FullCLIP) -> FullCLIP:
    """The text tower (with its projection and `logit_scale`) of one model and the vision tower (with its) of another.

    A model in GmP form is folded unless both are. Raises `UserError` if the two do not embed into equally many
    channels, or compute different activations.
    """
    text, vision = text_from.architecture, vision_from.architecture
    for what, one, other in (
        ("embed into", f"{text.embed_dim} channels", f"{vision.embed_dim} channels"),
        ("compute", text.activation, vision.activation),
    ):
        if one != other:
            raise UserError(
                f"The towers do not fit: the models {what} {one} (text) and {other} (vision); choose two of one kind."
            )
    notes: list[str] = []
    if text_from.parameterization != vision_from.parameterization:
        (text_from, notes), (vision_from, more) = _plain(text_from), _plain(vision_from)
        notes += more
    tower = {name: tensor for name, tensor in vision_from.state_dict.items() if names.is_vision_name(name)}
    rest = {name: tensor for name, tensor in text_from.state_dict.items() if not names.is_vision_name(name)}
    sizes = {
        name: value
        for name, value in vision.as_dict().items()
        if name.startswith("vision_") or name in ("image_size", "patch_size")
    }
    history = [*text_from.provenance.get("history", ()), f"vision tower of {vision_from.provenance.get('source')}"]
    return FullCLIP(
        dataclasses.replace(text, **sizes),
        rest | tower,
        {**text_from.provenance, "history": history},
        tuple(dict.fromkeys((*text_from.notes, *vision_from.notes, *notes))),
    )


def _plain(full_clip: FullCLIP) -> tuple[FullCLIP, list[str]]:
    if full_clip.parameterization == "linear":
        return full_clip, []
    return fold_gmp(full_clip), ["The full CLIP was in GmP form; it was folded to plain weights first."]


class _Piece(NamedTuple):
    """What a tower comes from: its tensors, and what the file and a configuration beside it tell, by the names of
    `Architecture`'s fields."""

    source: str
    tensors: Mapping[str, Tensor]
    told: Mapping[str, Any]
    beside: Mapping[str, Any]


def _read(given: str | os.PathLike | Mapping[str, Tensor], source: str) -> _Piece:
    if isinstance(given, Mapping):
        return _Piece(source, given, {}, {})
    found = find_model_source(given)
    contents = read_contents(found.path)
    ours = our_metadata(contents.metadata, found.path)
    if ours is not None:
        return _Piece(str(given), contents.tensors, ours["architecture"], {})
    return _Piece(str(given), contents.tensors, contents.told, found.told)


def _check_told(piece: _Piece, base: Architecture, tower: str) -> None:
    """Refuse a tower, of the right shapes, that computes otherwise than its place in the full CLIP does.

    A configuration beside it is believed only if it tells this tower's sizes: another's is of another model.
    """
    own = base.as_dict()
    sizes = [name for name in (f"{tower}_width", f"{tower}_layers", f"{tower}_mlp_width") if name in piece.beside]
    believed = bool(sizes) and all(piece.beside[name] == own[name] for name in sizes)
    told = {**(piece.beside if believed else {}), **piece.told}
    for name, words in ((f"{tower}_heads", "attention heads"), ("activation", "as activation")):
        if told.get(name, own[name]) != own[name]:
            raise UserError(
                f"{piece.source} has {one_line(told[name], 60)} {words}, the full CLIP {own[name]}; together "
                "they would compute something else. Use a full CLIP of the same kind."
            )


def _text_tower(piece: _Piece, width: int) -> dict[str, Tensor]:
    """The text tower's tensors under OpenAI's names; of several text encoders, that of this width."""
    tensors, source = names.unwrapped(piece.tensors), piece.source
    found = names.text_encoders_in(tensors)
    if not found:
        raise UserError(f"{source} holds no CLIP text encoder; give one, or an SD1.5 or SDXL checkpoint.")
    fitting = [prefix for prefix, tokens in found.items() if tensors[tokens].shape[-1:] == (width,)]
    prefix = (fitting or list(found))[0]
    text = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    _refuse_gmp(text, source)
    return {name: tensor for name, tensor in _openai_names(text, source).items() if _is_text(name)}


def _refuse_gmp(tensors: Iterable[str], source: str) -> None:
    if unfolded := [name for name in tensors if name.endswith((".r", ".theta"))]:
        raise UserError(
            f"{source} is in GmP form ({unfolded[0]}), which no piece may be; fold it first with FoldGmP or "
            "clip-finetune fold."
        )


def _is_text(name: str) -> bool:
    """Whether an OpenAI name is one of a text tower, known or not; a checkpoint's file holds much else."""
    return name in ("token_embedding.weight", "positional_embedding", _PROJECTION) or name.startswith(
        ("transformer.resblocks.", "ln_final.", "text_model.")
    )


def _openai_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    try:
        return with_one_table(names.to_openai(tensors))
    except KeyError as error:
        raise UserError(f"{source} is not whole: {error.args[0]} is missing; get it anew.") from error
    except UserError as error:
        raise UserError(f"{source} cannot be used: {error}") from error


def _check(tower: dict[str, Tensor], base: FullCLIP, source: str) -> None:
    """Refuse a tower (without its projection) that does not fit, or that other programs have broken."""
    vision = names.is_vision_name(next(iter(tower), ""))
    _check_sizes(tower, base.architecture, "vision" if vision else "text", source)
    own = names.is_vision_name if vision else names.is_text_name
    projection = (_VISION_PROJECTION, _PROJECTION)
    rest = {name: t for name, t in base.state_dict.items() if not own(name) or name in projection}
    try:
        check_shapes({name: tuple(tensor.shape) for name, tensor in (rest | tower).items()}, base.architecture)
    except UserError as error:
        raise UserError(f"{source} does not fit this full CLIP: {error}") from error
    for name, tensor in tower.items():
        if tensor.dtype not in names.WEIGHT_DTYPES or not torch.isfinite(tensor).all():
            raise UserError(f"{source} is damaged: {name} holds values that are not numbers; get the file anew.")
    if not vision and made_by_a_broken_merge(tower):
        raise UserError(f"{source} {BROKEN_MERGE} Use the text encoder that it was made from.")


def _check_sizes(tower: Mapping[str, Tensor], base: Architecture, which: str, source: str) -> None:
    """Refuse a tower of another size by what it is, not by the tensors that are missing for it."""
    if which == "vision" and base.resnet:
        raise UserError(f"{source} does not fit this full CLIP, whose vision tower is a ResNet.")
    block = "visual.transformer.resblocks." if which == "vision" else "transformer.resblocks."
    norms = [len(t) for n, t in tower.items() if n.startswith(block) and n.endswith(".ln_1.bias") and t.ndim == 1]
    wanted = getattr(base, f"{which}_width"), getattr(base, f"{which}_layers")
    if norms and (norms[0], len(norms)) != wanted:
        raise UserError(
            f"{source} does not fit this full CLIP: its {which} tower is {norms[0]} wide with {len(norms)} layers, the "
            f"full CLIP's {wanted[0]} with {wanted[1]}. Choose a full CLIP of the same kind."
        )
    table = tower.get("positional_embedding")
    if which == "text" and table is not None and table.ndim == 2 and len(table) != base.context_length:
        way_out = f"with the context length {LONG_CONTEXT}" if len(table) == LONG_CONTEXT else "without stretching it"
        raise UserError(
            f"{source} does not fit this full CLIP: it reads {len(table)} tokens, the full CLIP {base.context_length}. "
            f"Open the full CLIP {way_out}."
        )


def _of_the_same_model(projection: Tensor, own: Tensor) -> bool:
    if projection.shape != own.shape or projection.dtype not in names.WEIGHT_DTYPES:
        return False
    if not torch.isfinite(projection).all():
        return False
    return float(F.cosine_similarity(projection.double().flatten(), own.double().flatten(), dim=0)) > _SAME_PROJECTION


def _warnings(tower: Mapping[str, Tensor], projection: Tensor | None, base: FullCLIP) -> list[str]:
    notes = []
    swapped = [layer for layer in range(base.architecture.text_layers) if _looks_swapped(tower, base, layer)]
    if swapped:
        notes.append(
            f"In {len(swapped)} of the text tower's layers the query looks swapped with the key or the value, compared "
            f"with the full CLIP (the first is layer {swapped[0]}); this text encoder may have been converted wrongly."
        )
    own = base.state_dict["text_projection"]
    if projection is None or projection.dtype not in names.WEIGHT_DTYPES:
        return notes
    given = projection.float()
    if given.shape == own.shape and torch.allclose(given, own.float(), atol=1e-3):
        return notes
    if given.shape == own.t().shape and torch.allclose(given, own.float().t(), atol=1e-3):
        what = "the transpose of the full CLIP's"
    elif not torch.isfinite(given).all():
        what = "not finite"
    else:
        what = "an identity" if _is_identity(given) else "another one"
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
