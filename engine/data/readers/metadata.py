"""Records in JSON, as Hugging Face's `metadata.jsonl` has them: one a line, or all in a list."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError, shown
from ..text_files import open_text
from .columns import ChosenColumns, Columns
from .json_stream import json_members


def is_metadata(file: Path, columns: ChosenColumns) -> bool:
    if columns.content == "classes":
        return False
    is_table = file.suffix.lower() not in (".json", ".jsonl")
    return not is_table or (columns.content == "captions" and file.stem.lower() == "metadata")


def choose_columns(file: Path, columns: Columns) -> ChosenColumns | str:
    """Return the fields to read, from the first record; if there are none, what the file is."""
    first = next(_records(file), None)
    if first is None:
        return "is empty"
    chosen = columns.choose(list(first))
    return chosen or f"has records with the fields {', '.join(name[:40] for name in list(first)[:6])}"


def read_rows(file: Path, columns: Columns) -> Iterator[tuple[str, list[Any]]]:
    """Yield (image name, values of the chosen fields that are there) of every record that names an image."""
    records = _records(file)
    first = next(records)
    chosen = columns.choose(list(first))
    assert chosen is not None, "only files whose columns were chosen are read"
    for record in itertools.chain([first], records):
        name = record.get(chosen.image)
        if isinstance(name, str) and name.strip():
            values = [record[field] for field in chosen.values if record.get(field) is not None]
            if chosen.content == "classes":
                values = [_class_name(file, name, value) for value in values]
            yield name.strip(), values


def _class_name(file: Path, name: str, value: Any) -> str:
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{file}: the class of {name[:200]} is not a name, but {shown(value)}; write a text.")


def _records(file: Path) -> Iterator[Mapping[str, Any]]:
    return _list_elements(file) if file.suffix.lower() == ".json" else _lines(file)


def _list_elements(file: Path) -> Iterator[Mapping[str, Any]]:
    for _, value in json_members(file):
        if not isinstance(value, Mapping):
            raise UserError(f"{file} holds {shown(value)} among its records; mend it, or move it elsewhere.")
        yield value


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    with open_text(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _record(file, number, line)


def _record(file: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deep"
        raise UserError(f"{file} has no valid JSON in line {number} ({why}); mend it or move it elsewhere.") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{file} has {shown(value)} in line {number}, not a record; mend it or move it elsewhere.")
    return value


def write_metadata(samples: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """A column has one type in all rows: a text if every image has one caption, else a list."""
    single = all(len(captions) == 1 for _, captions in samples)
    for name, captions in samples:
        caption = {"text": captions[0]} if single else {"captions": list(captions)}
        yield json.dumps({"file_name": name} | caption, ensure_ascii=False) + "\n"
