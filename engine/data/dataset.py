"""ClipDataset, the value that a data set is: an index of names, captions and labels. Pictures are opened later."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .captions import Entry, read_captions


@dataclasses.dataclass(frozen=True, eq=False)
class ClipDataset:
    """Samples by index: the picture's name as written, its captions, and its class (an index into `class_names`).

    `len` counts entries, whether or not their pictures are there. `notes` are sentences for the user.
    """

    name: str
    folder: Path
    format: str
    reason: str
    entries: Sequence[Entry]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    @functools.cached_property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    @functools.cached_property
    def captions(self) -> list[tuple[str, ...]]:
        return [entry.captions for entry in self.entries]

    @functools.cached_property
    def labels(self) -> list[int | None]:
        index = {name: number for number, name in enumerate(self.class_names)}
        return [None if entry.label is None else index[entry.label] for entry in self.entries]

    @property
    def has_captions(self) -> bool:
        return any(entry.captions for entry in self.entries)

    @property
    def has_labels(self) -> bool:
        return bool(self.class_names)

    def training_captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample; one that has only a class gets "a photo of a …."."""
        entry = self.entries[index]
        return entry.captions or (() if entry.label is None else (f"a photo of a {entry.label}.",))

    def subset(self, indices: Sequence[int]) -> ClipDataset:
        return dataclasses.replace(self, entries=[self.entries[index] for index in indices])

    # ---- where the pictures are ------------------------------------------------------------------------------------

    def path(self, index: int) -> Path:
        """The picture of a sample: beside its caption file, in `images` beside that or its folder, or in the data set.

        A name that leads out of the data set's folder is never followed. A picture that is nowhere gets the first
        place it was looked for at.
        """
        candidates = self._candidates(index)
        return next((path for path in candidates if path.is_file()), candidates[0])

    def missing(self) -> list[int]:
        """Samples whose picture is not there; folders are listed, pictures are not touched."""
        listed: dict[str, frozenset[str]] = {}

        def there(path: Path) -> bool:
            folder = str(path.parent)
            if folder not in listed:
                listed[folder] = _files_in(folder)
            return path.name in listed[folder]

        return [index for index in range(len(self)) if not any(there(path) for path in self._candidates(index))]

    def _candidates(self, index: int) -> list[Path]:
        entry = self.entries[index]
        paths = []
        for start in _starts(entry.origin, str(self.folder)):
            path = os.path.normpath(os.path.join(start, entry.name))
            if path.startswith(_with_separator(str(self.folder))):
                paths.append(Path(path))
        # Nothing is ever called this, so a name that leads out of the folder is a missing picture.
        return paths or [self.folder / "\N{REPLACEMENT CHARACTER} outside the data set" / "none"]

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index, entry in enumerate(self.entries):
            try:
                stat = self.path(index).stat()
                seen = (stat.st_size, stat.st_mtime_ns)
            except OSError:
                seen = None
            digest.update(repr((entry.name, entry.captions, entry.label, seen)).encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """A hash over names, captions, classes, and the size and time of every picture's file."""
        return self._fingerprint


@functools.lru_cache(maxsize=1024)
def _starts(origin: str, folder: str) -> tuple[str, ...]:
    starts = (origin, os.path.join(origin, "images"), os.path.join(os.path.dirname(origin), "images"), folder)
    return tuple(dict.fromkeys(os.path.normpath(start) for start in starts))


def _with_separator(folder: str) -> str:
    return os.path.join(os.path.normpath(folder), "")


def _files_in(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()


def load_dataset(place: str | os.PathLike, captions: str = "auto") -> ClipDataset:
    """Open a folder of pictures with captions or class folders, or a labels JSON or CSV; the format is recognised.

    `captions` is auto, json, csv, sidecar or folders. Raises `UserError`.
    """
    place = Path(os.path.abspath(place))
    reading = read_captions(place, captions)
    entries = [entry for entry in reading.entries if entry.captions or entry.label is not None]
    bare = len(reading.entries) - len(entries)
    if not entries:
        raise UserError(f"{place} has no picture with a caption; every caption there is empty.")
    notes = (f"{bare} pictures have no caption and are left out.",) if bare else ()
    return ClipDataset(
        name=place.stem if place.is_file() else place.name,
        folder=place.parent if place.is_file() else place,
        format=reading.format,
        reason=reading.reason,
        entries=entries,
        class_names=tuple(sorted({entry.label for entry in entries if entry.label is not None})),
        notes=notes,
    )


def split_dataset(dataset: ClipDataset, fraction: float, seed: int = 0) -> tuple[ClipDataset, ClipDataset]:
    """(training, validation) parts; about `fraction` of the original pictures go to validation.

    Which part a picture is in depends on its name and the seed alone, so adding pictures moves no other. A fraction
    above 0 takes at least one original and leaves at least one. Raises `UserError` for a fraction outside 0 to 1.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"The validation split is {fraction}; give a share from 0 to below 1, such as 0.1.")
    if fraction == 0:
        return dataset, dataset.subset([])
    rank = {name: _rank(name, seed) for name in set(dataset.names)}
    if len(rank) < 2:
        raise UserError(f"{dataset.name} has a single picture; a validation split needs 2 at least. Set it to 0.")
    order = sorted(rank, key=rank.__getitem__)
    count = min(max(sum(value < fraction for value in rank.values()), 1), len(order) - 1)
    taken = set(order[:count])
    sides: tuple[list[int], list[int]] = ([], [])
    for index, name in enumerate(dataset.names):
        sides[name in taken].append(index)
    return dataset.subset(sides[0]), dataset.subset(sides[1])


def _rank(name: str, seed: int) -> float:
    """A number from 0 to 1 that the name and the seed decide."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
