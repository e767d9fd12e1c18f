"""The files below a folder, and which of them are images."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import UserError
from .image_files import image_formats


def walk(
    top: str | os.PathLike, on_error: Callable[[OSError], None] = lambda error: None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (folder, names of folders in it, names of files in it) from `top` down, as `os.walk` does.

    Links to folders are followed, but each real folder is listed once: two links to a folder above them would double
    the walk at every level. Remove names from the list of folders to stay out of them, or sort it to set the order.
    `on_error` gets the error of a folder that cannot be listed.
    """
    seen: set[str] = set()
    waiting = [os.fspath(top)]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        folders: list[str] = []
        files: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    (folders if _is_folder(entry) else files).append(entry.name)
        except OSError as error:
            on_error(error)
            continue
        yield folder, folders, files
        waiting += [os.path.join(folder, name) for name in reversed(folders)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


@dataclasses.dataclass(frozen=True)
class Tree:
    """The files below a folder, without hidden ones.

    `folders` pairs each folder's path from `top` ("" for `top` itself) with the sorted names of its files. `closed` are
    folders that cannot be read.
    """

    top: Path
    folders: tuple[tuple[str, tuple[str, ...]], ...]
    closed: tuple[str, ...] = ()

    @classmethod
    def of(cls, top: Path) -> Tree:
        """List a folder and those below it. Raises `UserError` if it cannot be read."""
        closed: list[str] = []

        def on_error(error: OSError) -> None:
            if error.filename == str(top):
                raise UserError(
                    f"{top} cannot be read ({error.strerror}); check that you may open it, or choose another folder."
                ) from error
            closed.append(_from_top(error.filename, top))

        folders = []
        for root, below, files in walk(top, on_error):
            below[:] = sorted(name for name in below if not name.startswith((".", "__MACOSX")))
            folders.append((_from_top(root, top), tuple(sorted(name for name in files if not name.startswith(".")))))
        return cls(top, tuple(folders), tuple(closed))

    def files(self, suffixes: Sequence[str] | frozenset[str]) -> Iterator[tuple[str, str]]:
        """Yield (folder, name) of each file with one of these extensions; give them in lower case."""
        for folder, names in self.folders:
            yield from ((folder, name) for name in names if os.path.splitext(name)[1].lower() in suffixes)

    @functools.cached_property
    def images(self) -> list[tuple[str, str]]:
        """(folder, name) of each image."""
        return list(self.files(image_suffixes()))

    @functools.cached_property
    def stems(self) -> dict[str, list[str]]:
        """The paths of images, from `top`, by their names without folder and extension."""
        stems: dict[str, list[str]] = {}
        for folder, name in self.images:
            stems.setdefault(os.path.splitext(name)[0], []).append(joined(folder, name))
        return stems

    @functools.cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        return dict(self.folders)

    def is_beside_an_image(self, folder: str, name: str) -> bool:
        """Return whether the folder has an image whose name differs from this file's in the extension alone."""
        names, stem = self._names[folder], os.path.splitext(name)[0] + "."
        for other in itertools.islice(names, bisect_left(names, stem), None):  # names with this stem are adjacent
            if not other.startswith(stem):
                return False
            if is_image(other):
                return True
        return False

    def folders_with(self, name: str) -> list[str]:
        """Return the folders that hold a file of this name."""
        return [folder for folder, names in self.folders if _contains(names, name)]


def joined(folder: str, name: str) -> str:
    """Return a file's path from the top of its tree, with slashes."""
    return f"{folder}/{name}" if folder else name


def _contains(names: tuple[str, ...], name: str) -> bool:
    index = bisect_left(names, name)
    return index < len(names) and names[index] == name


def _from_top(folder: str, top: Path) -> str:
    path = os.path.relpath(folder, top).replace(os.sep, "/")
    return "" if path == "." else path


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the extensions, in lower case, of the formats in `image_formats`."""
    from PIL import Image

    formats = image_formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def is_image(name: str) -> bool:
    """Return whether a file of this name is an image, by its extension."""
    return os.path.splitext(name)[1].lower() in image_suffixes()
