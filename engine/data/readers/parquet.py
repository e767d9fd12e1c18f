"""Captions and classes in Parquet files, of pictures that they name or, as Hugging Face's do, hold themselves."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError, one_line
from ..images.image_files import image_columns, in_parquet, largest_group
from .caption_texts import Gathered, captions_of
from .tables import Chosen, Columns, classes_of

_LARGE_GROUP = 2**28  # bytes: an order by chance takes long where groups of rows are larger
_PART = re.compile("train|test|val(?:id(?:ation)?)?", re.IGNORECASE)
_ROWS = 4096  # of captions that are read together


def kind_of_parquet(file: Path, columns: Columns) -> tuple[str | None, str]:
    """(parquet, labels or None; which columns hold captions, or what the file is). Needs the package pyarrow."""
    if (parquet := _pyarrow()) is None:
        return None, "is read with the package pyarrow (pip install pyarrow), which is not there"
    with _errors(file), parquet.ParquetFile(file) as opened:
        schema = opened.schema_arrow
    chosen = columns.found_in(schema.names)
    if chosen is None:
        return None, f"has the columns {', '.join(schema.names)[:80]}"
    if chosen.image in image_columns(schema):
        if any(mark in chosen.image for mark in "/\\"):
            return None, f"has its pictures in a column with a slash in its name, {chosen.image[:80]}"
    elif not str(schema.field(chosen.image).type).endswith("string"):
        return None, f"holds neither pictures nor their names in its column {chosen.image[:80]}"
    return "labels" if chosen.kind == "labels" else "parquet", chosen.told


def read_parquet(file: Path, columns: Columns) -> dict[str, str]:
    """Captions by picture name, a line for each, of a file that is `parquet`. Raises `UserError`."""
    found = Gathered()
    for name, values in _values(file, columns):
        captions = captions_of([value for value in values if value is not None])
        if captions is None:
            raise UserError(f"{file}: the captions of {name[:200]} are not texts; name another caption_column.")
        found.add(name, captions or [""])
    return found.texts()


def read_classes(file: Path, columns: Columns) -> tuple[dict[str, str], int]:
    """As `tables.classes_of`, of a file that is `labels`: numbers are named as its schema says."""
    with _errors(file), _pyarrow().ParquetFile(file) as opened:
        chosen = columns.found_in(opened.schema_arrow.names)
        names = _class_names(opened.schema_arrow.metadata or {}, chosen.values[0])
    return classes_of((name, _label(value, names)) for name, (value,) in _values(file, columns))


def _label(value: Any, names: Sequence[str]) -> str:
    if value is None or (names and value == -1):  # which is how a test set has none
        return ""
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value)


def _class_names(metadata: Mapping[bytes, bytes], column: str) -> list[str]:
    """What Hugging Face's library notes of a column with numbers of classes; [] for any other."""
    try:
        found = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):  # none, or not that library's
        return []
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else []


def notes_on(files: Sequence[Path], columns: Columns) -> list[str]:
    """Sentences about files that are read together: parts of a data set that others keep apart, and pictures that are
    slow to open."""
    notes, sizes = [], {}
    parts = sorted({found[0] for file in files if (found := _PART.match(file.name))})
    if len(parts) > 1:
        notes.append(
            f"Its files are of the parts {', '.join(parts)}, which are all read; for one of them alone, move its files "
            "into a folder of their own."
        )
    for file in files:
        with _errors(file), _pyarrow().ParquetFile(file) as opened:
            path = image_columns(opened.schema_arrow).get(columns.found_in(opened.schema_arrow.names).image)
            if path and (size := largest_group(opened.metadata, path)) > _LARGE_GROUP:
                sizes[file.name] = size
    if sizes:
        name = max(sizes, key=sizes.__getitem__)
        notes.append(
            f"{name} holds {sizes[name] / 1e9:.1f} GB of pictures in one group of rows, which is read from its start "
            "to reach a picture: until they are in the cache, opening them takes long. Written anew with 100 rows in a "
            "group it is fast."
        )
    return notes


def _values(file: Path, columns: Columns) -> Iterator[tuple[str, list[Any]]]:
    """(the picture's name, what the chosen columns hold) of every row that has a picture. No picture is read."""
    with _errors(file), _pyarrow().ParquetFile(file, pre_buffer=False) as opened:
        schema = opened.schema_arrow
        chosen: Chosen = columns.found_in(schema.names)
        inside = image_columns(schema)
        held = chosen.image in inside
        column = chosen.image if chosen.image != next(iter(inside), None) else ""
        row = 0
        wanted = list(dict.fromkeys([*([] if held else [chosen.image]), *chosen.values]))
        for batch in opened.iter_batches(_ROWS, columns=wanted):
            values = [batch.column(name).to_pylist() for name in chosen.values]
            if held:
                names = [in_parquet(file.name, row + place, column) for place in range(batch.num_rows)]
            else:
                names = batch.column(chosen.image).to_pylist()
            row += batch.num_rows
            for name, *found in zip(names, *values, strict=True):
                if name and name.strip():
                    yield name.strip(), found


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        return None
    return pyarrow.parquet


@contextlib.contextmanager
def _errors(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        why = one_line(error)
        raise UserError(f"{file} cannot be read as Parquet ({why}); mend it or move it elsewhere.") from error
