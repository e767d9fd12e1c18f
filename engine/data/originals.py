"""Which pictures are copies of which: `originals.tsv`, as preparing pictures writes it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError

NAME = "originals.tsv"
HEADER = "picture\toriginal"


def read_originals(files: Iterable[Path]) -> dict[str, str]:
    """The original's path by the copy's, both absolute, of all these files. An original need not be there; a copy of a
    copy is one of the first. Raises `UserError` for a file that is damaged."""
    found: dict[str, str] = {}
    for file in files:
        found |= _read(file)
    return {picture: _first(found, picture) for picture in found}


def _read(file: Path) -> dict[str, str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{file} cannot be read ({why}).") from error
    found = {}
    for number, line in enumerate(lines, 1):
        picture, mark, original = line.partition("\t")
        if (number == 1 and line != HEADER) or (line and not mark):
            raise UserError(f"{file} has {line[:60]!r} in line {number}; write a picture, a tab and its original.")
        if number > 1 and line:
            found[_absolute(file, picture)] = _absolute(file, original)
    return found


def _absolute(file: Path, name: str) -> str:
    return os.path.normpath(os.path.join(os.path.abspath(file.parent), name.replace("\\", "/")))


def _first(found: dict[str, str], picture: str) -> str:
    seen = {picture}
    while (original := found.get(picture, picture)) not in seen:
        seen.add(original)
        picture = original
    return picture
