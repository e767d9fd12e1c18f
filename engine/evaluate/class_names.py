"""What classes are called: the names behind ImageNet's folder names, and classes that a labels JSON says."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

from ..data.dataset import ClipDataset
from ..errors import UserError, shown

_WNID = re.compile(r"n\d{8}")
NAME_FILES = ("LOC_synset_mapping.txt", "classes.txt", "words.txt")
_LARGEST = 2**24  # bytes of such a file


def with_classes(dataset: ClipDataset) -> tuple[ClipDataset, tuple[str, ...]]:
    """(a data set whose classes have the names that are put into sentences, what there is to say of them).

    Where it has none, but the first captions of its pictures come again and again, as in a labels JSON such as
    {"1.jpg": "dog", "2.jpg": "cat", "3.jpg": "dog", "4.jpg": "cat"}, these are its classes. Raises `UserError`.
    """
    notes: list[str] = []
    if not dataset.class_names:
        dataset = _labelled_by_captions(dataset)
        if dataset.class_names:
            notes.append(f"{dataset.name} has no classes; the first captions of its pictures are taken for them.")
    if dataset.class_names and all(map(_WNID.fullmatch, dataset.class_names)):
        names, more = _names_of(dataset)
        dataset, notes = dataclasses.replace(dataset, class_names=names), notes + more
    return dataset, tuple(notes)


def with_named_classes(dataset: ClipDataset) -> tuple[ClipDataset, tuple[str, ...]]:
    """The same for what is captioned by its classes: captions are not taken for classes."""
    return with_classes(dataset) if dataset.class_names else (dataset, ())


def has_classes(dataset: ClipDataset) -> bool:
    """Whether zero-shot accuracy can be measured on it."""
    return bool(dataset.class_names or _labelled_by_captions(dataset).class_names)


def scored_by_classes(dataset: ClipDataset) -> bool:
    """Whether a data set's one score is that of its classes, and not of its captions: of all samples that is, or there
    are no captions."""
    labelled = dataset if dataset.class_names else _labelled_by_captions(dataset)
    return not dataset.has_captions or (len(labelled.class_names) > 1 and None not in labelled.labels)


def _labelled_by_captions(dataset: ClipDataset) -> ClipDataset:
    """With the first captions as classes, if there are two at least and half as many as pictures at most."""
    firsts = [captions[0] if captions else None for captions in dataset.captions]
    counts = collections.Counter(firsts)
    if None in counts or not 4 <= 2 * len(counts) <= len(firsts):
        return dataset
    names = tuple(sorted(counts))
    numbers = {name: number for number, name in enumerate(names)}
    return dataclasses.replace(dataset, class_names=names, labels=[numbers[first] for first in firsts])


def _names_of(dataset: ClipDataset) -> tuple[tuple[str, ...], list[str]]:
    """(names, notes) of classes that are called by WordNet's numbers: from a file beside the folders, else those that
    open_clip has for ImageNet's 1,000, else WordNet's own."""
    wnids, imagenet = dataset.class_names, _imagenet_names()
    file, told = _names_beside(dataset)
    lemmas = {wnid: _wordnet_name(wnid) for wnid in wnids if wnid not in told and wnid not in imagenet}
    names = [told.get(wnid) or imagenet.get(wnid) or lemmas[wnid] for wnid in wnids]
    if unknown := [wnid for wnid, name in zip(wnids, names, strict=True) if not name]:
        raise UserError(
            f"The class folders of {dataset.name} have WordNet's numbers for names, and what {unknown[0]} is called is "
            f"not known here; put a file {NAME_FILES[0]} or {NAME_FILES[1]} beside the folders, with a line such as "
            "“n01440764 tench” for each."
        )
    where = f"from {file.name}" if file else "ImageNet's, as open_clip has them"
    notes = [f"The class folders have WordNet's numbers for names; the names of the classes are {where}."]
    if lemmas:
        some = next(iter(lemmas))
        notes.append(
            f"{len(lemmas)} of the {len(wnids)} class folders are none of ImageNet's 1,000; WordNet's names are used "
            f"for them, such as {shown(lemmas[some])} for {some}."
        )
    if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
        notes.append(
            f"{len(twice)} names are those of several classes ({', '.join(twice[:3])}): no model can tell these apart, "
            "and as a tie is not a win, their pictures count as wrong."
        )
    return tuple(names), notes


def _names_beside(dataset: ClipDataset) -> tuple[Path | None, dict[str, str]]:
    for file in filter(Path.is_file, _name_files(dataset)):
        found = _read_names(file)
        if not found.keys().isdisjoint(dataset.class_names):
            return file, found
    return None, {}


def _name_files(dataset: ClipDataset) -> list[Path]:
    """Beside the folders, or beside the folder that they are in."""
    return [folder / name for folder in (dataset.folder, dataset.folder.parent) for name in NAME_FILES]


def _read_names(file: Path) -> dict[str, str]:
    """The first of the names in each line “n01440764 tench, Tinca tinca”."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            lines = stream.read(_LARGEST).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}); mend it or move it elsewhere.") from error
    found = {}
    for line in lines:
        wnid, _, rest = line.strip().replace("\t", " ").partition(" ")
        name = rest.partition(",")[0].strip()
        if _WNID.fullmatch(wnid) and name:
            found[wnid] = name
    return found


@functools.cache
def _imagenet_names() -> Mapping[str, str]:
    """open_clip's names, in the order of the sorted WordNet numbers, which timm, that open_clip needs, knows."""
    import open_clip
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), open_clip.IMAGENET_CLASSNAMES, strict=True))


@functools.cache
def _wordnet() -> Mapping[str, str]:
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)


def _wordnet_name(wnid: str) -> str:
    return _wordnet().get(wnid, "").partition(",")[0].strip()
