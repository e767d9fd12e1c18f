"""Image files: the only place that opens them, and reads images from the rows of Parquet files.

An image is named by the path of its own file, or by the path and row of a Parquet file: `train.parquet#17` (rows start
at 0), followed by `#column` if it is not in the first column of images.
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
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from ...errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import ImageFile

TOO_LARGE = "it is far too large for a photograph"
NOT_AN_IMAGE = "it is not an image that Pillow can open"
_IN_PARQUET = re.compile(r"(.+\.parquet)#(\d{1,12})(?:#([^/\\]+))?", re.IGNORECASE | re.DOTALL)


class BrokenImage(UserError):
    """A file that is not a complete image; the text is the reason."""


class MissingImage(BrokenImage):
    """An image file that does not exist."""


# ---- names -----------------------------------------------------------------------------------------------------------


def in_parquet(file: str, row: int, column: str = "") -> str:
    """Return the name of the image in a row; without a column it is in the first column of images."""
    return f"{file}#{row}#{column}" if column else f"{file}#{row}"


def file_of(path: str) -> str:
    """Return the file that holds an image: for an ordinary image, the path itself."""
    parquet = _parse(path)
    return parquet[0] if parquet else path


def row_of(path: str | os.PathLike) -> int | None:
    """Return the row that holds an image, or None for an ordinary image."""
    parquet = _parse(os.fspath(path))
    return parquet[1] if parquet else None


def _parse(path: str) -> tuple[str, int, str] | None:
    """Return (file, row, column or ""), or None for an ordinary image."""
    if "#" not in path or (match := _IN_PARQUET.fullmatch(path)) is None:
        return None
    return match[1], int(match[2]), match[3] or ""


def stat_of(path: str | os.PathLike) -> os.stat_result:
    """Stat the file that holds an image. Raises `OSError`, or `ValueError` for a name with a null character."""
    return os.stat(file_of(os.fspath(path)))


# ---- opening ---------------------------------------------------------------------------------------------------------


def _source(path: str | os.PathLike | BinaryIO) -> str | os.PathLike | BinaryIO:
    """Return what to open: the path of an ordinary image, or a file that is open already, or the bytes of a row."""
    if not isinstance(path, (str, os.PathLike)):
        return path
    parquet = _parse(os.fspath(path))
    return io.BytesIO(_bytes_in(*parquet)) if parquet else path


@contextlib.contextmanager
def open_bytes(path: str | os.PathLike | BinaryIO) -> Iterator[BinaryIO]:
    """Open an image's encoded bytes as a file. Raises `BrokenImage` and `OSError`."""
    source = _source(path)
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            yield file
    else:  # in memory, or the caller's to close
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


def open_image(path: str | os.PathLike | BinaryIO) -> ImageFile.ImageFile:
    """Open an image with Pillow, which decodes it later: the only call of `Image.open`, limited to `image_formats`.

    Raises `BrokenImage` and whatever Pillow raises, such as `UnidentifiedImageError` for any other format.
    """
    from PIL import Image

    return Image.open(_source(path), formats=image_formats())


def suffix_of(path: str | os.PathLike) -> str:
    """Return the extension of an image's file in lower case; for a row, the one of its format. Raises `BrokenImage`."""
    if row_of(path) is None:
        return os.path.splitext(path)[1].lower()
    from PIL import Image

    try:
        with open_image(path) as opened:
            format = opened.format
    except (OSError, Image.DecompressionBombError) as error:
        raise BrokenImage(NOT_AN_IMAGE) from error
    common = {"JPEG": ".jpg", "PNG": ".png", "TIFF": ".tif"}
    registered = (suffix for suffix, name in Image.registered_extensions().items() if name == format)
    return common.get(format or "") or next(registered)


# ---- rows of Parquet files -------------------------------------------------------------------------------------------

# A row can only be read together with the rows before it in its row group. So rows are read in chunks, and the chunks
# that were used last stay in memory.
_MAX_IMAGE_BYTES = 2**28
_CHUNK_BYTES = 2**26  # about
_MAX_CHUNK_ROWS = 1024  # where one image repeats, a file may claim to need too few bytes per row
_CACHE_BYTES = 2**28
_CONCURRENT_READS = 4  # chunks of a row group that is larger than a chunk are read one at a time


def image_columns(schema: Any) -> dict[str, str]:
    """Return the columns of encoded images by name, each with the path of its bytes.

    Hugging Face's image columns are structs with a field `bytes`.
    """
    import pyarrow

    paths = {}
    for field in schema:
        kind, path = field.type, field.name
        if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind, path = kind.field("bytes").type, f"{field.name}.bytes"
        if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
            paths[field.name] = path
    return paths


class _Layout(NamedTuple):
    """How a file is read: its column of images, the first row of each row group (and the end), and the rows per chunk
    of each group."""

    metadata: Any
    path: str
    starts: list[int]
    chunk_rows: list[int]

    def is_large(self, group: int) -> bool:
        return self.chunk_rows[group] < self.starts[group + 1] - self.starts[group]


@functools.lru_cache(maxsize=256)
def _layout(file: str, size: int, time: int, column: str) -> _Layout:
    """Return the layout; `size` and `time` are the file's, so that a changed file is read again."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as opened:
        metadata, paths = opened.metadata, image_columns(opened.schema_arrow)
    path = paths.get(column) if column else next(iter(paths.values()), None)
    if path is None:
        raise BrokenImage(f"{os.path.basename(file)} has no column {column or 'of images'}")
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    number = _column_number(metadata, path)
    sizes = [max(1, group.column(number).total_uncompressed_size) for group in groups]
    fitting = [group.num_rows * _CHUNK_BYTES // size for group, size in zip(groups, sizes, strict=True)]
    chunk_rows = [max(1, min(_MAX_CHUNK_ROWS, rows)) for rows in fitting]
    return _Layout(metadata, path, [0, *itertools.accumulate(group.num_rows for group in groups)], chunk_rows)


def largest_group(metadata: Any, path: str) -> int:
    """Return the bytes of images in the largest row group of a file."""
    column = _column_number(metadata, path)
    groups = range(metadata.num_row_groups)
    return max((metadata.row_group(number).column(column).total_uncompressed_size for number in groups), default=0)


def _column_number(metadata: Any, path: str) -> int:
    return next(number for number in range(metadata.num_columns) if metadata.schema.column(number).path == path)


def _bytes_in(file: str, row: int, column: str) -> bytes:
    """Return the encoded image of a row. Raises `BrokenImage` and `OSError`."""
    import pyarrow

    name, status = os.path.basename(file), os.stat(file)
    try:
        layout = _layout(file, status.st_size, status.st_mtime_ns, column)
        if row >= layout.starts[-1]:
            raise BrokenImage(f"{name} has only {layout.starts[-1]} rows")
        group = bisect.bisect_right(layout.starts, row) - 1
        chunk, offset = divmod(row - layout.starts[group], layout.chunk_rows[group])
        key = _ChunkKey(file, status.st_size, status.st_mtime_ns, layout.path, group, chunk)
        value = _chunks.get(key, layout)[offset]
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # from the system: the file is gone, or may not be read
            raise
        raise BrokenImage(f"{name} is damaged ({one_line(error)})") from error
    if not value.is_valid:
        raise BrokenImage(f"{name} has no image in this row")
    buffer = value.as_buffer()
    if buffer.size > _MAX_IMAGE_BYTES:
        raise BrokenImage(TOO_LARGE)
    return buffer.to_pybytes()


class _ChunkKey(NamedTuple):
    file: str
    size: int
    time: int
    path: str
    group: int
    chunk: int


class _Chunks:
    """The most recently used chunks. Threads that want a chunk that is being read wait for it."""

    def __init__(self) -> None:
        self._chunks: collections.OrderedDict[_ChunkKey, Any] = collections.OrderedDict()
        self._pending: dict[_ChunkKey, Future] = {}
        self._lock = threading.Lock()
        self._reading, self._reading_large = threading.BoundedSemaphore(_CONCURRENT_READS), threading.Lock()

    def get(self, key: _ChunkKey, layout: _Layout) -> Any:
        """Return a pyarrow array with the bytes of each row."""
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
                return self._chunks[key]
            is_first = key not in self._pending
            future = self._pending.setdefault(key, Future())
        if not is_first:
            return future.result()
        try:
            with self._reading_large if layout.is_large(key.group) else self._reading:
                chunk = _read_chunk(key, layout)
        except BaseException as error:  # the threads that wait must not wait for ever
            with self._lock:
                del self._pending[key]
            future.set_exception(error)
            raise
        with self._lock:
            self._chunks[key] = chunk
            while len(self._chunks) > 1 and sum(chunk.nbytes for chunk in self._chunks.values()) > _CACHE_BYTES:
                self._chunks.popitem(last=False)
            del self._pending[key]
        future.set_result(chunk)
        return chunk


_chunks = _Chunks()


def _read_chunk(key: _ChunkKey, layout: _Layout) -> Any:
    """Read one chunk of a row group without holding the chunks before it."""
    import pyarrow.parquet

    rows, group = layout.chunk_rows[key.group], key.group
    # Otherwise pyarrow holds the whole group. It always holds a page, which has up to 1024 rows if pyarrow wrote it.
    options = dict(metadata=layout.metadata, pre_buffer=False, buffer_size=2**20)
    with pyarrow.parquet.ParquetFile(key.file, **options) as opened:
        batches = opened.iter_batches(rows, [group], [key.path], use_threads=False)
        skipped = [batch.num_rows for batch in itertools.islice(batches, key.chunk)]
        batch = next(batches, None)
    remaining = layout.starts[group + 1] - layout.starts[group] - rows * key.chunk
    if skipped != [rows] * key.chunk or batch is None or batch.num_rows != min(rows, remaining):
        raise BrokenImage(f"{os.path.basename(key.file)} is damaged (it has fewer rows than it claims)")
    column = batch.column(0)
    return column.field("bytes") if key.path.endswith(".bytes") and hasattr(column, "field") else column
