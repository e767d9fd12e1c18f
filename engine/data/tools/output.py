"""New folders and files of the dataset tools: complete or not there at all, and never inside the source."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ...errors import UserError
from ..dataset import ClipDataset


def refuse_inside(dataset: ClipDataset, path: Path) -> None:
    """Raise `UserError` for a path inside the dataset's folder, unless the dataset is only a caption file in it."""
    if dataset.is_whole_folder and path.resolve().is_relative_to(dataset.folder.resolve()):
        raise UserError(f"{path} is inside {dataset.folder}, which must not change; choose a path outside it.")


@contextlib.contextmanager
def new_output(path: Path, *, is_file: bool = False) -> Iterator[Path]:
    """Yield a hidden folder, or the name of a file, beside `path`; on success it is moved there, else removed.

    An empty folder at `path` is replaced. Raises `UserError` for any `OSError`.
    """
    target = path.absolute()
    part = target.with_name(f".{secrets.token_hex(4)}.part{target.suffix if is_file else ''}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not is_file:
            part.mkdir()
        yield part
        if target.is_dir():
            target.rmdir()  # Windows does not replace an empty folder
        os.replace(part, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk is full: {path} cannot be written, and nothing of it is left. Free some space and try again."
            ) from error
        raise UserError(f"{path} cannot be written ({error.strerror or error}); choose another path.") from error
    finally:
        if is_file:
            part.unlink(missing_ok=True)
        else:
            shutil.rmtree(part, ignore_errors=True)
