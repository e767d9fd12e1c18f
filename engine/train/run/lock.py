"""One run folder, one training: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from ...errors import UserError

LOCK_NAME = ".lock"


class FolderLock:
    """The lock of a folder, taken by `lock_folder`."""

    def __init__(self, file: Path, descriptor: int):
        self.file, self.descriptor = file, descriptor

    def release(self) -> None:
        """Give the folder free; the lock's file goes too where the system lets it."""
        with contextlib.suppress(OSError):  # Windows does not remove an open file
            self.file.unlink()
        os.close(self.descriptor)


def lock_folder(folder: Path, say: Callable[[str], None]) -> FolderLock | None:
    """Lock a folder, which is made if need be; None if another process, or another training of this one, has it.

    The system's own file lock: nothing is left to clear when the holder is killed. Where the file system has no locks
    (some network folders) that is said, and the lock holds nobody off. Raises `UserError` for a folder that cannot be
    written to.
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
            say(f"{folder} is on a file system without locks; do not start another training in it meanwhile.")
            return FolderLock(file, descriptor)
        if _is_same(descriptor, file):  # its holder may have removed it between our opening and locking it
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
