"""Find what is wrong with a model's tensors, before another program loads them and produces noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import AnyPath
from . import names
from .architecture import Architecture, Shape, counted, parameterization_of
from .full_clip import FullCLIP

_TOKENS = "text_model.embeddings.token_embedding.weight"
_LAYER = "text_model.encoder.layers."
_MAX_LISTED = 3  # tensors that an error names
BROKEN_MERGE = "was made by a broken merge script: in every layer of the text tower attn.out_proj equals v_proj."


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of weights that hold NaN or infinite values."""
    return [name for name, t in tensors.items() if t.dtype in names.WEIGHT_DTYPES and not torch.isfinite(t).all()]


def not_numbers(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a sentence if weights hold NaN or infinite values, as a list of none or one."""
    if broken := not_finite(tensors):
        return [f"{counted(broken, 'tensor')} not made of numbers only (NaN or infinite); the first is {broken[0]}."]
    return []


def require_finite(
    full_clip: FullCLIP,
    outcome: str,
    *,
    file: AnyPath | None = None,
    matters: Callable[[str], bool] = lambda name: True,
) -> None:
    """Raise `UserError` if a tensor whose name `matters` holds NaN or infinite values.

    `outcome` says what did not happen because of them, such as "clip.safetensors was not written". `file` is the file
    that the model was loaded from; without it, the message names the file in the model's provenance.
    """
    broken = not_finite({name: tensor for name, tensor in full_clip.state_dict.items() if matters(name)})
    if not broken:
        return
    source = full_clip.provenance.get("source")
    origin = f"in {file}, " if file else f"in the model made from {source}, " if source else ""
    listed = ", ".join(broken[:_MAX_LISTED])
    if len(broken) > _MAX_LISTED:
        listed += f" and {len(broken) - _MAX_LISTED} more"
    raise UserError(
        f"{outcome}: {origin}{listed} {'holds' if len(broken) == 1 else 'hold'} values that are not numbers (NaN or "
        "infinite); use a model from before its training broke, such as the run's best.safetensors, or download the "
        "file again."
    )


def made_by_a_broken_merge(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a text tower under OpenAI's names has v_proj in every out_proj, as a well-known broken merge does.

    Of an intact one, only the first layer is read.
    """
    layers = [name for name in tensors if name.startswith("transformer.") and name.endswith(".attn.in_proj_weight")]
    return bool(layers) and all(_out_equals_v(tensors, name.removesuffix("in_proj_weight")) for name in layers)


def _out_equals_v(tensors: Mapping[str, Tensor], attention: str) -> bool:
    out, joined = tensors.get(f"{attention}out_proj.weight"), tensors[f"{attention}in_proj_weight"]
    if out is None or out.ndim != 2 or joined.shape[:1] != (3 * len(out),):
        return False
    return torch.equal(joined[-len(out) :], out)


def describe_text_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return architecture, parameterization and problems of a text encoder's file, whatever its tensors are called."""
    tensors = names.unwrapped(tensors)
    prefix = next((name.removesuffix(_TOKENS) for name in tensors if name.endswith(_TOKENS)), None)
    problems = []
    if prefix is None:
        gmp = parameterization_of(tensors) == "gmp"
        sizes = _sizes(tensors, "token_embedding.weight", "positional_embedding", "transformer.resblocks.")
    else:
        if prefix:
            problems.append(
                f"The names begin with {prefix!r}: ComfyUI's CLIP loaders would read nothing from it and make noise. "
                "Rename its tensors so that they begin with text_model."
            )
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        gmp = any(name.endswith((".r", ".theta")) for name in tensors)
        sizes = _sizes(tensors, _TOKENS, "text_model.embeddings.position_embedding.weight", _LAYER)
        problems += [] if gmp else _gaps(tensors, sizes)
        problems += [f"It {BROKEN_MERGE}"] if _out_proj_is_copied(tensors) else []
    if gmp:
        problems.append("It is in GmP form, which no image program reads; fold it first.")
    return {
        "architecture": sizes,
        "parameterization": "gmp" if gmp else "linear",
        "problems": problems + not_numbers(tensors),
    }


def _sizes(tensors: Mapping[str, Tensor], tokens: str, positions: str, block: str) -> dict[str, int]:
    sizes = {"text_layers": len({name[len(block) :].split(".")[0] for name in tensors if name.startswith(block)})}
    if tokens in tensors and tensors[tokens].ndim == 2:
        sizes |= {"vocab_size": tensors[tokens].shape[0], "text_width": tensors[tokens].shape[1]}
    if positions in tensors and tensors[positions].ndim == 2:
        sizes["context_length"] = tensors[positions].shape[0]
    return sizes


def _gaps(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> list[str]:
    """Return sentences on missing and misshapen tensors, by what a text tower of these sizes has."""
    if "text_width" not in sizes:
        return ["Its token embeddings are not a table."]
    try:
        expected = _expected_shapes(tensors, sizes)
    except UserError as error:  # no model has these sizes
        return [str(error)]
    missing = [name for name in expected if name not in tensors]
    wrong = [name for name, shape in expected.items() if name in tensors and tuple(tensors[name].shape) != shape]
    problems = []
    if missing:
        problems.append(f"{counted(missing, 'tensor')} missing; the first is {missing[0]}.")
    if wrong:
        problems.append(f"{counted(wrong, 'tensor')} of another shape than this tower's; the first is {wrong[0]}.")
    return problems


def _expected_shapes(tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Return the shapes of a text encoder of these sizes under Hugging Face's names, without the projection."""
    mlp_bias = tensors.get(f"{_LAYER}0.mlp.fc1.bias")
    architecture = Architecture(
        text_width=sizes["text_width"],
        text_layers=max(1, sizes["text_layers"]),
        vocab_size=sizes["vocab_size"],
        context_length=sizes.get("context_length", 77),
        text_mlp_width=len(mlp_bias) if mlp_bias is not None and mlp_bias.ndim == 1 else 4 * sizes["text_width"],
        text_heads=1,
        activation="quick_gelu",
        # The smallest vision tower: only the text tower counts.
        embed_dim=1,
        image_size=1,
        patch_size=1,
        vision_width=1,
        vision_layers=1,
        vision_heads=1,
        vision_mlp_width=1,
    )
    shapes = architecture.shapes()
    tower = {name: torch.empty(shapes[name], device="meta") for name in shapes if names.is_text_name(name)}
    return {name: tuple(t.shape) for name, t in names.to_hf(tower).items() if name != "text_projection.weight"}


def _out_proj_is_copied(tensors: Mapping[str, Tensor]) -> bool:
    """Return what `made_by_a_broken_merge` does, for Hugging Face's names."""
    values = {name: tensor for name, tensor in tensors.items() if name.endswith(".self_attn.v_proj.weight")}
    outs = {name: tensors.get(name.replace("v_proj", "out_proj")) for name in values}
    return bool(values) and all(out is not None and torch.equal(values[name], out) for name, out in outs.items())
