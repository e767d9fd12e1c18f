"""Sidecars: a text file beside each image, or a JSON with caption fields as img2dataset and SPRIGHT write it."""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ...errors import UserError
from ..images.folder_tree import Tree, is_image, joined
from ..text_files import open_text
from .columns import captions_in
from .json_stream import json_members
from .parsed import ParsedCaptions, caption_lines

TEXT_SUFFIXES = (".txt", ".caption")
# 10_dog: kohya's way to say how often its images come. 001_dog is a number, and so is 2024_dog.
_REPEATS = re.compile(r"([1-9]\d{0,2})_.+")
_MOST_NAMED = 3  # files in a note
_MOST_LISTED = 20_000


def read_sidecars(tree: Tree) -> ParsedCaptions | str:
    """Read the captions beside the images: every line of a text file, every caption field of a JSON."""
    files_by_stem: dict[str, list[str]] = {}
    for folder, name in tree.files((*TEXT_SUFFIXES, ".json")):
        stem = os.path.join(folder, os.path.splitext(name)[0])
        files_by_stem.setdefault(stem, []).append(os.path.join(folder, name))
    captions: list[str] = []
    errors: list[str] = []
    for folder, name in tree.images:
        lines: list[str] = []
        for file in files_by_stem.get(os.path.join(folder, os.path.splitext(name)[0]), ()):
            try:
                lines += _read_lines(tree.top / file)
            except UserError as error:
                errors.append(str(error))
        captions.append(caption_lines(lines or [""]))
    if not any(captions):
        return errors[0].rstrip(".") if errors else ""
    return ParsedCaptions(
        format="sidecar",
        reason="there are caption files beside the images",
        names=[joined(folder, name) for folder, name in tree.images],
        captions=captions,
        origins=[str(tree.top)] * len(captions),
        repeats=_repeats(tree, [folder for (folder, _), lines in zip(tree.images, captions, strict=True) if lines]),
        notes=[_unread_note(errors)] if errors else [],
    )


def _read_lines(file: Path) -> list[str]:
    if file.suffix.lower() != ".json":
        with open_text(file) as stream:
            return stream.read().splitlines()
    return captions_in({name: value for name, value in json_members(file) if name is not None}) or []


def _unread_note(errors: list[str]) -> str:
    more = f" And {len(errors) - _MOST_NAMED} more." if len(errors) > _MOST_NAMED else ""
    return f"{len(errors)} caption files beside images could not be read: {' '.join(errors[:_MOST_NAMED])}{more}"


def _repeats(tree: Tree, captioned_folders: Iterable[str]) -> list[int] | None:
    """How often each image comes per epoch, if every folder with captions is named in kohya's way; else None."""
    repeats: dict[str, int] = {}
    for folder in set(captioned_folders):
        match = _REPEATS.fullmatch(folder.rpartition("/")[2])
        if match is None:
            return None
        repeats[folder] = int(match[1])
    return [repeats.get(folder, 1) for folder, _ in tree.images]


def write_sidecar(samples: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    for _, captions in samples:
        yield "\n".join(captions) + "\n"


def holds_captioned_images(folder: str | os.PathLike) -> bool:
    """Whether a text file is beside an image right in this folder, among its first 20,000 files. The folder is listed
    again only if its time changed."""
    try:
        return _has_sidecars(os.fspath(folder), os.stat(folder).st_mtime_ns)
    except OSError:  # it may not be opened, or is gone
        return False


@functools.lru_cache(maxsize=4096)
def _has_sidecars(folder: str, time: int) -> bool:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in itertools.islice(entries, _MOST_LISTED)]
    stems = {os.path.splitext(name)[0] for name in names if name.lower().endswith(TEXT_SUFFIXES)}
    return bool(stems) and any(os.path.splitext(name)[0] in stems for name in names if is_image(name))
