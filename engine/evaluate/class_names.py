"""Class names: the words behind ImageNet's folder names, and classes that a labels JSON holds as captions."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

from ..data.dataset import ClipDataset
from ..errors import UserError, shown

_WNID = re.compile(r"n\d{8}")  # a WordNet ID, such as n01440764
NAME_FILES = ("LOC_synset_mapping.txt", "classes.txt", "words.txt")
_MAX_BYTES = 2**24  # of such a file


def with_classes(dataset: ClipDataset) -> tuple[ClipDataset, tuple[str, ...]]:
    """Return the dataset with class names that fit into sentences, and notes. Raises `UserError`.

    A dataset without classes whose first captions repeat, as in a labels JSON such as
    {"1.jpg": "dog", "2.jpg": "cat", "3.jpg": "dog", "4.jpg": "cat"}, gets these captions as its classes.
    """
    notes: list[str] = []
    if not dataset.class_names:
        dataset = _labelled_by_captions(dataset)
        if dataset.class_names:
            notes.append(f"{dataset.name} has no classes, so the first caption of each image is used as its class.")
    if dataset.class_names and all(map(_WNID.fullmatch, dataset.class_names)):
        class_names, name_notes = _wordnet_class_names(dataset)
        dataset, notes = dataclasses.replace(dataset, class_names=class_names), notes + name_notes
    return dataset, tuple(notes)


def with_named_classes(dataset: ClipDataset) -> tuple[ClipDataset, tuple[str, ...]]:
    """As `with_classes`, but captions stay captions."""
    return with_classes(dataset) if dataset.class_names else (dataset, ())


def has_classes(dataset: ClipDataset) -> bool:
    """Return whether zero-shot accuracy can be measured on it."""
    return bool(dataset.class_names or _labelled_by_captions(dataset).class_names)


def scored_by_classes(dataset: ClipDataset) -> bool:
    """Return whether a dataset's one score is its zero-shot accuracy rather than retrieval.

    It is if all samples have a class, or if there are no captions.
    """
    labelled = dataset if dataset.class_names else _labelled_by_captions(dataset)
    return not dataset.has_captions or (len(labelled.class_names) > 1 and None not in labelled.labels)


def _labelled_by_captions(dataset: ClipDataset) -> ClipDataset:
    """Use the first captions as classes, if there are at least two and at most half as many as images."""
    firsts = [captions[0] for captions in dataset.captions if captions]
    counts = collections.Counter(firsts)
    if len(firsts) < len(dataset) or not 4 <= 2 * len(counts) <= len(firsts):
        return dataset
    class_names = tuple(sorted(counts))
    numbers = {name: number for number, name in enumerate(class_names)}
    return dataclasses.replace(dataset, class_names=class_names, labels=[numbers[first] for first in firsts])


def _wordnet_class_names(dataset: ClipDataset) -> tuple[tuple[str, ...], list[str]]:
    """Return names and notes for classes called by WordNet IDs.

    Names come from a file beside the folders, else from open_clip's list of ImageNet's 1,000, else from WordNet.
    """
    wnids, imagenet = dataset.class_names, _imagenet_names()
    file, listed = _names_beside(dataset)
    lemmas = {wnid: _wordnet_name(wnid) for wnid in wnids if wnid not in listed and wnid not in imagenet}
    names = [listed.get(wnid) or imagenet.get(wnid) or lemmas[wnid] for wnid in wnids]
    if unknown := [wnid for wnid, name in zip(wnids, names, strict=True) if not name]:
        raise UserError(
            f"The class folders of {dataset.name} are named by WordNet IDs, and {unknown[0]} is not a known one; put a "
            f"file {NAME_FILES[0]} or {NAME_FILES[1]} beside the folders, with a line such as “n01440764 tench” for "
            "each."
        )
    source = f"from {file.name}" if file else "ImageNet's, from open_clip"
    notes = [f"The class folders are named by WordNet IDs; the class names used are {source}."]
    if lemmas:
        example = next(iter(lemmas))
        notes.append(
            f"{len(lemmas)} of the {len(wnids)} class folders are none of ImageNet's 1,000 classes; they get WordNet's "
            f"names, such as {shown(lemmas[example])} for {example}."
        )
    if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
        notes.append(
            f"{len(repeated)} names belong to several classes ({', '.join(repeated[:3])}). No model can tell these "
            "classes apart, and a tie is not a win, so their images count as wrong."
        )
    return tuple(names), notes


def _names_beside(dataset: ClipDataset) -> tuple[Path | None, dict[str, str]]:
    """Look beside the class folders, then beside the folder that holds them."""
    candidates = [folder / name for folder in (dataset.folder, dataset.folder.parent) for name in NAME_FILES]
    for file in filter(Path.is_file, candidates):
        names = _read_names(file)
        if not names.keys().isdisjoint(dataset.class_names):
            return file, names
    return None, {}


def _read_names(file: Path) -> dict[str, str]:
    """Read the first name of each line such as “n01440764 tench, Tinca tinca”."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            lines = stream.read(_MAX_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error}); fix it or move it elsewhere.") from error
    names = {}
    for line in lines:
        wnid, _, rest = line.strip().replace("\t", " ").partition(" ")
        name = rest.partition(",")[0].strip()
        if _WNID.fullmatch(wnid) and name:
            names[wnid] = name
    return names


@functools.cache
def _imagenet_names() -> Mapping[str, str]:
    """Return open_clip's names by WordNet ID; timm, which open_clip requires, has the IDs in the same order."""
    import open_clip
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo("imagenet-1k").label_names(), open_clip.IMAGENET_CLASSNAMES, strict=True))


@functools.cache
def _wordnet() -> Mapping[str, str]:
    from timm.data import ImageNetInfo

    descriptions = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
    assert isinstance(descriptions, dict)
    return descriptions


def _wordnet_name(wnid: str) -> str:
    return _wordnet().get(wnid, "").partition(",")[0].strip()
