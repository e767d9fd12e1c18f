"""ClipDataset, the value that a data set is: an index of names, captions and labels. Pictures are opened later."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from ..errors import UserError
from .fingerprint import fingerprint_of
from .images.image_files import file_of
from .images.paths import files_in, inside, relative, starts
from .readers.parsed import Reading
from .readers.registry import Captions, read_captions
from .readers.tables import Columns

_MOST_WEIGHT = 1000


@dataclasses.dataclass(frozen=True, eq=False)
class ClipDataset:
    """Samples by index: the picture's name as written, its captions, and its class (an index into `class_names`).

    `len` counts entries, whether or not their pictures are there. `notes` are sentences for the user. `origins` are
    the folders that names start from, `roots` those that no picture may lie outside of; if empty, `folder` is both.
    `originals` name, from `folder`, the picture that each one is a copy of ("" for none; if empty, none is a copy); it
    need not be there.
    `repeats` are how often each sample comes in an epoch; if empty, once.
    `other_parts` are what was split off: their pictures lie in the same folders and are no samples of this one.
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
    other_parts: tuple[ClipDataset, ...] = ()

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
        return Path(next((place for place in places if os.path.isfile(file_of(place))), places[0]))

    def original(self, index: int) -> str:
        """The place of the picture that a sample's is a copy of, or of its own: equal for copies of one picture."""
        copied = self.originals[index] if self.originals else ""
        return os.path.normpath(os.path.join(self.folder, copied)) if copied else str(self.path(index))

    def copied_from(self, index: int, originals: Mapping[str, str]) -> str:
        """What `originals`, absolute paths by those of their copies, say of a sample, from `folder`; "" for nothing."""
        copied = next((originals[place] for place in self._places(index) if place in originals), None)
        return "" if copied is None else relative(copied, str(self.folder))

    def absolute_originals(self) -> list[str]:
        """The column `originals` with whole paths, for a data set with another folder."""
        if not self.originals:
            return [""] * len(self)
        return [name and os.path.normpath(os.path.join(self.folder, name)) for name in self.originals]

    def missing(self) -> list[int]:
        """Samples whose picture is not there; folders are listed, pictures are not touched."""
        lists: dict[str, frozenset[str]] = {}
        found: dict[tuple[str, str], frozenset[str]] = {}  # the files of the folders that a name may lie in

        def listed(folder: str) -> frozenset[str]:
            if folder not in lists:
                lists[folder] = files_in(folder)
            return lists[folder]

        def is_there(index: int) -> bool:
            places = (place.rpartition(os.sep) for place in self._places(index))
            return any(file_of(file) in listed(folder) for folder, _, file in places)

        absent = []
        for index, (origin, folder, file) in enumerate(self.parted()):
            if file is None:
                if not is_there(index):
                    absent.append(index)
                continue
            files = found.get((origin, folder))
            if files is None:
                some = [files for place in self.folders_of(origin, folder) if (files := listed(place))]
                files = found[origin, folder] = some[0] if len(some) == 1 else frozenset().union(*some)
            if (file_of(file) if "#" in file else file) not in files:
                absent.append(index)
        return absent

    def parted(self) -> Iterator[tuple[str, str, str | None]]:
        """(origin, folder part of its name, its file) of each sample; the last is None for a name that cannot be parted
        so, because it takes more than its last part to know the folder: a/.., say, or /a."""
        windows = os.name == "nt"
        origins = self.origins or itertools.repeat(str(self.folder))
        for origin, name in zip(origins, self.names, strict=False):
            folder, slash, file = name.replace("\\", "/").rpartition("/")
            odd = file in ("", ".", "..") or (slash and not folder) or (windows and ":" in file)
            yield origin, folder, None if odd else file

    def folders_of(self, origin: str, folder: str) -> list[str]:
        """The folders that a picture may lie in whose name has this folder part, first things first."""
        roots = self.roots or (str(self.folder),)
        places = (os.path.normpath(os.path.join(start, folder)) for start in starts(origin, roots))
        return [place for place in places if inside(os.path.join(place, ""), roots)]

    def _places(self, index: int) -> Iterator[str]:
        """Where the picture may be, first things first; at least one."""
        name = self.names[index].replace("\\", "/")  # as Windows writes it
        origin = self.origins[index] if self.origins else str(self.folder)
        roots = self.roots or (str(self.folder),)
        nowhere = True
        for start in starts(origin, roots):
            place = os.path.normpath(os.path.join(start, name))
            if inside(place, roots):
                nowhere = False
                yield place
        if nowhere:
            # Nothing is ever called this, so a name that leads out of the data set is a missing picture.
            yield os.path.join(self.folder, "\N{REPLACEMENT CHARACTER} outside the data set", "none")

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint_of(self)

    def fingerprint(self) -> str:
        """A hash over names, captions, classes, originals, repeats, and the size and time of every picture's file.

        Of more than 50,000 samples the times of the folders take the place of the pictures': there a picture that is
        overwritten in its place is not noticed, one that is added, removed or renamed is.
        """
        return self._fingerprint


def load_dataset(
    place: str | os.PathLike, captions: str = "auto", *, image_column: str = "", caption_column: str = ""
) -> ClipDataset:
    """Open a folder of pictures with captions or class folders, or a single caption file; the format is recognised.

    `captions` is auto or one of `READERS` in captions.py. The columns of tables and records are recognised too, unless
    they are named here; several caption columns are separated by commas. Raises `UserError`.
    """
    columns = Columns(image=image_column, caption=caption_column) if image_column or caption_column else None
    reading = read_captions(Path(place), captions, columns)
    classes = reading.classes or reading.captions
    kept = [index for index, text in enumerate(reading.captions) if text or classes[index]]
    if not kept:
        raise UserError(f"{place} has no picture with a caption; every caption there is empty.")
    notes = list(reading.notes)
    if len(kept) < len(reading.names):
        notes.append(f"{len(reading.names) - len(kept)} pictures have no caption and are left out.")
    if reading.repeats:
        notes.append("The numbers that its folders' names begin with say how often their pictures come in an epoch.")
    dataset = dataclasses.replace(_dataset(Path(place), reading), notes=tuple(notes))
    return dataset if len(kept) == len(dataset) else dataset.subset(kept)


def _dataset(place: Path, reading: Reading) -> ClipDataset:
    file, whole = os.path.isfile(place), os.path.abspath(place)
    folder = os.path.dirname(whole) if file else whole
    class_names, labels = _numbered(reading)
    absolute = {origin: os.path.abspath(origin) for origin in set(reading.origins)}
    roots = (folder,)
    if file:
        # A caption file that was chosen by itself may have its pictures beside its folder.
        roots = tuple(dict.fromkeys((folder, os.path.join(os.path.dirname(folder), "images"), *absolute.values())))
    dataset = ClipDataset(
        name=Path(whole).stem if file else os.path.basename(whole),
        folder=Path(folder),
        format=reading.format,
        reason=reading.reason,
        names=reading.names,
        captions=Captions(reading.captions),
        labels=labels,
        class_names=class_names,
        origins=[absolute[origin] for origin in reading.origins],
        roots=roots,
        repeats=reading.repeats or (),
    )
    if not reading.originals:
        return dataset
    copied = [dataset.copied_from(index, reading.originals) for index in range(len(dataset))]
    return dataclasses.replace(dataset, originals=copied)


def _numbered(reading: Reading) -> tuple[tuple[str, ...], list[int | None]]:
    if reading.classes is None:
        return (), [None] * len(reading.names)
    class_names = tuple(sorted(set(reading.classes) - {""}))
    numbers = {name: number for number, name in enumerate(class_names)}
    return class_names, [numbers.get(name) for name in reading.classes]


# ---- several together ------------------------------------------------------------------------------------------------


def combine_datasets(datasets: Sequence[ClipDataset], weights: Sequence[float] | None = None) -> ClipDataset:
    """One data set of several. `weights` say how often a picture of each comes beside those of the others: with 2 and 1
    those of the first come twice an epoch; one that weighs 0 is left out.

    Classes of one name are one; copies stay copies of pictures in another set. Raises `UserError`.
    """
    if not datasets:
        raise UserError("There is no data set to combine; connect one at least.")
    times = _whole_numbers([1.0] * len(datasets) if weights is None else weights, len(datasets))
    parts = [(dataset, count) for dataset, count in zip(datasets, times, strict=True) if count]
    class_names = tuple(sorted({name for dataset, _ in parts for name in dataset.class_names}))
    numbers = {name: number for number, name in enumerate(class_names)}
    repeated = any(dataset.repeats or count > 1 for dataset, count in parts)
    copies = any(dataset.originals for dataset, _ in parts)
    return ClipDataset(
        name=" + ".join(dataset.name for dataset, _ in parts),
        folder=_common_folder([dataset.folder for dataset, _ in parts]),
        format="combined",
        reason="; ".join(f"{dataset.name}: {dataset.reason}" for dataset, _ in parts),
        names=[name for dataset, _ in parts for name in dataset.names],
        captions=Captions.joined([dataset.captions for dataset, _ in parts]),
        labels=[
            None if label is None else numbers[dataset.class_names[label]]
            for dataset, _ in parts
            for label in dataset.labels
        ],
        class_names=class_names,
        notes=tuple(dict.fromkeys(f"{dataset.name}: {note}" for dataset, _ in parts for note in dataset.notes)),
        origins=[start for dataset, _ in parts for start in dataset.origins or [str(dataset.folder)] * len(dataset)],
        roots=tuple(dict.fromkeys(root for dataset, _ in parts for root in dataset.roots or (str(dataset.folder),))),
        originals=[name for dataset, _ in parts for name in dataset.absolute_originals()] if copies else (),
        repeats=[
            count * often for dataset, count in parts for often in dataset.repeats or itertools.repeat(1, len(dataset))
        ]
        if repeated
        else (),
        other_parts=tuple(part for dataset, _ in parts for part in dataset.other_parts),
    )


def _whole_numbers(weights: Sequence[float], count: int) -> list[int]:
    """The smallest whole numbers that are as the weights are to each other, to a tenth."""
    if len(weights) != count:
        raise UserError(f"There are {len(weights)} weights for {count} data sets; give one for each.")
    if not all(0 <= weight <= _MOST_WEIGHT for weight in weights) or not any(weights):
        raise UserError(
            f"The weights are {', '.join(f'{weight:g}' for weight in weights)}; give numbers from 0 to {_MOST_WEIGHT}, "
            "of which one at least is above 0."
        )
    lightest = min(weight for weight in weights if weight)
    shares = [Fraction(weight / lightest).limit_denominator(10) for weight in weights]
    together = math.lcm(*(share.denominator for share in shares))
    whole = [int(share * together) for share in shares]
    return [number // math.gcd(*whole) for number in whole]


def _common_folder(folders: Sequence[Path]) -> Path:
    try:
        return Path(os.path.commonpath(folders))
    except ValueError:  # on Windows, where they are on different drives
        return folders[0]


# ---- splits ----------------------------------------------------------------------------------------------------------


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
    originals = _originals(dataset)
    rank = {name: _rank(name, seed) for name in set(originals)}
    if len(rank) < 2:
        raise UserError(f"{dataset.name} has a single picture; a validation split needs 2 at least. Set it to 0.")
    taken = {name for name, value in rank.items() if value < fraction} or {min(rank, key=rank.__getitem__)}
    if len(taken) == len(rank):
        taken.remove(max(rank, key=rank.__getitem__))
    sides: tuple[list[int], list[int]] = ([], [])
    for index, name in enumerate(originals):
        sides[name in taken].append(index)
    train, validation = map(dataset.subset, sides)
    more = dataset.other_parts
    return (
        dataclasses.replace(train, other_parts=(validation, *more)),
        dataclasses.replace(validation, other_parts=(train, *more)),
    )


def _originals(dataset: ClipDataset) -> list[str]:
    """Each picture's place from the data set's folder, so that two caption files that name it mean the same; of a copy,
    that of the picture it was made from. Each of several that were combined has a folder of its own."""

    def from_top(place: str) -> str:
        place = os.path.normpath(place)
        top = next((root for root in dataset.roots if inside(place, (root,))), str(dataset.folder))
        return relative(place, top)

    before: dict[tuple[str, str], str] = {}  # what stands before a file of this origin and folder
    places = []
    for name, (origin, folder, file) in zip(dataset.names, dataset.parted(), strict=True):
        if file is None:
            places.append(from_top(os.path.join(origin, name.replace("\\", "/"))))
            continue
        start = before.get((origin, folder))
        if start is None:
            start = before[origin, folder] = from_top(os.path.join(origin, folder, "x"))[:-1]
        places.append(start + file)
    for index, original in enumerate(dataset.originals):
        if original:
            places[index] = from_top(os.path.join(dataset.folder, original))
    return places


def _rank(name: str, seed: int) -> float:
    """A number from 0 to 1 that the name and the seed decide."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
