"""Decoded pictures on the disk, so that each is decoded once per data set and not once per epoch or run.

The folder holds segments, each written by one process: `<name>.u8`, pictures one after the other, and `<name>.index`,
a record of fixed length for each. A record is written after its picture, so a process that is killed leaves pictures
without a record, which do not exist; a record and its picture carry checksums, for what a power failure leaves. Nobody
writes into another's segment, so processes need no lock. When there is no room, the segments that were opened longest
ago go.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import secrets
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .image_files import stat_of
from .transforms import Transform

DEFAULT_BYTES = 20 * 10**9
_SHARE_OF_FREE = 0.5
_SEGMENTS = 32  # that a full cache has, about
_MOST_SEGMENTS = 256  # of short runs
_DATA, _INDEX = ".u8", ".index"
_RECORD = struct.Struct("<16sQIIII")  # key, offset, height, width, checksum of the picture and of the record so far


def user_cache_folder() -> Path:
    """Where the command keeps decoded pictures: below $XDG_CACHE_HOME or the system's folder for such things."""
    system = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(system or Path.home() / ".cache", "clip-finetune", "pictures")


class ImageCache:
    """What `Transform.base` gave for a file, by the file's path, size and time, and the transform.

    Holds at most `limit` bytes, and at most half of what is free on the disk and its own together. Whatever fails is
    told once through `say`, and the work goes on without what could not be kept. Safe to use from several threads.
    """

    def __init__(
        self, folder: str | os.PathLike, limit: int = DEFAULT_BYTES, say: Callable[[str], None] = lambda said: None
    ):
        self.folder, self.say = Path(folder), say
        self._lock = threading.Lock()
        self._places: dict[bytes, tuple[_Segment, int, int, int, int]] = {}
        self._checked: set[bytes] = set()
        self._segments: list[_Segment] = []
        self._own: _Writer | None = None
        self._stopped = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._segments = _segments_in(self.folder)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            self._stop(error)
            free = 0
        self.bytes = sum(segment.bytes for segment in self._segments)
        self.limit = min(limit, int((free + self.bytes) * _SHARE_OF_FREE))
        self._make_room(0)
        for segment in self._segments:
            for key, *place in segment.records():
                self._places[key] = (segment, *place)

    @property
    def entries(self) -> int:
        """How many pictures are here."""
        return len(self._places)

    def key(self, path: str | os.PathLike, transform: Transform) -> bytes | None:
        """16 bytes that change when the file does; None if it is not there."""
        try:
            found = stat_of(path)
        except (OSError, ValueError):  # the latter for a name with a null character
            return None
        said = f"{os.fspath(path)}\0{found.st_size}\0{found.st_mtime_ns}\0{transform.base_name}"
        return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def get(self, key: bytes | None) -> Tensor | None:
        """uint8 [3, h, w], or None for what is not here or no longer whole."""
        place = self._places.get(key)
        if place is None:
            return None
        segment, offset, height, width, checksum = place
        picture = segment.read(offset, 3 * height * width)
        if picture is not None and key not in self._checked:
            if zlib.crc32(picture.numpy()) == checksum:
                self._checked.add(key)
            else:
                picture = None
        if picture is None:
            with self._lock:
                self._places.pop(key, None)
            return None
        segment.used = True
        return picture.view(3, height, width)

    def put(self, key: bytes | None, picture_chw: Tensor) -> bool:
        """Keep a picture, uint8 [3, h, w]; False if there is no room for it."""
        if key is None or self._stopped:
            return False
        content = picture_chw.contiguous().numpy().data.cast("B")
        checksum = zlib.crc32(content)
        with self._lock:
            if key in self._places:
                return True
            if self._stopped or not self._make_room(len(content) + _RECORD.size):
                return False
            try:
                if self._own is None or self._own.segment.bytes >= self.limit // _SEGMENTS:
                    self._next_segment()
                _, height, width = picture_chw.shape
                offset = self._own.append(key, content, height, width, checksum)
            except OSError as error:
                self._stop(error)
                return False
            self.bytes += len(content) + _RECORD.size
            self._places[key] = (self._own.segment, offset, height, width, checksum)
            self._checked.add(key)
        return True

    def close(self) -> None:
        """Let go of the files. What is kept stays for the next one."""
        with self._lock:
            self._stopped = True
            if self._own is not None:
                self._own.close()
            self._places.clear()
            for segment in self._segments:
                segment.mapped = None

    def _next_segment(self) -> None:
        if self._own is not None:
            self._own.close()
        self._own = _Writer(self.folder)
        self._segments.append(self._own.segment)

    def _make_room(self, size: int) -> bool:
        """Remove segments that nothing was read from, those opened longest ago first, until `size` bytes fit."""
        while self.bytes + size > self.limit or len(self._segments) > _MOST_SEGMENTS:
            oldest = next((segment for segment in self._segments if not segment.used), None)
            if oldest is None:
                return self.bytes + size <= self.limit
            self._segments.remove(oldest)
            self.bytes -= oldest.bytes
            if self._places:
                self._places = {key: place for key, place in self._places.items() if place[0] is not oldest}
            oldest.remove()
        return True

    def _stop(self, error: OSError) -> None:
        self._stopped = True
        self.say(
            f"Decoded pictures cannot be kept in {self.folder} ({error.strerror or error}); they are decoded anew each "
            "time, which is slower and changes nothing else."
        )


class _Segment:
    """One pair of files. `used` protects it from being removed by this process."""

    def __init__(self, data: Path):
        self.data, self.index = data, data.with_suffix(_INDEX)
        self.mapped: mmap.mmap | None = None
        self.used = False
        self.bytes = 0
        self.opened_at = 0.0
        with contextlib.suppress(FileNotFoundError):  # another process may be removing it
            self.bytes = os.path.getsize(data)
            self.bytes += os.path.getsize(self.index)
            self.opened_at = os.path.getmtime(self.index)

    def records(self) -> list[tuple[bytes, int, int, int, int]]:
        """(key, offset, height, width, checksum) of each whole picture; the file's time becomes now."""
        try:
            content = self.index.read_bytes()
            os.utime(self.index)
        except OSError:  # removed by another process, or not ours to read
            return []
        whole = content[: len(content) - len(content) % _RECORD.size]
        return [tuple(found[:5]) for found in _RECORD.iter_unpack(whole) if _checksum(*found[:5]) == found[5]]

    def read(self, offset: int, size: int) -> Tensor | None:
        """A copy, uint8 [size]; None where the file ends before, or is gone."""
        mapped = self.mapped
        if mapped is None or offset + size > len(mapped):
            try:
                with open(self.data, "rb") as file:
                    # Private: torch wants memory that could be written to. Nothing ever is.
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError):  # the latter for an empty file
                return None
            if offset + size > len(mapped):
                return None
            self.mapped = mapped
        return torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=offset).clone()

    def remove(self) -> None:
        self.mapped = None
        for file in (self.index, self.data):
            with contextlib.suppress(OSError):  # Windows does not remove what another process has open
                file.unlink(missing_ok=True)


class _Writer:
    """A new segment that this process alone appends to. Raises `OSError`, also for a full disk."""

    def __init__(self, folder: Path):
        data = folder / f"{time.time_ns():x}-{secrets.token_hex(4)}{_DATA}"
        self._data = open(data, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        try:
            self._index = open(data.with_suffix(_INDEX), "xb", buffering=0)  # noqa: SIM115
        except OSError:
            self._data.close()
            raise
        self.segment = _Segment(data)
        self.segment.used = True
        self._end = 0

    def append(self, key: bytes, content: memoryview, height: int, width: int, checksum: int) -> int:
        """The offset of the picture, whose record is written after it."""
        offset = self._end
        self._data.seek(offset)  # over what an earlier failure left
        _write_all(self._data, content)
        place = (key, offset, height, width, checksum)
        _write_all(self._index, _RECORD.pack(*place, _checksum(*place)))
        self._end = offset + len(content)
        self.segment.bytes = self._end + self._index.tell()
        return offset

    def close(self) -> None:
        self._data.close()
        self._index.close()


def _write_all(file, content) -> None:
    view = memoryview(content)
    while len(view):
        view = view[file.write(view) :]


def _checksum(*record) -> int:
    return zlib.crc32(_RECORD.pack(*record, 0))


def _segments_in(folder: Path) -> list[_Segment]:
    """All segments, those opened longest ago first."""
    found = [_Segment(data) for data in folder.glob(f"*{_DATA}")]
    return sorted(found, key=lambda segment: segment.opened_at)
