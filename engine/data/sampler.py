"""What an epoch is made of: in which order the samples come, how often, and with which caption.

All of it is a function of the seed, the epoch and the place in the epoch, so that a training that stopped goes on with
what would have come. Nothing is computed for a sample before its turn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from typing import Literal, NamedTuple

import numpy
import torch
from torch import Tensor

from ..errors import UserError
from ..settings import Settings, setting
from .dataset import ClipDataset

POLICIES = ("random", "first", "mixed", "all")
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionPolicy:
    """Which of a sample's captions is drawn, and what is done to it.

    `which`: random (one an epoch), first, mixed (a long one with probability `long_caption_ratio`, else a short one) or
    all (each caption makes a pair of its own in every epoch). `dropout` is the share of pairs whose caption is left
    empty. `shuffle_tags` reorders what stands between commas, behind the first `keep_tokens`.
    """

    which: str = "random"
    long_caption_ratio: float = 0.5
    dropout: float = 0.0
    shuffle_tags: bool = False
    keep_tokens: int = 0

    def __post_init__(self):
        if self.which not in POLICIES:
            raise UserError(f"captions is {self.which!r}; choose {' or '.join(POLICIES)}.")


class Pair(NamedTuple):
    """A sample's turn in an epoch. `entry` numbers the turns of an epoch before they are put in order. `meaning` is
    the caption before its tags were shuffled: pairs of equal meaning are right for each other."""

    entry: int
    sample: int
    caption: str
    meaning: str


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of `count` entries, a function of seed and epoch alone."""
    return torch.randperm(count, generator=_generator(seed, epoch, 1))


def rng_of(seed: int, epoch: int, entry: int, purpose: str) -> random.Random:
    """Chance of its own for one entry of one epoch, and for one purpose."""
    return random.Random(f"{seed}/{epoch}/{entry}/{purpose}")


class Sampler:
    """The epochs of a data set. `length` is how many entries each has: every sample as often as its `repeats` say,
    and under the policy `all` that often with each of its captions."""

    def __init__(self, dataset: ClipDataset, seed: int, policy: CaptionPolicy | None = None):
        self.dataset, self.seed, self.policy = dataset, seed, policy or CaptionPolicy()
        self._ends = self._count_entries()
        self.length = len(dataset) if self._ends is None else int(self._ends[-1]) if len(self._ends) else 0

    def epoch(self, number: int) -> Epoch:
        return Epoch(self, number)

    def _count_entries(self) -> numpy.ndarray | None:
        """The sum of the entries up to each sample; None where each has one, so that nothing needs to be counted."""
        dataset, each = self.dataset, self.policy.which == "all"
        if not each and not any(repeats != 1 for repeats in dataset.repeats):
            return None
        counts = numpy.ones(len(dataset), dtype=numpy.int64)
        if dataset.repeats:
            counts *= numpy.asarray(dataset.repeats, dtype=numpy.int64)
        if each:
            counts *= [len(dataset.training_captions(index)) for index in range(len(dataset))]
        return counts.cumsum()

    def sample_of(self, entry: int) -> tuple[int, int]:
        """(the sample of an entry, how many entries of the same sample are before it)."""
        if self._ends is None:
            return entry, 0
        sample = int(numpy.searchsorted(self._ends, entry, side="right"))
        return sample, entry - (int(self._ends[sample - 1]) if sample else 0)


class Epoch:
    """One epoch: `self[place]` is the pair at a place of its order, from 0 to `length` - 1."""

    def __init__(self, epochs: Sampler, number: int):
        self.epochs, self.number = epochs, number
        self._order = epoch_order(epochs.length, epochs.seed, number).numpy()
        generator = _generator(epochs.seed, number, 2)
        self._draws = torch.rand(epochs.length, generator=generator, dtype=torch.float64).numpy()

    def __getitem__(self, place: int) -> Pair:
        entry = int(self._order[place])
        sample, turn = self.epochs.sample_of(entry)
        policy, captions = self.epochs.policy, self.epochs.dataset.training_captions(sample)
        drawn = _drawn(captions, policy, float(self._draws[entry]), turn)
        caption = drawn
        seed, number = self.epochs.seed, self.number
        if policy.dropout and rng_of(seed, number, entry, "dropout").random() < policy.dropout:
            drawn = caption = ""
        elif policy.shuffle_tags:
            caption = shuffled_tags(drawn, policy.keep_tokens, rng_of(seed, number, entry, "tags"))
        return Pair(entry, sample, caption, drawn)


def _drawn(captions: tuple[str, ...], policy: CaptionPolicy, draw: float, turn: int) -> str:
    """One of the captions, by a number from 0 to 1."""
    if policy.which == "first":
        return captions[0]
    if policy.which == "all":
        return captions[turn % len(captions)]
    if policy.which == "mixed":
        middle = (min(map(len, captions)) + max(map(len, captions))) / 2
        long = draw < policy.long_caption_ratio
        # The same number chooses among them, stretched to 0 to 1 again.
        draw = (
            draw / policy.long_caption_ratio
            if long
            else (draw - policy.long_caption_ratio) / (1 - policy.long_caption_ratio)
        )
        captions = tuple(text for text in captions if (len(text) > middle) == long) or captions
    return captions[int(draw * len(captions))]


def shuffled_tags(caption: str, keep: int, chance: random.Random) -> str:
    """The caption with what stands between commas in another order, but for the first `keep` of them."""
    tags = [tag.strip() for tag in caption.split(",")]
    tags = [tag for tag in tags if tag]
    moved = tags[keep:]
    chance.shuffle(moved)
    return ", ".join(tags[:keep] + moved)


def with_template(dataset: ClipDataset, template: str) -> ClipDataset:
    """The data set with this sentence, {} being the class, as the caption of samples that have a class and none."""
    if template == DEFAULT_TEMPLATE or not dataset.class_names:
        return dataset
    sentences = [(template.replace("{}", name),) for name in dataset.class_names]
    captions = [
        found or (() if label is None else sentences[label])
        for found, label in zip(dataset.captions, dataset.labels, strict=True)
    ]
    return dataclasses.replace(dataset, captions=captions)


def _generator(seed: int, epoch: int, purpose: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{epoch}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
