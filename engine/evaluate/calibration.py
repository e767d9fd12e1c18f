"""Calibration: the temperature at which a model's confidence equals its accuracy (answers at 70 % are right in 70 %).

Temperature scaling of Guo et al. 2017, arXiv:1706.04599.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..errors import UserError
from .class_names import scored_by_classes, with_classes, with_named_classes
from .encoder import EncodedImages, Encoder, Runtime, encode_images, require_images
from .zero_shot import class_features, labels_of, right_classes, sentences_of

BINS = 15
LOWEST, HIGHEST = 0.01, 1000.0  # the range of scales that is searched; CLIP's own is at most 100
# More images change the result little. Each image is compared with all captions, so there are fewer of those.
_MAX_LABELLED, _MAX_PAIRS = 10_000, 2000


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The factor that scores are multiplied by, as stored and as best for this dataset (least cross-entropy).

    `ece_…` is the expected calibration error (0 to 1) with each. `answers` is the number of answers that each image
    had to choose from; the best factor depends on it.
    """

    images: int
    answers: int
    stored: float
    best: float
    ece_stored: float
    ece_best: float
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "notes"}


def calibrate_logit_scale(full_clip: FullCLIP, dataset: ClipDataset, **runtime: Unpack[Runtime]) -> Calibration:
    """Find the best `exp(logit_scale)` for a dataset, over its classes if all samples have one, else its captions.

    Of captions the first of each image counts. Raises `UserError` if there are fewer than two answers.
    """
    require_images(dataset)
    encoder = Encoder.of(full_clip, **runtime)
    return calibration_of(encoder, dataset, encode_images(encoder, dataset))


def calibration_of(encoder: Encoder, dataset: ClipDataset, images: EncodedImages) -> Calibration:
    """As `calibrate_logit_scale`, with a network that is already built and its encoded images."""
    labelled = scored_by_classes(dataset)
    dataset, notes = with_classes(dataset) if labelled else with_named_classes(dataset)
    rows, right, texts = _classes(dataset, images) if labelled else _captions(dataset, images)
    if len(rows) < 2 or len(texts) < 2:
        raise UserError(f"{dataset.name} has too few images with different texts to calibrate on; add more.")
    answers = class_features(encoder, texts, sentences_of("simple")) if labelled else encoder.encode_texts(texts)
    cosines = images.features[rows].double() @ answers.double().T
    stored, best = encoder.logit_scale, best_scale(cosines, right)
    if best in (LOWEST, HIGHEST):
        notes = (*notes, "The best temperature is out of range: there are too few images to determine it.")
    return Calibration(
        images=len(rows),
        answers=len(answers),
        stored=stored,
        best=best,
        ece_stored=calibration_error(cosines * stored, right),
        ece_best=calibration_error(cosines * best, right),
        notes=notes,
    )


def _classes(dataset: ClipDataset, images: EncodedImages) -> tuple[list[int], Tensor, Sequence[str]]:
    """Return the rows of images that have a class, their right answers bool [rows, classes], and the classes."""
    labelled = [row for row, samples in enumerate(images.samples) if labels_of(dataset, samples)]
    rows = _spread(labelled, _MAX_LABELLED)
    return rows, right_classes(dataset, [images.samples[row] for row in rows]), dataset.class_names


def _captions(dataset: ClipDataset, images: EncodedImages) -> tuple[list[int], Tensor, Sequence[str]]:
    """Return rows, their right answers, and the distinct first captions."""
    rows = _spread(range(len(images.samples)), _MAX_PAIRS)
    firsts = [dataset.training_captions(images.samples[row][0])[0] for row in rows]
    captions = list(dict.fromkeys(firsts))
    return rows, torch.tensor([[first == caption for caption in captions] for first in firsts]), captions


def _spread(rows: Sequence[int], limit: int) -> list[int]:
    """Return at most `limit` rows, evenly spread."""
    step = max(1.0, len(rows) / limit)
    return [rows[int(number * step)] for number in range(min(len(rows), limit))]


def best_scale(cosines_nc: Tensor, right_nc: Tensor) -> float:
    """Return the scale with the least mean cross-entropy, the target spread evenly over right answers.

    The loss is convex in the scale, so its slope (the expected cosine under the softmax, less the mean cosine of the
    right answers) is bisected.
    """
    cosines = cosines_nc.double()
    target = ((cosines * right_nc).sum(1) / right_nc.sum(1)).mean()
    low, high = math.log(LOWEST), math.log(HIGHEST)

    def slope(log_scale: float) -> float:
        return (((cosines * math.exp(log_scale)).softmax(1) * cosines).sum(1).mean() - target).item()

    if slope(low) >= 0:
        return LOWEST
    if slope(high) <= 0:
        return HIGHEST
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp((low + high) / 2)


def calibration_error(logits_nc: Tensor, right_nc: Tensor) -> float:
    """Return the expected calibration error.

    That is the mean gap between confidence and accuracy over 15 equal bins of confidence, weighted by the number of
    images in each. Among equal scores a wrong answer counts as the model's.
    """
    shares = logits_nc.double().softmax(1)
    confidence = shares.amax(1)
    won = ~((shares == confidence[:, None]) & ~right_nc).any(1)
    bins = (confidence * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)  # (a, b], as Guo et al. cut them
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, won.double() - confidence)
    return (gaps.abs().sum() / len(shares)).item()
