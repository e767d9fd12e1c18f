"""Retrieval: does a picture find its captions among all captions, and a caption its picture among all pictures?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..data.images.image_cache import ImageCache
from ..errors import UserError
from .class_names import with_named_classes
from .encoder import EncodedImages, Encoder, EncodingCache, encode_images, require_images

KS = (1, 5, 10)
_ROWS, _COLUMNS = 1024, 4096  # of the similarity matrix, of which one such block is in memory


@dataclasses.dataclass(frozen=True)
class RetrievalResult:
    """Recalls (0 to 1) and median ranks in both directions, over the whole set.

    `loss` is the contrastive loss over the whole set at the model's own temperature (see `contrastive_loss`).
    """

    images: int
    captions: int
    image_to_text: dict[str, float]
    text_to_image: dict[str, float]
    loss: float
    notes: tuple[str, ...] = ()

    @property
    def recall_at_1(self) -> float:
        """The mean of both directions."""
        return (self.image_to_text["r1"] + self.text_to_image["r1"]) / 2

    def as_dict(self) -> dict[str, Any]:
        return {
            "image_to_text": self.image_to_text,
            "text_to_image": self.text_to_image,
            "captions": self.captions,
        }


def eval_retrieval(
    full_clip: FullCLIP,
    dataset: ClipDataset,
    *,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
    cache: ImageCache | None = None,
    features: EncodingCache | None = None,
) -> RetrievalResult:
    """Retrieval over a captioned data set; raises `UserError` for one without captions."""
    require_images(dataset)
    if not dataset.has_captions:
        raise UserError(
            f"{dataset.name} has class folders but no captions, so retrieval cannot be measured on it; measure "
            "zero-shot accuracy instead."
        )
    dataset, told = with_named_classes(dataset)
    encoder = Encoder.of(
        full_clip,
        device=device,
        on_progress=on_progress,
        check_cancelled=check_cancelled,
        cache=cache,
        features=features,
    )
    found = retrieval_of(encoder, dataset)
    return dataclasses.replace(found, notes=(*told, *found.notes))


def retrieval_of(encoder: Encoder, dataset: ClipDataset, *, pictures: EncodedImages | None = None) -> RetrievalResult:
    """Retrieval with a network that is already there, and its pictures if they were encoded before; a sample that has
    only a class is captioned by it.

    A caption that several pictures have is one text, and right for each of them; a picture that is there twice is one
    picture with the captions of both.
    """
    pictures = pictures or encode_images(encoder, dataset)
    numbers: dict[str, int] = {}
    relevant = []
    for samples in pictures.samples:
        texts = {text for index in samples for text in dataset.training_captions(index)}
        relevant.append(sorted(numbers.setdefault(text, len(numbers)) for text in sorted(texts)))
    images, texts = pictures.features, encoder.texts(list(numbers))
    notes = [*pictures.notes]
    if cut := sum(map(encoder.tokenizer.truncated, numbers)):
        notes.append(
            f"{cut} of the {len(numbers)} captions are longer than the {encoder.tokenizer.context_length} tokens that "
            "the model reads; it sees their beginnings."
        )
    if encoder.device.type == "cuda":
        images, texts = images.to(encoder.device), texts.to(encoder.device)
    pairs = _Pairs.of(relevant, images.device)
    loss = _Loss(images, texts, pairs, float(encoder.network.logit_scale.detach().exp()))
    ranks = _Ranks(images, texts, pairs)
    _walk(images, texts, loss, ranks)
    return RetrievalResult(len(images), len(texts), *ranks.recalls(), loss.mean(), tuple(notes))


def retrieval_metrics(
    images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]]
) -> tuple[dict[str, float], dict[str, float]]:
    """(image to text, text to image), each {"r1", "r5", "r10", "median_rank"}; `relevant[i]` are picture i's texts.

    Features have rows of length 1. A query is right at k if one of its right answers is among the first k
    (the definition of CLIP_benchmark for several captions a picture). An answer's rank counts every wrong answer of at
    least its score before it: a tie is not a win, and the order of equal scores does not matter.
    """
    ranks = _Ranks(images_nd, texts_md, _Pairs.of(relevant, images_nd.device))
    _walk(images_nd, texts_md, ranks)
    return ranks.recalls()


def contrastive_loss(
    images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]], logit_scale: float
) -> float:
    """The symmetric InfoNCE of the whole set as one batch: each picture against all texts and each text against all
    pictures, the target spread evenly over what belongs together. `logit_scale` is the factor itself, such as 100.

    It does not depend on batches or order, so values of different steps compare. In float64.
    """
    loss = _Loss(images_nd, texts_md, _Pairs.of(relevant, images_nd.device), logit_scale)
    _walk(images_nd, texts_md, loss)
    return loss.mean()


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """What belongs together: picture `images[i]` and text `texts[i]`, int64 [p], in the order of the pictures."""

    images: Tensor
    texts: Tensor

    @classmethod
    def of(cls, relevant: Sequence[Sequence[int]], device: torch.device) -> _Pairs:
        counts = torch.tensor([len(texts) for texts in relevant], dtype=torch.int64)
        images = torch.arange(len(relevant)).repeat_interleave(counts)
        texts = torch.tensor([text for texts in relevant for text in texts], dtype=torch.int64)
        return cls(images.to(device), texts.to(device))

    def within(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Those in a block, counted from its corner."""
        first, last = torch.searchsorted(self.images, self.images.new_tensor([rows.start, rows.stop])).tolist()
        texts = self.texts[first:last]
        inside = (texts >= columns.start) & (texts < columns.stop)
        return self.images[first:last][inside] - rows.start, texts[inside] - columns.start


def _walk(images_nd: Tensor, texts_md: Tensor, *measures: _Loss | _Ranks) -> None:
    """Give each measure the similarity matrix, float64, block after block: a set of any size needs the same memory. A
    measure may write into its block, so the ranks, which do, come last."""
    for top in range(0, len(images_nd), _ROWS):
        rows = slice(top, min(top + _ROWS, len(images_nd)))
        images = images_nd[rows].double()
        for left in range(0, len(texts_md), _COLUMNS):
            columns = slice(left, min(left + _COLUMNS, len(texts_md)))
            scores = images @ texts_md[columns].double().T
            for measure in measures:
                measure.add(rows, columns, scores)


class _Ranks:
    """The rank of each picture's best text among all texts, and of each text's best picture."""

    def __init__(self, images_nd: Tensor, texts_md: Tensor, pairs: _Pairs):
        self.pairs = pairs
        right = _grid(_pair_scores(images_nd, texts_md, pairs))
        # What has no right answer is behind all that are wrong: whatever is finite is at least this.
        lowest = torch.finfo(torch.float64).min
        self.image_best = right.new_full((len(images_nd),), lowest).scatter_reduce(0, pairs.images, right, "amax")
        self.text_best = right.new_full((len(texts_md),), lowest).scatter_reduce(0, pairs.texts, right, "amax")
        self.of_images, self.of_texts = (
            torch.ones(len(features), dtype=torch.int64, device=right.device) for features in (images_nd, texts_md)
        )

    def add(self, rows: slice, columns: slice, scores: Tensor) -> None:
        wrong = _grid(scores).index_put_(self.pairs.within(rows, columns), scores.new_tensor(-math.inf))
        self.of_images[rows] += (wrong >= self.image_best[rows, None]).sum(1)
        self.of_texts[columns] += (wrong >= self.text_best[columns]).sum(0)

    def recalls(self) -> tuple[dict[str, float], dict[str, float]]:
        return _recalls(self.of_images), _recalls(self.of_texts)


class _Loss:
    """InfoNCE in both directions."""

    def __init__(self, images_nd: Tensor, texts_md: Tensor, pairs: _Pairs, logit_scale: float):
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


def _grid(scores: Tensor) -> Tensor:
    """Rounded in place, so that equal answers are equal whatever the order of the sums in their products was."""
    return scores.mul_(1e9).round_()


def _pair_scores(images_nd: Tensor, texts_md: Tensor, pairs: _Pairs) -> Tensor:
    """float64 [p]: the scores of what belongs together."""
    found = [images_nd.new_zeros(0, dtype=torch.float64)]
    for start in range(0, len(pairs.images), _COLUMNS):
        images, texts = (column[start : start + _COLUMNS] for column in (pairs.images, pairs.texts))
        found.append((images_nd[images].double() * texts_md[texts].double()).sum(1))
    return torch.cat(found)


def _mean_by(places: Tensor, values: Tensor, count: int) -> Tensor:
    sums = values.new_zeros(count).index_add_(0, places, values)
    return sums / torch.bincount(places, minlength=count)


def _recalls(ranks: Tensor) -> dict[str, float]:
    recalls = {f"r{k}": (ranks <= k).double().mean().item() for k in KS}
    return recalls | {"median_rank": float(ranks.double().quantile(0.5))}
