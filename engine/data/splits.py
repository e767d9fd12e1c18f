"""Splits a dataset into training and validation, by original image."""

from __future__ import annotations

import dataclasses
import hashlib
import os

from ..errors import UserError
from .dataset import ClipDataset
from .images.paths import inside, relative


def split_dataset(dataset: ClipDataset, fraction: float, seed: int = 0) -> tuple[ClipDataset, ClipDataset]:
    """Return (training, validation); about `fraction` of the original images go to validation.

    Which side an image is on depends on its path in the dataset and the seed alone, so adding images moves no other. A
    fraction above 0 takes at least one original and leaves at least one; 0 gives an empty validation part. Raises
    `UserError` for a fraction outside 0 to 1.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"The validation split is {fraction}; give a share from 0 to below 1, such as 0.1.")
    if fraction == 0:
        return dataset, dataset.subset([])
    originals = original_paths(dataset)
    rank = {name: _rank(name, seed) for name in set(originals)}
    if len(rank) < 2:
        raise UserError(f"{dataset.name} has a single image; a validation split needs at least 2. Set it to 0.")
    chosen = {name for name, value in rank.items() if value < fraction} or {min(rank, key=rank.__getitem__)}
    if len(chosen) == len(rank):
        chosen.remove(max(rank, key=rank.__getitem__))
    sides: tuple[list[int], list[int]] = ([], [])
    for index, name in enumerate(originals):
        sides[name in chosen].append(index)
    train, validation = map(dataset.subset, sides)
    return (
        dataclasses.replace(train, other_parts=(validation, *dataset.other_parts)),
        dataclasses.replace(validation, other_parts=(train, *dataset.other_parts)),
    )


def original_paths(dataset: ClipDataset) -> list[str]:
    """Each image's path from its root, so that two caption files that name it mean the same; for a copy, that of its
    original. Each of several datasets that were combined has a root of its own."""

    def from_root(path: str) -> str:
        path = os.path.normpath(path)
        root = next((root for root in dataset.roots if inside(path, (root,))), str(dataset.folder))
        return relative(path, root)

    prefixes: dict[tuple[str, str], str] = {}  # what comes before the file name, by origin and folder
    paths = []
    for name, (origin, folder, file) in zip(dataset.names, dataset.locations.split_names(), strict=True):
        if file is None:
            paths.append(from_root(os.path.join(origin, name.replace("\\", "/"))))
            continue
        prefix = prefixes.get((origin, folder))
        if prefix is None:
            prefix = prefixes[origin, folder] = from_root(os.path.join(origin, folder, "x"))[:-1]
        paths.append(prefix + file)
    for index, original in enumerate(dataset.originals):
        if original:
            paths[index] = from_root(os.path.join(dataset.folder, original))
    return paths


def _rank(name: str, seed: int) -> float:
    """A number from 0 to 1 that depends on the name and the seed alone."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
