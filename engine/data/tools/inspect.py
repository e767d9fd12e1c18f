"""What is in a data set and what is wrong with it: broken files, duplicates, cut captions, sizes, classes."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy

from ...openai import VOCABULARY
from ..dataset import ClipDataset
from ..images.decoding import BrokenImage, MissingImage, decode
from ..images.folder_tree import Tree, is_image
from ..images.image_files import open_bytes
from ..threads import in_threads
from ..tokenizer import Tokenizer, encode
from .perceptual_hash import Look, look, near_groups

GONE = "the file is not there"
_BLOCK = 2**20
_MOST_REPEATED = 100  # repeated captions that are named
_ENDS = 2  # start and end token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken:
    """A picture that cannot be used."""

    file: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect_dataset` found. Pictures are named as in the data set.

    `images` counts entries, `originals` the different pictures that they were made from. `token_counts` says how many
    captions have how many tokens, start and end included, before they are cut to `context_length`; `longest_caption`
    is the name of the picture with the longest. `sizes` holds (width, height) in pixels of the sound pictures, int32
    [m, 2]. In a group of duplicates each original is named once. `repeated_captions` are the captions of several
    originals, the most frequent first, at most 100 of `repeated` that there are. `without_captions` are entries that
    have neither caption nor class; `unnamed` are pictures in the same folders that are no entry, nor one of another
    part of a split. `classes` are the pictures of each class.
    """

    name: str
    format: str
    reason: str
    notes: tuple[str, ...]
    images: int
    originals: int
    captions: int
    context_length: int
    token_counts: Mapping[int, int]
    truncated_captions: int
    longest_caption: str
    sizes: numpy.ndarray
    broken: tuple[Broken, ...]
    exact_duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    repeated_captions: Mapping[str, int]
    repeated: int
    without_captions: tuple[str, ...]
    unnamed: tuple[str, ...]
    classes: Mapping[str, int]

    @property
    def missing(self) -> tuple[str, ...]:
        """Entries whose picture is not there; they are among `broken`."""
        return tuple(found.file for found in self.broken if found.reason == GONE)


def inspect_dataset(
    dataset: ClipDataset,
    *,
    context_length: int = 77,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> Inspection:
    """Read every caption and decode every picture whole; takes some hundred bytes of memory for each.

    `on_progress(done, total)` counts entries twice, once for their captions and once for their pictures.
    `check_cancelled` is called for each and may raise.
    """
    total = 2 * len(dataset)

    def counted(items: Iterable, before: int) -> Iterator:
        for done, item in enumerate(items, before + 1):
            check_cancelled()
            yield item
            on_progress(done, total)

    captions = _read_captions(dataset, context_length, counted(range(len(dataset)), 0))
    pictures = _Pictures(len(dataset))
    with contextlib.closing(in_threads(lambda index: _study(dataset, index), range(len(dataset)))) as studied:
        for index, found in enumerate(counted(studied, len(dataset))):
            pictures.note(index, found)
    exact = _equal_rows(pictures.contents, pictures.sound)
    twins = {index for group in exact for index in group[1:]}
    compared = numpy.array([index for index in numpy.flatnonzero(pictures.shows) if index not in twins], dtype=int)
    near = near_groups(pictures.words[compared], pictures.colours[compared], check_cancelled=check_cancelled)
    return Inspection(
        name=dataset.name,
        format=dataset.format,
        reason=dataset.reason,
        notes=tuple(dataset.notes),
        images=len(dataset),
        originals=_originals(dataset),
        context_length=context_length,
        sizes=pictures.sizes[pictures.sound],
        broken=tuple(Broken(file=dataset.names[index], reason=why) for index, why in pictures.broken.items()),
        exact_duplicates=_named(dataset, exact),
        near_duplicates=_named(dataset, [[int(compared[place]) for place in group] for group in near]),
        unnamed=tuple(_unnamed(dataset)),
        classes=_classes(dataset),
        **captions,
    )


# ---- captions --------------------------------------------------------------------------------------------------------


def _read_captions(dataset: ClipDataset, context_length: int, indices: Iterable[int]) -> dict:
    """The fields that are about captions. A caption is remembered by 8 bytes of a hash until it is known to repeat."""
    tokenizer = Tokenizer(context_length, VOCABULARY)
    counts: collections.Counter[int] = collections.Counter()
    seen = array.array("Q")  # hash, sample, hash, sample, …
    without, truncated, longest, longest_name = [], 0, -1, ""
    for index in indices:
        texts = dataset.captions[index]
        if not dataset.training_captions(index):
            without.append(dataset.names[index])
        for text in texts:
            tokens = len(encode(text)) + _ENDS
            counts[tokens] += 1
            truncated += tokenizer.truncated(text)
            if tokens > longest:
                longest, longest_name = tokens, dataset.names[index]
            seen.extend((_hash(text), index))
    repeated = _repeated(dataset, numpy.array(seen, dtype=numpy.uint64).reshape(-1, 2))
    named = dict(sorted(repeated.items(), key=lambda item: (-item[1], item[0]))[:_MOST_REPEATED])
    return {
        "captions": counts.total(),
        "token_counts": dict(sorted(counts.items())),
        "truncated_captions": truncated,
        "longest_caption": longest_name,
        "repeated_captions": named,
        "repeated": len(repeated),
        "without_captions": tuple(without),
    }


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _repeated(dataset: ClipDataset, seen: numpy.ndarray) -> dict[str, int]:
    """How many originals a caption has, where they are several; `seen` uint64 [m, 2] of hashes and samples."""
    order = numpy.argsort(seen[:, 0], kind="stable")
    repeated = {}
    for start, end in _runs(seen[order, 0]):
        samples = seen[order[start:end], 1].tolist()
        originals = {dataset.original(index) for index in samples}
        if len(originals) > 1:
            key = seen[order[start], 0]
            text = next(text for text in dataset.captions[samples[0]] if _hash(text) == key)
            repeated[text] = len(originals)
    return repeated


def _runs(column: numpy.ndarray) -> Iterator[tuple[int, int]]:
    """(start, end) of each stretch of two and more equal values."""
    edges = numpy.flatnonzero(column[1:] != column[:-1]) + 1 if len(column) else column
    bounds = [0, *edges.tolist(), len(column)]
    yield from ((start, end) for start, end in zip(bounds, bounds[1:], strict=False) if end - start > 1)


# ---- pictures --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Studied:
    size: tuple[int, int]
    content: tuple[int, int]
    look: Look


class _Pictures:
    """What is known of each picture, in columns."""

    def __init__(self, count: int):
        self.sizes = numpy.zeros((count, 2), dtype=numpy.int32)
        self.contents = numpy.zeros((count, 2), dtype=numpy.uint64)
        self.words = numpy.zeros((count, 2), dtype=numpy.uint64)
        self.colours = numpy.zeros((count, 3), dtype=numpy.uint8)
        self.sound = numpy.zeros(count, dtype=bool)
        self.shows = numpy.zeros(count, dtype=bool)
        self.broken: dict[int, str] = {}

    def note(self, index: int, found: _Studied | str) -> None:
        if isinstance(found, str):
            self.broken[index] = found
            return
        self.sound[index], self.shows[index] = True, not found.look.plain
        self.sizes[index], self.contents[index] = found.size, found.content
        self.words[index], self.colours[index] = found.look.words, found.look.colour


def _study(dataset: ClipDataset, index: int) -> _Studied | str:
    """What a picture is, or why it cannot be used."""
    path = dataset.path(index)
    try:
        picture = decode(path)
        return _Studied(picture.size, _content(path), look(picture))
    except MissingImage:
        return GONE
    except BrokenImage as error:
        return str(error)
    except OSError as error:  # it went away, or the disk failed, between the two readings
        return f"it cannot be read ({error.strerror})"


def _content(path: os.PathLike) -> tuple[int, int]:
    """128 bits of a hash of the file."""
    digest = hashlib.blake2b(digest_size=16)
    with open_bytes(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    value = digest.digest()
    return int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big")


def _equal_rows(rows: numpy.ndarray, chosen: numpy.ndarray) -> list[list[int]]:
    """Groups of two and more equal ones among the chosen rows, uint64 [n, 2], each in order."""
    indices = numpy.flatnonzero(chosen)
    order = indices[numpy.lexsort((indices, rows[indices, 1], rows[indices, 0]))]
    same = (rows[order[1:]] == rows[order[:-1]]).all(1)
    numbers = numpy.concatenate([[0], numpy.cumsum(~same)]) if len(order) else order
    return [sorted(order[start:end].tolist()) for start, end in _runs(numbers)]


def _named(dataset: ClipDataset, groups: Sequence[Sequence[int]]) -> tuple[tuple[str, ...], ...]:
    """The names of each group, one for each original; copies of one picture are meant to be alike."""
    named = []
    for group in sorted(groups):
        first: dict[str, str] = {}
        for index in group:
            first.setdefault(dataset.original(index), dataset.names[index])
        if len(first) > 1:
            named.append(tuple(first.values()))
    return tuple(named)


# ---- the whole -------------------------------------------------------------------------------------------------------


def _originals(dataset: ClipDataset) -> int:
    """Pictures that the entries were made from; without copies, every entry is one."""
    if not any(dataset.originals):
        return len(dataset)
    return len({dataset.original(index) for index in range(len(dataset))})


def _classes(dataset: ClipDataset) -> dict[str, int]:
    counts = collections.Counter(dataset.labels)
    return {name: counts.get(number, 0) for number, name in enumerate(dataset.class_names)}


def _unnamed(dataset: ClipDataset) -> list[str]:
    """Pictures that lie in the data set's folder and are no entry of it, nor of what was split off.

    Of a data set that is a single caption file, or several folders, only the folders in which its pictures are: what
    else lies around that file may be anything.
    """
    if dataset.format == "images":  # a folder of the pack's own, in which others' pictures lie too
        return []
    used = {str(dataset.path(index)) for index in range(len(dataset))}
    whole = dataset.folder.is_dir() and tuple(dataset.roots) in ((), (str(dataset.folder),))
    own = sorted({os.path.dirname(path) for path in used})
    used.update(str(part.path(index)) for part in dataset.other_parts for index in range(len(part)))
    if whole:
        paths = [os.path.join(dataset.folder, folder, name) for folder, name in Tree.of(dataset.folder).pictures]
    else:
        paths = [os.path.join(folder, name) for folder in own for name in _images_in(folder)]
    return [os.path.relpath(path, dataset.folder).replace(os.sep, "/") for path in paths if path not in used]


def _images_in(folder: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if is_image(name) and not name.startswith("."))
    except (OSError, ValueError):  # it is not there; the latter for a name with a null character
        return []


def sample_images(dataset: ClipDataset, count: int, seed: int = 0, side: int = 512) -> list[tuple]:
    """Up to `count` (picture, caption) drawn by `seed`, in the data set's order: PIL RGB of at most `side` pixels a
    side, and the first caption, with how many more there are. Broken pictures are passed over."""
    order = random.Random(seed).sample(range(len(dataset)), len(dataset))
    found: dict[int, tuple] = {}
    with contextlib.closing(in_threads(lambda index: (index, _thumbnail(dataset, index, side)), order)) as pictures:
        for index, picture in pictures:
            if len(found) == count:
                break
            if picture is not None:
                texts = dataset.training_captions(index) or ("(no caption)",)
                more = f" (+ {len(texts) - 1} more)" if len(texts) > 1 else ""
                found[index] = (picture, texts[0][:300] + more)
    return [found[index] for index in sorted(found)]


def _thumbnail(dataset: ClipDataset, index: int, side: int):
    try:
        picture = decode(dataset.path(index))
    except BrokenImage:
        return None
    picture.thumbnail((side, side))
    return picture
