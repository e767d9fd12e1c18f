"""Where an image that a caption file names may be: never outside the dataset's own folders."""

from __future__ import annotations

import functools
import os


@functools.lru_cache(maxsize=1024)
def starts(origin: str, roots: tuple[str, ...]) -> tuple[str, ...]:
    """Return the folders that an image's name in a file in `origin` may be relative to, the likeliest first."""
    beside = (origin, os.path.join(origin, "images"), os.path.join(os.path.dirname(origin), "images"))
    # A caption file deep in a dataset may name images from the dataset's top, but not from that of a combined one.
    tops = tuple(root for root in roots if inside(origin, (root,)))
    return tuple(dict.fromkeys(start for start in (*beside, *tops) if start in roots or inside(start, roots)))


def inside(path: str, roots: tuple[str, ...]) -> bool:
    """Return whether an absolute path, without .. in it, is below one of these folders."""
    return any(path.startswith(os.path.join(root, "")) for root in roots)


def files_in(folder: str) -> frozenset[str]:
    """Return the names of the files in a folder, links to files included; none if there is no such folder."""
    try:
        with os.scandir(folder or os.sep) as entries:
            return frozenset([entry.name for entry in entries if entry.is_file()])
    except (OSError, ValueError):  # ValueError: a null character in the name
        return frozenset()


def relative(path: str, folder: str) -> str:
    """Return a path relative to a folder, with slashes."""
    try:
        return os.path.relpath(path, folder).replace(os.sep, "/")
    except ValueError:  # on Windows: another drive
        return path.replace(os.sep, "/")
