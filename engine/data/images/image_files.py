"""Where the bytes of a picture are: in a file of its own, or in a row of a Parquet file, whose place is written
`train.parquet#17` (rows from 0), with `#column` after it for another column of pictures than the first.

A row cannot be reached without what comes before it in its group of rows, so what was read last is kept, up to a bound.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import functools
import io
import itertools
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, BinaryIO, NamedTuple

from ...errors import UserError, one_line

TOO_LARGE = "it is far too large for a photograph"
_IN_PARQUET = re.compile(r"(.+\.parquet)#(\d{1,12})(?:#([^/\\]+))?", re.IGNORECASE | re.DOTALL)
_LARGEST = 2**28  # bytes of a picture in a row
_STRETCH = 2**26  # bytes of pictures that are read together, about
_KEPT_BYTES = 2**28
_AT_ONCE = 4  # stretches that are being read, by as many threads; of groups that are larger than one, a single one
_MOST_ROWS = 1024  # that are read together: where a picture comes again and again, a file may say too few bytes


class BrokenImage(UserError):
    """A file that is not a whole picture; the text is the reason."""


class MissingImage(BrokenImage):
    """There is no such file."""


def in_parquet(file: str, row: int, column: str = "") -> str:
    """The name of the picture in a row, and in a column if it is not the first of pictures."""
    return f"{file}#{row}#{column}" if column else f"{file}#{row}"


def file_of(place: str) -> str:
    """The file that a picture is in; an ordinary picture is one itself."""
    found = _parted(place)
    return found[0] if found else place


def row_of(place: str | os.PathLike) -> int | None:
    """The row that a picture is in; None for an ordinary one."""
    found = _parted(os.fspath(place))
    return found[1] if found else None


def _parted(place: str) -> tuple[str, int, str] | None:
    """(file, row, column or "")."""
    if "#" not in place or (found := _IN_PARQUET.fullmatch(place)) is None:
        return None
    return found[1], int(found[2]), found[3] or ""


def stat_of(place: str | os.PathLike) -> os.stat_result:
    """Of the file that a picture is in. Raises `OSError`, or `ValueError` for a name with a null character."""
    return os.stat(file_of(os.fspath(place)))


def opener_of(place: str | os.PathLike | BinaryIO) -> str | os.PathLike | BinaryIO:
    """What Pillow opens: the path of an ordinary picture, or a file that is open already, else the bytes of a row.
    Raises `BrokenImage` and `OSError`."""
    if not isinstance(place, (str, os.PathLike)):
        return place
    found = _parted(os.fspath(place))
    return io.BytesIO(_bytes_in(*found)) if found else place


@contextlib.contextmanager
def open_bytes(place: str | os.PathLike | BinaryIO) -> Iterator[BinaryIO]:
    """The bytes of a picture, as a file. Raises `BrokenImage` and `OSError`."""
    source = opener_of(place)
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield file
    else:  # it takes no more than memory, or is the caller's to close
        yield source


@functools.cache
def image_formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats that it decodes itself, in the order in which it tries them.

    Pillow goes by a file's content, whatever its name, so each of these can come from any dataset. Left out are EPS,
    which runs Ghostscript; IPTC, which opens the file inside it as any format, EPS included; WMF and the other stubs,
    which hand the file to the operating system or to another library; and MPEG, which Pillow cannot decode.
    """
    from PIL import Image, ImageFile

    Image.init()
    stubs = {name for name, (opener, _) in Image.OPEN.items() if _derives(opener, ImageFile.StubImageFile)}
    return tuple(name for name in Image.ID if name not in stubs | {"EPS", "IPTC", "MPEG"})


def _derives(opener: object, base: type) -> bool:
    return isinstance(opener, type) and issubclass(opener, base)


def open_image(place: str | os.PathLike | BinaryIO):
    """Open an image with Pillow, which decodes it later: the only call of `Image.open`, limited to `image_formats`.

    Raises `BrokenImage` and what Pillow raises, `UnidentifiedImageError` for any other format among it.
    """
    from PIL import Image

    return Image.open(opener_of(place), formats=image_formats())


def suffix_of(place: str | os.PathLike) -> str:
    """The extension of a picture's file, in lower case; of one in a row, as its bytes are. Raises `BrokenImage`."""
    if row_of(place) is None:
        return os.path.splitext(place)[1].lower()
    from PIL import Image

    try:
        with open_image(place) as opened:
            form = opened.format
    except (OSError, Image.DecompressionBombError) as error:
        raise BrokenImage("it is not a picture that Pillow can open") from error
    usual = {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif"}
    return usual.get(form) or next(end for end, kind in Image.registered_extensions().items() if kind == form)


# ---- rows of Parquet files -------------------------------------------------------------------------------------------


def image_columns(schema: Any) -> dict[str, str]:
    """The columns of encoded pictures, by name: where their bytes are. Hugging Face's are structs with `bytes`."""
    import pyarrow

    found = {}
    for field in schema:
        kind, path = field.type, field.name
        if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind, path = kind.field("bytes").type, f"{field.name}.bytes"
        if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
            found[field.name] = path
    return found


class _Layout(NamedTuple):
    """What is known of a file without reading it: the column of pictures, the first row of each group and one after
    the last, and how many rows of each are read together."""

    metadata: Any
    path: str
    starts: list[int]
    together: list[int]

    def is_large(self, group: int) -> bool:
        return self.together[group] < self.starts[group + 1] - self.starts[group]


@functools.lru_cache(maxsize=256)
def _layout(file: str, size: int, time: int, column: str) -> _Layout:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        metadata, paths = opened.metadata, image_columns(opened.schema_arrow)
    path = paths.get(column) if column else next(iter(paths.values()), None)
    if path is None:
        raise BrokenImage(f"{os.path.basename(file)} has no column {column or 'of pictures'}")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    number = _number_of(metadata, path)
    together = [
        max(1, min(_MOST_ROWS, group.num_rows * _STRETCH // max(1, group.column(number).total_uncompressed_size)))
        for group in groups
    ]
    return _Layout(metadata, path, [0, *itertools.accumulate(group.num_rows for group in groups)], together)


def largest_group(metadata: Any, path: str) -> int:
    """Bytes of the pictures in the largest group of rows of a file."""
    column = _number_of(metadata, path)
    groups = range(metadata.num_row_groups)
    return max((metadata.row_group(number).column(column).total_uncompressed_size for number in groups), default=0)


def _number_of(metadata: Any, path: str) -> int:
    return next(number for number in range(metadata.num_columns) if metadata.schema.column(number).path == path)


def _bytes_in(file: str, row: int, column: str) -> bytes:
    """The bytes of the picture in a row."""
    import pyarrow

    found = os.stat(file)
    try:
        layout = _layout(file, found.st_size, found.st_mtime_ns, column)
        if row >= layout.starts[-1]:
            raise BrokenImage(f"{os.path.basename(file)} has {layout.starts[-1]} rows, and not so many")
        group = bisect.bisect_right(layout.starts, row) - 1
        stretch, place = divmod(row - layout.starts[group], layout.together[group])
        key = (file, found.st_size, found.st_mtime_ns, layout.path, group, stretch)
        value = _stretches.get(key, layout)[place]
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's: the file is gone, or may not be read
            raise
        raise BrokenImage(f"{os.path.basename(file)} is damaged ({one_line(error)})") from error
    if not value.is_valid:
        raise BrokenImage(f"{os.path.basename(file)} has no picture in this row")
    buffer = value.as_buffer()
    if buffer.size > _LARGEST:
        raise BrokenImage(TOO_LARGE)
    return buffer.to_pybytes()


class _Stretches:
    """Pictures that lie one after the other in a file, read together; those used last are kept. Threads that want the
    same ones wait for the first of them."""

    def __init__(self):
        self._kept: collections.OrderedDict[tuple, Any] = collections.OrderedDict()
        self._coming: dict[tuple, Future] = {}
        self._lock = threading.Lock()
        self._reading, self._reading_large = threading.BoundedSemaphore(_AT_ONCE), threading.Lock()

    def get(self, key: tuple, layout: _Layout) -> Any:
        """An array of pyarrow's with the bytes of each."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            coming = self._coming.get(key)
            first = coming is None
            if first:
                coming = self._coming[key] = Future()
        if not first:
            return coming.result()
        try:
            with self._reading_large if layout.is_large(key[-2]) else self._reading:
                found = _read(key, layout)
        except BaseException as error:  # whoever waits for it must not wait for ever
            with self._lock:
                del self._coming[key]
            coming.set_exception(error)
            raise
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            del self._coming[key]
        coming.set_result(found)
        return found


_stretches = _Stretches()


def _read(key: tuple, layout: _Layout) -> Any:
    """One stretch of a group, without holding those before it."""
    import pyarrow.parquet

    file, _, _, path, group, stretch = key
    # Without these options the whole group is held. A page is held whatever they are: pyarrow writes up to 1024 rows.
    options = dict(metadata=layout.metadata, pre_buffer=False, buffer_size=2**20)
    with pyarrow.parquet.ParquetFile(file, **options) as opened:
        batches = opened.iter_batches(layout.together[group], [group], [path], use_threads=False)
        rows = [layout.together[group]] * stretch
        before = [batch.num_rows for batch in itertools.islice(batches, stretch)]
        batch = next(batches, None)
    left = layout.starts[group + 1] - layout.starts[group] - sum(rows)
    if before != rows or batch is None or batch.num_rows != min(layout.together[group], left):
        raise BrokenImage(f"{os.path.basename(file)} is damaged (it has not as many rows as it says)")
    column = batch.column(0)
    return column.field("bytes") if path.endswith(".bytes") and hasattr(column, "field") else column
