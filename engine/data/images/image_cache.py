"""A disk cache of decoded images, so that each is decoded once per dataset, not once per epoch or run.

The folder holds segments, each written by one process and never by another, so processes need no lock. A segment is two
files: `<name>.u8`, the pixels of its images one after the other, and `<name>.index`, a record of fixed length for each.
A record is written after its pixels: a process that is killed leaves pixels without a record, which are ignored. Record
and pixels carry checksums, for what a power failure leaves behind. When the cache is full, the segments opened longest
ago are removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .image_files import stat_of
from .transforms import Transform

DEFAULT_BYTES = 20 * 10**9
_SHARE_OF_FREE = 0.5
_SEGMENTS = 32  # of a full cache, about
_MAX_SEGMENTS = 256  # short runs leave small segments
_DATA, _INDEX = ".u8", ".index"


class _Record(NamedTuple):
    """Where an image is in its segment. `checksum` is that of the pixels."""

    key: bytes
    offset: int
    height: int
    width: int
    checksum: int

    def crc32(self) -> int:
        return zlib.crc32(_PACKED.pack(*self, 0))

    def packed(self) -> bytes:
        return _PACKED.pack(*self, self.crc32())


_PACKED = struct.Struct("<16sQIIII")  # the fields of a record and a checksum of the record


def user_cache_folder() -> Path:
    """Return where the command line caches decoded images: in the user's cache folder, $XDG_CACHE_HOME on Linux."""
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache", "clip-finetune", "images")


class ImageCache:
    """Results of `Transform.base` by the file's path, size and time, and the transform.

    Holds at most `limit` bytes, and at most half of the disk space that is free or its own. After an error it only
    reads, and says so once through `on_note`. Safe to use from several threads.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        limit: int = DEFAULT_BYTES,
        on_note: Callable[[str], None] = lambda note: None,
    ):
        self.folder, self.on_note = Path(folder), on_note
        self._lock = threading.Lock()
        self._entries: dict[bytes, tuple[_Segment, _Record]] = {}
        self._verified: set[bytes] = set()
        self._segments: list[_Segment] = []
        self._writer: _Writer | None = None
        self._stopped = False
        free = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._segments = _segments_in(self.folder)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            self._stop(error)
        self.bytes = sum(segment.bytes for segment in self._segments)
        self.limit = min(limit, int((free + self.bytes) * _SHARE_OF_FREE))
        self._make_room(0)
        for segment in self._segments:
            self._entries.update((record.key, (segment, record)) for record in segment.records())

    @property
    def entries(self) -> int:
        """The number of images in the cache."""
        return len(self._entries)

    def key(self, path: str | os.PathLike, transform: Transform) -> bytes | None:
        """Return 16 bytes that change when the file does, or None if there is no such file."""
        try:
            status = stat_of(path)
        except (OSError, ValueError):  # ValueError: a null character in the name
            return None
        source = f"{os.fspath(path)}\0{status.st_size}\0{status.st_mtime_ns}\0{transform.base_name}"
        return hashlib.blake2b(source.encode("utf-8", "surrogatepass"), digest_size=16).digest()

    def get(self, key: bytes | None) -> Tensor | None:
        """Return an image, uint8 [3, h, w], or None if it is not cached or is damaged."""
        entry = None if key is None else self._entries.get(key)
        if key is None or entry is None:
            return None
        segment, record = entry
        image = segment.read(record.offset, 3 * record.height * record.width)
        if image is not None and key not in self._verified:
            if zlib.crc32(image.numpy()) == record.checksum:  # type: ignore[arg-type]  # numpy 1's types lack Buffer
                self._verified.add(key)
            else:
                image = None
        if image is None:
            with self._lock:
                self._entries.pop(key, None)
            return None
        segment.used = True
        return image.view(3, record.height, record.width)

    def put(self, key: bytes | None, image_chw: Tensor) -> bool:
        """Store an image, uint8 [3, h, w]. Returns False if there is no room for it."""
        if key is None or self._stopped:
            return False
        content = image_chw.contiguous().numpy().data.cast("B")
        checksum = zlib.crc32(content)
        with self._lock:
            if key in self._entries:
                return True
            if self._stopped or not self._make_room(len(content) + _PACKED.size):
                return False
            try:
                writer = self._current_writer()
                _, height, width = image_chw.shape
                record = writer.append(_Record(key, 0, height, width, checksum), content)
            except OSError as error:
                self._stop(error)
                return False
            self.bytes += len(content) + _PACKED.size
            self._entries[key] = writer.segment, record
            self._verified.add(key)
        return True

    def close(self) -> None:
        """Close the files. Their content stays for the next process."""
        with self._lock:
            self._stopped = True
            if self._writer is not None:
                self._writer.close()
            self._entries.clear()
            for segment in self._segments:
                segment.mapped = None

    def _current_writer(self) -> _Writer:
        """Return the writer of this process's segment; a new one when that segment is full."""
        if self._writer is not None and self._writer.segment.bytes < self.limit // _SEGMENTS:
            return self._writer
        if self._writer is not None:
            self._writer.close()
        self._writer = _Writer(self.folder)
        self._segments.append(self._writer.segment)
        return self._writer

    def _make_room(self, size: int) -> bool:
        """Remove segments until `size` bytes fit: of those that nothing was read from, the ones opened longest ago."""
        while self.bytes + size > self.limit or len(self._segments) > _MAX_SEGMENTS:
            oldest = next((segment for segment in self._segments if not segment.used), None)
            if oldest is None:
                return self.bytes + size <= self.limit
            self._segments.remove(oldest)
            self.bytes -= oldest.bytes
            if self._entries:
                self._entries = {key: entry for key, entry in self._entries.items() if entry[0] is not oldest}
            oldest.remove()
        return True

    def _stop(self, error: OSError) -> None:
        self._stopped = True
        self.on_note(
            f"Decoded images cannot be cached in {self.folder} ({error.strerror or error}). They are decoded again "
            "each time, which is slower and changes nothing else."
        )


@dataclasses.dataclass(eq=False)
class _Segment:
    """A pair of files. One that is `used` is not removed by this process."""

    data: Path
    bytes: int = 0
    opened_at: float = 0.0
    used: bool = False
    mapped: mmap.mmap | None = None

    @classmethod
    def of(cls, data: Path) -> _Segment:
        segment = cls(data)
        with contextlib.suppress(FileNotFoundError):  # another process may be removing it
            segment.bytes = os.path.getsize(data)
            segment.bytes += os.path.getsize(segment.index)
            segment.opened_at = os.path.getmtime(segment.index)
        return segment

    @property
    def index(self) -> Path:
        return self.data.with_suffix(_INDEX)

    def records(self) -> list[_Record]:
        """Return the intact records, and set the file's time to now."""
        try:
            content = self.index.read_bytes()
            os.utime(self.index)
        except OSError:  # removed by another process, or not readable
            return []
        whole = content[: len(content) - len(content) % _PACKED.size]
        unpacked = ((_Record(*fields), crc32) for *fields, crc32 in _PACKED.iter_unpack(whole))
        return [record for record, crc32 in unpacked if record.crc32() == crc32]

    def read(self, offset: int, size: int) -> Tensor | None:
        """Return a copy of some bytes, uint8 [size], or None if the file is shorter or is gone."""
        mapped = self.mapped
        if mapped is None or offset + size > len(mapped):
            try:
                with open(self.data, "rb") as file:
                    # torch wants writable memory, so this is a private mapping; nothing is ever written to it.
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError):  # ValueError: an empty file
                return None
            if offset + size > len(mapped):
                return None
            self.mapped = mapped
        return torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=offset).clone()

    def remove(self) -> None:
        self.mapped = None
        for file in (self.index, self.data):
            with contextlib.suppress(OSError):  # Windows does not remove a file that another process has open
                file.unlink(missing_ok=True)


class _Writer:
    """A new segment that only this process appends to. Raises `OSError`, for a full disk too."""

    def __init__(self, folder: Path):
        self.segment = _Segment(folder / f"{time.time_ns():x}-{secrets.token_hex(4)}{_DATA}", used=True)
        self._data = open(self.segment.data, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        try:
            self._index = open(self.segment.index, "xb", buffering=0)  # noqa: SIM115
        except OSError:
            self._data.close()
            raise
        self._end = 0

    def append(self, record: _Record, content: memoryview) -> _Record:
        """Write the pixels, then the record, and return it with its offset."""
        record = record._replace(offset=self._end)
        self._data.seek(self._end)  # an earlier failure may have left something behind the end
        _write_all(self._data, content)
        _write_all(self._index, record.packed())
        self._end += len(content)
        self.segment.bytes = self._end + self._index.tell()
        return record

    def close(self) -> None:
        self._data.close()
        self._index.close()


def _write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while len(view):
        view = view[file.write(view) :]  # an unbuffered file may write less than it was given


def _segments_in(folder: Path) -> list[_Segment]:
    """Return all segments, those opened longest ago first."""
    return sorted(map(_Segment.of, folder.glob(f"*{_DATA}")), key=lambda segment: segment.opened_at)
