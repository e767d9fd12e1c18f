"""A full CLIP as the folder that Hugging Face's transformers opens: model, picture processor and tokenizer."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import replacing_folder, write_compared
from ..openai import END, MEAN, START, STD, VOCABULARY
from . import names
from .architecture import Architecture
from .full_clip import MIXED, FullCLIP, cast, load_full_clip
from .gmp import fold_gmp

# The texts of tokens 49406 and 49407 in OpenAI's vocabulary; open_clip calls them otherwise.
_START_TEXT, _END_TEXT = "<|startoftext|>", "<|endoftext|>"
_BICUBIC = 3  # Pillow's number for it
_LAYER_NORM_EPS = 1e-5  # OpenAI's and open_clip's, in every norm


def save_huggingface(
    full_clip: FullCLIP, folder: str | os.PathLike, *, dtype: str | None = None
) -> tuple[Path, list[str]]:
    """Write a folder for transformers' `from_pretrained` (CLIPModel, CLIPProcessor, CLIPTokenizer and their kin).

    Returns the folder and sentences on what was done: GmP is folded, and a model with another vocabulary than OpenAI's
    gets no tokenizer. `dtype` is fp16, bf16 or fp32; None keeps each tensor's own. The folder appears whole, after it
    was read back and compared, or not at all. Raises `UserError` for a folder that holds something, weights that are
    not finite or too large for fp16, a ResNet, a full disk and a place that cannot be written to.
    """
    folder = Path(folder)
    architecture = full_clip.architecture
    if architecture.resnet:
        raise UserError(
            f"{folder} was not written: this model's vision tower is a ResNet, and Hugging Face's CLIP has only ViTs; "
            "save it as a full CLIP instead."
        )
    tensors, done = _hf_state_dict(full_clip, folder, dtype)
    files = {
        "config.json": _json(config_of(architecture, tensors)),
        "preprocessor_config.json": _json(_preprocessor_config(architecture)),
    }
    if architecture.vocab_size == VOCABULARY:
        files |= _tokenizer_files(architecture)
    else:
        done.append(
            f"The folder has no tokenizer: this model's vocabulary has {architecture.vocab_size} tokens and is not "
            f"OpenAI's, of {VOCABULARY}. Put its own tokenizer's files there."
        )
    size = sum(tensor.nbytes for tensor in tensors.values()) + sum(len(text) for text in files.values())
    with replacing_folder(folder, size) as beside:
        for name, text in files.items():
            (beside / name).write_text(text, encoding="utf-8", newline="\n")
        write_compared(tensors, beside / "model.safetensors", {"format": "pt"}, folder / "model.safetensors")
        _check_architecture(beside, architecture, folder)
    return folder, done


def _hf_state_dict(full_clip: FullCLIP, folder: Path, dtype: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """Every tensor under Hugging Face's names, plain and finite, and sentences on what was done."""
    if dtype == MIXED:
        raise UserError(f"The dtype {MIXED} is not one of Hugging Face's; choose fp16, bf16 or fp32.")
    done = []
    if full_clip.parameterization == "gmp":
        full_clip = fold_gmp(full_clip)
        done.append("The model was in GmP form; it was folded to plain weights for the Hugging Face folder.")
    broken = [name for name, tensor in full_clip.state_dict.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"{folder} was not written: {broken[0]} holds values that are not numbers (NaN or infinite). "
            "Save a model from before the training broke, such as the run's best.safetensors."
        )
    return cast(names.to_hf(full_clip.state_dict), dtype, folder), done


def _check_architecture(written: Path, architecture: Architecture, folder: Path) -> None:
    """Raise `UserError` unless our own loader finds this architecture in the written folder, with nothing assumed.

    The tensors it maps are released on return: Windows moves no folder with a mapped file in it.
    """
    read = load_full_clip(written)
    expected, found = architecture.as_dict(), read.architecture.as_dict()
    different = [name for name in expected if found.get(name) != expected[name]]
    if different:
        name = different[0]
        raise UserError(
            f"{folder} was not written: read back, its {name} is {found.get(name)}, not {expected[name]}; "
            "save this model as a full CLIP instead."
        )
    if read.notes:
        raise UserError(f"{folder} was not written: reading it back, something had to be assumed. {read.notes[0]}")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


# ---- config.json ----------------------------------------------------------------------------------------------------


def config_of(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """A CLIPConfig, with what equals transformers' defaults too: they are those of ViT-B/32 and may change."""
    a = architecture
    # What transformers loads everything in. Of a mixture it is the widest, which changes no value.
    dtype = str(functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values())))
    dtype = dtype.removeprefix("torch.")
    vision = {
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "image_size": a.image_size,
        "patch_size": a.patch_size,
        **_tower(a, a.vision_width, a.vision_layers, a.vision_heads, a.vision_mlp_width),
    }
    text = {
        "model_type": "clip_text_model",
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.context_length,
        **_tower(a, a.text_width, a.text_layers, a.text_heads, a.text_mlp_width),
        **_token_ids(a),
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": a.embed_dim,
        "logit_scale_init_value": math.log(1 / 0.07),  # of a new model; the weights hold this one's
        "initializer_factor": 1.0,
        "torch_dtype": dtype,  # transformers 5 reads this name too, 4.40 no other
        "text_config": text | {"torch_dtype": dtype},
        "vision_config": vision | {"torch_dtype": dtype},
    }


def _tower(a: Architecture, width: int, layers: int, heads: int, mlp_width: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": a.embed_dim,
        "hidden_act": a.activation,  # the two activations are called the same there
        "layer_norm_eps": _LAYER_NORM_EPS,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
    }


def _token_ids(a: Architecture) -> dict[str, int]:
    """The tokens that transformers' text tower knows of; the features are those at the first `eos_token_id`."""
    if a.vocab_size == VOCABULARY:
        return {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}  # as its tokenizer pads
    # Where the end token is not known, an `eos_token_id` of 2 makes transformers take the features at the highest
    # token of each row, as open_clip does. These three were its defaults until 4.31.
    return {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


# ---- preprocessor_config.json ---------------------------------------------------------------------------------------


def _preprocessor_config(architecture: Architecture) -> dict[str, Any]:
    """CLIP's own transform: the shorter side resized, the centre cut out, normalised (engine/data/images.py)."""
    side = architecture.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


# ---- the tokenizer's files ------------------------------------------------------------------------------------------


def _tokenizer_files(architecture: Architecture) -> dict[str, str]:
    """Names and texts of the files of a CLIPTokenizer, from the vocabulary and merges that open_clip ships.

    It pads with the end token, as OpenAI's own models on Hugging Face do; ours pads with 0. Features do not depend on
    it: no token sees a later one, and they are taken at the first end token.
    """
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    vocabulary = dict(sorted(tokenizer.encoder.items(), key=lambda item: item[1]))
    texts = [*list(vocabulary)[:START], _START_TEXT, _END_TEXT]
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    special = {
        "bos_token": _START_TEXT,
        "eos_token": _END_TEXT,
        "unk_token": _END_TEXT,
        "pad_token": _END_TEXT,
    }
    about = {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        **special,
        "model_max_length": architecture.context_length,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    return {
        "vocab.json": json.dumps({text: token for token, text in enumerate(texts)}, ensure_ascii=False) + "\n",
        # transformers skips the first line, whatever it holds.
        "merges.txt": "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in merges),
        "tokenizer_config.json": _json(about),
        "special_tokens_map.json": _json(special),
    }
