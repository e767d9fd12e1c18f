"""Parquet files: their rows name images or, as Hugging Face's do, hold them. Needs the package pyarrow."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError, one_line
from ..images.image_files import image_columns, in_parquet, largest_group
from .columns import ChosenColumns, Columns

_LARGE_GROUP = 2**28  # bytes: random order is slow where row groups are larger
_SPLIT_NAME = re.compile("train|test|val(?:id(?:ation)?)?", re.IGNORECASE)
_ROWS = 4096  # of captions that are read together


def choose_columns(file: Path, columns: Columns) -> ChosenColumns | str:
    """Return the columns to read; if there are none, or pyarrow is missing, say so."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return "is read with the package pyarrow (pip install pyarrow), which is not there"
    with _open(file) as opened:
        schema = opened.schema_arrow
    chosen = columns.choose(schema.names)
    if chosen is None:
        return f"has the columns {', '.join(schema.names)[:80]}"
    if chosen.image in image_columns(schema):
        if any(slash in chosen.image for slash in "/\\"):
            return f"has its images in a column with a slash in its name, {chosen.image[:80]}"
    elif not str(schema.field(chosen.image).type).endswith("string"):
        return f"holds neither images nor their names in its column {chosen.image[:80]}"
    return chosen


def read_rows(file: Path, columns: Columns) -> Iterator[tuple[str, list[Any]]]:
    """Yield (image name, values of the chosen columns) of every row that has an image. No image is read."""
    with _open(file, pre_buffer=False) as opened:
        schema = opened.schema_arrow
        chosen = _chosen(schema, columns)
        class_names = _class_names(schema.metadata or {}, chosen.values[0])
        is_classes = chosen.content == "classes"
        held = list(image_columns(schema))
        embedded = chosen.image in held
        column = chosen.image if embedded and chosen.image != held[0] else ""
        wanted = list(dict.fromkeys([*([] if embedded else [chosen.image]), *chosen.values]))
        row = 0
        for batch in opened.iter_batches(_ROWS, columns=wanted):
            if embedded:
                names = [in_parquet(file.name, row + number, column) for number in range(batch.num_rows)]
            else:
                names = batch.column(chosen.image).to_pylist()
            row += batch.num_rows
            for name, *values in zip(names, *(batch.column(name).to_pylist() for name in chosen.values), strict=True):
                if name and name.strip():
                    values = [value for value in values if value is not None]
                    yield name.strip(), [_class_name(value, class_names) for value in values] if is_classes else values


def _chosen(schema: Any, columns: Columns) -> ChosenColumns:
    chosen = columns.choose(schema.names)
    assert chosen is not None, "only files whose columns were chosen are read"
    return chosen


def _class_name(value: Any, names: Sequence[str]) -> str:
    if names and value == -1:  # how a test set has no classes
        return ""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value)


def _class_names(metadata: Mapping[bytes, bytes], column: str) -> list[str]:
    """The class names that Hugging Face's library notes for a column of numbers; [] for any other column."""
    try:
        names = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):  # none, or not that library's
        return []
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def parquet_notes(files: Sequence[Path], columns: Columns) -> list[str]:
    """Notes on files that are read together: several parts of a split, and images that are slow to open."""
    notes, sizes = [], {}
    parts = sorted({match[0] for file in files if (match := _SPLIT_NAME.match(file.name))})
    if len(parts) > 1:
        notes.append(
            f"Its files are of the parts {', '.join(parts)}, which are all read; for one of them alone, move its files "
            "into a folder of their own."
        )
    for file in files:
        with _open(file) as opened:
            path = image_columns(opened.schema_arrow).get(_chosen(opened.schema_arrow, columns).image)
            if path and (size := largest_group(opened.metadata, path)) > _LARGE_GROUP:
                sizes[file.name] = size
    if sizes:
        name = max(sizes, key=sizes.__getitem__)
        notes.append(
            f"{name} holds {sizes[name] / 1e9:.1f} GB of images in one row group, which must be read from its start to "
            "reach an image, so opening images is slow until they are cached. Write the file again with 100 rows per "
            "group to make it fast."
        )
    return notes


@contextlib.contextmanager
def _open(file: Path, **options: bool) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; errors, also those while reading, become `UserError`."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, **options) as opened:
            yield opened
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file} cannot be read as Parquet ({one_line(error)}); mend it or move it elsewhere."
        ) from error
