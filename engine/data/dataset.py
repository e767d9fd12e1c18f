"""ClipDataset, the value that a data set is: an index of names, captions and labels. Pictures are opened later."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UserError
from .captions import Captions, Reading, read_captions


@dataclasses.dataclass(frozen=True, eq=False)
class ClipDataset:
    """Samples by index: the picture's name as written, its captions, and its class (an index into `class_names`).

    `len` counts entries, whether or not their pictures are there. `notes` are sentences for the user. `origins` are
    the folders that names start from, `roots` those that no picture may lie outside of; if empty, `folder` is both.
    `originals` name, from `folder`, the picture that each one is a copy of ("" for none; if empty, none is a copy).
    `repeats` are how often each sample comes in an epoch; if empty, once.
    """

    name: str
    folder: Path
    format: str
    reason: str
    names: Sequence[str]
    captions: Sequence[tuple[str, ...]]
    labels: Sequence[int | None]
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origins: Sequence[str] = ()
    roots: tuple[str, ...] = ()
    originals: Sequence[str] = ()
    repeats: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_captions(self) -> bool:
        return any(self.captions)

    @property
    def has_labels(self) -> bool:
        return bool(self.class_names)

    def training_captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample; one that has only a class gets "a photo of a …."."""
        label = self.labels[index]
        return self.captions[index] or (() if label is None else (f"a photo of a {self.class_names[label]}.",))

    def subset(self, indices: Sequence[int]) -> ClipDataset:
        def chosen(column: Sequence) -> Sequence:
            return column.chosen(indices) if isinstance(column, Captions) else [column[index] for index in indices]

        return dataclasses.replace(
            self,
            names=chosen(self.names),
            captions=chosen(self.captions),
            labels=chosen(self.labels),
            origins=chosen(self.origins) if self.origins else (),
            originals=chosen(self.originals) if self.originals else (),
            repeats=chosen(self.repeats) if self.repeats else (),
        )

    # ---- where the pictures are ------------------------------------------------------------------------------------

    def path(self, index: int) -> Path:
        """The picture of a sample: beside its caption file, in `images` beside that or its folder, or in the data set.

        A name that leads out of the data set is never followed. A picture that is nowhere gets the first place it was
        looked for at.
        """
        places = list(self._places(index))
        return Path(next((place for place in places if os.path.isfile(place)), places[0]))

    def original(self, index: int) -> str:
        """The place of the picture that a sample's is a copy of, or of its own: equal for copies of one picture."""
        copied = self.originals[index] if self.originals else ""
        return os.path.normpath(os.path.join(self.folder, copied)) if copied else str(self.path(index))

    def missing(self) -> list[int]:
        """Samples whose picture is not there; folders are listed, pictures are not touched."""
        listed: dict[str, frozenset[str]] = {}

        def there(place: str) -> bool:
            folder, _, name = place.rpartition(os.sep)
            if folder not in listed:
                listed[folder] = _files_in(folder)
            return name in listed[folder]

        return [index for index in range(len(self)) if not any(map(there, self._places(index)))]

    def _places(self, index: int) -> Iterator[str]:
        """Where the picture may be, first things first; at least one."""
        name = self.names[index].replace("\\", "/")  # as Windows writes it
        origin = self.origins[index] if self.origins else str(self.folder)
        roots = self.roots or (str(self.folder),)
        nowhere = True
        for start in _starts(origin, str(self.folder), roots):
            place = os.path.normpath(os.path.join(start, name))
            if _inside(place, roots):
                nowhere = False
                yield place
        if nowhere:
            # Nothing is ever called this, so a name that leads out of the data set is a missing picture.
            yield os.path.join(self.folder, "\N{REPLACEMENT CHARACTER} outside the data set", "none")

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index, (name, captions, label) in enumerate(zip(self.names, self.captions, self.labels, strict=True)):
            named = None if label is None else self.class_names[label]
            digest.update(repr((name, captions, named, self._size_and_time(index))).encode())
        return digest.hexdigest()

    def _size_and_time(self, index: int) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path(index))
        except (OSError, ValueError):  # the latter for a name with a null character
            return None
        return found.st_size, found.st_mtime_ns

    def fingerprint(self) -> str:
        """A hash over names, captions, classes, and the size and time of every picture's file."""
        return self._fingerprint


@functools.lru_cache(maxsize=1024)
def _starts(origin: str, folder: str, roots: tuple[str, ...]) -> tuple[str, ...]:
    starts = (origin, os.path.join(origin, "images"), os.path.join(os.path.dirname(origin), "images"), folder)
    return tuple(dict.fromkeys(start for start in starts if start in roots or _inside(start, roots)))


def _inside(place: str, roots: tuple[str, ...]) -> bool:
    return any(place.startswith(os.path.join(root, "")) for root in roots)


def _files_in(folder: str) -> frozenset[str]:
    try:
        with os.scandir(folder or os.sep) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except (OSError, ValueError):  # the latter for a name with a null character
        return frozenset()


def load_dataset(place: str | os.PathLike, captions: str = "auto") -> ClipDataset:
    """Open a folder of pictures with captions or class folders, or a labels JSON or CSV; the format is recognised.

    `captions` is auto, json, csv, sidecar or folders. Raises `UserError`.
    """
    reading = read_captions(Path(place), captions)
    kept = [index for index, text in enumerate(reading.captions) if text or reading.classes]
    if not kept:
        raise UserError(f"{place} has no picture with a caption; every caption there is empty.")
    notes = []
    if len(kept) < len(reading.names):
        notes.append(f"{len(reading.names) - len(kept)} pictures have no caption and are left out.")
    file = os.path.isfile(place)
    whole = os.path.abspath(place)
    folder = os.path.dirname(whole) if file else whole
    class_names, labels = _numbered(reading)
    absolute = {origin: os.path.abspath(origin) for origin in set(reading.origins)}
    dataset = ClipDataset(
        name=Path(whole).stem if file else os.path.basename(whole),
        folder=Path(folder),
        format=reading.format,
        reason=reading.reason,
        names=reading.names,
        captions=Captions(reading.captions),
        labels=labels,
        class_names=class_names,
        notes=tuple(notes),
        origins=[absolute[origin] for origin in reading.origins],
        # A caption file that was chosen by itself may have its pictures in `images` beside its folder.
        roots=(folder, os.path.join(os.path.dirname(folder), "images")) if file else (folder,),
    )
    return dataset if len(kept) == len(dataset) else dataset.subset(kept)


def _numbered(reading: Reading) -> tuple[tuple[str, ...], list[int | None]]:
    if reading.classes is None:
        return (), [None] * len(reading.names)
    class_names = tuple(sorted(set(reading.classes)))
    numbers = {name: number for number, name in enumerate(class_names)}
    return class_names, [numbers[name] for name in reading.classes]


def split_dataset(dataset: ClipDataset, fraction: float, seed: int = 0) -> tuple[ClipDataset, ClipDataset]:
    """(training, validation) parts; about `fraction` of the original pictures go to validation.

    Which part a picture is in depends on its place in the data set and the seed alone, so adding pictures moves no
    other. A fraction above 0 takes at least one original and leaves at least one; 0 gives an empty validation part.
    Raises `UserError` for a fraction outside 0 to 1.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"The validation split is {fraction}; give a share from 0 to below 1, such as 0.1.")
    if fraction == 0:
        return dataset, dataset.subset([])
    originals = [_original(dataset, index) for index in range(len(dataset))]
    rank = {name: _rank(name, seed) for name in set(originals)}
    if len(rank) < 2:
        raise UserError(f"{dataset.name} has a single picture; a validation split needs 2 at least. Set it to 0.")
    order = sorted(rank, key=rank.__getitem__)
    count = min(max(sum(value < fraction for value in rank.values()), 1), len(order) - 1)
    taken = set(order[:count])
    sides: tuple[list[int], list[int]] = ([], [])
    for index, name in enumerate(originals):
        sides[name in taken].append(index)
    return dataset.subset(sides[0]), dataset.subset(sides[1])


def _original(dataset: ClipDataset, index: int) -> str:
    """The picture's place from the data set's folder, so that two caption files that name it mean the same; of a copy,
    that of the picture it was made from."""
    if dataset.originals and dataset.originals[index]:
        return os.path.normpath(dataset.originals[index]).replace(os.sep, "/")
    name = dataset.names[index].replace("\\", "/")
    origin = os.path.relpath(dataset.origins[index], dataset.folder) if dataset.origins else "."
    return os.path.normpath(os.path.join(origin, name)).replace(os.sep, "/")


def _rank(name: str, seed: int) -> float:
    """A number from 0 to 1 that the name and the seed decide."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
