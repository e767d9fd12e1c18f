"""Model files: read named tensors in any of MODEL_FORMATS; write safetensors, read them back and compare.

A file's format is recognised by its first bytes, never by its name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError, one_line, shown
from ..files import AnyPath, replacing
from .architecture import NO_HINTS, Hints
from .torch_files import PICKLE_MARK, ZIP_MARK, read_torch_file

INDEX_SUFFIX = ".index.json"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MIXED = "mixed"

_MAX_HEADER_BYTES = 25 << 20  # an SDXL checkpoint's is 0.3 MB
_MAX_INDEX_BYTES = 25 << 20
# The longest name in a CLIP has 60 letters, and its largest tensors four dimensions; a VAE's have five.
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
class FileContents:
    """Named tensors (CPU), a safetensors file's metadata, and what the classes in a pickled model say about it.

    `notes` are sentences for the user.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    hints: Hints = NO_HINTS
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelFormat:
    """A file format of weights.

    `recognises` takes a file's first nine bytes and its size; `read` the path and the wanted tensors (None: all).
    """

    name: str
    recognises: Callable[[bytes, int], bool]
    read: Callable[[Path, Iterable[str] | None], FileContents]


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_contents(path: AnyPath, *, in_memory: bool = False) -> FileContents:
    """Read a model file in one of MODEL_FORMATS, or a model in several files by its index or one of its shards.

    Tensors are memory-mapped unless `in_memory` (except those of torch's format before 1.6). fp8 weights become fp16.
    Nothing in a file is executed. Raises `UserError` that names the file and what to do.
    """
    given, path = path, Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, this accepts names that cannot exist
        what = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise UserError(f"{given} {what}; give the path of a model file.")
    if shard := _SHARD.fullmatch(path.name):
        index = path.with_name(shard[1] + shard[2] + INDEX_SUFFIX)
        path = index if index.is_file() else path
    contents = _read_shards(path) if path.name.endswith(INDEX_SUFFIX) else _read_one(path)
    _check_names(contents.tensors, path)
    if in_memory:
        tensors = {name: tensor.clone() for name, tensor in contents.tensors.items()}
        contents = dataclasses.replace(contents, tensors=tensors)
    return _widened(contents, path)


def _read_one(path: Path, wanted: Iterable[str] | None = None) -> FileContents:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}); choose a file that you can read."
        ) from error
    for model_format in MODEL_FORMATS:
        if model_format.recognises(start, size):
            return model_format.read(path, wanted)
    raise UserError(f"{path} {_why_not_a_model(start)}")


def _why_not_a_model(start: bytes) -> str:
    """Return why a file that begins like this cannot be read, and what to do."""
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


def _is_safetensors(start: bytes, size: int) -> bool:
    """Eight bytes with the length of a JSON header, then that header."""
    return start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < size


def _read_safetensors(path: Path, wanted: Iterable[str] | None) -> FileContents:
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        if struct.unpack("<Q", file.read(8))[0] > _MAX_HEADER_BYTES:
            raise UserError(f"{path} has a longer header than any model's and was not read; choose another file.")
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
        # OSError comes from the disk. torch raises the others: for a file that cannot be mapped, for dtypes that this
        # version does not have, and for impossible shapes.
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path} cannot be read ({reason}); choose another file.") from error
    return FileContents(tensors, metadata)


def _read_torch(path: Path, wanted: Iterable[str] | None) -> FileContents:
    tensors, hints = read_torch_file(path)
    return FileContents(tensors, hints=hints)


# Tried in this order: the header length of one safetensors file in 32 begins with the first byte of a pickle.
MODEL_FORMATS = (
    ModelFormat("safetensors", _is_safetensors, _read_safetensors),
    ModelFormat("torch", lambda start, size: start.startswith((ZIP_MARK, PICKLE_MARK)), _read_torch),
)


def _check_names(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that no model has: names that are endless or break a line, and very many dimensions."""
    for name, tensor in tensors.items():
        if not name.isprintable() or len(name) > _MAX_NAME or tensor.ndim > _MAX_DIMENSIONS:
            raise UserError(f"{path} holds a tensor that is none of a model's ({shown(name)}); choose another file.")


def _widened(contents: FileContents, path: Path) -> FileContents:
    """Convert fp8 weights to fp16, which holds all of their values exactly."""
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


# ---- a model in several files ----------------------------------------------------------------------------------------


def _read_shards(index: Path) -> FileContents:
    """Read a model in several files, by the index that says which tensor is in which file."""
    names_by_file: dict[str, list[str]] = {}
    for name, file in _weight_map(index).items():
        names_by_file.setdefault(file, []).append(name)
    tensors: dict[str, Tensor] = {}
    for file, wanted in names_by_file.items():
        shard = index.with_name(file)
        if not os.path.isfile(shard):
            raise UserError(
                f"{shard} is missing, one of the {len(names_by_file)} files that {index} names; download it too."
            )
        in_shard = _read_one(shard, wanted).tensors
        if missing := [name for name in wanted if name not in in_shard]:
            raise UserError(
                f"{shard} does not hold {shown(missing[0])}, which {index} says is there; download both again."
            )
        tensors |= {name: in_shard[name] for name in wanted}
    return FileContents(tensors)


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index file: the name of the shard that holds each tensor. The names are checked: an index could name any
    file of the disk."""
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("it is too long")
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError("its weight_map names no files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{index} is not the index of a model in several files ({one_line(error)}); download it again, or choose "
            "another file."
        ) from error
    for file in weight_map.values():
        plain = file == os.path.basename(file) and file not in ("", ".", "..") and "\\" not in file
        if not plain or not file.isprintable() or len(file) > _MAX_NAME:
            raise UserError(
                f"{index} names {shown(file)}, which is no file in its folder, so nothing was opened; choose another "
                "file."
            )
    return weight_map


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_safetensors(tensors: Mapping[str, Tensor], path: AnyPath, metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file beside `path`, read it back, compare every bit, and only then move it to `path`.

    After any failure `path` holds what it held before. Raises `UserError` for a name without .safetensors, a full disk,
    and a folder that cannot be written to.
    """
    path = require_safetensors_path(path)
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as unfinished:
        write_compared(tensors, unfinished, metadata, path)
    return path


def require_safetensors_path(path: AnyPath) -> Path:
    """Return the path; raise `UserError` if it does not end in .safetensors, or is a folder."""
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the name of a file.")
    return Path(path)


def write_compared(tensors: Mapping[str, Tensor], unfinished: Path, metadata: Mapping[str, str], path: Path) -> None:
    """Write safetensors to `unfinished`, a path inside `files.replacing` or `replacing_folder`, and read them back.

    Raises `UserError`, in which the file is called `path`, if they differ, and OSError as any writing does.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, unfinished, dict(metadata))
    except SafetensorError as error:
        raise _as_os_error(error) from error
    read = _read_one(unfinished).tensors
    different = [name for name, tensor in tensors.items() if name not in read or not same_bits(read[name], tensor)]
    if different or len(read) != len(tensors):
        raise UserError(f"{path} was not written: reading it back gave other values for {different[:1]}; try again.")


def _as_os_error(error: Exception) -> OSError:
    """Return the OSError behind a SafetensorError, which has the number only in its text."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number and os.name == "posix":
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return OSError(0, str(error), None, int(number[1]) if number else 0)  # Windows finds the errno by the fourth


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal in dtype, shape and every bit (a NaN equals the same NaN)."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


def cast(tensors: Mapping[str, Tensor], dtype: str | None, what: AnyPath) -> dict[str, Tensor]:
    """Convert tensors to fp16, bf16 or fp32 (None: keep each dtype); refuse values that would become infinite.

    MIXED is OpenAI's own layout, for tensors under OpenAI's names: fp16, but norms, embeddings, `logit_scale` and GmP's
    `r` and `theta` in fp32. `what` begins the error message: a path, or "The LoRA".
    """
    if dtype is None:
        return dict(tensors)
    if dtype != MIXED and dtype not in DTYPES:
        raise UserError(f"The dtype {dtype!r} is not known; choose fp16, bf16, fp32 or mixed.")
    converted = {}
    for name, tensor in tensors.items():
        to = DTYPES[dtype] if dtype != MIXED else torch.float32 if _fp32_in_mixed(name) else torch.float16
        converted[name] = tensor.to(to)
        if to != tensor.dtype and not torch.isfinite(converted[name]).all() and torch.isfinite(tensor).all():
            raise UserError(f"{what} was not written: {name} holds values too large for {_too_narrow(to)}.")
    return converted


def _too_narrow(dtype: torch.dtype) -> str:
    """Return the name of a dtype whose range did not suffice, and which to choose instead."""
    largest = {name: torch.finfo(other).max for name, other in DTYPES.items()}
    own = next(name for name, other in DTYPES.items() if other == dtype)
    wider = [name for name in largest if largest[name] > largest[own]]
    return f"{own}; choose {' or '.join(wider) or 'another model'}"


def _fp32_in_mixed(name: str) -> bool:
    if name == "logit_scale" or name.endswith(("_embedding", "token_embedding.weight", ".r", ".theta")):
        return True
    # A ResNet's norm behind a downsampling convolution is called downsample.1.
    return "downsample.1." in name or any(step.startswith(("ln_", "bn")) for step in name.split("."))
