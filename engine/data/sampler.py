"""What an epoch consists of: the order of the samples, how often each comes, and with which caption.

Everything is a function of the seed, the epoch and the position in it, so that a resumed training gets the same pairs.
A pair is not computed before it is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy
import torch
from torch import Tensor

from ..errors import UserError
from ..settings import Settings, setting
from .dataset import ClipDataset

DEFAULT_TEMPLATE = "a photo of a {}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionsConfig(Settings):
    """Which of an image's captions a training uses, and how it changes them."""

    caption_policy: Literal["random", "first", "mixed", "all"] = setting(
        "random",
        "Which caption of an image to use. random: a random one each epoch; first: always the first; mixed: long and "
        "short ones in the ratio of long_caption_ratio; all: every caption, each as its own pair in every epoch.",
    )
    long_caption_ratio: float = setting(
        0.5,
        "For caption_policy mixed: how often to use a long caption instead of a short one.",
        min=0.0,
        max=1.0,
        step=0.05,
    )
    caption_dropout: float = setting(0.0, "The share of pairs that get an empty caption.", min=0.0, max=0.9, step=0.05)
    shuffle_tags: bool = setting(False, "Shuffle the comma-separated tags of a caption, anew each epoch.")
    keep_tokens: int = setting(0, "For shuffle_tags: leave this many tags at the start in place.", min=0, max=1000)
    label_template: str = setting(
        DEFAULT_TEMPLATE, "The caption for images that have a class but no caption; {} stands for the class."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{}" not in self.label_template:
            raise UserError(
                f"label_template is {self.label_template!r}; write a sentence with {{}} where the class goes, such as "
                f'"{DEFAULT_TEMPLATE}"'
            )


class Pair(NamedTuple):
    """One sample with its caption for this epoch.

    `entry` is the position in the epoch before shuffling. `meaning` is the caption before its tags were shuffled:
    pairs with equal meanings are correct matches of each other.
    """

    entry: int
    sample: int
    caption: str
    meaning: str


class Sampler:
    """The epochs of a dataset; `length` is the number of pairs in each.

    A sample comes as often as its `repeats` say, under caption_policy all that often with each of its captions.
    """

    def __init__(self, dataset: ClipDataset, seed: int, captions: CaptionsConfig | None = None):
        self.dataset, self.seed, self.config = dataset, seed, captions or CaptionsConfig()
        self._ends = self._count_entries()
        self.length = len(dataset) if self._ends is None else int(self._ends[-1]) if len(self._ends) else 0

    def epoch(self, number: int) -> Epoch:
        return Epoch(self, number)

    def _count_entries(self) -> numpy.ndarray | None:
        """Return the cumulative count of entries, int64 [samples]; None if each sample has exactly one."""
        dataset, every_caption = self.dataset, self.config.caption_policy == "all"
        if not every_caption and not any(repeats != 1 for repeats in dataset.repeats):
            return None
        counts = numpy.ones(len(dataset), dtype=numpy.int64)
        if dataset.repeats:
            counts *= numpy.asarray(dataset.repeats, dtype=numpy.int64)
        if every_caption:
            counts *= [len(dataset.training_captions(index)) for index in range(len(dataset))]
        return counts.cumsum()

    def sample_of(self, entry: int) -> tuple[int, int]:
        """Return (sample, number of entries of the same sample before this one)."""
        if self._ends is None:
            return entry, 0
        sample = int(numpy.searchsorted(self._ends, entry, side="right"))
        return sample, entry - (int(self._ends[sample - 1]) if sample else 0)


class Epoch:
    """One shuffled epoch: `self[position]` is a pair, for positions from 0 to `length` - 1."""

    def __init__(self, sampler: Sampler, number: int):
        self.sampler, self.number = sampler, number
        self._order = epoch_order(sampler.length, sampler.seed, number).numpy()
        generator = _generator(sampler.seed, number, 2)
        self._draws = torch.rand(sampler.length, generator=generator, dtype=torch.float64).numpy()

    def __getitem__(self, position: int) -> Pair:
        config, seed = self.sampler.config, self.sampler.seed
        entry = int(self._order[position])
        sample, repeat = self.sampler.sample_of(entry)
        captions = self.sampler.dataset.training_captions(sample)
        if config.caption_dropout and rng_of(seed, self.number, entry, "dropout").random() < config.caption_dropout:
            return Pair(entry, sample, "", "")
        meaning = _draw(captions, config, float(self._draws[entry]), repeat)
        if not config.shuffle_tags:
            return Pair(entry, sample, meaning, meaning)
        rng = rng_of(seed, self.number, entry, "tags")
        return Pair(entry, sample, shuffled_tags(meaning, config.keep_tokens, rng), meaning)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return a random permutation of `count` entries, int64 [count]."""
    return torch.randperm(count, generator=_generator(seed, epoch, 1))


def rng_of(seed: int, epoch: int, entry: int, purpose: str) -> random.Random:
    """Return the rng for one purpose at one entry of an epoch."""
    return random.Random(f"{seed}/{epoch}/{entry}/{purpose}")


def _generator(seed: int, epoch: int, purpose: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _draw(captions: Sequence[str], config: CaptionsConfig, draw: float, repeat: int) -> str:
    """Return one caption, by a random draw from 0 to 1 and the number of times the sample came before."""
    if config.caption_policy == "first":
        return captions[0]
    if config.caption_policy == "all":
        return captions[repeat % len(captions)]
    if config.caption_policy == "mixed":
        middle = (min(map(len, captions)) + max(map(len, captions))) / 2
        ratio = config.long_caption_ratio
        long = draw < ratio
        # Below the ratio, or above it, the draw is uniform again: stretched to 0 to 1 it also picks the caption.
        draw = draw / ratio if long else (draw - ratio) / (1 - ratio)
        captions = [text for text in captions if (len(text) > middle) == long] or captions
    return captions[int(draw * len(captions))]


def shuffled_tags(caption: str, keep: int, rng: random.Random) -> str:
    """Shuffle the comma-separated tags of a caption, except the first `keep`."""
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    tail = tags[keep:]
    rng.shuffle(tail)
    return ", ".join(tags[:keep] + tail)


def with_template(dataset: ClipDataset, template: str) -> ClipDataset:
    """Return the dataset with captions made from this template, {} being the class, where there are only classes."""
    if template == DEFAULT_TEMPLATE or not dataset.class_names:
        return dataset
    sentences = [(template.replace("{}", name),) for name in dataset.class_names]
    captions = [
        texts or (() if label is None else sentences[label])
        for texts, label in zip(dataset.captions, dataset.labels, strict=True)
    ]
    return dataclasses.replace(dataset, captions=captions)
