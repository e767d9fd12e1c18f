"""What is wrong with a model's tensors, found before another program loads them and makes noise of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import UserError
from . import names
from .architecture import Architecture, Shape, counted

_MARK = "text_model.embeddings.token_embedding.weight"
_LAYER = "text_model.encoder.layers."
BROKEN_MERGE = "was made by a broken merge script: in every layer of the text tower attn.out_proj equals v_proj."


def not_numbers(tensors: Mapping[str, Tensor]) -> list[str]:
    """A sentence if tensors hold NaN or infinite values."""
    broken = [name for name, t in tensors.items() if t.dtype in names.WEIGHT_DTYPES and not torch.isfinite(t).all()]
    if not broken:
        return []
    return [f"{counted(broken, 'tensor')} not made of numbers only (NaN or infinite); the first is {broken[0]}."]


def made_by_a_broken_merge(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a text tower under OpenAI's names bears the mark of a well-known broken merge: v_proj in every out_proj.

    Of a sound one, only the first layer is read.
    """
    layers = [name for name in tensors if name.startswith("transformer.") and name.endswith(".attn.in_proj_weight")]
    return bool(layers) and all(_out_equals_v(tensors, name.removesuffix("in_proj_weight")) for name in layers)


def _out_equals_v(tensors: Mapping[str, Tensor], attention: str) -> bool:
    out, joined = tensors.get(f"{attention}out_proj.weight"), tensors[f"{attention}in_proj_weight"]
    if out is None or out.ndim != 2 or joined.shape[:1] != (3 * len(out),):
        return False
    return torch.equal(joined[-len(out) :], out)


def describe_text_encoder(tensors: Mapping[str, Tensor]) -> dict:
    """Architecture, parameterization and problems of a text encoder's file, under whatever names its tensors have."""
    tensors = names.unwrapped(tensors)
    prefix = next((name.removesuffix(_MARK) for name in tensors if name.endswith(_MARK)), None)
    problems = []
    if prefix is not None:
        if prefix:
            problems.append(
                f"The names begin with {prefix!r}: ComfyUI's CLIP loaders would read nothing from it and make noise. "
                "Rename its tensors so that they begin with text_model."
            )
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        gmp = any(name.endswith((".r", ".theta")) for name in tensors)
        problems += ([] if gmp else _gaps(tensors, _sizes(tensors, True))) + _copied_values(tensors)
    else:
        gmp = any(name.endswith((".mlp.c_fc.theta", ".mlp.c_fc.r")) for name in tensors)
    if gmp:
        problems.append("It is in GmP form, which no image program reads; fold it first.")
    return {
        "architecture": _sizes(tensors, prefix is not None),
        "parameterization": "gmp" if gmp else "linear",
        "problems": problems + not_numbers(tensors),
    }


def _sizes(tensors: Mapping[str, Tensor], hf: bool) -> dict[str, int]:
    token, position, block = (
        (_MARK, "text_model.embeddings.position_embedding.weight", _LAYER)
        if hf
        else ("token_embedding.weight", "positional_embedding", "transformer.resblocks.")
    )
    layers = {name[len(block) :].split(".")[0] for name in tensors if name.startswith(block)}
    sizes = {"text_layers": len(layers)}
    if token in tensors and tensors[token].ndim == 2:
        sizes |= {"vocab_size": tensors[token].shape[0], "text_width": tensors[token].shape[1]}
    if position in tensors and tensors[position].ndim == 2:
        sizes["context_length"] = tensors[position].shape[0]
    return sizes


def _gaps(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> list[str]:
    """Missing or misshapen tensors, by what a tower of these sizes has."""
    if "text_width" not in sizes:
        return ["Its token embeddings are not a table."]
    try:
        wanted = _wanted(tensors, sizes)
    except UserError as error:  # sizes that no model has
        return [str(error)]
    missing = [name for name in wanted if name not in tensors]
    wrong = [name for name, shape in wanted.items() if name in tensors and tuple(tensors[name].shape) != shape]
    found = []
    if missing:
        found.append(f"{counted(missing, 'tensor')} missing; the first is {missing[0]}.")
    if wrong:
        found.append(f"{counted(wrong, 'tensor')} of another shape than this tower's; the first is {wrong[0]}.")
    return found


def _wanted(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Shape]:
    mlp = tensors.get(f"{_LAYER}0.mlp.fc1.bias")
    mlp_width = len(mlp) if mlp is not None and mlp.ndim == 1 else 4 * sizes["text_width"]
    tower = Architecture(
        **{"context_length": 77, **sizes, "text_layers": max(1, sizes["text_layers"])},
        text_mlp_width=mlp_width,
        text_heads=1,
        activation="quick_gelu",
        # Only the text tower is looked at.
        embed_dim=1,
        image_size=1,
        patch_size=1,
        vision_width=1,
        vision_layers=1,
        vision_heads=1,
        vision_mlp_width=1,
    )
    return {name: shape for name, shape in text_shapes(tower).items() if name != "text_projection.weight"}


def _copied_values(tensors: Mapping[str, Tensor]) -> list[str]:
    """The mark of a well-known broken merge, under Hugging Face's names."""
    values = [name for name in tensors if name.endswith(".self_attn.v_proj.weight")]
    others = [name.replace("v_proj", "out_proj") for name in values]
    copied = all(o in tensors and torch.equal(tensors[v], tensors[o]) for v, o in zip(values, others, strict=True))
    return [f"It {BROKEN_MERGE}"] if values and copied else []


def text_shapes(architecture: Architecture) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a text encoder file's tensors for this architecture."""
    expected = {
        name: torch.empty(shape, device="meta")
        for name, shape in architecture.shapes("linear").items()
        if names.is_text_name(name)
    }
    return {name: tuple(tensor.shape) for name, tensor in names.to_hf(expected).items()}
