"""Captions and labels as people have them: one small reader a format, and how a folder's format is recognised.

A reader takes the list of a folder's files and gives a `Reading`, or says in a few words why there is nothing for it to
read. No picture is looked for while a caption file is read.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, overload

from ..errors import UserError
from .labels_json import in_lines, read_labels

_SIDECARS = (".txt", ".caption")
_TABLES = (".csv", ".tsv")
_IMAGE_COLUMNS = ("image", "filename", "file_name", "image_path", "filepath", "path", "file")
_CAPTION_COLUMNS = ("caption", "captions", "text", "description")
# Folders of these names, with or without a year, are parts of a data set and not classes.
_PARTS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "dev"))
_HOW = (
    'a .txt file beside each picture, a labels JSON such as {"picture.jpg": ["a caption"]}, a CSV that begins with the '
    "line image,caption, or a subfolder for each class"
)


class Captions(Sequence[tuple[str, ...]]):
    """The captions of each sample, kept as one text with a line for each: a third of what tuples of texts take."""

    def __init__(self, lines: Sequence[str]):
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Captions: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return Captions(self._lines[index])
        lines = self._lines[index]
        return tuple(lines.split("\n")) if lines else ()

    def chosen(self, indices: Sequence[int]) -> Captions:
        return Captions([self._lines[index] for index in indices])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a reader found, a row a picture: its name as written, its captions (a line for each, or none), its class,
    and the folder that its name starts from. `reason` tells in a few words why this reader was chosen."""

    format: str
    reason: str
    names: list[str]
    captions: list[str]
    classes: list[str] | None = None
    origins: list[str]


@dataclasses.dataclass(frozen=True)
class Tree:
    """The files below a folder that are not hidden: (path from `top`, "" for itself; the sorted names in it)."""

    top: Path
    folders: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, top: Path) -> Tree:
        """Links are followed; a folder that is reached in two ways is listed once."""

        def failed(error: OSError) -> None:
            if error.filename == str(top):
                raise UserError(f"{top} cannot be read ({error.strerror}).") from error

        seen, folders = set(), []
        for root, below, files in os.walk(top, followlinks=True, onerror=failed):
            real = os.path.realpath(root)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX")))
            place = os.path.relpath(root, top).replace(os.sep, "/")
            folders.append(("" if place == "." else place, tuple(sorted(n for n in files if not n.startswith(".")))))
        return cls(top, tuple(folders))

    def files(self, suffixes: Sequence[str] | frozenset[str]) -> Iterator[tuple[str, str]]:
        """(folder, name) of each file with one of these extensions, in any case."""
        for folder, names in self.folders:
            yield from ((folder, name) for name in names if os.path.splitext(name)[1].lower() in suffixes)

    @functools.cached_property
    def pictures(self) -> list[tuple[str, str]]:
        return list(self.files(picture_suffixes()))


class Reader(Protocol):
    def __call__(self, tree: Tree) -> Reading | str:
        """What the folder holds in this format, or why it holds nothing; raises `UserError` for what is damaged."""


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Extensions, in lower case, of the formats that Pillow opens."""
    from PIL import Image, ImageFile

    registered = Image.registered_extensions()
    # Pillow knows these by name only: it cannot decode them.
    stubs = {kind for kind, (opener, _) in Image.OPEN.items() if _derives(opener, ImageFile.StubImageFile)} | {"MPEG"}
    # Read by starting another program, Ghostscript; nothing that lies in a data set is ever run.
    stubs.add("EPS")
    return frozenset(suffix for suffix, kind in registered.items() if kind in Image.OPEN and kind not in stubs)


def _derives(opener: object, base: type) -> bool:
    return isinstance(opener, type) and issubclass(opener, base)


def read_captions(place: Path, kind: str = "auto") -> Reading:
    """Read a folder or one caption file. In a folder a labels JSON goes before a CSV, that before text files beside the
    pictures, and those before class folders. Raises `UserError`, in one sentence, where there is nothing to read."""
    if kind != "auto" and kind not in READERS:
        raise UserError(f"The caption format {kind!r} is not known; choose auto, {', '.join(READERS)}.")
    if place.is_file():
        return _read_file(place)
    if not place.is_dir():
        raise UserError(f"{place} does not exist; give a folder of pictures with captions, or a labels JSON.")
    tree = Tree.of(place)
    refusals = {}
    for name, reader in READERS.items() if kind == "auto" else [(kind, READERS[kind])]:
        reading = reader(tree)
        if isinstance(reading, Reading):
            return reading
        refusals[name] = reading
    raise UserError(_nothing_read(tree, refusals))


def _nothing_read(tree: Tree, refusals: dict[str, str]) -> str:
    if not tree.pictures:
        found = f" ({refusals['json']})" if refusals.get("json") else ""
        return f"{tree.top} holds no pictures{found}; choose the folder that your captioned pictures are in."
    if len(refusals) == 1:
        ((kind, why),) = refusals.items()
        return f"{tree.top} cannot be read as {kind}{': ' if why else ''}{why}; choose auto, or another folder."
    found = "; ".join(why for why in refusals.values() if why)
    found = f" ({found})" if found else ""
    return f"{tree.top} holds {len(tree.pictures)} pictures but no captions for them{found}: give {_HOW}."


# ---- caption files ---------------------------------------------------------------------------------------------------


def _read_file(file: Path) -> Reading:
    suffix = file.suffix.lower()
    if suffix != ".json" and suffix not in _TABLES:
        raise UserError(
            f"{file} is not a caption file; give a labels JSON, a CSV with the columns image and caption, or a folder."
        )
    found = _labels(file) if suffix == ".json" else _table(file)
    if isinstance(found, str):
        raise UserError(f"{file} {found}, not captions by picture; give {_HOW}.")
    return _rows("json" if suffix == ".json" else "csv", f"{file.name} was chosen", [(str(file.parent), found)])


def _json_files(tree: Tree) -> Reading | str:
    return _caption_files(tree, "json", (".json",))


def _csv_files(tree: Tree) -> Reading | str:
    return _caption_files(tree, "csv", _TABLES)


def _caption_files(tree: Tree, kind: str, suffixes: tuple[str, ...]) -> Reading | str:
    """All caption files of one kind, wherever in the folder they are."""
    found, others, tables = [], [], {}
    for folder, name in tree.files(suffixes):
        file = tree.top / folder / name
        table = _labels(file) if kind == "json" else _table(file)
        shown = f"{folder}/{name}" if folder else name
        if isinstance(table, str):
            others.append(f"{shown} {table}")
            continue
        found.append(shown)
        origin = tables.setdefault(str(file.parent), {})
        for picture, captions in table.items():
            origin[picture] = in_lines([*origin[picture].split("\n"), captions]) if picture in origin else captions
    if not found:
        return others[0] if others else ""
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return _rows(kind, f"{found[0]}{more} {'hold' if more else 'holds'} captions", list(tables.items()))


def _rows(kind: str, reason: str, tables: list[tuple[str, dict[str, str]]]) -> Reading:
    return Reading(
        format=kind,
        reason=reason,
        names=[name for _, table in tables for name in table],
        captions=[captions for _, table in tables for captions in table.values()],
        origins=[origin for origin, table in tables for _ in table],
    )


def _labels(file: Path) -> dict[str, str] | str:
    return read_labels(file, str(file), picture_suffixes())


def _table(file: Path) -> dict[str, str] | str:
    """Captions by picture name from a CSV; its columns may have their usual other names, and a picture several rows."""
    captions: dict[str, list[str]] = {}
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            header = stream.readline()
            # Spreadsheets write semicolons where the comma is the decimal sign.
            columns = next((found for mark in ",;\t" if (found := _columns(header, mark))), None)
            if columns is None:
                return f"is a table that begins with the line {header.strip()[:60]!r}"
            image, caption, mark = columns
            for row in csv.reader(stream, delimiter=mark, strict=True):
                name = row[image].strip() if len(row) > image else ""
                if name:
                    captions.setdefault(name, []).append(row[caption] if len(row) > caption else "")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); save it again as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error
    except csv.Error as error:
        raise UserError(f"{file} is not a readable CSV ({error}); is a quotation mark missing?") from error
    return {name: in_lines(found) for name, found in captions.items()}


def _columns(header: str, mark: str) -> tuple[int, int, str] | None:
    names = [name.strip().lower() for name in next(csv.reader([header], delimiter=mark), [])]
    image = next((names.index(name) for name in _IMAGE_COLUMNS if name in names), None)
    caption = next((names.index(name) for name in _CAPTION_COLUMNS if name in names), None)
    return None if image is None or caption is None else (image, caption, mark)


# ---- folders ---------------------------------------------------------------------------------------------------------


def _sidecars(tree: Tree) -> Reading | str:
    """A text file with the picture's name beside it; every line that is not empty is a caption."""
    texts: dict[str, list[str]] = {}
    for folder, name in tree.files(_SIDECARS):
        texts.setdefault(os.path.join(folder, os.path.splitext(name)[0]), []).append(os.path.join(folder, name))
    names, captions = [], []
    for folder, name in tree.pictures:
        beside = texts.get(os.path.join(folder, os.path.splitext(name)[0]), [])
        names.append(f"{folder}/{name}" if folder else name)
        captions.append(in_lines([line for file in beside for line in _text_of(tree.top / file).splitlines()] or [""]))
    if not any(captions):
        return ""
    return Reading(
        format="sidecar",
        reason="there are caption files beside the pictures",
        names=names,
        captions=captions,
        origins=[str(tree.top)] * len(names),
    )


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); save it again as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error


def _class_folders(tree: Tree) -> Reading | str:
    """Each subfolder is a class of the pictures in it."""
    folders = list(dict.fromkeys(folder for folder, _ in tree.pictures))
    depths = {folder.count("/") + 1 if folder else 0 for folder in folders}
    tops = list(dict.fromkeys(folder.split("/")[0] for folder in folders))
    if depths == {2} or (depths == {1} and all(top.lower().rstrip("0123456789") in _PARTS for top in tops)):
        return f"the folders {', '.join(tops[:4])} in it are parts; choose one of them, such as {tree.top / tops[0]}"
    if depths != {1} or [top.lower() for top in tops] == ["images"]:
        return ""
    return Reading(
        format="folders",
        reason="each subfolder is a class of pictures",
        names=[f"{folder}/{name}" for folder, name in tree.pictures],
        captions=[""] * len(tree.pictures),
        classes=[folder.replace("_", " ") for folder, _ in tree.pictures],
        origins=[str(tree.top)] * len(tree.pictures),
    )


# In the order in which they are tried.
READERS: dict[str, Reader] = {
    "json": _json_files, "csv": _csv_files, "sidecar": _sidecars, "folders": _class_folders,
}  # fmt: skip
FORMATS = ("auto", *READERS)
