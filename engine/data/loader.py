"""From a data set to batches: the order, the captions drawn, and pictures decoded ahead by threads."""

from __future__ import annotations

import collections
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import UserError
from .dataset import ClipDataset
from .images import BrokenImage, MissingImage, load_image
from .tokens import Tokenizer

T = TypeVar("T")
R = TypeVar("R")

# Threads serve inside ComfyUI and outside alike: Pillow decodes without holding Python's lock.
THREADS = min(8, os.cpu_count() or 1)
CACHE_BYTES = 512 * 2**20


class Batch(NamedTuple):
    """`images` uint8 [b, 3, s, s], `tokens` int64 [b, context]; `originals` and `texts` int64 [b], equal where two
    pairs share the picture or the caption; `indices` into the data set."""

    images: Tensor
    tokens: Tensor
    originals: Tensor
    texts: Tensor
    indices: list[int]


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of `count` samples, a function of seed and epoch alone."""
    return torch.randperm(count, generator=_generator(seed, epoch, 1))


def caption_draw(dataset: ClipDataset, seed: int, epoch: int) -> list[str]:
    """The caption of each sample for this epoch, drawn evenly from all it has; a function of seed and epoch alone."""
    draws = torch.rand(len(dataset), generator=_generator(seed, epoch, 2), dtype=torch.float64).tolist()
    chosen = []
    for index, draw in enumerate(draws):
        captions = dataset.training_captions(index)
        chosen.append(captions[int(draw * len(captions))])
    return chosen


def _generator(seed: int, epoch: int, purpose: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class TrainLoader:
    """Batches of a training. Which pairs a step has depends on the seed and the step alone."""

    def __init__(
        self, dataset: ClipDataset, image_size: int, tokenizer: Tokenizer, batch_size: int, seed: int,
        cache_bytes: int = CACHE_BYTES,
    ):  # fmt: skip
        self.dataset, self.tokenizer, self.batch_size, self.seed = dataset, tokenizer, batch_size, seed
        self.steps_per_epoch = len(dataset) // batch_size
        self.pictures = _Pictures(dataset, image_size, cache_bytes)
        self._numbers: dict[str, int] = {}

    @property
    def broken(self) -> dict[str, str]:
        """Names and reasons of the pictures that could not be decoded; they are missing in their batches."""
        return self.pictures.broken

    def iterate(self, start_step: int = 0) -> Iterator[tuple[int, Batch]]:
        """(steps done before, batch) from optimizer step `start_step` (0-based) on, without end.

        Raises `UserError` for a batch with fewer than two good pictures.
        """
        for step, samples in self._decoded(start_step):
            good = [(index, caption, image) for index, caption, image in samples if image is not None]
            if len(good) < 2:
                name, reason = next(iter(self.broken.items()))
                raise UserError(
                    f"Of the {len(samples)} pictures of a batch {len(good)} could be opened (for example {name}: "
                    f"{reason}); run clip-finetune info on the data set to see which are broken."
                )
            indices, captions, images = (list(column) for column in zip(*good, strict=True))
            yield (
                step,
                Batch(
                    torch.stack(images),
                    self.tokenizer(captions),
                    torch.tensor([self._number(f"picture {self.dataset.original(index)}") for index in indices]),
                    torch.tensor([self._number(f"text {caption}") for caption in captions]),
                    indices,
                ),
            )

    def close(self) -> None:
        self.pictures.close()

    def _number(self, what: str) -> int:
        return self._numbers.setdefault(what, len(self._numbers))

    def _plan(self, start_step: int) -> Iterator[tuple[int, int, str]]:
        """(step, sample, caption) of every pair from a step on."""
        epoch, position = divmod(start_step, self.steps_per_epoch)
        while True:
            order = epoch_order(len(self.dataset), self.seed, epoch).tolist()
            captions = caption_draw(self.dataset, self.seed, epoch)
            for slot in range(position * self.batch_size, self.steps_per_epoch * self.batch_size):
                step = epoch * self.steps_per_epoch + slot // self.batch_size
                yield step, order[slot], captions[order[slot]]
            epoch, position = epoch + 1, 0

    def _decoded(self, start_step: int) -> Iterator[tuple[int, list[tuple[int, str, Tensor | None]]]]:
        samples: list[tuple[int, str, Tensor | None]] = []
        ahead = 2 * self.batch_size + THREADS
        pairs = self.pictures.map(lambda pair: (pair, self.pictures.load(pair[1])), self._plan(start_step), ahead)
        for (step, index, caption), image in pairs:
            samples.append((index, caption, image))
            if len(samples) == self.batch_size:
                yield step, samples
                samples = []


class _Pictures:
    """Decoded pictures by sample, kept in memory up to a bound, and the names of those that are broken."""

    def __init__(self, dataset: ClipDataset, image_size: int, cache_bytes: int):
        self.dataset, self.image_size = dataset, image_size
        self.room = cache_bytes // (3 * image_size * image_size)
        self.kept: dict[int, Tensor] = {}
        self.broken: dict[str, str] = {}
        self.lock = threading.Lock()
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="clip-finetune-pictures")

    def load(self, index: int) -> Tensor | None:
        """uint8 [3, s, s], or None for a broken picture, whose reason is noted."""
        if index in self.kept:
            return self.kept[index]
        try:
            image = load_image(self.dataset.path(index), self.image_size)
        except MissingImage as error:
            raise UserError(
                f"{self.dataset.path(index)} was there when the training began and is gone; put it back and start the "
                "same run again: it goes on from where it is. Without the picture it is another run."
            ) from error
        except BrokenImage as error:
            with self.lock:
                self.broken[self.dataset.names[index]] = str(error)
            return None
        with self.lock:
            if len(self.kept) < self.room:
                self.kept[index] = image
        return image

    def map(self, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
        return _ordered(self.pool, function, items, ahead)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)


def _ordered(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """`function` of each item in order, computed by the pool at most `ahead` items before it is asked for."""
    waiting: collections.deque = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def in_threads(function: Callable[[T], R], items: Iterable[T], ahead: int = 64) -> Iterator[R]:
    """`function` of each item, in order, computed in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        yield from _ordered(pool, function, items, ahead)


def image_batches(
    dataset: ClipDataset, indices: Sequence[int], image_size: int, batch_size: int, broken: dict[str, str] | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """(sample indices, uint8 [b, 3, s, s]) in order. Broken pictures are left out and put in `broken`."""
    good: list[int] = []
    images: list[Tensor] = []

    def load(index: int) -> tuple[int, Tensor | str]:
        try:
            return index, load_image(dataset.path(index), image_size)
        except BrokenImage as error:
            return index, str(error)

    for index, image in in_threads(load, indices, ahead=2 * batch_size):
        if isinstance(image, str):
            if broken is not None:
                broken[dataset.names[index]] = image
            continue
        good.append(index)
        images.append(image)
        if len(good) == batch_size:
            yield good, torch.stack(images)
            good, images = [], []
    if good:
        yield good, torch.stack(images)
