"""Retrieval: does a picture find its captions among all captions, and a caption its picture among all pictures?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..clip.full_clip import FullCLIP
from ..data.cache import PictureCache
from ..data.dataset import ClipDataset
from ..errors import UserError
from .features import Encoder, encode_pictures, require_pictures

KS = (1, 5, 10)
_CHUNK = 1024  # rows of the similarity matrix that are in memory at once


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
    cache: PictureCache | None = None,
) -> RetrievalResult:
    """Retrieval over a captioned data set; raises `UserError` for one without captions."""
    require_pictures(dataset)
    if not dataset.has_captions:
        raise UserError(
            f"{dataset.name} has class folders but no captions, so retrieval cannot be measured on it; measure "
            "zero-shot accuracy instead."
        )
    encoder = Encoder.of(
        full_clip, device=device, on_progress=on_progress, check_cancelled=check_cancelled, cache=cache
    )
    return retrieval_of(encoder, dataset)


def retrieval_of(encoder: Encoder, dataset: ClipDataset) -> RetrievalResult:
    """Retrieval with a network that is already there; a sample that has only a class is captioned by it.

    A caption that several pictures have is one text, and right for each of them; a picture that is there twice is one
    picture with the captions of both.
    """
    pictures = encode_pictures(encoder, dataset)
    numbers: dict[str, int] = {}
    relevant = []
    for samples in pictures.samples:
        texts = {text for index in samples for text in dataset.training_captions(index)}
        relevant.append(sorted(numbers.setdefault(text, len(numbers)) for text in sorted(texts)))
    texts = encoder.texts(list(numbers))
    i2t, t2i = retrieval_metrics(pictures.features, texts, relevant)
    scale = float(encoder.network.logit_scale.detach().exp())
    loss = contrastive_loss(pictures.features, texts, relevant, scale)
    return RetrievalResult(len(pictures.features), len(texts), i2t, t2i, loss, pictures.notes)


def retrieval_metrics(
    images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]]
) -> tuple[dict[str, float], dict[str, float]]:
    """(image to text, text to image), each {"r1", "r5", "r10", "median_rank"}; `relevant[i]` are picture i's texts.

    Features have rows of length 1. A query is right at k if one of its right answers is among the first k
    (the definition of CLIP_benchmark for several captions a picture). An answer's rank counts every wrong answer of at
    least its score before it: a tie is not a win, and the order of equal scores does not matter.
    """
    to_text = _ranks(images_nd, texts_md, relevant)
    to_image = _ranks(texts_md, images_nd, _turned(relevant, len(texts_md)))
    return _recalls(to_text), _recalls(to_image)


def contrastive_loss(
    images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]], logit_scale: float
) -> float:
    """The symmetric InfoNCE of the whole set as one batch: each picture against all texts and each text against all
    pictures, the target spread evenly over what belongs together. `logit_scale` is the factor itself, such as 100.

    It does not depend on batches or order, so values of different steps compare. Accumulated in float64.
    """
    to_text = _cross_entropy(images_nd, texts_md, relevant, logit_scale)
    to_image = _cross_entropy(texts_md, images_nd, _turned(relevant, len(texts_md)), logit_scale)
    return (to_text + to_image) / 2


def _turned(relevant: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    turned: list[list[int]] = [[] for _ in range(count)]
    for image, texts in enumerate(relevant):
        for text in texts:
            turned[text].append(image)
    return turned


def _rows(queries: Tensor, answers: Tensor, right: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(scores [c, m], right answers bool [c, m]) of chunk after chunk of the queries."""
    for start in range(0, len(queries), _CHUNK):
        scores = queries[start : start + _CHUNK].double() @ answers.double().T
        mask = torch.zeros(scores.shape, dtype=torch.bool)
        for row, columns in enumerate(right[start : start + _CHUNK]):
            mask[row, list(columns)] = True
        yield scores, mask


def _ranks(queries: Tensor, answers: Tensor, right: Sequence[Sequence[int]]) -> Tensor:
    ranks = []
    for scores, mask in _rows(queries, answers, right):
        # Rounded, so that equal answers are equal whatever the order of the sums in their products was.
        scores = scores.mul(1e9).round()
        best = scores.masked_fill(~mask, -math.inf).amax(1, keepdim=True)
        ranks.append(1 + ((scores >= best) & ~mask).sum(1))
    return torch.cat(ranks)


def _recalls(ranks: Tensor) -> dict[str, float]:
    recalls = {f"r{k}": (ranks <= k).double().mean().item() for k in KS}
    return recalls | {"median_rank": float(ranks.double().quantile(0.5))}


def _cross_entropy(queries: Tensor, answers: Tensor, right: Sequence[Sequence[int]], logit_scale: float) -> float:
    total = 0.0
    for scores, mask in _rows(queries, answers, right):
        log_shares = (scores * logit_scale).log_softmax(1)
        total -= ((log_shares * mask).sum(1) / mask.sum(1)).sum().item()
    return total / len(queries)
