"""Tables of captions (CSV, TSV and their kin), and CLIP Interrogator's tables of prompts."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..text_files import open_text
from ..tokenizer import encode
from .columns import ChosenColumns, Columns

# Spreadsheets write semicolons where the comma is the decimal sign; Flickr30k's captions come with bars.
_DELIMITERS = ",;\t|"
_LONGEST_HEADER = 2**16
# Characters per field. Python's own limit is 131,072; a field beyond this one is a quotation mark that is never closed.
_LONGEST_FIELD = 2**24
_CONTEXT_LENGTH = 77
_LONGEST_TOKENIZED = 4096  # characters; a longer prompt never fits


def choose_columns(file: Path, columns: Columns) -> ChosenColumns | str:
    """Return the columns to read, from the first line; if there are none, what the file is."""
    with open_text(file, newline="") as stream:
        header = stream.readline(_LONGEST_HEADER)
    layout = _layout(header, columns)
    return layout[0] if layout else f"is a table that begins with the line {header.strip()[:60]!r}"


def read_rows(file: Path, columns: Columns) -> Iterator[tuple[str, list[Any]]]:
    """Yield (image name, values of the chosen columns) of every row that names an image."""
    with _csv_errors(file), _long_fields(), open_text(file, newline="") as stream:
        layout = _layout(stream.readline(_LONGEST_HEADER), columns)
        assert layout is not None, "only files whose columns were chosen are read"
        chosen, names, delimiter = layout
        image, positions = names.index(chosen.image), [names.index(value) for value in chosen.values]
        if delimiter == "|":
            rows = csv.reader(stream, delimiter=delimiter, strict=True, quoting=csv.QUOTE_NONE)
        else:
            rows = csv.reader(stream, delimiter=delimiter, strict=True)
        for row in rows:
            name = row[image].strip() if len(row) > image else ""
            if name:
                yield name, [row[position] for position in positions if position < len(row)]


def _layout(header: str, columns: Columns) -> tuple[ChosenColumns, list[str], str] | None:
    """(the columns to read, all names in the header, the delimiter)."""
    for delimiter in _DELIMITERS:
        names = next(csv.reader([header], delimiter=delimiter), [])
        if (chosen := columns.choose(names)) is not None:
            return chosen, names, delimiter
    return None


@contextlib.contextmanager
def _csv_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except csv.Error as error:
        raise UserError(f"{file} is not a readable CSV ({error}); is a quotation mark missing?") from error


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Python's limit on the length of a field is global to the process, so it is put back."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def write_csv(samples: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    yield "image,caption\n"
    for name, captions in samples:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((name, caption) for caption in captions)
        yield text.getvalue()


def prompt_captions(prompt: str) -> list[str]:
    """Split a prompt of CLIP Interrogator at its commas, and return as many parts as fit into CLIP's context together.

    The first is always returned, cut after a word if it must be, so that no image is left without a caption.
    """
    room = _CONTEXT_LENGTH - 2  # the start and end tokens
    parts = [part for part in map(str.strip, prompt.split(",")) if part]
    captions = [_fitting_words(parts[0], room)] if parts else []
    used = _token_count(captions[0]) if captions else 0
    for part in parts[1:]:
        used += 1 + _token_count(part)  # the comma is a token too
        if used > room:
            break
        captions.append(part)
    return captions


def _fitting_words(text: str, room: int) -> str:
    """As many of the first words as fit; at least one."""
    words = text.split()[:room]
    while len(words) > 1 and _token_count(" ".join(words)) > room:
        words.pop()
    return " ".join(words)


def _token_count(text: str) -> int:
    """The number of tokens; for a text that is far too long, a number that is too large."""
    return len(text) if len(text) > _LONGEST_TOKENIZED else len(encode(text))
