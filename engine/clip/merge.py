"""Replace one tower of a full CLIP by a text encoder, by a vision encoder, or by that of another full CLIP."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import UserError
from ..files import AnyPath
from ..notes import Notes
from . import names
from .architecture import NO_HINTS, Architecture, Hints, check_shapes
from .full_clip import FullCLIP, read_metadata
from .gmp import plain_weights
from .health import BROKEN_MERGE, made_by_a_broken_merge, require_finite
from .load import find_model_source
from .tensor_files import read_contents
from .variants.long_clip import LONG_CONTEXT, with_one_table

Tower = Literal["text", "vision"]
_PROJECTIONS: Mapping[Tower, str] = {"text": "text_projection", "vision": "visual.proj"}
# Two training runs of one model leave its projections nearly parallel; those of two models have nothing in common.
_MIN_COSINE = 0.5


def merge_text_encoder(
    text_encoder: AnyPath | Mapping[str, Tensor], full_clip: FullCLIP, *, source: str = "the text encoder"
) -> FullCLIP:
    """Return `full_clip` with the text tower of `text_encoder`: a file, a checkpoint that holds one, or its tensors.

    Reads Hugging Face's and OpenAI's names, with the prefixes of SDXL, SD1.5, SD2 and SD3 checkpoints and of CLIPs that
    ComfyUI saved; of several text encoders it takes the one that is as wide. `text_projection` and `logit_scale` are
    always the full CLIP's: diffusion files hold none that can be trusted. Tensors keep their dtypes. `source` is the
    name of tensors that do not come from a file, for messages.

    Raises `UserError` for a file without a text encoder or with one of another shape, for GmP tensors, values that are
    not finite in what the merged model has, and the mark of a well-known broken merge (every out_proj equal to v_proj).
    """
    encoder, notes = _read(text_encoder, source), Notes()
    base = _plain_base(full_clip, "text", encoder.source, notes)
    tower = _text_tower(encoder, base.architecture.text_width)
    projection = tower.pop(_PROJECTIONS["text"], None)
    _check_tower(tower, "text", base, encoder.source)
    _check_hints(encoder, "text", base.architecture)
    _note_swapped_layers(tower, base, notes)
    _note_ignored_projection(projection, base.state_dict[_PROJECTIONS["text"]], notes)
    return base.derive(tower, step=f"text tower replaced by that of {Path(encoder.source).name}", notes=notes)


def merge_vision_encoder(
    vision_encoder: AnyPath | Mapping[str, Tensor], full_clip: FullCLIP, *, source: str = "the vision encoder"
) -> FullCLIP:
    """Return `full_clip` with the vision tower of `vision_encoder`: a file for ComfyUI's CLIPVisionLoader, or its
    tensors.

    Its own projection comes with it if it belongs to the same model (a cosine above 0.5 with the full CLIP's). If there
    is none, or one of uninitialised memory, the full CLIP's stays, and a note says so. Tensors keep their dtypes.
    Raises `UserError` as `merge_text_encoder` does.
    """
    encoder, notes = _read(vision_encoder, source), Notes()
    base = _plain_base(full_clip, "vision", encoder.source, notes)
    _refuse_gmp(encoder.tensors, encoder.source)
    renamed = _openai_names(encoder.tensors, encoder.source)
    tower = {name: tensor for name, tensor in renamed.items() if names.is_vision_name(name)}
    if not tower:
        raise UserError(
            f"{encoder.source} holds no CLIP vision encoder; give a file that ComfyUI's CLIPVisionLoader opens."
        )
    projection = tower.pop(_PROJECTIONS["vision"], None)
    _check_tower(tower, "vision", base, encoder.source)
    _check_hints(encoder, "vision", base.architecture)
    if projection is not None and _is_of_same_model(projection, base.state_dict[_PROJECTIONS["vision"]]):
        tower[_PROJECTIONS["vision"]] = projection
    elif projection is not None:
        notes.add("The vision encoder's own projection cannot be used; the full CLIP's is used.")
    return base.derive(tower, step=f"vision tower replaced by that of {Path(encoder.source).name}", notes=notes)


def transplant_tower(text_from: FullCLIP, vision_from: FullCLIP) -> FullCLIP:
    """Return the text tower (with its projection and `logit_scale`) of one model with the vision tower of another.

    A model in GmP form is folded unless both are. Raises `UserError` if the two embed into different numbers of
    channels, or compute different activations, and for weights in these towers that are not finite.
    """
    text, vision = text_from.architecture, vision_from.architecture
    for verb, ours, theirs in (
        ("embed into", f"{text.embed_dim} channels", f"{vision.embed_dim} channels"),
        ("compute", text.activation, vision.activation),
    ):
        if ours != theirs:
            raise UserError(
                f"The towers do not fit: the models {verb} {ours} (text) and {theirs} (vision); choose two of one kind."
            )
    for model, is_taken in ((text_from, _is_not_vision), (vision_from, names.is_vision_name)):
        require_finite(model, "The tower was not transplanted", matters=is_taken)
    notes = Notes()
    if text_from.parameterization != vision_from.parameterization:
        text_from = plain_weights(text_from, notes.add, matters=_is_not_vision)
        vision_from = plain_weights(vision_from, notes.add, matters=names.is_vision_name)
    sizes = {
        name: value
        for name, value in vision.as_dict().items()
        if name.startswith("vision_") or name in ("image_size", "patch_size")
    }
    return text_from.derive(
        {name: tensor for name, tensor in vision_from.state_dict.items() if names.is_vision_name(name)},
        dropped=filter(names.is_vision_name, text_from.state_dict),
        step=f"vision tower of {vision_from.provenance.get('source')}",
        notes=(*vision_from.notes, *notes),
        architecture=dataclasses.replace(text, **sizes),
    )


def _is_not_vision(name: str) -> bool:
    return not names.is_vision_name(name)


def keeps(name: str, replaced: Tower) -> bool:
    """Return whether a merge that replaces one tower keeps this tensor of the full CLIP.

    Projections count as kept: the vision encoder's replaces the full CLIP's only if the two are alike.
    """
    belongs = names.is_vision_name if replaced == "vision" else names.is_text_name
    return not belongs(name) or name == _PROJECTIONS[replaced]


def _plain_base(full_clip: FullCLIP, replaced: Tower, source: str, notes: Notes) -> FullCLIP:
    """Return the full CLIP with plain weights; raise `UserError` if what a merge keeps of it is not finite."""
    kept = functools.partial(keeps, replaced=replaced)
    require_finite(full_clip, f"The full CLIP cannot take the {replaced} tower of {source}", matters=kept)
    return plain_weights(full_clip, notes.add, matters=kept)


# ---- reading an encoder ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """The tensors of a file, and what it and a config beside it say about them."""

    source: str
    tensors: Mapping[str, Tensor]
    hints: Hints = NO_HINTS
    config: Hints = NO_HINTS


def _read(encoder: AnyPath | Mapping[str, Tensor], source: str) -> _Encoder:
    if isinstance(encoder, Mapping):
        return _Encoder(source, encoder)
    model = find_model_source(encoder)
    contents = read_contents(model.path)
    try:
        described = read_metadata(contents.metadata)
    except UserError as error:
        raise UserError(f"{encoder} cannot be used: {error}") from error
    if described is None:
        return _Encoder(str(encoder), contents.tensors, contents.hints, model.config)
    own = described[0]
    hints = Hints({"vision_heads": own.vision_heads, "text_heads": own.text_heads}, own.activation)
    return _Encoder(str(encoder), contents.tensors, hints)


def _text_tower(encoder: _Encoder, width: int) -> dict[str, Tensor]:
    """Return the text tower's tensors under OpenAI's names; of several text encoders, that of this width."""
    tensors = names.unwrapped(encoder.tensors)
    tokens_by_prefix = names.text_encoders_in(tensors)
    if not tokens_by_prefix:
        raise UserError(f"{encoder.source} holds no CLIP text encoder; give one, or an SD1.5 or SDXL checkpoint.")
    fitting = (prefix for prefix, tokens in tokens_by_prefix.items() if tensors[tokens].shape[-1:] == (width,))
    prefix = next(fitting, next(iter(tokens_by_prefix)))
    text = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    _refuse_gmp(text, encoder.source)
    return {name: tensor for name, tensor in _openai_names(text, encoder.source).items() if _is_text(name)}


def _refuse_gmp(tensor_names: Iterable[str], source: str) -> None:
    if unfolded := [name for name in tensor_names if name.endswith((".r", ".theta"))]:
        raise UserError(
            f"{source} is in GmP form ({unfolded[0]}), which cannot be merged; fold it first with FoldGmP or "
            "clip-finetune fold."
        )


def _is_text(name: str) -> bool:
    """Return whether an OpenAI name is one of a text tower, known or not: a checkpoint's file holds much else."""
    return name in ("token_embedding.weight", "positional_embedding", _PROJECTIONS["text"]) or name.startswith(
        ("transformer.resblocks.", "ln_final.", "text_model.")
    )


def _openai_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    try:
        return with_one_table(names.to_openai(tensors))
    except KeyError as error:
        raise UserError(f"{source} is not whole: {error.args[0]} is missing; download it again.") from error
    except UserError as error:
        raise UserError(f"{source} cannot be used: {error}") from error


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check_tower(tower: Mapping[str, Tensor], kind: Tower, base: FullCLIP, source: str) -> None:
    """Refuse a tower (without its projection) that does not fit, or that another program has broken."""
    _check_size(tower, kind, base.architecture, source)
    others = {name: tensor for name, tensor in base.state_dict.items() if keeps(name, kind)}
    try:
        check_shapes({name: tuple(tensor.shape) for name, tensor in {**others, **tower}.items()}, base.architecture)
    except UserError as error:
        raise UserError(f"{source} does not fit this full CLIP: {error}") from error
    for name, tensor in tower.items():
        if tensor.dtype not in names.WEIGHT_DTYPES or not torch.isfinite(tensor).all():
            raise UserError(f"{source} is damaged: {name} holds values that are not numbers; download it again.")
    if kind == "text" and made_by_a_broken_merge(tower):
        raise UserError(f"{source} {BROKEN_MERGE} Use the text encoder that it was made from.")


def _check_size(tower: Mapping[str, Tensor], kind: Tower, base: Architecture, source: str) -> None:
    """Refuse a tower of another size by its size, which says more than a list of missing tensors."""
    if kind == "vision" and base.resnet:
        raise UserError(f"{source} does not fit this full CLIP, whose vision tower is a ResNet.")
    block = "visual.transformer.resblocks." if kind == "vision" else "transformer.resblocks."
    norms = [len(t) for n, t in tower.items() if n.startswith(block) and n.endswith(".ln_1.bias") and t.ndim == 1]
    width, layers = (base.vision_width, base.vit.layers) if kind == "vision" else (base.text_width, base.text_layers)
    if norms and (norms[0], len(norms)) != (width, layers):
        raise UserError(
            f"{source} does not fit this full CLIP: its {kind} tower is {norms[0]} wide with {len(norms)} layers, the "
            f"full CLIP's {width} with {layers}. Choose a full CLIP of the same kind."
        )
    table = tower.get("positional_embedding")
    if kind == "text" and table is not None and table.ndim == 2 and len(table) != base.context_length:
        way_out = f"with the context length {LONG_CONTEXT}" if len(table) == LONG_CONTEXT else "without stretching it"
        raise UserError(
            f"{source} does not fit this full CLIP: it reads {len(table)} tokens, the full CLIP {base.context_length}. "
            f"Open the full CLIP {way_out}."
        )


def _check_hints(encoder: _Encoder, kind: Tower, base: Architecture) -> None:
    """Refuse a tower of the right shapes that computes something else than its place in the full CLIP does.

    A config beside the file is believed only if it gives this tower's sizes: it may be another model's.
    """
    sizes, config = base.as_dict(), encoder.config
    given = [name for name in (f"{kind}_width", f"{kind}_layers", f"{kind}_mlp_width") if name in config.sizes]
    if not given or any(config.sizes[name] != sizes[name] for name in given):
        config = NO_HINTS
    heads = f"{kind}_heads"
    for hint, own, words in (
        ({**config.sizes, **encoder.hints.sizes}.get(heads), sizes[heads], "attention heads"),
        (encoder.hints.activation or config.activation, base.activation, "as activation"),
    ):
        if hint not in (None, own):
            raise UserError(
                f"{encoder.source} has {hint} {words}, the full CLIP {own}; together they would compute something "
                "else. Use a full CLIP of the same kind."
            )


# ---- notes -----------------------------------------------------------------------------------------------------------


def _is_of_same_model(projection: Tensor, own: Tensor) -> bool:
    if projection.shape != own.shape or projection.dtype not in names.WEIGHT_DTYPES:
        return False
    if not torch.isfinite(projection).all():
        return False
    return float(F.cosine_similarity(projection.double().flatten(), own.double().flatten(), dim=0)) > _MIN_COSINE


def _note_swapped_layers(tower: Mapping[str, Tensor], base: FullCLIP, notes: Notes) -> None:
    swapped = [layer for layer in range(base.architecture.text_layers) if _looks_swapped(tower, base, layer)]
    if swapped:
        notes.add(
            f"In {len(swapped)} of the text tower's layers the query looks swapped with the key or the value, compared "
            f"with the full CLIP (the first is layer {swapped[0]}); this text encoder may have been converted wrongly."
        )


def _looks_swapped(tower: Mapping[str, Tensor], base: FullCLIP, layer: int) -> bool:
    """Return whether the query is clearly nearer to the base's key (or value), and that to the base's query; towers
    that have nothing in common are about as far either way."""
    name = f"transformer.resblocks.{layer}.attn.in_proj_weight"
    q, k, v = tower[name].float().chunk(3)
    base_q, base_k, base_v = base.state_dict[name].float().chunk(3)

    def crossed(one: Tensor, other: Tensor, base_one: Tensor, base_other: Tensor) -> bool:
        straight = (one - base_one).norm() + (other - base_other).norm()
        return bool((one - base_other).norm() + (other - base_one).norm() < 0.75 * straight)

    return crossed(q, k, base_q, base_k) or crossed(q, v, base_q, base_v)


def _note_ignored_projection(projection: Tensor | None, own: Tensor, notes: Notes) -> None:
    """Note what a text encoder's own projection is, unless it equals the full CLIP's, which is used in any case."""
    if projection is None or projection.dtype not in names.WEIGHT_DTYPES:
        return
    given = projection.float()
    if given.shape == own.shape and torch.allclose(given, own.float(), atol=1e-3):
        return
    if given.shape == own.t().shape and torch.allclose(given, own.float().t(), atol=1e-3):
        what = "the transpose of the full CLIP's"
    elif not torch.isfinite(given).all():
        what = "not finite"
    else:
        identity = given.ndim == 2 and torch.equal(given, torch.eye(*given.shape))
        what = "an identity" if identity else "another one"
    notes.add(f"The text encoder's own projection is {what}; it was ignored, and the full CLIP's is used.")
