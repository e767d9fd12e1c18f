"""The same tensors under OpenAI's names and under Hugging Face's.

OpenAI keeps the three attention projections as one tensor (query, key and value, in that order) and both output
projections as [width, embed]; Hugging Face keeps three tensors and the transposes. MLP weights and position tables are
the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import UserError

_Value = TypeVar("_Value")

# (OpenAI, Hugging Face) for what stands before a block's number, and for what follows it.
_TO_HF = (
    (
        ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
        ("transformer.resblocks.", "text_model.encoder.layers."),
    ),
    (
        ("ln_1.", "layer_norm1."),
        ("ln_2.", "layer_norm2."),
        ("attn.", "self_attn."),
        ("mlp.c_fc.", "mlp.fc1."),
        ("mlp.c_proj.", "mlp.fc2."),
    ),
)
_FROM_HF = tuple(tuple((hf, openai) for openai, hf in table) for table in _TO_HF)
_OUTSIDE_BLOCKS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_OPENAI_OUTSIDE_BLOCKS = {hf: openai for openai, hf in _OUTSIDE_BLOCKS.items()}
_OPENAI_TRANSPOSED = {hf: openai for openai, hf in _TRANSPOSED.items()}
_THIRD = re.compile(r"^(.*\.(?:self_)?attn)\.([qkv])_proj\.(weight|bias)$")

# What stands before a text encoder's names: before `text_model.` in SDXL and SD1.5 checkpoints, in CLIPs that ComfyUI
# saved, in SD3 checkpoints, in diffusers' own and in a text encoder's file; before OpenAI's names in SDXL's second text
# encoder, in SD2 and in full CLIPs.
TEXT_ENCODER_PREFIXES = (
    "conditioner.embedders.0.transformer.",
    "cond_stage_model.transformer.",
    "clip_l.transformer.",
    "clip_g.transformer.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_g.transformer.",
    "conditioner.embedders.1.model.",
    "cond_stage_model.model.",
    "text.",
    "text_encoder.",
    "text_encoder_2.",
    "",
)
_TOKEN_EMBEDDINGS = ("text_model.embeddings.token_embedding.weight", "token_embedding.weight")
# Bookkeeping that some programs store among the weights.
_NOT_WEIGHTS = (
    "input_resolution",
    "context_length",
    "vocab_size",
    "attn_mask",
    "num_batches_tracked",
    "mask1",
    "mask2",
)
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What training and compiling put before every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "clip_model.", "clip.")


def is_text_name(name: str) -> bool:
    """Return whether an OpenAI name is one of the text tower, its projection included."""
    return not is_vision_name(name) and name != "logit_scale"


def is_vision_name(name: str) -> bool:
    """Return whether an OpenAI name is one of the vision tower, its projection included."""
    return name.startswith("visual.")


def unwrapped(tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    """Drop bookkeeping, and the prefixes that wrappers of a model leave before all of its names."""
    while tensors:
        wrapper = next((prefix for prefix in _WRAPPERS if all(name.startswith(prefix) for name in tensors)), None)
        if wrapper is None:
            break
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in _NOT_WEIGHTS}


def text_encoders_in(tensor_names: Iterable[str]) -> dict[str, str]:
    """Return the name of the token embeddings of each text encoder in a file, by the prefix of its names."""
    names = set(tensor_names)
    encoders: dict[str, str] = {}
    for prefix in TEXT_ENCODER_PREFIXES:
        for tokens in _TOKEN_EMBEDDINGS:
            if prefix + tokens in names:
                encoders.setdefault(prefix, prefix + tokens)
    return encoders


def to_openai(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename to OpenAI's names from Hugging Face's, from open_clip's, or from OpenAI's with attention in three parts.

    Other names stay as they are; Hugging Face's `position_ids` are dropped. Raises KeyError with the name of a missing
    third of an attention, and `UserError` for thirds or a projection that cannot be one.
    """
    state = unwrapped(tensors)
    if any(name.startswith(("text_model.", "vision_model.")) for name in state):
        return _from_hf(state)
    if "text.token_embedding.weight" in state:
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    layer = "text_projection.weight"  # open_clip can hold the projection as a linear layer, too
    if "text_projection" not in state and layer in state:
        state["text_projection"] = _transposed(layer, state.pop(layer))
    return _fused(state)


def to_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename one tower or both from OpenAI's names to Hugging Face's; KeyError for a name that is neither tower's."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _OUTSIDE_BLOCKS:
            renamed[_OUTSIDE_BLOCKS[name]] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.t().contiguous()
        elif (hf := _renamed(name, _TO_HF)) is None:
            raise KeyError(name)
        elif ".self_attn.in_proj_" in hf:
            attention, kind = hf.rsplit(".in_proj_", 1)
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{attention}.{letter}_proj.{kind}"] = third.contiguous()
        else:
            renamed[hf] = tensor
    return renamed


def _from_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in _fused(tensors).items():
        if name in _OPENAI_OUTSIDE_BLOCKS:
            renamed[_OPENAI_OUTSIDE_BLOCKS[name]] = tensor
        elif name in _OPENAI_TRANSPOSED:
            renamed[_OPENAI_TRANSPOSED[name]] = _transposed(name, tensor)
        elif not name.endswith("position_ids"):
            renamed[_renamed(name, _FROM_HF) or name] = tensor
    return renamed


def _renamed(name: str, tables: Iterable[Iterable[tuple[str, str]]]) -> str | None:
    """Rename a tensor inside a block by its tower and by what follows the block's number; None for any other."""
    towers, parts = tables
    for old_tower, new_tower in towers:
        if name.startswith(old_tower):
            number, _, rest = name.removeprefix(old_tower).partition(".")
            for old, new in parts:
                if rest.startswith(old):
                    rest = new + rest.removeprefix(old)
                    break
            return f"{new_tower}{number}.{rest}"
    return None


def _fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join query, key and value, where they are apart, to one tensor in that order; raises what `to_openai` does."""
    fused: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        third = _THIRD.match(name)
        if third and third[2] == "q":
            attention, _, kind = third.groups()
            fused[f"{attention}.in_proj_{kind}"] = _joined([f"{attention}.{q}_proj.{kind}" for q in "qkv"], tensors)
        elif not third:
            fused[name] = tensor
    return fused


def _joined(names: list[str], tensors: Mapping[str, Tensor]) -> Tensor:
    thirds = [tensors[name] for name in names]
    first = thirds[0]
    if first.ndim == 0 or any(third.shape != first.shape or third.dtype not in WEIGHT_DTYPES for third in thirds):
        raise UserError(f"the tensors {names[0]}, k and v are not three parts of one; download the file again.")
    return torch.cat(thirds)


def _transposed(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim != 2:
        raise UserError(f"the tensor {name} has the shape {tuple(tensor.shape)}, not a matrix's; download it again.")
    return tensor.t().contiguous()
