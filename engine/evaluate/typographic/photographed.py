"""Pictures with words written over them by others: SCAM's layout and RTA-100's."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ...data.dataset import ClipDataset
from ...data.readers.parsed import Captions
from ...errors import UserError, one_line, shown

CLEAN, HAND_WRITTEN, SYNTHETIC, DRAWN = "clean", "hand-written", "synthetic", "drawn"
# Of a table, in any case; the first that is there counts.
_PICTURE = ("file_name", "filename", "image", "image_path", "path", "file")
_WORD = ("attack_word", "attack", "attack_text", "written_word")
_OBJECT = ("object_label", "object", "label", "class", "class_name", "category")
_KIND = ("type", "kind", "attack_type")
_KINDS = {
    CLEAN: {"clean", "none", "no", "original", "noscam", "norta"},
    HAND_WRITTEN: {"hand-written", "handwritten", "hand", "real", "attack", "attacked", "scam", "rta"},
    SYNTHETIC: {"synthetic", "synth", "digital", "drawn", "synthscam", "synthrta"},
}
_RTA_NAME = re.compile(r"label=(.+)_text=(.+)\.\w+")
_TABLES = (".csv", ".tsv", ".jsonl")
_MOST_BYTES = 2**28
_FIRST_LINES = 20  # of a JSONL, in which the first object is looked for


@dataclasses.dataclass(frozen=True)
class WrittenOn:
    """What a picture shows, the word that is written on it (or on its attacked copies), and CLEAN, HAND_WRITTEN or
    SYNTHETIC."""

    shows: str
    word: str
    kind: str


def attacks_in(dataset: ClipDataset) -> dict[int, WrittenOn]:
    """What is known of a data set's samples from a table in its folder (CSV, TSV or JSONL with the columns attack_word,
    object_label and type, as SCAM has them), or from names such as `label=cup_text=dog.jpg`; {} if nothing is."""
    folders = dict.fromkeys([str(dataset.folder), *(dataset.origins or ())])
    found: dict[str, WrittenOn] = {}
    for folder in folders:
        found |= _in_tables(Path(folder))
    known = {}
    for index in range(len(dataset)):
        written = found.get(str(dataset.path(index))) if found else None
        written = written or _from_name(dataset.names[index])
        if written is not None:
            known[index] = written
    return known


def load_attacks(folder: str | os.PathLike) -> ClipDataset | None:
    """A folder of attacked pictures as a data set whose classes are what the pictures show; None if it is none."""
    top = Path(os.path.abspath(folder))
    if not top.is_dir():
        return None
    tables = _in_tables(top)
    named = [path for path in sorted(map(str, top.glob("*"))) if _from_name(path)] if not tables else []
    paths = list(tables) or named
    if not paths:
        return None
    objects = [(tables.get(path) or _from_name(path)).shows for path in paths]
    classes = tuple(sorted(set(objects)))
    numbers = {name: number for number, name in enumerate(classes)}
    return ClipDataset(
        name=top.name,
        folder=top,
        format="attacks",
        reason="words are written on its pictures",
        names=[os.path.relpath(path, top).replace(os.sep, "/") for path in paths],
        captions=Captions([""] * len(paths)),
        labels=[numbers[name] for name in objects],
        class_names=classes,
    )


def _in_tables(folder: Path) -> dict[str, WrittenOn]:
    """By the picture's path, of all tables in a folder that say which word is written on which picture."""
    found: dict[str, WrittenOn] = {}
    files = (file for file in folder.glob("*") if file.suffix.lower() in _TABLES and os.path.isfile(file))
    for file in sorted(files):
        for row in _rows(file):
            lower = {str(key).strip().lower(): value for key, value in row.items()}
            picture, shows = _value(lower, _PICTURE), _value(lower, _OBJECT)
            if picture and shows:
                path = os.path.normpath(os.path.join(folder, picture.replace("\\", "/")))
                if path.startswith(os.path.join(str(folder), "")):
                    found[path] = WrittenOn(_plain(shows), _plain(_value(lower, _WORD)), _kind(lower, file))
    return found


def _rows(file: Path) -> Iterator[Mapping[str, object]]:
    """Of a table that has a column with the words that are written; none of any other."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            return
        with open(file, encoding="utf-8-sig", errors="replace", newline="") as stream:
            if file.suffix.lower() == ".jsonl":
                yield from _json_rows(stream, file)
                return
            lines = itertools.dropwhile(lambda line: not line.strip(), stream)
            reader = csv.DictReader(lines, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
            if _has_words(reader.fieldnames or ()):
                yield from reader
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); make it readable or move it elsewhere.") from error
    except csv.Error as error:
        raise UserError(f"{file} is not a readable CSV ({error}); is a quotation mark missing?") from error


def _json_rows(stream: Iterable[str], file: Path) -> Iterator[Mapping[str, object]]:
    """The first object says whether it is such a table: only then is a line that is none an error."""
    is_table, damage = False, ""
    filled = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
    for place, (number, line) in enumerate(filled, 1):
        try:
            row = json.loads(line)
            said = "" if isinstance(row, Mapping) else "no object such as {…}"
        except (ValueError, RecursionError) as error:
            said = f"not JSON ({one_line(error)})"
        if said:
            damage = damage or f"line {number} is {said}"
        elif not is_table:
            if not _has_words(row):
                return
            is_table = True
        if is_table and damage:
            raise UserError(f"{file} is damaged: {damage}; mend that line or remove it.")
        if is_table:
            yield row
        elif place == _FIRST_LINES:
            return


def _has_words(columns) -> bool:
    names = {str(name).strip().lower() for name in columns}
    return not names.isdisjoint(_WORD) and not names.isdisjoint(_PICTURE) and not names.isdisjoint(_OBJECT)


def _value(row: Mapping[str, object], names: tuple[str, ...]) -> str:
    value = next((row[name] for name in names if name in row), None)
    return value.strip() if isinstance(value, str) else ""


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _kind(row: Mapping[str, object], file: Path) -> str:
    said = _value(row, _KIND).lower()
    if not said:
        return HAND_WRITTEN if _value(row, _WORD) else CLEAN
    found = next((kind for kind, words in _KINDS.items() if said in words), None)
    if found is None:
        raise UserError(
            f"{file} says that a picture is of the type {shown(said)}; write clean, hand-written or synthetic, or as "
            "SCAM does NoSCAM, SCAM and SynthSCAM."
        )
    return found


def _from_name(name: str) -> WrittenOn | None:
    found = _RTA_NAME.fullmatch(os.path.basename(name.replace("\\", "/")))
    return WrittenOn(_plain(found[1]), _plain(found[2]), HAND_WRITTEN) if found else None
