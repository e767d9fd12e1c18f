"""Whether a data set is still the same: a hash over what it says of its pictures, and over the times of their files."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

from .images.image_files import file_of, stat_of
from .images.paths import relative
from .readers.registry import Captions

if TYPE_CHECKING:
    from .dataset import ClipDataset

MOST_STATTED = 50_000  # pictures that are asked for their size and time; a million would take a minute on a slow disk


def fingerprint_of(dataset: ClipDataset) -> str:
    """See `ClipDataset.fingerprint`."""
    return _by_picture(dataset) if len(dataset) <= MOST_STATTED else _by_folder(dataset)


def _by_picture(dataset: ClipDataset) -> str:
    """Runs on the disk depend on it: it must not change."""
    digest = hashlib.sha256()
    for index, (name, captions, label) in enumerate(zip(dataset.names, dataset.captions, dataset.labels, strict=True)):
        named = None if label is None else dataset.class_names[label]
        more = [column[index] for column in (dataset.originals, dataset.repeats) if column]
        digest.update(repr((name, captions, named, _size_and_time(dataset, index), *more)).encode())
    return digest.hexdigest()


def _size_and_time(dataset: ClipDataset, index: int) -> tuple[int, int] | None:
    try:
        found = stat_of(dataset.path(index))
    except (OSError, ValueError):  # the latter for a name with a null character
        return None
    return found.st_size, found.st_mtime_ns


def _by_folder(dataset: ClipDataset) -> str:
    """The same columns, a column at a time, and in place of each picture's size and time the times of the folders that
    pictures lie in."""
    digest = hashlib.sha256()

    def add(texts: Sequence[str]) -> None:
        # With their number and their lengths: where one ends and the next begins counts.
        digest.update(numpy.fromiter(itertools.chain([len(texts)], map(len, texts)), numpy.int64, 1 + len(texts)))
        digest.update("".join(texts).encode("utf-8", "surrogatepass"))

    for texts in (dataset.names, Captions.joined([dataset.captions]).lines, dataset.class_names, dataset.originals):
        add(texts)
    for numbers in ([-1 if label is None else label for label in dataset.labels], dataset.repeats):
        digest.update(numpy.array([len(numbers), *numbers], dtype=numpy.int64))
    origins = dataset.origins or itertools.repeat(str(dataset.folder))
    parts = set(zip(origins, (name.replace("\\", "/").rpartition("/")[0] for name in dataset.names), strict=False))
    times = []
    for folder in sorted({folder for part in parts for folder in dataset.folders_of(*part)}):
        with contextlib.suppress(OSError, ValueError):  # not there, or a name with a null character
            times.append(f"{relative(folder, str(dataset.folder))}\0{os.stat(folder).st_mtime_ns}")
    add(times)
    if holders := _holders(dataset):
        add(holders)
    return digest.hexdigest()


def _holders(dataset: ClipDataset) -> list[str]:
    """The sizes and times of the files that hold pictures in their rows: they are few."""
    origins = dataset.origins or itertools.repeat(str(dataset.folder))
    firsts: dict[tuple[str, str], int] = {}
    for index, (origin, name) in enumerate(zip(origins, dataset.names, strict=False)):
        if "#" in name and (file := file_of(name)) != name:
            firsts.setdefault((origin, file), index)
    return sorted(f"{file}\0{_size_and_time(dataset, index)}" for (_, file), index in firsts.items())
