"""Captions in JSON files: by picture name as a labels JSON or kohya's scripts have them, COCO's annotations, and
records as Hugging Face has them, one a line or in a list."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError, shown
from ..images.folder_tree import is_image
from .caption_texts import Gathered, captions_of
from .json_stream import JsonStream
from .tables import Chosen, Columns, classes_of

# A file whose first members are nothing that is known is some other JSON, and is not read to its end.
_ENOUGH = 20
_COCO_LISTS = frozenset(("images", "annotations"))
_KOHYA = {"caption", "tags"}


def kind_of_json(file: Path, columns: Columns) -> tuple[str | None, str]:
    """(json, kohya, coco, metadata, labels or None, in a few words what the file is), from its beginning.

    Raises `UserError` for text that is not JSON.
    """
    names = []
    with JsonStream(file) as stream:
        for name, value in stream.members(_COCO_LISTS):
            if (kind := _kind(name, value, columns)) is not None:
                return kind, ""
            if name is None:
                return None, "is JSON, but no records with a picture's name and captions"
            names.append(name)
            if len(names) == _ENOUGH:
                break
    known = ", ".join(name[:40] for name in names[:4])
    return None, f"is a JSON object with {f'the keys {known}' if names else 'nothing'} in it"


def _kind(name: str | None, value: Any, columns: Columns) -> str | None:
    record = isinstance(value, Mapping)
    if name is None:
        return _kind_of_record(columns.found_in(list(value))) if record else None
    if name in _COCO_LISTS:
        coco = record and ("file_name" in value or {"image_id", "caption"} <= set(value))
        return "coco" if coco else None
    if record and (_KOHYA & set(value) or (is_image(name) and captions_of(value) is not None)):
        return "kohya"
    return "json" if isinstance(value, (str, list)) and is_image(name) else None


def _kind_of_record(chosen: Chosen | None) -> str | None:
    if chosen is None:
        return None
    return "labels" if chosen.kind == "labels" else "metadata"


def read_labels(file: Path) -> dict[str, str]:
    """Captions by picture name, a line for each, of a file `{"relative/path.jpg": ["caption", …]}`.

    The value may be one text, a list of lists, or an object such as {"caption": …, "tags": …}; a name that comes twice
    has the captions of both. Raises `UserError` for captions that are none of these.
    """
    found = Gathered()
    with JsonStream(file) as stream:
        for name, value in stream.members():
            captions = captions_of(value)
            if name is None or captions is None:
                raise UserError(f'{file}: the captions of {name} are not a list of texts; write ["caption", …].')
            found.add(name, captions)
    return found.texts()


def read_coco(file: Path) -> dict[str, str] | str:
    """Captions by picture name of COCO's annotations, {"images": [{"id", "file_name"}], "annotations": [{"image_id",
    "caption"}]}; of annotations that are not captions, in a few words what they are."""
    names: dict[Any, str] = {}
    captions: dict[Any, list[str]] = {}
    with JsonStream(file) as stream:
        for name, value in stream.members(_COCO_LISTS):
            if name not in _COCO_LISTS:
                continue
            if name == "images":
                names[_field(file, value, "id")] = _field(file, value, "file_name", str)
            elif "caption" not in value:
                return "holds COCO's annotations of another kind than captions"
            else:
                captions.setdefault(_field(file, value, "image_id"), []).append(_field(file, value, "caption", str))
    found = Gathered()
    for number, name in names.items():
        found.add(name, captions.get(number, [""]))
    return found.texts()


def _field(file: Path, value: Any, name: str, kind: type | tuple[type, ...] = (int, str)) -> Any:
    if isinstance(value, Mapping) and isinstance(value.get(name), kind):
        return value[name]
    raise UserError(f"{file}: there is no {name} in {shown(value)}; mend it, or move the file elsewhere.")


# ---- records ---------------------------------------------------------------------------------------------------------


def kind_of_lines(file: Path, columns: Columns) -> tuple[str | None, str]:
    """(metadata, labels or None, in a few words what the file is) of a JSON with a record a line."""
    first = next(_lines(file), None)
    if first is None:
        return None, "is empty"
    if (chosen := columns.found_in(list(first))) is not None:
        return _kind_of_record(chosen), chosen.told
    return None, f"has records with the fields {', '.join(str(name)[:40] for name in list(first)[:6])}"


def read_records(file: Path, columns: Columns) -> dict[str, str]:
    """Captions by picture name of records, one a line or in a JSON list."""
    found = Gathered()
    for name, values in _values(file, columns):
        captions = captions_of(values)
        if captions is None:
            raise UserError(f"{file}: the captions of {name[:200]} are not texts, but {shown(values)}.")
        found.add(name, captions or [""])
    return found.texts()


def read_classes(file: Path, columns: Columns) -> tuple[dict[str, str], int]:
    """As `tables.classes_of`, of records, one a line or in a JSON list."""
    return classes_of((name, _label(file, name, values)) for name, values in _values(file, columns))


def _label(file: Path, name: str, values: list[Any]) -> str:
    if not values:
        return ""
    (value,) = values
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{file}: the class of {name[:200]} is not a name, but {shown(value)}; write a text.")


def _values(file: Path, columns: Columns) -> Iterator[tuple[str, list[Any]]]:
    """(the picture's name, what the chosen fields hold) of every record that names a picture."""
    records = _elements(file) if file.suffix.lower() == ".json" else _lines(file)
    first = next(records)
    chosen = columns.found_in(list(first))
    assert chosen is not None, "the file's kind says that it has them"
    for record in itertools.chain([first], records):
        name = record.get(chosen.image)
        if isinstance(name, str) and name.strip():
            yield name.strip(), [record[field] for field in chosen.values if record.get(field) is not None]


def _elements(file: Path) -> Iterator[Mapping[str, Any]]:
    with JsonStream(file) as stream:
        for _, value in stream.members():
            if not isinstance(value, Mapping):
                raise UserError(f"{file} holds {shown(value)} among its records; mend it, or move it elsewhere.")
            yield value


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with open(file, encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _record(file, number, line)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text; save it again as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error


def _record(file: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        why = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deep"
        raise UserError(f"{file} has no valid JSON in line {number} ({why}); mend it or move it elsewhere.") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{file} has {shown(value)} in line {number}, not a record; mend it or move it elsewhere.")
    return value
