"""Opens datasets, and combines several into one."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from ..errors import UserError
from .dataset import ClipDataset
from .readers.caption_files import read_captions
from .readers.columns import Columns
from .readers.parsed import Captions, ParsedCaptions

_LARGEST_WEIGHT = 1000


def load_dataset(
    path: str | os.PathLike, captions: str = "auto", *, image_column: str = "", caption_column: str = ""
) -> ClipDataset:
    """Open a folder of images with captions or class folders, or a single caption file.

    `captions` is one of `FORMAT_NAMES` (readers/registry.py); auto recognises the format. The columns of tables and
    records are recognised too, unless they are named here; several caption columns are separated by commas. Raises
    `UserError`.
    """
    columns = Columns(image=image_column, caption=caption_column) if image_column or caption_column else None
    parsed = read_captions(Path(path), captions, columns)
    classes = parsed.classes or parsed.captions
    usable = [index for index, text in enumerate(parsed.captions) if text or classes[index]]
    if not usable:
        raise UserError(f"{path} has no image with a caption; every caption there is empty.")
    notes = list(parsed.notes)
    if len(usable) < len(parsed.names):
        notes.append(f"{len(parsed.names) - len(usable)} images have no caption and are left out.")
    if parsed.repeats:
        notes.append("The numbers that its folders' names begin with say how often their images come per epoch.")
    dataset = dataclasses.replace(_from_parsed(Path(path), parsed), notes=tuple(notes))
    return dataset if len(usable) == len(dataset) else dataset.subset(usable)


def _from_parsed(path: Path, parsed: ParsedCaptions) -> ClipDataset:
    is_file, absolute = os.path.isfile(path), os.path.abspath(path)
    folder = os.path.dirname(absolute) if is_file else absolute
    origins = {origin: os.path.abspath(origin) for origin in set(parsed.origins)}
    roots = [folder]
    if is_file:  # a caption file that was chosen by itself may have its images beside its folder
        roots += [os.path.join(os.path.dirname(folder), "images"), *origins.values()]
    class_names = tuple(sorted(set(parsed.classes or ()) - {""}))
    numbers = {name: number for number, name in enumerate(class_names)}
    dataset = ClipDataset(
        name=Path(absolute).stem if is_file else os.path.basename(absolute),
        folder=Path(folder),
        format=parsed.format,
        reason=parsed.reason,
        names=parsed.names,
        captions=Captions(parsed.captions),
        labels=[numbers.get(name) for name in parsed.classes] if parsed.classes else [None] * len(parsed.names),
        class_names=class_names,
        origins=[origins[origin] for origin in parsed.origins],
        roots=tuple(dict.fromkeys(roots)),
        repeats=parsed.repeats or (),
    )
    return dataset.with_originals(parsed.originals) if parsed.originals else dataset


def combine_datasets(datasets: Sequence[ClipDataset], weights: Sequence[float] | None = None) -> ClipDataset:
    """Combine datasets into one. `weights` are relative numbers of repeats: with 2 and 1, the images of the first come
    twice per epoch; a dataset that weighs 0 is left out.

    Classes of one name become one; copies stay copies of images in another dataset. Raises `UserError`.
    """
    if not datasets:
        raise UserError("There is no dataset to combine; connect at least one.")
    counts = _integer_ratio([1.0] * len(datasets) if weights is None else weights, len(datasets))
    weighted = [(dataset, count) for dataset, count in zip(datasets, counts, strict=True) if count]
    datasets = [dataset for dataset, _ in weighted]
    class_names = tuple(sorted({name for dataset in datasets for name in dataset.class_names}))
    numbers = {name: number for number, name in enumerate(class_names)}
    has_repeats = any(dataset.repeats or count > 1 for dataset, count in weighted)
    has_copies = any(dataset.originals for dataset in datasets)
    return ClipDataset(
        name=" + ".join(dataset.name for dataset in datasets),
        folder=_common_folder([dataset.folder for dataset in datasets]),
        format="combined",
        reason="; ".join(f"{dataset.name}: {dataset.reason}" for dataset in datasets),
        names=[name for dataset in datasets for name in dataset.names],
        captions=Captions.concatenated(dataset.captions for dataset in datasets),
        labels=[
            None if label is None else numbers[dataset.class_names[label]]
            for dataset in datasets
            for label in dataset.labels
        ],
        class_names=class_names,
        notes=tuple(dict.fromkeys(f"{dataset.name}: {note}" for dataset in datasets for note in dataset.notes)),
        origins=[start for dataset in datasets for start in dataset.origins or [str(dataset.folder)] * len(dataset)],
        roots=tuple(dict.fromkeys(root for dataset in datasets for root in dataset.roots or (str(dataset.folder),))),
        originals=[name for dataset in datasets for name in dataset.absolute_originals()] if has_copies else (),
        repeats=[
            count * repeats
            for dataset, count in weighted
            for repeats in dataset.repeats or itertools.repeat(1, len(dataset))
        ]
        if has_repeats
        else (),
        other_parts=tuple(part for dataset in datasets for part in dataset.other_parts),
    )


def _integer_ratio(weights: Sequence[float], count: int) -> list[int]:
    """The smallest integers with the ratio of the weights, to a tenth."""
    if len(weights) != count:
        raise UserError(f"There are {len(weights)} weights for {count} datasets; give one for each.")
    if not all(0 <= weight <= _LARGEST_WEIGHT for weight in weights) or not any(weights):
        raise UserError(
            f"The weights are {', '.join(f'{weight:g}' for weight in weights)}; give numbers from 0 to "
            f"{_LARGEST_WEIGHT}, at least one of them above 0."
        )
    smallest = min(weight for weight in weights if weight)
    ratios = [Fraction(weight / smallest).limit_denominator(10) for weight in weights]
    denominator = math.lcm(*(ratio.denominator for ratio in ratios))
    integers = [int(ratio * denominator) for ratio in ratios]
    return [integer // math.gcd(*integers) for integer in integers]


def _common_folder(folders: Sequence[Path]) -> Path:
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # on Windows, where they are on different drives
        return folders[0]
