"""Safetensors in and out: memory-mapped reading, writing that leaves either the whole file or the old one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

PART_SUFFIX = ".part"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def read_tensors(path: str | os.PathLike, *, in_memory: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (CPU, the file's dtypes) and metadata of a `.safetensors` file or of a state dict saved by torch.

    Safetensors are memory-mapped unless `in_memory`; a mapped file must not be replaced on Windows while it is in use.
    Nothing in a file is executed: torch's files are read by its `weights_only` loader, which refuses everything that
    is not a tensor. Raises `UserError` with the file and the way out.
    """
    given, path = path, Path(path)
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UserError(f"{given} {what}; give the path of a model file.")
    if path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt"):
        return _read_torch(path), {}
    return _read_safetensors(path, in_memory)


def _read_safetensors(path: Path, in_memory: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}); download or save it again, or choose another file."
        ) from error
    except (OSError, RuntimeError) as error:  # the latter from torch, for a file that cannot be mapped
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}).") from error
    if in_memory:
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, metadata


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # damaged files make torch raise whatever its readers stumble over
        raise UserError(
            f"{path} is not a whole file of plain weights, and nothing else in it is ever run; use a .safetensors file "
            "of this model."
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise UserError(f"{path} does not hold named weights; use a .safetensors file of this model.")
    return {name: value.detach() for name, value in loaded.items() if isinstance(value, Tensor)}


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def write_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]) -> Path:
    """Write the file beside its place, read it back and compare, then move it there.

    After any failure the place holds what it held before. Raises `UserError` for a full disk or a folder that cannot
    be written to.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as beside:
        save_file(tensors, beside, dict(metadata))
        _compare(beside, tensors, path)
    return path


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a small text file whole or not at all."""
    with replacing(Path(path), len(text)) as beside:
        beside.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | os.PathLike, value) -> Path:
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replacing(path: Path, size: int = 0):
    """Gives a name to write to, in a folder beside `path`; on success the file is synced to the disk and moved there.

    `size` is what will be written, in bytes. A process that is killed leaves the folder (see `remove_parts`), with all
    that its writer, which may have half-written files of its own, left in it.
    """
    from safetensors import SafetensorError

    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART_SUFFIX}")
    beside = part / path.name
    try:
        part.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(beside, mode)  # safetensors writes files that only their owner may read
        os.replace(beside, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in _FULL_DISK or "os error 28" in str(error).lower()
        if full:
            raise UserError(
                f"The disk is full: {path} ({_megabytes(size)}) could not be written. Free some space and try again; "
                "nothing that was there before is lost."
            ) from error
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} could not be written ({reason}); choose a folder that you can write to.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)  # what could not be made cannot be removed


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left half written in a folder."""
    for part in folder.glob(f".*{PART_SUFFIX}"):
        shutil.rmtree(part, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def _compare(written: Path, tensors: Mapping[str, Tensor], path: Path) -> None:
    read, _ = _read_safetensors(written, in_memory=False)
    different = [name for name, tensor in tensors.items() if name not in read or not same_bits(read[name], tensor)]
    if different or len(read) != len(tensors):
        raise UserError(f"{path} was not written: reading it back gave other values for {different[:1]}; try again.")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit (NaN equals the same NaN)."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )
