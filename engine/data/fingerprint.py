"""Whether a dataset is still the same: a hash over its columns, and over the sizes and times of its image files."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Sequence

import numpy

from .images.image_files import file_of, stat_of
from .images.locations import ImageLocations
from .images.paths import relative
from .readers.parsed import Captions

MOST_STATTED = 50_000  # images whose size and time are read; a million would take a minute on a slow disk


def fingerprint_of(
    locations: ImageLocations,
    captions: Sequence[tuple[str, ...]],
    labels: Sequence[int | None],
    class_names: Sequence[str],
    originals: Sequence[str],
    repeats: Sequence[int],
) -> str:
    """Return a SHA-256 over a dataset's columns, and the size and time of each image file.

    With more than 50,000 images, the times of their folders replace those of the files: an image that is overwritten in
    place is not noticed then, one that is added, removed or renamed is.
    """
    digest = hashlib.sha256()
    if len(locations.names) <= MOST_STATTED:
        for index, (name, image_captions, label) in enumerate(zip(locations.names, captions, labels, strict=True)):
            class_name = None if label is None else class_names[label]
            optional = [column[index] for column in (originals, repeats) if column]
            digest.update(
                repr((name, image_captions, class_name, _size_and_time(locations, index), *optional)).encode()
            )
        return digest.hexdigest()

    def add(texts: Sequence[str]) -> None:
        # Their number and lengths too, because where one text ends and the next begins counts.
        lengths = numpy.fromiter(itertools.chain([len(texts)], map(len, texts)), numpy.int64, 1 + len(texts))
        digest.update(lengths.tobytes())
        digest.update("".join(texts).encode("utf-8", "surrogatepass"))

    for texts in (locations.names, Captions.concatenated([captions]).lines, class_names, originals):
        add(texts)
    for numbers in ([-1 if label is None else label for label in labels], repeats):
        digest.update(numpy.array([len(numbers), *numbers], dtype=numpy.int64).tobytes())
    # The folder of an odd name such as a/.. counts as well, so this does not ask whether a name can be split.
    named_folders = {(origin, folder) for origin, folder, _ in locations.split_names()}
    times = []
    for path in sorted({path for named in named_folders for path in locations.candidate_folders(*named)}):
        with contextlib.suppress(OSError, ValueError):  # not there, or a name with a null character
            times.append(f"{relative(path, locations.folder)}\0{os.stat(path).st_mtime_ns}")
    add(times)
    if containers := _containers(locations):
        add(containers)
    return digest.hexdigest()


def _size_and_time(locations: ImageLocations, index: int) -> tuple[int, int] | None:
    try:
        stat = stat_of(locations.path(index))
    except (OSError, ValueError):  # the latter for a name with a null character
        return None
    return stat.st_size, stat.st_mtime_ns


def _containers(locations: ImageLocations) -> list[str]:
    """Sizes and times of the files that hold images in their rows. They are few."""
    first: dict[tuple[str, str], int] = {}
    origins = locations.origins or itertools.repeat(locations.folder)
    for index, (origin, name) in enumerate(zip(origins, locations.names, strict=False)):
        if "#" in name and (file := file_of(name)) != name:
            first.setdefault((origin, file), index)
    return sorted(f"{file}\0{_size_and_time(locations, index)}" for (_, file), index in first.items())
