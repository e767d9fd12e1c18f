"""Files out: writing that leaves either the whole new file or the old one, read back and compared."""

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

from .clip.tensor_files import read_tensors
from .errors import UserError

PART_SUFFIX = ".part"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def write_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]) -> Path:
    """Write the file beside its place, read it back and compare, then move it there.

    After any failure the place holds what it held before. Raises `UserError` for a full disk or a folder that cannot
    be written to.
    """
    path = Path(path)
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as beside:
        write_compared(tensors, beside, metadata, path)
    return path


def write_compared(tensors: Mapping[str, Tensor], beside: Path, metadata: Mapping[str, str], path: Path) -> None:
    """Write safetensors to `beside`, a name from `replacing` or in `replacing_folder`'s folder, and read them back.

    Raises `UserError`, in which the file is called `path`, if they are not the same, and what safetensors raises.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, beside, dict(metadata))
    _compare(beside, tensors, path)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a small text file whole or not at all."""
    # Half a surrogate, out of a damaged file name, is written as JSON has it.
    data = text.encode("utf-8", "backslashreplace")
    with replacing(Path(path), len(data)) as beside:
        beside.write_bytes(data)
    return Path(path)


def write_json(path: str | os.PathLike, value) -> Path:
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replacing(path: Path, size: int = 0):
    """Gives a name to write to, in a folder beside `path`; on success the file is synced to the disk and moved there.

    `size` is what will be written, in bytes. A process that is killed leaves the folder (see `remove_parts`), with all
    that its writer, which may have half-written files of its own, left in it.
    """
    part = _part_beside(path)
    beside = part / path.name
    try:
        with _explained(path, size):
            part.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                mode = os.fstat(file.fileno()).st_mode
            yield beside
            _finish(beside, mode)
            os.replace(beside, path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # what could not be made cannot be removed


@contextlib.contextmanager
def replacing_folder(path: Path, size: int = 0):
    """Gives an empty folder to put files in; on success they are synced to the disk and it is moved to `path`, whole.

    As in `replacing`, it lies in a hidden folder beside `path`, which a killed process leaves, and `size` is in bytes.
    Raises `UserError` if something other than an empty folder is there.
    """
    with _explained(path, size):
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path} is already there; choose a folder that does not exist or is empty.")
        place = path.resolve()  # a link to an empty folder stays, and "." gets a name
        part = _part_beside(place)
        beside = part / place.name
        try:
            beside.mkdir(parents=True)
            yield beside
            mode = beside.stat().st_mode & 0o666  # the umask's, as a new file would get it
            for file in beside.iterdir():
                _finish(file, mode)
            _sync_folder(beside)
            if place.is_dir():
                place.rmdir()  # Windows does not replace even an empty one; one that was filled meanwhile stays
            os.replace(beside, place)
            _sync_folder(place.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _part_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART_SUFFIX}")


def _finish(file: Path, mode: int) -> None:
    """Sync a written file to the disk and set its mode."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
    os.chmod(file, mode)  # safetensors writes files that only their owner may read


@contextlib.contextmanager
def _explained(path: Path, size: int):
    """Turns what writing raises into a `UserError` about `path`, which was to hold `size` bytes."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in _FULL_DISK or "os error 28" in str(error).lower()
        if full:
            raise UserError(
                f"The disk is full: {path} ({_megabytes(size)}) could not be written. Free some space and try again; "
                "nothing that was there before is lost."
            ) from error
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} could not be written ({reason}); choose a folder that you can write to.") from error


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
    read, _ = read_tensors(written)
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
