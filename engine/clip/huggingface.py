"""Write a full CLIP as the folder that Hugging Face's transformers opens: model, image processor and tokenizer."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import AnyPath, replacing_folder
from ..notes import OnNote, ignore_note
from ..openai import END, MEAN, START, STD, VOCABULARY
from . import names
from .architecture import Architecture
from .full_clip import FullCLIP
from .gmp import plain_weights
from .health import require_finite
from .load import load_full_clip
from .tensor_files import MIXED, cast, write_compared

# The texts of tokens 49406 and 49407 in OpenAI's vocabulary; open_clip has other names for them.
_START_TEXT, _END_TEXT = "<|startoftext|>", "<|endoftext|>"
_BICUBIC = 3  # Pillow's number for it
_LAYER_NORM_EPS = 1e-5  # OpenAI's and open_clip's, in every norm


def save_huggingface(
    full_clip: FullCLIP, folder: AnyPath, *, dtype: str | None = None, on_note: OnNote = ignore_note
) -> Path:
    """Write a folder for transformers' `from_pretrained` (CLIPModel, CLIPProcessor, CLIPTokenizer and their kin).

    GmP is folded; a model with another vocabulary than OpenAI's gets no tokenizer; notes say so. `dtype` is fp16, bf16
    or fp32; None keeps each tensor's own. The folder appears whole, after it was read back and compared, or not at all.
    Raises `UserError` for a folder that is not empty or cannot be written to, a full disk, weights that are not finite
    or too large for fp16, and a ResNet.
    """
    folder, architecture = Path(folder), full_clip.architecture
    if architecture.resnet:
        raise UserError(
            f"{folder} was not written: this model's vision tower is a ResNet, and Hugging Face's CLIP has only ViTs; "
            "save it as a full CLIP instead."
        )
    if dtype == MIXED:
        raise UserError(f"The dtype {MIXED} is not one of Hugging Face's; choose fp16, bf16 or fp32.")
    require_finite(full_clip, f"{folder} was not written")
    full_clip = plain_weights(full_clip, on_note)
    tensors = cast(names.to_hf(full_clip.state_dict), dtype, folder)
    files = {
        "config.json": _json(config_of(architecture, tensors)),
        "preprocessor_config.json": _json(_preprocessor_config(architecture.image_size)),
    }
    if architecture.vocab_size == VOCABULARY:
        files |= _tokenizer_files(architecture.context_length)
    else:
        on_note(
            f"The folder has no tokenizer: this model's vocabulary has {architecture.vocab_size} tokens and is not "
            f"OpenAI's, of {VOCABULARY}. Put its own tokenizer's files there."
        )
    size = sum(tensor.nbytes for tensor in tensors.values()) + sum(len(text) for text in files.values())
    with replacing_folder(folder, size) as unfinished:
        for name, text in files.items():
            (unfinished / name).write_text(text, encoding="utf-8", newline="\n")
        write_compared(tensors, unfinished / "model.safetensors", {"format": "pt"}, folder / "model.safetensors")
        _check_architecture(unfinished, architecture, folder)
    return folder


def _check_architecture(written: Path, architecture: Architecture, folder: Path) -> None:
    """Raise `UserError` unless our own loader finds this architecture in the written folder without assuming anything.

    The tensors that it maps are released on return: Windows moves no folder with a mapped file in it.
    """
    opened = load_full_clip(written)
    expected, read = architecture.as_dict(), opened.architecture.as_dict()
    for name, value in expected.items():
        if read[name] != value:
            raise UserError(
                f"{folder} was not written: read back, its {name} is {read[name]}, not {value}; save this model as a "
                "full CLIP instead."
            )
    if opened.notes:
        raise UserError(f"{folder} was not written: reading it back, something had to be assumed. {opened.notes[0]}")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


# ---- config.json -----------------------------------------------------------------------------------------------------


def config_of(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a CLIPConfig, with what equals transformers' defaults too: they are those of ViT-B/32 and may change."""
    a = architecture
    # transformers loads all tensors in one dtype. Of several it is the widest, which changes no value.
    widest = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    dtype = str(widest).removeprefix("torch.")
    vision = {
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "image_size": a.image_size,
        "patch_size": a.patch_size,
        **_tower(a, a.vision_width, a.vit.layers, a.vision_heads, a.vit.mlp_width),
    }
    text = {
        "model_type": "clip_text_model",
        "vocab_size": a.vocab_size,
        "max_position_embeddings": a.context_length,
        **_tower(a, a.text_width, a.text_layers, a.text_heads, a.text_mlp_width),
        **_token_ids(a.vocab_size),
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": a.embed_dim,
        "logit_scale_init_value": math.log(1 / 0.07),  # of a new model; this model's is among the weights
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
        "hidden_act": a.activation,  # transformers has the same two names
        "layer_norm_eps": _LAYER_NORM_EPS,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "initializer_factor": 1.0,
    }


def _token_ids(vocab_size: int) -> dict[str, int]:
    """The special tokens of transformers' text tower, whose features are those at the first `eos_token_id`."""
    if vocab_size == VOCABULARY:
        return {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}  # as its tokenizer pads
    # The end token is not known. With an `eos_token_id` of 2, transformers takes the features at the highest token id
    # of each row, as open_clip does. These three were its defaults until 4.31.
    return {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


# ---- preprocessor_config.json ----------------------------------------------------------------------------------------


def _preprocessor_config(image_size: int) -> dict[str, Any]:
    """CLIP's own transform: the shorter side resized, the centre cropped, normalised (engine/data/images)."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


# ---- the tokenizer's files -------------------------------------------------------------------------------------------


def _tokenizer_files(context_length: int) -> dict[str, str]:
    """Return names and texts of the files of a CLIPTokenizer, from the vocabulary and merges that open_clip ships.

    It pads with the end token, as OpenAI's own models on Hugging Face do; our tokenizer pads with 0. That changes no
    feature: no token sees a later one, and the features are those at the first end token.
    """
    from open_clip import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    words = sorted(tokenizer.encoder, key=tokenizer.encoder.__getitem__)
    vocabulary = [*words[:START], _START_TEXT, _END_TEXT]
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    special = {"bos_token": _START_TEXT, "eos_token": _END_TEXT, "unk_token": _END_TEXT, "pad_token": _END_TEXT}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        **special,
        "model_max_length": context_length,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    return {
        "vocab.json": json.dumps({text: token for token, text in enumerate(vocabulary)}, ensure_ascii=False) + "\n",
        # transformers skips the first line, whatever it holds.
        "merges.txt": "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in merges),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }
