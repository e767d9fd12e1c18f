"""The same tensors under OpenAI's names and under Hugging Face's.

OpenAI keeps the three attention projections as one tensor, query, key and value in that order, and both projections as
[width, embed]; Hugging Face keeps three tensors and the transposes. MLP weights and position tables are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import UserError

_TOWERS = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
)
_IN_BLOCK = (
    ("ln_1.", "layer_norm1."),
    ("ln_2.", "layer_norm2."),
    ("attn.out_proj.", "self_attn.out_proj."),
    ("mlp.c_fc.", "mlp.fc1."),
    ("mlp.c_proj.", "mlp.fc2."),
)
_OUTSIDE = {
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
_FROM_OUTSIDE = {hf: openai for openai, hf in _OUTSIDE.items()}
_FROM_TRANSPOSED = {hf: openai for openai, hf in _TRANSPOSED.items()}
_SPLIT = re.compile(r"^(.*)\.self_attn\.([qkv])_proj\.(weight|bias)$")

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
_TOKENS = ("text_model.embeddings.token_embedding.weight", "token_embedding.weight")


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
# What weights are stored in.
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What training and compiling put before every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "clip_model.", "clip.")
_SPLIT_OPENAI = re.compile(r"^(.*\.attn)\.([qkv])_proj\.(weight|bias)$")


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without bookkeeping, and without what wrappers of a model leave before its names."""
    wrapped = True
    while wrapped:
        wrapped = next((w for w in _WRAPPERS if tensors and all(name.startswith(w) for name in tensors)), "")
        if wrapped:
            tensors = {name.removeprefix(wrapped): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in _NOT_WEIGHTS}


def to_openai(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names from Hugging Face's, open_clip's, or OpenAI's with attention in three parts.

    Names that are not a CLIP's stay as they are. Raises KeyError with the name of a missing third of an attention, and
    `UserError` for thirds or a projection that cannot be one.
    """
    tensors = unwrapped(tensors)
    if any(name.startswith(("text_model.", "vision_model.")) for name in tensors):
        return from_hf(tensors)
    if "text.token_embedding.weight" in tensors:
        tensors = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
    linear = "text_projection.weight"  # as a layer, which open_clip has too
    if "text_projection" not in tensors and linear in tensors:
        projection = _transposed(linear, tensors[linear])
        tensors = {name: tensor for name, tensor in tensors.items() if name != linear} | {"text_projection": projection}
    return _fused(tensors)


def _fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value, where they are apart under OpenAI's names, as one tensor in that order."""
    fused: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        split = _SPLIT_OPENAI.match(name)
        if split and split[2] == "q":
            fused[f"{split[1]}.in_proj_{split[3]}"] = _joined(tensors, f"{split[1]}.{{}}_proj.{split[3]}")
        elif not split:
            fused[name] = tensor
    return fused


def _joined(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Query, key and value as one tensor, from a name with a gap for the letter; raises what `to_openai` does."""
    parts = [tensors[name.format(letter)] for letter in "qkv"]
    if parts[0].ndim == 0 or any(p.shape != parts[0].shape or p.dtype not in WEIGHT_DTYPES for p in parts):
        raise UserError(f"the tensors {name.format('q')}, k and v are not three parts of one; get the file anew.")
    return torch.cat(parts)


def text_encoders_in(tensor_names: Iterable[str]) -> dict[str, str]:
    """The token embeddings of the text encoders in a file, by the prefix before each one's names."""
    found, there = {}, set(tensor_names)
    for prefix in TEXT_ENCODER_PREFIXES:
        for tokens in _TOKENS:
            if prefix + tokens in there:
                found.setdefault(prefix, prefix + tokens)
    return found


def is_text_name(name: str) -> bool:
    """True for the tensors of the text tower (with its projection) under OpenAI's names."""
    return not is_vision_name(name) and name != "logit_scale"


def is_vision_name(name: str) -> bool:
    """True for the tensors of the vision tower (with its projection) under OpenAI's names."""
    return name.startswith("visual.")


def to_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI names to Hugging Face's, for either tower or both; raises KeyError for a name that is neither's."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _OUTSIDE:
            renamed[_OUTSIDE[name]] = tensor
        elif name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.t().contiguous()
        elif name.endswith((".attn.in_proj_weight", ".attn.in_proj_bias")):
            stem, kind = name.rsplit(".attn.in_proj_", 1)
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{_swap_tower(stem + '.')}self_attn.{letter}_proj.{kind}"] = part.contiguous()
        else:
            renamed[_swap_tower(name)] = tensor
    return renamed


def from_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names to OpenAI's; `position_ids` is dropped, and names that are not a CLIP's stay as they are.

    Raises what `to_openai` does.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):
            continue
        split = _SPLIT.match(name)
        if split and split[2] != "q":
            continue
        if split:
            joined = _joined(tensors, f"{split[1]}.self_attn.{{}}_proj.{split[3]}")
            renamed[_swap_tower(split[1] + ".", back=True) + f"attn.in_proj_{split[3]}"] = joined
        elif name in _FROM_OUTSIDE:
            renamed[_FROM_OUTSIDE[name]] = tensor
        elif name in _FROM_TRANSPOSED:
            renamed[_FROM_TRANSPOSED[name]] = _transposed(name, tensor)
        else:
            renamed[_swap_tower(name, back=True)] = tensor
    return renamed


def _transposed(name: str, tensor: Tensor) -> Tensor:
    if tensor.ndim != 2:
        raise UserError(f"the tensor {name} has the shape {tuple(tensor.shape)}, not a matrix's; get the file anew.")
    return tensor.t().contiguous()


def _swap_tower(name: str, back: bool = False) -> str:
    """Rename the part before and the part after a block's number."""
    for openai, hf in _TOWERS:
        old, new = (hf, openai) if back else (openai, hf)
        if name.startswith(old):
            number, _, rest = name[len(old) :].partition(".")
            for openai_part, hf_part in _IN_BLOCK:
                old_part, new_part = (hf_part, openai_part) if back else (openai_part, hf_part)
                if rest.startswith(old_part):
                    rest = new_part + rest[len(old_part) :]
                    break
            return f"{new}{number}.{rest}"
    if back:
        return name
    raise KeyError(name)
