"""Where a picture may lie that a caption file names: no further than in the data set's own folders."""

from __future__ import annotations

import functools
import os


@functools.lru_cache(maxsize=1024)
def starts(origin: str, roots: tuple[str, ...]) -> tuple[str, ...]:
    """The folders that a picture's name may start from, first things first, for one that a file in `origin` names."""
    beside = (origin, os.path.join(origin, "images"), os.path.join(os.path.dirname(origin), "images"))
    # What a caption file deep in a data set names may be named from its top, not from that of another that was joined.
    tops = tuple(root for root in roots if inside(origin, (root,)))
    return tuple(dict.fromkeys(start for start in (*beside, *tops) if start in roots or inside(start, roots)))


def inside(place: str, roots: tuple[str, ...]) -> bool:
    """Whether an absolute place, without .. in it, is below one of these folders."""
    return any(place.startswith(os.path.join(root, "")) for root in roots)


def files_in(folder: str) -> frozenset[str]:
    """The names of the files right in a folder, links to some included; none if it is not there."""
    try:
        with os.scandir(folder or os.sep) as entries:
            return frozenset([entry.name for entry in entries if entry.is_file()])
    except (OSError, ValueError):  # the latter for a name with a null character
        return frozenset()


def relative(place: str, folder: str) -> str:
    """A place as seen from a folder, with slashes."""
    try:
        return os.path.relpath(place, folder).replace(os.sep, "/")
    except ValueError:  # on another drive of Windows
        return place.replace(os.sep, "/")
