"""Images with words written on them by others: the layouts of SCAM and RTA-100."""

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
# Columns of a table, in any case; the first that is there counts.
_IMAGE = ("file_name", "filename", "image", "image_path", "path", "file")
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
_MAX_BYTES = 2**28
_FIRST_LINES = 20  # of a JSONL file, in which the first object is looked for


@dataclasses.dataclass(frozen=True)
class WrittenOn:
    """What an image shows, the word written on it (or on its attacked copies), and CLEAN, HAND_WRITTEN or SYNTHETIC."""

    shows: str
    word: str
    kind: str

    @property
    def is_attack(self) -> bool:
        return self.kind != CLEAN and bool(self.word)


def attacks_in(dataset: ClipDataset) -> dict[int, WrittenOn]:
    """Return what is known of a dataset's samples, by index; {} if nothing is.

    It comes from a table in the dataset's folder (CSV, TSV or JSONL with SCAM's columns attack_word, object_label and
    type) or from names such as `label=cup_text=dog.jpg`.
    """
    folders = dict.fromkeys([str(dataset.folder), *(dataset.origins or ())])
    listed: dict[str, WrittenOn] = {}
    for folder in folders:
        listed |= _in_tables(Path(folder))
    known = {}
    for index in range(len(dataset)):
        written = listed.get(str(dataset.path(index))) if listed else None
        written = written or _from_name(dataset.names[index])
        if written is not None:
            known[index] = written
    return known


def load_attacks(folder: str | os.PathLike) -> ClipDataset | None:
    """Open a folder of attacked images as a dataset whose classes are what they show; None if it is not one."""
    top = Path(os.path.abspath(folder))
    if not top.is_dir():
        return None
    written = _in_tables(top)
    if not written:
        paths = sorted(map(str, top.glob("*")))
        written = {path: named for path in paths if (named := _from_name(path)) is not None}
    if not written:
        return None
    class_names = tuple(sorted({about.shows for about in written.values()}))
    numbers = {name: number for number, name in enumerate(class_names)}
    return ClipDataset(
        name=top.name,
        folder=top,
        format="attacks",
        reason="its images have words written on them",
        names=[os.path.relpath(path, top).replace(os.sep, "/") for path in written],
        captions=Captions([""] * len(written)),
        labels=[numbers[about.shows] for about in written.values()],
        class_names=class_names,
    )


def _in_tables(folder: Path) -> dict[str, WrittenOn]:
    """Read all tables in a folder that say which word is written on which image, by the image's path."""
    written: dict[str, WrittenOn] = {}
    files = (file for file in folder.glob("*") if file.suffix.lower() in _TABLES and os.path.isfile(file))
    for file in sorted(files):
        for row in _rows(file):
            columns = {str(key).strip().lower(): value for key, value in row.items()}
            image, shows = _value(columns, _IMAGE), _value(columns, _OBJECT)
            if image and shows:
                path = os.path.normpath(os.path.join(folder, image.replace("\\", "/")))
                if path.startswith(os.path.join(str(folder), "")):  # a table names no file outside its folder
                    written[path] = WrittenOn(_plain(shows), _plain(_value(columns, _WORD)), _kind(columns, file))
    return written


def _rows(file: Path) -> Iterator[Mapping[str, object]]:
    """Yield the rows of a table of written words; nothing for any other file."""
    try:
        if file.stat().st_size > _MAX_BYTES:
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
    """Yield the objects of a JSONL table.

    Its first object shows whether the file is such a table; only then is a damaged line an error.
    """
    is_table, damage = False, ""
    filled = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
    for count, (number, line) in enumerate(filled, 1):
        row, problem = _json_object(line)
        if problem:
            damage = damage or f"line {number} is {problem}"
        elif not is_table:
            if not _has_words(row):
                return
            is_table = True
        if is_table and damage:
            raise UserError(f"{file} is damaged: {damage}; fix that line or remove it.")
        if is_table:
            yield row
        elif count == _FIRST_LINES:
            return


def _json_object(line: str) -> tuple[Mapping[str, object], str]:
    """Return the object in a line, or what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {}, f"not JSON ({one_line(error)})"
    return (row, "") if isinstance(row, Mapping) else ({}, "not an object such as {…}")


def _has_words(columns: Iterable[object]) -> bool:
    names = {str(name).strip().lower() for name in columns}
    return not any(names.isdisjoint(accepted) for accepted in (_WORD, _IMAGE, _OBJECT))


def _value(row: Mapping[str, object], names: tuple[str, ...]) -> str:
    value = next((row[name] for name in names if name in row), None)
    return value.strip() if isinstance(value, str) else ""


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _kind(row: Mapping[str, object], file: Path) -> str:
    value = _value(row, _KIND).lower()
    if not value:
        return HAND_WRITTEN if _value(row, _WORD) else CLEAN
    for kind, words in _KINDS.items():
        if value in words:
            return kind
    raise UserError(
        f"{file} has an image of the type {shown(value)}; write clean, hand-written or synthetic, or as SCAM does "
        "NoSCAM, SCAM and SynthSCAM."
    )


def _from_name(name: str) -> WrittenOn | None:
    match = _RTA_NAME.fullmatch(os.path.basename(name.replace("\\", "/")))
    return WrittenOn(_plain(match[1]), _plain(match[2]), HAND_WRITTEN) if match else None
