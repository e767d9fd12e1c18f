"""Inspect a dataset: broken files, duplicates, truncated captions, sizes, classes."""

from __future__ import annotations

import array
import collections
import contextlib
import dataclasses
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy

from ...openai import VOCABULARY
from ..dataset import ClipDataset
from ..images.decoding import BrokenImage, MissingImage, decode
from ..images.folder_tree import Tree, is_image
from ..images.image_files import open_bytes
from ..images.paths import files_in
from ..threads import in_threads
from ..tokenizer import Tokenizer, encode
from .perceptual_hash import Look, look, near_groups

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

GONE = "the file is not there"
_BLOCK = 2**20
_MAX_REPEATED = 100  # repeated captions that are listed
_SPECIAL_TOKENS = 2  # start and end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken:
    """An image that cannot be used."""

    file: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CaptionFacts:
    """What is known about the captions.

    `token_counts` says how many captions have how many tokens, with start and end token, before truncation;
    `longest_caption` is the name of the image that has the longest. `repeated_captions` are captions of several
    originals with their number, the most frequent first: at most 100 of `repeated`. `without_captions` are entries with
    neither caption nor class.
    """

    captions: int
    token_counts: Mapping[int, int]
    truncated_captions: int
    longest_caption: str
    repeated_captions: Mapping[str, int]
    repeated: int
    without_captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection(_CaptionFacts):
    """The result of `inspect_dataset`. Images are named as in the dataset.

    `images` counts entries, `originals` the distinct images that they were made from. `sizes` are the (width, height)
    of intact images in pixels, int32 [m, 2]. Groups of duplicates name each original once. `unnamed` are images in the
    same folders that are neither entries nor in another part of a split. `classes` counts the images of each class.
    """

    name: str
    format: str
    reason: str
    notes: tuple[str, ...]
    images: int
    originals: int
    context_length: int
    sizes: numpy.ndarray
    broken: tuple[Broken, ...]
    exact_duplicates: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, ...], ...]
    unnamed: tuple[str, ...]
    classes: Mapping[str, int]

    @property
    def missing(self) -> tuple[str, ...]:
        """The names of images that do not exist; they are among `broken`."""
        return tuple(item.file for item in self.broken if item.reason == GONE)


def inspect_dataset(
    dataset: ClipDataset,
    *,
    context_length: int = 77,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> Inspection:
    """Read every caption and decode every image completely; needs some hundred bytes of memory for each.

    `on_progress(done, total)` counts each entry twice, once for its captions and once for its image. `check_cancelled`
    is called for each and may raise.
    """
    total = 2 * len(dataset)

    def counted(items: Iterable[T], before: int) -> Iterator[T]:
        for done, item in enumerate(items, before + 1):
            check_cancelled()
            yield item
            on_progress(done, total)

    captions = _caption_facts(dataset, context_length, counted(range(len(dataset)), 0))
    table = _ImageTable(len(dataset))
    with contextlib.closing(in_threads(lambda index: _study(dataset, index), range(len(dataset)))) as studies:
        for index, study in enumerate(counted(studies, len(dataset))):
            table.add(index, study)
    exact = _equal_rows(table.contents, table.intact)
    duplicates = {index for group in exact for index in group[1:]}
    compared = numpy.array(
        [index for index in numpy.flatnonzero(table.has_detail) if index not in duplicates], dtype=int
    )
    near = near_groups(table.hashes[compared], table.colours[compared], check_cancelled=check_cancelled)
    return Inspection(
        name=dataset.name,
        format=dataset.format,
        reason=dataset.reason,
        notes=tuple(dataset.notes),
        images=len(dataset),
        originals=_count_originals(dataset),
        context_length=context_length,
        sizes=table.sizes[table.intact],
        broken=tuple(Broken(file=dataset.names[index], reason=reason) for index, reason in table.broken.items()),
        exact_duplicates=_named(dataset, exact),
        near_duplicates=_named(dataset, [[int(compared[row]) for row in group] for group in near]),
        unnamed=tuple(_unnamed(dataset)),
        classes=_class_counts(dataset),
        **vars(captions),
    )


# ---- captions --------------------------------------------------------------------------------------------------------


def _caption_facts(dataset: ClipDataset, context_length: int, indices: Iterable[int]) -> _CaptionFacts:
    """Read all captions. To find repeated ones, only a hash of 8 bytes is remembered for each."""
    tokenizer = Tokenizer(context_length, VOCABULARY)
    counts: collections.Counter[int] = collections.Counter()
    hashes = array.array("Q")  # hash, sample, hash, sample and so on
    without, truncated, longest, longest_name = [], 0, -1, ""
    for index in indices:
        if not dataset.training_captions(index):
            without.append(dataset.names[index])
        for text in dataset.captions[index]:
            tokens = len(encode(text)) + _SPECIAL_TOKENS
            counts[tokens] += 1
            truncated += tokenizer.truncated(text)
            if tokens > longest:
                longest, longest_name = tokens, dataset.names[index]
            hashes.extend((_hash(text), index))
    repeated = _repeated(dataset, numpy.array(hashes, dtype=numpy.uint64).reshape(-1, 2))
    return _CaptionFacts(
        captions=counts.total(),
        token_counts=dict(sorted(counts.items())),
        truncated_captions=truncated,
        longest_caption=longest_name,
        repeated_captions=dict(sorted(repeated.items(), key=lambda item: (-item[1], item[0]))[:_MAX_REPEATED]),
        repeated=len(repeated),
        without_captions=tuple(without),
    )


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _repeated(dataset: ClipDataset, hashes: numpy.ndarray) -> dict[str, int]:
    """Return the captions of several originals with their number; `hashes` is uint64 [m, 2] of hashes and samples."""
    order = numpy.argsort(hashes[:, 0], kind="stable")
    repeated = {}
    for start, end in _runs(hashes[order, 0]):
        samples = hashes[order[start:end], 1].tolist()
        originals = {dataset.original(index) for index in samples}
        if len(originals) > 1:
            key = hashes[order[start], 0]
            text = next(text for text in dataset.captions[samples[0]] if _hash(text) == key)
            repeated[text] = len(originals)
    return repeated


def _runs(column: numpy.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each run of two or more equal values."""
    edges = numpy.flatnonzero(column[1:] != column[:-1]) + 1 if len(column) else column
    bounds = [0, *edges.tolist(), len(column)]
    yield from ((start, end) for start, end in zip(bounds, bounds[1:], strict=False) if end - start > 1)


# ---- images ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Study:
    size: tuple[int, int]
    content: tuple[int, int]
    look: Look


class _ImageTable:
    """The facts about each image, in columns."""

    def __init__(self, count: int):
        self.sizes = numpy.zeros((count, 2), dtype=numpy.int32)
        self.contents = numpy.zeros((count, 2), dtype=numpy.uint64)
        self.hashes = numpy.zeros((count, 2), dtype=numpy.uint64)
        self.colours = numpy.zeros((count, 3), dtype=numpy.uint8)
        self.intact = numpy.zeros(count, dtype=bool)
        self.has_detail = numpy.zeros(count, dtype=bool)
        self.broken: dict[int, str] = {}

    def add(self, index: int, study: _Study | str) -> None:
        if isinstance(study, str):
            self.broken[index] = study
            return
        self.intact[index], self.has_detail[index] = True, not study.look.plain
        self.sizes[index], self.contents[index] = study.size, study.content
        self.hashes[index], self.colours[index] = study.look.words, study.look.colour


def _study(dataset: ClipDataset, index: int) -> _Study | str:
    """Return the facts about an image, or the reason why it cannot be used."""
    path = dataset.path(index)
    try:
        image = decode(path)
        return _Study(image.size, _content_hash(path), look(image))
    except MissingImage:
        return GONE
    except BrokenImage as error:
        return str(error)
    except OSError as error:  # the file was deleted, or the disk failed, after it was decoded
        return f"it cannot be read ({error.strerror})"


def _content_hash(path: os.PathLike) -> tuple[int, int]:
    """Return a hash of the file, as two numbers of 64 bits."""
    digest = hashlib.blake2b(digest_size=16)
    with open_bytes(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    value = digest.digest()
    return int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big")


def _equal_rows(rows: numpy.ndarray, chosen: numpy.ndarray) -> list[list[int]]:
    """Return groups of two or more equal rows, uint64 [n, 2], among the chosen ones, each in order."""
    indices = numpy.flatnonzero(chosen)
    order = indices[numpy.lexsort((indices, rows[indices, 1], rows[indices, 0]))]
    same = (rows[order[1:]] == rows[order[:-1]]).all(1)
    numbers = numpy.concatenate([[0], numpy.cumsum(~same)]) if len(order) else order
    return [sorted(order[start:end].tolist()) for start, end in _runs(numbers)]


def _named(dataset: ClipDataset, groups: list[list[int]]) -> tuple[tuple[str, ...], ...]:
    """Return the names in each group, one for each original: copies of one image are meant to be alike."""
    named = []
    for group in sorted(groups):
        names: dict[str, str] = {}
        for index in group:
            names.setdefault(dataset.original(index), dataset.names[index])
        if len(names) > 1:
            named.append(tuple(names.values()))
    return tuple(named)


# ---- the dataset -----------------------------------------------------------------------------------------------------


def _count_originals(dataset: ClipDataset) -> int:
    if not any(dataset.originals):
        return len(dataset)
    return len({dataset.original(index) for index in range(len(dataset))})


def _class_counts(dataset: ClipDataset) -> dict[str, int]:
    counts = collections.Counter(dataset.labels)
    return {name: counts.get(number, 0) for number, name in enumerate(dataset.class_names)}


def _unnamed(dataset: ClipDataset) -> list[str]:
    """Return images in the dataset's folder that are neither entries nor in another part of a split.

    For a dataset that is a caption file, or has several folders, only the folders of its images are searched: what else
    is around that file may be anything.
    """
    if dataset.format == "images":  # images from a ComfyUI graph, which share a folder of the pack with others
        return []
    used = {str(dataset.path(index)) for index in range(len(dataset))}
    folders = sorted({os.path.dirname(path) for path in used})
    used.update(str(part.path(index)) for part in dataset.other_parts for index in range(len(part)))
    if dataset.is_whole_folder and dataset.folder.is_dir():
        paths = [os.path.join(dataset.folder, folder, name) for folder, name in Tree.of(dataset.folder).images]
    else:
        paths = [os.path.join(folder, name) for folder in folders for name in _images_in(folder)]
    return [os.path.relpath(path, dataset.folder).replace(os.sep, "/") for path in paths if path not in used]


def _images_in(folder: str) -> list[str]:
    return sorted(name for name in files_in(folder) if is_image(name) and not name.startswith("."))


def sample_images(dataset: ClipDataset, count: int, seed: int = 0, side: int = 512) -> list[tuple[Image.Image, str]]:
    """Return up to `count` random images with a caption, in the dataset's order; broken images are skipped.

    Images are RGB of at most `side` pixels a side. The caption is the first one and says how many more there are.
    """
    order = random.Random(seed).sample(range(len(dataset)), len(dataset))
    samples: dict[int, tuple[Image.Image, str]] = {}
    with contextlib.closing(in_threads(lambda index: (index, _thumbnail(dataset, index, side)), order)) as images:
        for index, image in images:
            if len(samples) == count:
                break
            if image is not None:
                texts: Sequence[str] = dataset.training_captions(index) or ("(no caption)",)
                others = f" (+ {len(texts) - 1} more)" if len(texts) > 1 else ""
                samples[index] = (image, texts[0][:300] + others)
    return [samples[index] for index in sorted(samples)]


def _thumbnail(dataset: ClipDataset, index: int, side: int) -> Image.Image | None:
    try:
        image = decode(dataset.path(index))
    except BrokenImage:
        return None
    image.thumbnail((side, side))
    return image
