"""Which images are copies of which: `originals.tsv`, written when images are prepared."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .text_files import open_text

NAME = "originals.tsv"
HEADER = "picture\toriginal"


def read_originals(files: Iterable[Path]) -> dict[str, str]:
    """Return the original of each copy, both as absolute paths, from all these files.

    An original need not be there; a copy of a copy gets the first original. Raises `UserError` for a damaged file.
    """
    originals: dict[str, str] = {}
    for file in files:
        originals |= _read(file)
    return {copy: _first(originals, copy) for copy in originals}


def _read(file: Path) -> dict[str, str]:
    with open_text(file) as stream:
        lines = stream.read().splitlines()
    originals = {}
    for number, line in enumerate(lines, 1):
        copy, tab, original = line.partition("\t")
        if (number == 1 and line != HEADER) or (line and not tab):
            raise UserError(f"{file} has {line[:60]!r} in line {number}; write an image, a tab and its original.")
        if number > 1 and line:
            originals[_absolute(file, copy)] = _absolute(file, original)
    return originals


def _absolute(file: Path, name: str) -> str:
    return os.path.normpath(os.path.join(os.path.abspath(file.parent), name.replace("\\", "/")))


def _first(originals: dict[str, str], path: str) -> str:
    seen = {path}
    while (original := originals.get(path, path)) not in seen:
        seen.add(original)
        path = original
    return path
