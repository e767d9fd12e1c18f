"""Atomic writes: a crash or a full disk leaves either the whole new file (or folder) or the old one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

AnyPath = str | os.PathLike[str]
PART_SUFFIX = ".part"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def write_text(path: AnyPath, text: str) -> Path:
    """Write a text file whole or not at all, in UTF-8 with "\\n" line ends."""
    # Undecodable bytes of a file name are lone surrogates in Python; they are written as JSON escapes.
    data = text.encode("utf-8", "backslashreplace")
    with replacing(Path(path), len(data)) as unfinished:
        unfinished.write_bytes(data)
    return Path(path)


def write_json(path: AnyPath, value: object) -> Path:
    """Write a value as indented JSON, whole or not at all."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replacing(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield a path to write to, in a hidden folder beside `path`; on success fsync the file and move it to `path`.

    `size` is the number of bytes to be written, for the message about a full disk. A killed process leaves the hidden
    folder behind, with any temporary files of the writer in it; `remove_parts` removes it. Raises `UserError`.
    """
    part = _part_beside(path)
    unfinished = part / path.name
    try:
        with _os_errors_explained(path, size):
            part.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "wb") as file:
                mode = os.fstat(file.fileno()).st_mode
            yield unfinished
            _sync(unfinished, mode)
            os.replace(unfinished, path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # it may not exist: creating it can fail


@contextlib.contextmanager
def replacing_folder(path: Path, size: int = 0) -> Iterator[Path]:
    """Yield an empty folder to fill, in a hidden one beside `path`; on success fsync its files and move it to `path`.

    Otherwise as `replacing`. Raises `UserError` if `path` exists and is not an empty folder.
    """
    with _os_errors_explained(path, size):
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise UserError(f"{path} is already there; choose a folder that does not exist or is empty.")
        target = path.resolve()  # keeps a link to an empty folder, and gives "." a name
        part = _part_beside(target)
        unfinished = part / target.name
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            mode = unfinished.stat().st_mode & 0o666  # what the umask gives a new file
            for file in unfinished.iterdir():
                _sync(file, mode)
            _sync_folder(unfinished)
            if target.is_dir():
                target.rmdir()  # Windows does not replace even an empty folder; rmdir fails if it was filled meanwhile
            os.replace(unfinished, target)
            _sync_folder(target.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def remove_parts(folder: Path) -> None:
    """Remove the hidden folders that killed processes left in a folder."""
    for part in folder.glob(f".*{PART_SUFFIX}"):
        shutil.rmtree(part, ignore_errors=True)


def _part_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART_SUFFIX}")


def _sync(file: Path, mode: int) -> None:
    """Flush a written file to the disk and set its mode: safetensors makes files that only their owner may read."""
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())
    os.chmod(file, mode)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _os_errors_explained(path: Path, size: int) -> Iterator[None]:
    """Turn an OSError into a `UserError` about `path`, which was to hold `size` bytes."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise UserError(
                f"The disk is full: {path} ({_megabytes(size)}) could not be written. Free some space and try again; "
                "nothing that was there before is lost."
            ) from error
        reason = error.strerror or error
        raise UserError(f"{path} could not be written ({reason}); choose a folder that you can write to.") from error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"
