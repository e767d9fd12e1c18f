"""Tensors out of whatever file holds them: what it is, is told by what it begins with, not by its name."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, one_line, shown
from .torch_files import PICKLE_MARK, ZIP_MARK, read_torch

INDEX_SUFFIX = ".index.json"
_MAX_HEADER_BYTES = 25 << 20  # that of an SDXL checkpoint is 0.3 MB
_MAX_INDEX_BYTES = 25 << 20
# A CLIP's longest name has 60 letters, and its largest tensors four dimensions; a VAE's have five.
_MAX_NAME = 300
_MAX_DIMENSIONS = 8
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")
_FP8 = tuple(dtype for name, dtype in vars(torch).items() if name.startswith(("float8_e4", "float8_e5")))
_WIDENED = (
    "The weights are stored in eight bits (fp8); they were widened to fp16. What fp8 left out is lost: to train, use "
    "the fp16 or fp32 file of this model."
)
_SCALED_FP8 = ("scaled_fp8", ".scale_weight", ".weight_scale", ".comfy_quant")


@dataclasses.dataclass(frozen=True)
class Contents:
    """Named tensors (CPU), a safetensors file's metadata, and what a pickled model's classes tell of it.

    `told` has vision_heads, text_heads and activation, as far as they are known. `notes` are sentences for the user.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    told: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_contents(path: str | os.PathLike, *, in_memory: bool = False) -> Contents:
    """What a model file holds: safetensors, torch's own formats, or the index of a model in several files.

    Tensors are memory-mapped unless `in_memory` (but those of torch's format before 1.6).
    Weights in fp8 become fp16. Nothing in a file is executed. Raises `UserError` with the file and the way out.
    """
    given, path = path, Path(path)
    if not os.path.isfile(path):  # which is no error for a name that cannot be, as Path's own is
        what = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{given} {what}; give the path of a model file.")
    if (shard := _SHARD.fullmatch(path.name)) and (
        index := path.with_name(shard[1] + shard[2] + INDEX_SUFFIX)
    ).is_file():
        path = index
    contents = _read_shards(path) if path.name.endswith(INDEX_SUFFIX) else _read_one(path)
    _check_names(contents.tensors, path)
    if in_memory:
        tensors = {name: tensor.clone() for name, tensor in contents.tensors.items()}
        contents = dataclasses.replace(contents, tensors=tensors)
    return _widened(contents, path)


def read_tensors(path: str | os.PathLike, *, in_memory: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of `read_contents`."""
    contents = read_contents(path, in_memory=in_memory)
    return contents.tensors, contents.metadata


def _read_one(path: Path, wanted: Iterable[str] | None = None) -> Contents:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); choose a file that you can read."
        ) from error
    # One safetensors file in 32 begins with the mark of a pickle: the length of its header.
    header = struct.unpack("<Q", start[:8])[0] if start[8:] == b"{" else size
    if header < size:
        if header > _MAX_HEADER_BYTES:
            raise UserError(f"{path} has a longer header than any model's and was not read; choose another file.")
        return Contents(*_read_safetensors(path, wanted))
    if start[:4] == ZIP_MARK or start[:1] == PICKLE_MARK:
        tensors, told = read_torch(path)
        return Contents(tensors, told=told)
    raise UserError(f"{path} {_not_a_model(start)}")


def _not_a_model(start: bytes) -> str:
    """Why a file that begins like this cannot be read."""
    if not start:
        return "is empty; download or save it again."
    if start.startswith(b"GGUF"):
        return "is a GGUF file, whose weights are quantized; use the .safetensors file of this model."
    if start.startswith(b"version h"):
        return "is only the pointer that Git LFS leaves; run git lfs pull, or download the file itself."
    if start.lstrip()[:2].lower() in (b"<!", b"<h"):
        return "is a web page; download the model file itself."
    if start[8:] == b"{":
        return "is not a whole safetensors file (its header is cut off); download or save it again."
    return "is not a whole safetensors file, nor one of torch's; download or save it again, or choose another file."


def _read_safetensors(path: Path, wanted: Iterable[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in (file.keys() if wanted is None else wanted)}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({one_line(error)}); download or save it again, or choose "
            "another file."
        ) from error
    except (OSError, RuntimeError, ValueError, AttributeError, TypeError, OverflowError) as error:
        # From the disk; from torch, for a file that cannot be mapped; for dtypes that this torch does not have, and for
        # shapes that nothing has.
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path} cannot be read ({reason}); choose another file.") from error
    return tensors, metadata


def _check_names(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse what no model has: names that break a line or never end, and tensors that much cannot be done with."""
    for name, tensor in tensors.items():
        if not name.isprintable() or len(name) > _MAX_NAME or tensor.ndim > _MAX_DIMENSIONS:
            raise UserError(f"{path} holds a tensor that is none of a model's ({shown(name)}); choose another file.")


def _read_shards(index: Path) -> Contents:
    """A model in several files, by the index that tells which tensor is in which."""
    by_file: dict[str, list[str]] = {}
    for name, file in _weight_map(index).items():
        by_file.setdefault(file, []).append(name)
    tensors: dict[str, Tensor] = {}
    for file, wanted in by_file.items():
        part = index.with_name(file)
        if not os.path.isfile(part):
            raise UserError(f"{part} is missing, one of the {len(by_file)} files that {index} names; download it too.")
        found = _read_one(part, wanted).tensors
        if missing := [name for name in wanted if name not in found]:
            raise UserError(
                f"{part} does not hold {shown(missing[0])}, which {index} says is there; download both again."
            )
        tensors |= {name: found[name] for name in wanted}
    return Contents(tensors)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("it is too long")
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not found or not all(isinstance(file, str) for file in found.values()):
            raise ValueError("its weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index} is not the index of a model in several files ({one_line(error)}); download it again, or choose "
            "another file."
        ) from error
    for file in found.values():
        if (
            file != os.path.basename(file)
            or file in ("", ".", "..")
            or "\\" in file
            or not file.isprintable()
            or len(file) > _MAX_NAME
        ):
            raise UserError(
                f"{index} names {shown(file)}, which is no file in its folder, so nothing was opened; choose another "
                "file."
            )
    return found


def _widened(contents: Contents, path: Path) -> Contents:
    """fp8 to fp16, which holds all of its values exactly."""
    if not any(tensor.dtype in _FP8 for tensor in contents.tensors.values()):
        return contents
    if scaled := [name for name in contents.tensors if name.endswith(_SCALED_FP8)]:
        raise UserError(
            f"{path} holds scaled fp8 weights ({scaled[0]}), which are made for running only; use the fp16 or fp32 "
            "file of this model."
        )
    tensors = {
        name: tensor.to(torch.float16) if tensor.dtype in _FP8 else tensor for name, tensor in contents.tensors.items()
    }
    return dataclasses.replace(contents, tensors=tensors, notes=(*contents.notes, _WIDENED))
