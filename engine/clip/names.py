"""The same tensors under OpenAI's names and under Hugging Face's.

OpenAI keeps the three attention projections as one tensor, query, key and value in that order, and both projections as
[width, embed]; Hugging Face keeps three tensors and the transposes. MLP weights and position tables are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_TOWERS = (("visual.transformer.resblocks.", "vision_model.encoder.layers."),
           ("transformer.resblocks.", "text_model.encoder.layers."))  # fmt: skip
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

# What stands before Hugging Face's `text_model.` names in SDXL and SD1.5 checkpoints, in CLIPs that ComfyUI saved, in
# SD3 checkpoints, and in a text encoder's own file.
TEXT_ENCODER_PREFIXES = (
    "conditioner.embedders.0.transformer.",
    "cond_stage_model.transformer.",
    "clip_l.transformer.",
    "text_encoders.clip_l.transformer.",
    "",
)


# Bookkeeping that some programs store among the weights.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without bookkeeping, and without the `module.` that training on several graphics cards leaves before names."""
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in tensors.items() if name not in _NOT_WEIGHTS}


def is_text_name(name: str) -> bool:
    """True for the tensors of the text tower (with its projection) under OpenAI's names."""
    return not name.startswith("visual.") and name != "logit_scale"


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

    Raises KeyError with the name of a missing third of an attention projection.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):
            continue
        split = _SPLIT.match(name)
        if split and split[2] != "q":
            continue
        if split:
            parts = [tensors[f"{split[1]}.self_attn.{letter}_proj.{split[3]}"] for letter in "qkv"]
            renamed[_swap_tower(split[1] + ".", back=True) + f"attn.in_proj_{split[3]}"] = torch.cat(parts)
        elif name in _FROM_OUTSIDE:
            renamed[_FROM_OUTSIDE[name]] = tensor
        elif name in _FROM_TRANSPOSED:
            renamed[_FROM_TRANSPOSED[name]] = tensor.t().contiguous()
        else:
            renamed[_swap_tower(name, back=True)] = tensor
    return renamed


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
