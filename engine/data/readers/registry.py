"""How a folder's captions are recognised, whatever format they are in, and what of a folder is read.

A reader takes a `Source` and gives a `Reading`, or says in a few words why there is nothing for it to read. No picture
is opened while captions are read.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, overload

from ...errors import UserError
from ..images.folder_tree import Tree
from ..originals import NAME as ORIGINALS
from ..originals import read_originals
from .caption_files import Source, read_coco_files, read_file, read_files
from .folders import read_class_folders, read_sidecars
from .parsed import Reading
from .tables import Columns

_HOW = (
    'a .txt file beside each picture, a labels JSON such as {"picture.jpg": ["a caption"]}, a CSV that begins with the '
    "line image,caption, or a subfolder for each class"
)
# The formats that have columns or fields with names to choose from.
_WITH_COLUMNS = ("metadata", "csv", "labels", "parquet")


class Captions(Sequence[tuple[str, ...]]):
    """The captions of each sample, kept as one text with a line for each: a third of what tuples of texts take."""

    def __init__(self, lines: Sequence[str]):
        self.lines = lines

    @classmethod
    def joined(cls, parts: Sequence[Sequence[tuple[str, ...]]]) -> Captions:
        """Those of several data sets, one after the other."""
        lines: list[str] = []
        for part in parts:
            lines += part.lines if isinstance(part, Captions) else map("\n".join, part)
        return cls(lines)

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Captions: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Captions(self.lines[index])
        lines = self.lines[index]
        return tuple(lines.split("\n")) if lines else ()

    def chosen(self, indices: Sequence[int]) -> Captions:
        return Captions([self.lines[index] for index in indices])


class Reader(Protocol):
    def __call__(self, source: Source) -> Reading | str:
        """What there is in this format, or why there is nothing; raises `UserError` for what is damaged."""


def read_captions(place: Path, kind: str = "auto", columns: Columns | None = None) -> Reading:
    """Read a folder or one caption file. In a folder the formats are tried in the order of `READERS`: caption files,
    then texts beside the pictures, then class folders; with `columns`, those formats that have some. Raises
    `UserError`, in one sentence, where there is nothing."""
    if kind != "auto" and kind not in READERS:
        raise UserError(f"The caption format {kind!r} is not known; choose auto, {', '.join(READERS)}.")
    if os.path.isfile(place):
        return _read_single(place, kind, columns or Columns())
    if not os.path.isdir(place):
        raise UserError(f"{place} does not exist; give a folder of pictures with captions, or a labels JSON.")
    source = Source(Tree.of(place), columns or Columns())
    refusals = {}
    for name in (tuple(READERS) if columns is None else _WITH_COLUMNS) if kind == "auto" else (kind,):
        reading = READERS[name](source)
        if isinstance(reading, Reading):
            notes = [*reading.notes, *_closed(source.tree), *(source.unread(name) if kind == "auto" else ())]
            files = [place / folder / ORIGINALS for folder in source.tree.folders_with(ORIGINALS)]
            return dataclasses.replace(reading, notes=notes, originals=read_originals(files))
        refusals[name] = reading
    raise UserError(_nothing_read(source.tree, refusals))


def holds_captions(file: str | os.PathLike) -> bool:
    """Whether a file is one that captions, or classes, can be read from."""
    try:
        return isinstance(read_file(Path(file), "auto", Columns()), Reading)
    except UserError:
        return False


def _read_single(file: Path, kind: str, columns: Columns) -> Reading:
    reading = read_file(file, kind, columns)
    if isinstance(reading, str):
        raise UserError(f"{file} {reading}; give {_HOW}.")
    beside = file.with_name(ORIGINALS)
    return dataclasses.replace(reading, originals=read_originals([beside] if os.path.isfile(beside) else []))


def _closed(tree: Tree) -> list[str]:
    shown = ", ".join(tree.closed[:3])
    return [f"{len(tree.closed)} folders in it may not be read and are left out: {shown}."] if tree.closed else []


def _nothing_read(tree: Tree, refusals: dict[str, str]) -> str:
    reasons = list(dict.fromkeys(why for why in refusals.values() if why))
    if not tree.images:
        found = f" ({reasons[0]})" if reasons else ""
        return f"{tree.top} holds no pictures{found}; choose the folder that your captioned pictures are in."
    if len(refusals) == 1:
        ((kind, why),) = refusals.items()
        return f"{tree.top} cannot be read as {kind}{': ' if why else ''}{why}; choose auto, or another folder."
    found = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{tree.top} holds {len(tree.images)} pictures but no captions for them{found}: give {_HOW}."


# In the order in which they are tried.
READERS: dict[str, Reader] = {
    "json": functools.partial(read_files, "json"),
    "kohya": functools.partial(read_files, "kohya"),
    "coco": read_coco_files,
    "metadata": functools.partial(read_files, "metadata"),
    "csv": functools.partial(read_files, "csv"),
    "interrogator": functools.partial(read_files, "interrogator"),
    "labels": functools.partial(read_files, "labels"),
    "parquet": functools.partial(read_files, "parquet"),
    "sidecar": lambda source: read_sidecars(source.tree),
    "folders": lambda source: read_class_folders(source.tree),
}
FORMATS = ("auto", *READERS)
