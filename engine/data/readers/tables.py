"""Captions and classes in tables: CSV and its kin. Which columns hold what is chosen here for all formats that have
some."""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError
from .caption_texts import Gathered, is_caption_field, prompt_captions

_IMAGE_COLUMNS = (
    "image",
    "filename",
    "file_name",
    "image_path",
    "filepath",
    "path",
    "file",
    "image_name",
    "image_file",
    "img",
    "img_path",
)
# SCAM calls it object_label; CIFAR-100 has a fine and a coarse one.
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "object_label", "fine_label")
_PROMPT = "prompt"  # CLIP Interrogator's
# Spreadsheets write semicolons where the comma is the decimal sign; Flickr30k's captions come with bars.
_MARKS = ",;\t|"
_LONGEST_HEADER = 2**16
# Letters in a field. Python's own limit is 131,072; a field beyond this one is a quotation mark that is never closed.
_LONGEST_FIELD = 2**24


class Chosen(NamedTuple):
    """The columns of a table. `kind` is csv (captions), interrogator (prompts) or labels (classes)."""

    kind: str
    image: str
    values: tuple[str, ...]

    @property
    def told(self) -> str:
        """The columns of captions, if there are several: all of them count, which a user may not expect."""
        return ", ".join(self.values) if len(self.values) > 1 else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """The names, in any case, of the columns with the picture's name and with captions, of which several are separated
    by commas; one that is empty is recognised."""

    image: str = ""
    caption: str = ""

    def found_in(self, names: Sequence[str]) -> Chosen | None:
        """Which of a table's columns are used; None if it has no such ones."""
        by_name = {str(name).strip().lower(): str(name) for name in reversed(names)}
        image = next((by_name[name] for name in self._image_names if name in by_name), None)
        if image is None:
            return None
        if self.caption:
            wanted = [name.strip().lower() for name in self.caption.split(",") if name.strip()]
            there = all(name in by_name for name in wanted)
            return Chosen("csv", image, tuple(by_name[name] for name in wanted)) if there else None
        if captions := tuple(name for name in dict.fromkeys(map(str, names)) if is_caption_field(name)):
            return Chosen("csv", image, captions)
        if _PROMPT in by_name:
            return Chosen("interrogator", image, (by_name[_PROMPT],))
        label = next((by_name[name] for name in _LABEL_COLUMNS if name in by_name), None)
        return None if label is None else Chosen("labels", image, (label,))

    @property
    def _image_names(self) -> tuple[str, ...]:
        return (self.image.strip().lower(),) if self.image.strip() else _IMAGE_COLUMNS


# ---- CSV -------------------------------------------------------------------------------------------------------------


def kind_of_table(file: Path, columns: Columns) -> tuple[str | None, str]:
    """(csv, metadata, interrogator, labels or None; which columns hold captions, or what the file is), from its first
    line."""
    with _reading(file), open(file, encoding="utf-8-sig", newline="") as stream:
        header = stream.readline(_LONGEST_HEADER)
    if (found := _columns(header, columns)) is None:
        return None, f"is a table that begins with the line {header.strip()[:60]!r}"
    is_metadata = found[0].kind == "csv" and file.stem.lower() == "metadata"
    return "metadata" if is_metadata else found[0].kind, found[0].told


def _columns(header: str, columns: Columns) -> tuple[Chosen, list[str], str] | None:
    """(the columns used, all names in the header, the mark between them)."""
    for mark in _MARKS:
        names = next(csv.reader([header], delimiter=mark), [])
        if (chosen := columns.found_in(names)) is not None:
            return chosen, names, mark
    return None


def read_table(file: Path, columns: Columns) -> dict[str, str]:
    """Captions by picture name, a line for each; a picture may have several rows. Raises `UserError`."""
    found = Gathered()
    for chosen, name, values in _rows(file, columns):
        found.add(name, prompt_captions(values[0]) if chosen.kind == "interrogator" else values)
    return found.texts()


def read_classes(file: Path, columns: Columns) -> tuple[dict[str, str], int]:
    """As `classes_of`. Raises `UserError`."""
    return classes_of((name, values[0]) for _, name, values in _rows(file, columns))


def classes_of(rows: Iterable[tuple[str, str]]) -> tuple[dict[str, str], int]:
    """(a class by picture name, how many pictures have rows that do not agree): a picture of several rows has the class
    that most of them say, or a line for each of those that as many say."""
    votes: dict[str, str | collections.Counter[str]] = {}
    agreeing: collections.Counter[str] = collections.Counter()  # further rows that say the same as the first
    for name, said in rows:
        label = " ".join(said.replace("_", " ").split())
        if name not in votes:
            votes[name] = label
            continue
        before = votes[name]
        if not label:
            continue
        if before == label:
            agreeing[name] += 1
            continue
        if isinstance(before, str):
            before = votes[name] = collections.Counter({before: 1 + agreeing.pop(name, 0)} if before else {})
        before[label] += 1
    classes = {name: vote if isinstance(vote, str) else "\n".join(_most_said(vote)) for name, vote in votes.items()}
    return classes, sum(not isinstance(vote, str) and len(vote) > 1 for vote in votes.values())


def _most_said(votes: collections.Counter[str]) -> list[str]:
    most = max(votes.values())
    return sorted(label for label, count in votes.items() if count == most)


def _rows(file: Path, columns: Columns) -> Iterator[tuple[Chosen, str, list[str]]]:
    """(the columns used, the picture's name, the values of those columns) of every row that names a picture."""
    with _reading(file), _long_fields(), open(file, encoding="utf-8-sig", newline="") as stream:
        found = _columns(stream.readline(_LONGEST_HEADER), columns)
        assert found is not None, "kind_of_table said that it has them"
        chosen, names, mark = found
        image, places = names.index(chosen.image), [names.index(value) for value in chosen.values]
        quoting = csv.QUOTE_NONE if mark == "|" else csv.QUOTE_MINIMAL
        for row in csv.reader(stream, delimiter=mark, strict=True, quoting=quoting):
            name = row[image].strip() if len(row) > image else ""
            if name:
                yield chosen, name, [row[place] for place in places if place < len(row)] or [""]


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); save it again as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error
    except csv.Error as error:
        raise UserError(f"{file} is not a readable CSV ({error}); is a quotation mark missing?") from error


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Python's limit on a field is for the whole process: it is put back."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
