"""Captions and classes that lie beside the pictures: a text for each, or a folder for each class."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ...errors import UserError
from ..images.folder_tree import Tree, is_image, joined
from .caption_texts import captions_of, in_lines
from .json_stream import JsonStream
from .parsed import Reading

TEXT_SUFFIXES = (".txt", ".caption")
# Folders of these names, with or without a year, are parts of a data set and not classes.
_PARTS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "dev"))
# 10_dog: kohya's way to say how often its pictures come. 001_dog is a number, and so is 2024_dog.
_REPEATS = re.compile(r"([1-9]\d{0,2})_.+")
_NAMED = 3  # files that a note names
_MOST_LISTED = 20_000


def read_sidecars(tree: Tree) -> Reading | str:
    """A text file with the picture's name beside it, of which every line that is not empty is a caption; or a JSON with
    fields for captions, as img2dataset and SPRIGHT have them."""
    beside = _beside(tree)
    names, captions, unread = [], [], []
    for folder, name in tree.images:
        lines: list[str] = []
        for file in beside.get(os.path.join(folder, os.path.splitext(name)[0]), ()):
            try:
                lines += _lines_of(tree.top / file)
            except UserError as error:
                unread.append(str(error))
        names.append(joined(folder, name))
        captions.append(in_lines(lines or [""]))
    if not any(captions):
        return unread[0].rstrip(".") if unread else ""
    return Reading(
        format="sidecar",
        reason="there are caption files beside the pictures",
        names=names,
        captions=captions,
        origins=[str(tree.top)] * len(names),
        repeats=_repeats([folder for (folder, _), text in zip(tree.images, captions, strict=True) if text], tree),
        notes=[_unread_note(unread)] if unread else [],
    )


def holds_captioned_images(folder: str | os.PathLike) -> bool:
    """Whether a text lies beside a picture right in this folder, among its first 20,000 files. It is listed anew only
    if its time changed."""
    try:
        return _captioned(os.fspath(folder), os.stat(folder).st_mtime_ns)
    except OSError:  # it may not be opened, or is gone
        return False


@functools.lru_cache(maxsize=4096)
def _captioned(folder: str, time: int) -> bool:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, _MOST_LISTED)]
    texts = {os.path.splitext(name)[0] for name in names if name.lower().endswith(TEXT_SUFFIXES)}
    return bool(texts) and any(os.path.splitext(name)[0] in texts for name in names if is_image(name))


def _beside(tree: Tree) -> dict[str, list[str]]:
    """Text and JSON files by their path without extension."""
    found: dict[str, list[str]] = {}
    for folder, name in tree.files((*TEXT_SUFFIXES, ".json")):
        found.setdefault(os.path.join(folder, os.path.splitext(name)[0]), []).append(os.path.join(folder, name))
    return found


def _lines_of(file: Path) -> list[str]:
    if file.suffix.lower() != ".json":
        return _text_of(file).splitlines()
    fields: dict[str, object] = {}
    with JsonStream(file) as stream:
        fields.update((name, value) for name, value in stream.members() if name is not None)
    return captions_of(fields) or []


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start}); save it again as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}).") from error


def _unread_note(unread: list[str]) -> str:
    more = f" And {len(unread) - _NAMED} more." if len(unread) > _NAMED else ""
    return f"{len(unread)} caption files beside pictures could not be read: {' '.join(unread[:_NAMED])}{more}"


def _repeats(captioned: Iterable[str], tree: Tree) -> list[int] | None:
    """How often each picture comes, where every folder with captions is named in kohya's way; None if not."""
    times = {folder: _REPEATS.fullmatch(folder.rpartition("/")[2]) for folder in set(captioned)}
    if not all(times.values()):
        return None
    return [int(found[1]) if (found := times.get(folder)) else 1 for folder, _ in tree.images]


def read_class_folders(tree: Tree) -> Reading | str:
    """Each subfolder is a class of the pictures in it."""
    folders = list(dict.fromkeys(folder for folder, _ in tree.images))
    depths = {folder.count("/") + 1 if folder else 0 for folder in folders}
    tops = list(dict.fromkeys(folder.split("/")[0] for folder in folders))
    if depths == {2} or (depths == {1} and all(top.lower().rstrip("0123456789") in _PARTS for top in tops)):
        return f"the folders {', '.join(tops[:4])} in it are parts; choose one of them, such as {tree.top / tops[0]}"
    if depths != {1} or [top.lower() for top in tops] == ["images"]:
        return ""
    return Reading(
        format="folders",
        reason="each subfolder is a class of pictures",
        names=[joined(folder, name) for folder, name in tree.images],
        captions=[""] * len(tree.images),
        classes=[folder.replace("_", " ") for folder, _ in tree.images],
        origins=[str(tree.top)] * len(tree.images),
    )
