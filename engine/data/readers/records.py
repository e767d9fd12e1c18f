"""Rows of images with captions, prompts or classes: read alike from tables, JSON records and Parquet files."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError, shown
from . import metadata, parquet, tables
from .columns import ChosenColumns, Columns, captions_in
from .parsed import CaptionCollector, FileCaptions, Source

# Each has `choose_columns`, which returns the columns or what the file is if it has none, and `read_rows`.
_CONTAINERS = {".json": metadata, ".jsonl": metadata, ".parquet": parquet}


def choose_columns(file: Path, columns: Columns) -> ChosenColumns | str:
    """Return the columns to read; if there are none, briefly what the file is. Raises `UserError`."""
    return _CONTAINERS.get(file.suffix.lower(), tables).choose_columns(file, columns)


def _rows(file: Path, source: Source) -> Iterator[tuple[str, list[Any]]]:
    return _CONTAINERS.get(file.suffix.lower(), tables).read_rows(file, source.columns)


def read_caption_rows(file: Path, source: Source) -> FileCaptions:
    """Read the captions of every row; an image may have several rows. Raises `UserError`."""
    collector = CaptionCollector()
    for name, values in _rows(file, source):
        captions = captions_in(values)
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
    classes: dict[str, str] = {}
    votes: dict[str, collections.Counter[str]] = {}  # of the images with several rows
    for name, values in _rows(file, source):
        label = " ".join(values[0].replace("_", " ").split()) if values else ""
        if name not in classes:
            classes[name] = label
        elif label:
            counter = votes.setdefault(name, collections.Counter([classes[name]] if classes[name] else []))
            counter[label] += 1
    for name, counter in votes.items():
        most = max(counter.values())
        classes[name] = "\n".join(sorted(label for label, count in counter.items() if count == most))
    disputed = sum(len(counter) > 1 for counter in votes.values())
    return FileCaptions(by_image=classes, are_classes=True, disputed=disputed)
