"""Reads the captions of a folder or a file: recognises the format, reads every file that has it, and finds the folder
that its image names start from. No image is opened meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...errors import UserError
from ..images.folder_tree import Tree, joined
from ..images.image_files import file_of
from ..originals import NAME as ORIGINALS
from ..originals import read_originals
from .coco import COCO_LISTS
from .columns import ChosenColumns, Columns
from .json_stream import json_members
from .parquet import parquet_notes
from .parsed import FileCaptions, ParsedCaptions, Source, caption_lines
from .records import choose_columns
from .registry import CAPTION_FORMATS, FORMAT_NAMES, CaptionFormat

_WAYS_TO_CAPTION = (
    'a .txt file beside each image, a labels JSON such as {"image.jpg": ["a caption"]}, a CSV that begins with the '
    "line image,caption, or a subfolder for each class"
)
# Tables although their names say otherwise: Flickr8k's captions are often found so.
_TEXT_TABLES = ("captions.txt",)
_FILE_FORMATS = [(known, known.files) for known in CAPTION_FORMATS if known.files]
_SUFFIXES = frozenset(suffix for _, files in _FILE_FORMATS for suffix in files.suffixes)
_MOST_SNIFFED = 20  # a JSON that begins with this many unknown members is no caption file, and not read to its end
_NAMES_TRIED = 8  # when looking for the folder that a file's names start from
_MOST_FOLDERS = 10_000  # that are tried
_DISPUTED = "{} images have rows that do not agree; their class is what most say, or each of those that as many say."


def read_captions(path: Path, format_name: str = "auto", columns: Columns | None = None) -> ParsedCaptions:
    """Read a folder or one caption file.

    In a folder, the formats are tried in the order of `CAPTION_FORMATS`; with `columns`, only those that have columns.
    Raises `UserError`, in one sentence, if there is nothing to read.
    """
    if format_name not in FORMAT_NAMES:
        raise UserError(f"The caption format {format_name!r} is not known; choose {', '.join(FORMAT_NAMES)}.")
    if os.path.isfile(path):
        parsed = _read_single(path, format_name, columns or Columns())
        lists = [path.with_name(ORIGINALS)]
        return dataclasses.replace(parsed, originals=read_originals(filter(os.path.isfile, lists)))
    if not os.path.isdir(path):
        raise UserError(f"{path} does not exist; give a folder of images with captions, or a labels JSON.")
    reader = _Reader(Source(Tree.of(path), columns or Columns()))
    refusals: dict[str, str] = {}
    for known in CAPTION_FORMATS:
        has_columns = known.files is not None and known.files.sniff_columns is not None
        if (columns is None or has_columns) if format_name == "auto" else known.name == format_name:
            result = reader.read(known)
            if isinstance(result, ParsedCaptions):
                return reader.finished(result, known if format_name == "auto" else None)
            refusals[known.name] = result
    raise UserError(_nothing_read(reader.source.tree, refusals))


def holds_captions(file: str | os.PathLike) -> bool:
    """Whether captions, or classes, can be read from this file."""
    try:
        _read_single(Path(file), "auto", Columns())
    except UserError:
        return False
    return True


def _read_single(file: Path, format_name: str, columns: Columns) -> ParsedCaptions:
    source = Source(Tree(file.parent, (("", (file.name,)),)), columns, single=True)
    reader = _Reader(source)
    known, what = reader.recognise(file.name) if file.name in reader.names(_SUFFIXES) else (None, "is no caption file")
    contents: FileCaptions | str
    if known is None or known.files is None:
        contents = f"{what}, not captions by image"
    elif format_name not in ("auto", known.name):
        contents = f"holds {known.holds}, which is {known.name} and not {format_name}"
    else:
        contents = known.files.read(file, source)
    if known is None or isinstance(contents, str):
        raise UserError(f"{file} {contents}; give {_WAYS_TO_CAPTION}.")
    return _merged(known, f"{file.name} was chosen", {file: contents}, source)


def _nothing_read(tree: Tree, refusals: dict[str, str]) -> str:
    reasons = list(dict.fromkeys(reason for reason in refusals.values() if reason))
    if not tree.images:
        shown = f" ({reasons[0]})" if reasons else ""
        return f"{tree.top} holds no images{shown}; choose the folder that your captioned images are in."
    if len(refusals) == 1:
        ((name, reason),) = refusals.items()
        return f"{tree.top} cannot be read as {name}{': ' if reason else ''}{reason}; choose auto, or another folder."
    shown = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{tree.top} holds {len(tree.images)} images but no captions for them{shown}: give {_WAYS_TO_CAPTION}."


class _Reader:
    """Reads one format after another from a source, and recognises each of its caption files once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._recognised: dict[str, tuple[CaptionFormat | None, str]] = {}

    def names(self, suffixes: Sequence[str] | frozenset[str]) -> Iterator[str]:
        """Paths, from the top of the tree, of files with these suffixes that may hold the captions of many images."""
        tree = self.source.tree
        for folder, name in tree.files(suffixes):
            lower = name.lower()
            if name == ORIGINALS or (lower.endswith(".txt") and lower not in _TEXT_TABLES):
                continue
            if self.source.single or not (lower.endswith(".json") and tree.is_beside_an_image(folder, name)):
                yield joined(folder, name)

    def recognise(self, name: str) -> tuple[CaptionFormat | None, str]:
        """(the format or None, its caption columns if it has several or what the file is). Raises `UserError`."""
        if name not in self._recognised:
            self._recognised[name] = _recognise(self.source.tree.top / name, self.source.columns)
        return self._recognised[name]

    def read(self, known: CaptionFormat) -> ParsedCaptions | str:
        """Read all captions of one format, or return why there are none. Raises `UserError` for damaged files."""
        shown, refusals, captions = [], [], {}
        for name in self.names(known.files.suffixes) if known.files else ():
            recognised, what = self.recognise(name)
            if recognised is known and known.files:
                contents = known.files.read(self.source.tree.top / name, self.source)
                if isinstance(contents, FileCaptions):
                    shown.append(f"{name} (columns {what})" if what else name)
                    captions[self.source.tree.top / name] = contents
                    continue
                recognised, what = self._recognised[name] = None, contents
            if recognised is None:
                refusals.append(f"{name} {what}")
        if captions:
            more = f" and {len(shown) - 1} more hold" if len(shown) > 1 else " holds"
            return _merged(known, f"{shown[0]}{more} {known.holds}", captions, self.source)
        return (known.read_folder(self.source.tree) if known.read_folder else "") or (refusals[0] if refusals else "")

    def finished(self, parsed: ParsedCaptions, recognised: CaptionFormat | None) -> ParsedCaptions:
        """Add the originals of copies, and notes on what was not read. `recognised` is None if the user chose it."""
        tree, notes = self.source.tree, list(parsed.notes)
        if tree.closed:
            shown = ", ".join(tree.closed[:3])
            notes.append(f"{len(tree.closed)} folders in it may not be read and are left out: {shown}.")
        for name in self.names(_SUFFIXES) if recognised else ():
            with contextlib.suppress(UserError):  # a damaged file is not read either
                other = self.recognise(name)[0]
                if other and other is not recognised:
                    choice = f"for it, choose captions: {other.name}"
                    notes.append(f"{name} is not read, because {parsed.format} goes first; {choice}.")
        lists = [tree.top / folder / ORIGINALS for folder in tree.folders_with(ORIGINALS)]
        return dataclasses.replace(parsed, notes=notes, originals=read_originals(lists))


def _recognise(file: Path, columns: Columns) -> tuple[CaptionFormat | None, str]:
    if file.suffix.lower() != ".json":
        chosen = choose_columns(file, columns)
        return (None, chosen) if isinstance(chosen, str) else (_with_columns(file, chosen), chosen.caption_columns)
    keys = []
    for name, value in itertools.islice(json_members(file, COCO_LISTS), _MOST_SNIFFED):
        if name is None:
            record = columns.choose(list(value)) if isinstance(value, Mapping) else None
            known = _with_columns(file, record) if record else None
            return known, "" if known else "is JSON, but no records with an image's name and captions"
        for known, files in _FILE_FORMATS:
            if files.sniff_member and files.sniff_member(name, value):
                return known, ""
        keys.append(name[:40])
    return None, f"is a JSON object with {'the keys ' + ', '.join(keys[:4]) if keys else 'nothing'} in it"


def _with_columns(file: Path, columns: ChosenColumns) -> CaptionFormat | None:
    for known, files in _FILE_FORMATS:
        if file.suffix.lower() in files.suffixes and files.sniff_columns and files.sniff_columns(file, columns):
            return known
    return None


# ---- from files to one entry per image -------------------------------------------------------------------------------


def _merged(known: CaptionFormat, reason: str, captions: Mapping[Path, FileCaptions], source: Source) -> ParsedCaptions:
    """Merge files of one format: an image in several files has the captions of all, but the class of the first.

    An image of several classes has an entry for each.
    """
    are_classes = any(contents.are_classes for contents in captions.values())
    by_origin: dict[str, dict[str, str]] = {}
    for file, contents in captions.items():
        merged = by_origin.setdefault(_find_origin(known, source, file, contents), contents.by_image)
        for name, lines in contents.by_image.items() if merged is not contents.by_image else ():
            both = name in merged and not are_classes
            merged[name] = caption_lines(f"{merged[name]}\n{lines}".split("\n")) if both else merged.get(name, lines)
    names: list[str] = []
    texts: list[str] = []
    origins: list[str] = []
    for origin, by_image in by_origin.items():
        if are_classes:
            pairs = [(name, label) for name, labels in by_image.items() for label in labels.split("\n")]
            names += [name for name, _ in pairs]
            texts += [label for _, label in pairs]
        else:
            names += by_image
            texts += by_image.values()
        origins += [origin] * (len(names) - len(origins))
    disputed = sum(contents.disputed for contents in captions.values())
    tables = [file for file in captions if file.suffix.lower() == ".parquet"]
    return ParsedCaptions(
        format=known.name,
        reason=reason,
        names=names,
        origins=origins,
        captions=[""] * len(names) if are_classes else texts,
        classes=texts if are_classes else None,
        notes=[*([_DISPUTED.format(disputed)] if disputed else []), *parquet_notes(tables, source.columns)],
    )


def _find_origin(known: CaptionFormat, source: Source, file: Path, captions: FileCaptions) -> str:
    """Return the folder that a file's image names start from.

    That is the file's own, where `images` in it or beside it counts too. If none of a few names leads to an image there
    it is the folder of the dataset in which most of them do.
    """
    own, top = str(file.parent), str(source.tree.top)
    step = len(captions.by_image) // _NAMES_TRIED or 1
    names = [name.replace("\\", "/") for name in itertools.islice(captions.by_image, 0, None, step)]
    names = [name for name in names if not os.path.isabs(name) and ".." not in name.split("/")]

    def images_in(folder: str) -> int:
        return sum(os.path.isfile(os.path.join(folder, file_of(name))) for name in names)

    parent = os.path.dirname(own) if source.single or own != top else own
    if any(map(images_in, (own, os.path.join(own, "images"), os.path.join(parent, "images"), top))):
        return own
    candidates = _subfolders(file.parent) if source.single else _folders_with(source.tree, names)
    origin = max([own, *captions.image_folders, *candidates][:_MOST_FOLDERS], key=images_in)
    if not source.single and os.path.relpath(origin, top).startswith(os.pardir):
        raise UserError(
            f"{top} holds {known.holds} of the images in {origin}; choose the folder that both are in, or that of the "
            "images."
        )
    return origin


def _folders_with(tree: Tree, names: Sequence[str]) -> list[str]:
    """Folders that one of these names may start from."""
    candidates: dict[str, None] = {}
    for name in names:
        parent, _, base = name.rpartition("/")
        for folder in tree.folders_with(base):
            if not parent or folder == parent or folder.endswith("/" + parent):
                candidates[str(tree.top / folder[: len(folder) - len(parent)])] = None
    return list(candidates)


def _subfolders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:  # a folder that may be entered but not listed
        return []
