"""Retrieval: does an image find its captions among all captions, and a caption its image among all images?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from typing_extensions import Unpack

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..errors import UserError
from ..report.charts import bar_chart
from ..report.tables import percent
from .class_names import with_named_classes
from .encoder import EncodedImages, Encoder, Runtime, encode_images, require_images

_ROWS, _COLUMNS = 1024, 4096  # one such block of the similarity matrix is in memory at a time


@dataclasses.dataclass(frozen=True)
class Recalls:
    """The share of queries (0 to 1) with a right answer among the first 1, 5 and 10, and the median rank."""

    r1: float
    r5: float
    r10: float
    median_rank: float


@dataclasses.dataclass(frozen=True)
class RetrievalResult:
    """Recalls in both directions over the whole dataset, and its contrastive loss at the model's temperature."""

    images: int
    captions: int
    image_to_text: Recalls
    text_to_image: Recalls
    loss: float
    notes: tuple[str, ...] = ()

    @property
    def recall_at_1(self) -> float:
        """The mean of both directions."""
        return (self.image_to_text.r1 + self.text_to_image.r1) / 2

    @property
    def directions(self) -> dict[str, Recalls]:
        return {"image to text": self.image_to_text, "text to image": self.text_to_image}

    def as_dict(self) -> dict[str, Any]:
        return {
            "image_to_text": dataclasses.asdict(self.image_to_text),
            "text_to_image": dataclasses.asdict(self.text_to_image),
            "captions": self.captions,
        }

    def rows(self) -> dict[str, str]:
        return {
            f"{direction} R@{k}": percent(getattr(recalls, f"r{k}"))
            for direction, recalls in self.directions.items()
            for k in (1, 5, 10)
        }

    def remark(self) -> str:
        """The median ranks in a sentence."""
        return (
            f"For half of the images a right caption is among the first {self.image_to_text.median_rank:.0f} of "
            f"{self.captions}; for half of the captions the right image is among the first "
            f"{self.text_to_image.median_rank:.0f} of {self.images}."
        )


def retrieval_chart(results: Mapping[str, RetrievalResult], title: str) -> Image:
    first = next(iter(results.values()))
    groups = {
        f"{direction}\nR@{k}": {
            name: getattr(result.directions[direction], f"r{k}") for name, result in results.items()
        }
        for direction in first.directions
        for k in (1, 5)
    }
    return bar_chart(groups, title=title)


def require_captions(dataset: ClipDataset) -> None:
    require_images(dataset)
    if not dataset.has_captions:
        raise UserError(
            f"{dataset.name} has class folders but no captions, so retrieval cannot be measured on it; measure "
            "zero-shot accuracy instead."
        )


def eval_retrieval(full_clip: FullCLIP, dataset: ClipDataset, **runtime: Unpack[Runtime]) -> RetrievalResult:
    """Measure retrieval on a captioned dataset; raises `UserError` for one without captions."""
    require_captions(dataset)
    return named_retrieval_of(Encoder.of(full_clip, **runtime), dataset)


def named_retrieval_of(
    encoder: Encoder, dataset: ClipDataset, *, images: EncodedImages | None = None
) -> RetrievalResult:
    """As `retrieval_of`, with classes that have WordNet IDs called by their names."""
    dataset, notes = with_named_classes(dataset)
    result = retrieval_of(encoder, dataset, images=images)
    return dataclasses.replace(result, notes=(*notes, *result.notes))


def retrieval_of(encoder: Encoder, dataset: ClipDataset, *, images: EncodedImages | None = None) -> RetrievalResult:
    """Measure retrieval with a network that is already built, and its images if they are already encoded.

    A sample that has only a class is captioned by it. A caption of several images is one text, and right for each of
    them. Copies of an image are one image with the captions of all.
    """
    encoded = images or encode_images(encoder, dataset)
    captions, relevant = relevant_captions(dataset, encoded)
    image_features, text_features = encoded.features, encoder.encode_texts(captions)
    notes = [*encoded.notes]
    if cut := sum(map(encoder.tokenizer.truncated, captions)):
        notes.append(
            f"{cut} of the {len(captions)} captions are longer than the {encoder.tokenizer.context_length} tokens that "
            "the model reads; the rest of them is cut off."
        )
    if encoder.device.type == "cuda":
        image_features, text_features = image_features.to(encoder.device), text_features.to(encoder.device)
    numbers = retrieval_numbers(image_features, text_features, relevant, encoder.logit_scale)
    return RetrievalResult(len(image_features), len(text_features), *numbers, tuple(notes))


def relevant_captions(dataset: ClipDataset, images: EncodedImages) -> tuple[list[str], list[list[int]]]:
    """Return the distinct captions, and for each image the indices of those that belong to it."""
    numbers: dict[str, int] = {}
    relevant = []
    for samples in images.samples:
        captions = sorted({caption for index in samples for caption in dataset.training_captions(index)})
        relevant.append(sorted(numbers.setdefault(caption, len(numbers)) for caption in captions))
    return list(numbers), relevant


def retrieval_numbers(
    images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]], logit_scale: float
) -> tuple[Recalls, Recalls, float]:
    """Return the recalls (image to text, text to image) and the contrastive loss; `relevant[i]` are image i's texts.

    A query counts at k if one of its right answers is among the first k (CLIP_benchmark's definition for several
    captions an image). Every wrong answer with at least the same score ranks before a right one: a tie is not a win,
    and the order of equal scores does not matter.

    The loss is the symmetric InfoNCE of the whole dataset as one batch, in float64: each image is compared with all
    texts and each text with all images, the target spread evenly over the right answers. It does not depend on batches
    or order, so values of different steps can be compared. `logit_scale` is the factor itself, such as 100.
    """
    pairs = _Pairs.of(relevant, images_nd.device)
    loss, ranks = _Loss(images_nd, texts_md, pairs, logit_scale), _Ranks(images_nd, texts_md, pairs)
    for top in range(0, len(images_nd), _ROWS):
        rows = slice(top, min(top + _ROWS, len(images_nd)))
        images = images_nd[rows].double()
        for left in range(0, len(texts_md), _COLUMNS):
            columns = slice(left, min(left + _COLUMNS, len(texts_md)))
            scores = images @ texts_md[columns].double().T
            loss.add(rows, columns, scores)
            ranks.add(rows, columns, scores)  # last, because it overwrites the scores
    return _recalls(ranks.of_images), _recalls(ranks.of_texts), loss.mean()


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """What belongs together: image `images[i]` and text `texts[i]`, int64 [p], in the order of the images."""

    images: Tensor
    texts: Tensor

    @classmethod
    def of(cls, relevant: Sequence[Sequence[int]], device: torch.device) -> _Pairs:
        counts = torch.tensor([len(texts) for texts in relevant], dtype=torch.int64)
        images = torch.arange(len(relevant)).repeat_interleave(counts)
        texts = torch.tensor([text for texts in relevant for text in texts], dtype=torch.int64)
        return cls(images.to(device), texts.to(device))

    def within(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the pairs inside a block, counted from its corner."""
        first, last = torch.searchsorted(self.images, self.images.new_tensor([rows.start, rows.stop])).tolist()
        texts = self.texts[first:last]
        inside = (texts >= columns.start) & (texts < columns.stop)
        return self.images[first:last][inside] - rows.start, texts[inside] - columns.start


class _Ranks:
    """The rank of each image's best text among all texts, and of each text's best image."""

    def __init__(self, images_nd: Tensor, texts_md: Tensor, pairs: _Pairs) -> None:
        self.pairs = pairs
        right = _to_grid(_pair_scores(images_nd, texts_md, pairs))
        # A query without a right answer ranks behind all wrong ones: every finite score is at least this.
        lowest = torch.finfo(torch.float64).min
        self.image_best = right.new_full((len(images_nd),), lowest).scatter_reduce(0, pairs.images, right, "amax")
        self.text_best = right.new_full((len(texts_md),), lowest).scatter_reduce(0, pairs.texts, right, "amax")
        self.of_images, self.of_texts = (
            torch.ones(len(features), dtype=torch.int64, device=right.device) for features in (images_nd, texts_md)
        )

    def add(self, rows: slice, columns: slice, scores: Tensor) -> None:
        wrong = _to_grid(scores).index_put_(self.pairs.within(rows, columns), scores.new_tensor(-math.inf))
        self.of_images[rows] += (wrong >= self.image_best[rows, None]).sum(1)
        self.of_texts[columns] += (wrong >= self.text_best[columns]).sum(0)


class _Loss:
    """InfoNCE in both directions."""

    def __init__(self, images_nd: Tensor, texts_md: Tensor, pairs: _Pairs, logit_scale: float) -> None:
        self.logit_scale = logit_scale
        right = _pair_scores(images_nd, texts_md, pairs) * logit_scale
        self.image_right = _mean_by(pairs.images, right, len(images_nd))
        self.text_right = _mean_by(pairs.texts, right, len(texts_md))
        self.image_total = torch.full_like(self.image_right, -math.inf)
        self.text_total = torch.full_like(self.text_right, -math.inf)

    def add(self, rows: slice, columns: slice, scores: Tensor) -> None:
        logits = scores * self.logit_scale
        self.image_total[rows] = torch.logaddexp(self.image_total[rows], logits.logsumexp(1))
        self.text_total[columns] = torch.logaddexp(self.text_total[columns], logits.logsumexp(0))

    def mean(self) -> float:
        to_text, to_image = self.image_total - self.image_right, self.text_total - self.text_right
        return (to_text.mean().item() + to_image.mean().item()) / 2


def _to_grid(scores: Tensor) -> Tensor:
    """Round in place, so that equal answers are equal whatever the order of the sums in their products was."""
    return scores.mul_(1e9).round_()


def _pair_scores(images_nd: Tensor, texts_md: Tensor, pairs: _Pairs) -> Tensor:
    """Return the scores of what belongs together, float64 [p]."""
    scores = [images_nd.new_zeros(0, dtype=torch.float64)]
    for start in range(0, len(pairs.images), _COLUMNS):
        images, texts = (column[start : start + _COLUMNS] for column in (pairs.images, pairs.texts))
        scores.append((images_nd[images].double() * texts_md[texts].double()).sum(1))
    return torch.cat(scores)


def _mean_by(groups: Tensor, values: Tensor, count: int) -> Tensor:
    sums = values.new_zeros(count).index_add_(0, groups, values)
    return sums / torch.bincount(groups, minlength=count)


def _recalls(ranks: Tensor) -> Recalls:
    r1, r5, r10 = ((ranks <= k).double().mean().item() for k in (1, 5, 10))
    return Recalls(r1, r5, r10, float(ranks.double().quantile(0.5)))
