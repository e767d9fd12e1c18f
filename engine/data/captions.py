"""Captions and labels as people have them: a small reader for each format, and how a folder's format is recognised.

A reader gives entries: the picture's name as written, its captions, its class and the folder that the name starts
from. No picture is looked for while a caption file is read.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

FORMATS = ("auto", "json", "csv", "sidecar", "folders")
_SIDECARS = (".txt", ".caption")
_IMAGE_COLUMNS = ("image", "filename", "file_name", "image_path", "path", "file")
_CAPTION_COLUMNS = ("caption", "captions", "text", "description")


class Entry(NamedTuple):
    """One picture. `origin` is the folder of the file that names it."""

    name: str
    captions: tuple[str, ...]
    label: str | None
    origin: str


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a reader found, and in a few words why this reader was chosen."""

    format: str
    reason: str
    entries: list[Entry]


@functools.cache
def picture_suffixes() -> frozenset[str]:
    """Extensions, in lower case, of the formats that Pillow opens."""
    from PIL import Image

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def read_captions(place: Path, kind: str = "auto") -> Reading:
    """Read a data set folder, or one caption file; raises `UserError` where there is nothing to read."""
    if kind not in FORMATS:
        raise UserError(f"The caption format {kind!r} is not known; choose {' or '.join(FORMATS)}.")
    if place.is_file():
        return _read_file(place)
    if not place.is_dir():
        raise UserError(f"{place} does not exist; give a folder of pictures with captions, or a labels JSON.")
    tree = sorted(_walk(place))
    if kind in ("auto", "json", "csv"):
        reading = _from_caption_files(place, tree, (".json", ".csv") if kind == "auto" else (f".{kind}",))
        if reading:
            return reading
        if kind != "auto":
            raise UserError(f"{place} holds no labels {kind.upper()} with captions; choose auto, or another folder.")
    pictures = [file for file in tree if file.suffix.lower() in picture_suffixes()]
    if not pictures:
        raise UserError(f"{place} holds no pictures; choose the folder that your captioned pictures are in.")
    if kind in ("auto", "sidecar"):
        entries = list(_sidecar_entries(place, pictures, set(tree)))
        if any(entry.captions for entry in entries):
            return Reading("sidecar", "there are caption files beside the pictures", entries)
        if kind == "sidecar":
            raise UserError(f"{place} has no .txt or .caption file beside any picture; write one with the same name.")
    return _from_class_folders(place, pictures)


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below `folder` that is not hidden; a link to a folder above itself is not followed twice."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in files if not name.startswith("."))


# ---- caption files ---------------------------------------------------------------------------------------------------


def _read_file(file: Path) -> Reading:
    readers = {".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file} is not a caption file; give a labels JSON, a CSV with the columns image and caption, "
                        "or a folder.")  # fmt: skip
    entries = reader(file)
    if entries is None:
        raise UserError(
            f'{file} is not a caption file: a JSON looks like {{"picture.jpg": ["caption", …]}}, a CSV begins with a '
            "line image,caption."
        )
    if not entries:
        raise UserError(f"{file} names no picture with a caption.")
    return Reading(file.suffix.lower().strip(".").replace("tsv", "csv"), f"{file.name} was chosen", entries)


def _from_caption_files(folder: Path, tree: Iterable[Path], suffixes: tuple[str, ...]) -> Reading | None:
    """All caption files of one kind in the folder; JSON goes before CSV."""
    for suffix in suffixes:
        found, entries = [], []
        for file in tree:
            if file.suffix.lower() != suffix:
                continue
            read = (_read_json if suffix == ".json" else _read_csv)(file)
            if read:
                found.append(file.relative_to(folder).as_posix())
                entries += read
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return Reading(suffix.strip("."), f"{found[0]}{more} holds captions", entries)
    return None


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); save it again as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error


def _read_json(file: Path) -> list[Entry] | None:
    """`{"relative/path.jpg": ["caption", …]}`; None if the file is some other JSON."""
    try:
        value = json.loads(_text_of(file), object_pairs_hook=_merging_duplicates)
    except ValueError as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"{file} is not valid JSON (line {line}: {getattr(error, 'msg', error)}); mend it or move it "
                        "out of the folder.") from error  # fmt: skip
    if not isinstance(value, dict) or not value:
        return None
    suffixes = picture_suffixes()
    if not any(os.path.splitext(name)[1].lower() in suffixes for name in value):
        return None
    origin = str(file.parent)
    entries = []
    for name, captions in value.items():
        if isinstance(captions, str):
            captions = [captions]
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise UserError(f'{file}: the captions of {name} are not a list of texts; write ["caption", …].')
        entries.append(Entry(name, _clean(captions), None, origin))
    return entries


def _merging_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict in which a name that comes twice has the captions of both."""
    merged: dict[str, Any] = {}
    for name, value in pairs:
        if name in merged and isinstance(value, (list, str)) and isinstance(merged[name], (list, str)):
            both = [[item] if isinstance(item, str) else item for item in (merged[name], value)]
            value = both[0] + both[1]
        merged[name] = value
    return merged


def _read_csv(file: Path) -> list[Entry] | None:
    """Columns image and caption (or their usual other names), several rows a picture; None for another table."""
    text = _text_of(file)
    if file.suffix.lower() == ".tsv":
        rows = csv.reader(text.splitlines(keepends=True), delimiter="\t")
    else:
        rows = csv.reader(text.splitlines(keepends=True))
    csv.field_size_limit(2**31 - 1)
    header = [name.strip().lower() for name in next(rows, [])]
    image = next((header.index(name) for name in _IMAGE_COLUMNS if name in header), None)
    caption = next((header.index(name) for name in _CAPTION_COLUMNS if name in header), None)
    if image is None or caption is None:
        return None
    captions: dict[str, list[str]] = {}
    for row in rows:
        if len(row) > max(image, caption) and row[image].strip():
            captions.setdefault(row[image].strip(), []).append(row[caption])
    origin = str(file.parent)
    return [Entry(name, _clean(found), None, origin) for name, found in captions.items()]


def _clean(captions: Iterable[str]) -> tuple[str, ...]:
    """Without surrounding space, empty ones and repetitions."""
    return tuple(dict.fromkeys(text for caption in captions if (text := " ".join(caption.split()))))


# ---- folders ---------------------------------------------------------------------------------------------------------


def _sidecar_entries(folder: Path, pictures: Iterable[Path], tree: set[Path]) -> Iterator[Entry]:
    """A text file with the picture's name beside it; every line is a caption."""
    for picture in pictures:
        captions: tuple[str, ...] = ()
        for suffix in _SIDECARS:
            sidecar = picture.with_suffix(suffix)
            if sidecar in tree:
                captions += _clean(_text_of(sidecar).splitlines())
        yield Entry(picture.relative_to(folder).as_posix(), captions, None, str(folder))


def _from_class_folders(folder: Path, pictures: list[Path]) -> Reading:
    depths = {len(picture.relative_to(folder).parts) for picture in pictures}
    if depths == {2}:
        entries = [
            Entry(name.as_posix(), (), name.parts[0].replace("_", " "), str(folder))
            for name in (picture.relative_to(folder) for picture in pictures)
        ]
        return Reading("folders", "each subfolder is a class of pictures", entries)
    if depths == {3}:
        inner = sorted({picture.relative_to(folder).parts[0] for picture in pictures})
        raise UserError(
            f"{folder} holds folders of class folders ({', '.join(inner[:4])}); choose one of them, such as "
            f"{folder / inner[0]}."
        )
    raise UserError(
        f"{folder} holds {len(pictures)} pictures but no captions: add a .txt file beside each picture, a labels JSON "
        'such as {"picture.jpg": ["a caption"]}, a CSV with the columns image and caption, or a subfolder a class.'
    )
