"""The lock of a run folder: it ends with the process that holds it, however that ends.

Not the `filelock` package, which torch brings in whatever version the host has: its file stays behind after the
release, and on file systems without locks (some network folders) its versions either take every lock as held, or leave
a marker that outlives a killed process.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from ...errors import UserError

LOCK_NAME = ".lock"


class FolderLock:
    """A lock that `lock_folder` took."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self.file, self.descriptor = file, descriptor

    def release(self) -> None:
        """Unlock the folder; removes the lock's file where the system allows it."""
        with contextlib.suppress(OSError):  # Windows does not remove an open file
            self.file.unlink()
        os.close(self.descriptor)


def lock_folder(folder: Path, on_note: Callable[[str], None]) -> FolderLock | None:
    """Lock a folder, and make it if need be; None if another process, or another training of this one, holds the lock.

    Uses the system's own file lock, so a killed process leaves nothing to clear. On a file system without locks
    `on_note` says so, and the lock keeps nobody out. Raises `UserError` for a folder that cannot be written to.
    """
    file = folder / LOCK_NAME
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"{folder} could not be written ({error.strerror}); choose a folder that you can write to."
            ) from error
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                os.close(descriptor)
                return None
            on_note(f"{folder} is on a file system without locks; do not start another training in it meanwhile.")
            return FolderLock(file, descriptor)
        if _is_same(descriptor, file):  # its holder may have removed it after we opened it and before we locked it
            return FolderLock(file, descriptor)
        os.close(descriptor)


def _is_same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


if os.name == "nt":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
