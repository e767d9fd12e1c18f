"""Rows of images with captions, prompts or classes: read alike from tables, JSON records and Parquet files."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError, shown
from . import metadata, parquet, tables
from .columns import ChosenColumns, Columns, captions_in
from .parsed import CaptionCollector, FileCaptions, Source


class _Container(NamedTuple):
    """How rows are read from a kind of file. `choose` returns the columns, or what the file is if it has none."""

    choose: Callable[[Path, Columns], ChosenColumns | str]
    rows: Callable[[Path, Columns], Iterator[tuple[str, list[Any]]]]


_TABLE = _Container(tables.choose_columns, tables.read_rows)
_CONTAINERS = {
    ".csv": _TABLE,
    ".tsv": _TABLE,
    ".txt": _TABLE,
    ".jsonl": _Container(metadata.choose_columns, metadata.read_rows),
    ".json": _Container(metadata.choose_columns, metadata.read_rows),
    ".parquet": _Container(parquet.choose_columns, parquet.read_rows),
}


def choose_columns(file: Path, columns: Columns) -> ChosenColumns | str:
    """Return the columns to read; if there are none, briefly what the file is. Raises `UserError`."""
    return _CONTAINERS[file.suffix.lower()].choose(file, columns)


def _rows(file: Path, source: Source) -> Iterator[tuple[str, list[Any]]]:
    return _CONTAINERS[file.suffix.lower()].rows(file, source.columns)


def read_caption_rows(file: Path, source: Source) -> FileCaptions:
    """Read the captions of every row; an image may have several rows. Raises `UserError`."""
    collector = CaptionCollector()
    for name, values in _rows(file, source):
        captions = captions_in([value for value in values if value is not None])
        if captions is None:
            raise UserError(
                f"{file}: the captions of {name[:200]} are not texts, but {shown(values)}; name another caption_column."
            )
        collector.add(name, captions or [""])
    return FileCaptions(by_image=collector.by_image())


def read_prompt_rows(file: Path, source: Source) -> FileCaptions:
    """Read CLIP Interrogator's prompts, each of which is several captions. Raises `UserError`."""
    collector = CaptionCollector()
    for name, values in _rows(file, source):
        collector.add(name, tables.prompt_captions(values[0] if values else ""))
    return FileCaptions(by_image=collector.by_image())


def read_class_rows(file: Path, source: Source) -> FileCaptions:
    """Read the class of every row. An image whose rows disagree gets the most frequent class, or a line for each of the
    equally frequent. Raises `UserError`."""
    votes = _count_votes((name, values[0] if values else "") for name, values in _rows(file, source))
    return FileCaptions(
        by_image={name: vote if isinstance(vote, str) else _most_frequent(vote) for name, vote in votes.items()},
        are_classes=True,
        disputed=sum(not isinstance(vote, str) and len(vote) > 1 for vote in votes.values()),
    )


def _count_votes(rows: Iterable[tuple[str, str]]) -> dict[str, str | collections.Counter[str]]:
    """The class of each image, or counts of several. Only images whose rows disagree have a counter: they are few."""
    votes: dict[str, str | collections.Counter[str]] = {}
    agreeing: collections.Counter[str] = collections.Counter()  # further rows that say the same as the first
    for name, value in rows:
        label = " ".join(value.replace("_", " ").split())
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
    return votes


def _most_frequent(votes: collections.Counter[str]) -> str:
    most = max(votes.values())
    return "\n".join(sorted(label for label, count in votes.items() if count == most))
