"""The temperature at which a model's scores are honest: of the answers given with 70 %, seven in ten are right.

Temperature scaling of Guo et al. 2017, arXiv:1706.04599.
"""

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
from .class_names import scored_by_classes, with_classes, with_named_classes
from .encoder import EncodedImages, Encoder, EncodingCache, encode_images, require_images
from .zero_shot import class_features, sentences_of

BINS = 15
LOWEST, HIGHEST = 0.01, 1000.0  # scales that are looked at; CLIP's own is 100 at most
# More pictures change the result little; of captions each picture sees all, so fewer of them do.
_MOST_LABELLED, _MOST_PAIRS = 10_000, 2000


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The factor that scores are multiplied by, as stored and as this data set wants it (least cross-entropy), with the
    expected calibration error (0 to 1) of each. `answers` is how many each picture had to choose from: the best factor
    depends on it."""

    images: int
    answers: int
    stored: float
    best: float
    ece_stored: float
    ece_best: float
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "notes"}


def calibrate_logit_scale(
    full_clip: FullCLIP,
    dataset: ClipDataset,
    *,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
    cache: ImageCache | None = None,
    features: EncodingCache | None = None,
) -> Calibration:
    """The best `exp(logit_scale)` for a data set: over its classes if all of it has some, else over its captions, the
    first one of each picture. Raises `UserError` if there are not two answers at least."""
    require_images(dataset)
    encoder = Encoder.of(
        full_clip,
        device=device,
        on_progress=on_progress,
        check_cancelled=check_cancelled,
        cache=cache,
        features=features,
    )
    return calibration_of(encoder, dataset, encode_images(encoder, dataset))


def calibration_of(encoder: Encoder, dataset: ClipDataset, pictures: EncodedImages) -> Calibration:
    """The same with a network that is already there and its pictures."""
    labelled = scored_by_classes(dataset)
    dataset, told = with_classes(dataset) if labelled else with_named_classes(dataset)
    rows, right, texts = _classes(dataset, pictures) if labelled else _captions(dataset, pictures)
    if len(rows) < 2 or len(texts) < 2:
        raise UserError(f"{dataset.name} has too few pictures with different texts to calibrate on; take more.")
    answers = class_features(encoder, texts, sentences_of("simple")) if labelled else encoder.texts(texts)
    cosines = pictures.features[rows].double() @ answers.double().T
    stored = encoder.network.logit_scale.detach().double().exp().item()
    best = best_scale(cosines, right)
    notes = [*told]
    if best in (LOWEST, HIGHEST):
        notes.append("The best temperature lies beyond all bounds: there are too few pictures to tell it.")
    return Calibration(
        len(rows),
        len(answers),
        stored,
        best,
        calibration_error(cosines * stored, right),
        calibration_error(cosines * best, right),
        tuple(notes),
    )


def _classes(dataset: ClipDataset, pictures: EncodedImages) -> tuple[list[int], Tensor, Sequence[str]]:
    """Rows of pictures that have a class, right answers bool [rows, classes], and the classes."""
    labels = [sorted({dataset.labels[index] for index in samples} - {None}) for samples in pictures.samples]
    rows = _spread([row for row, found in enumerate(labels) if found], _MOST_LABELLED)
    right = torch.zeros(len(rows), len(dataset.class_names), dtype=torch.bool)
    for number, row in enumerate(rows):
        right[number, labels[row]] = True
    return rows, right, dataset.class_names


def _captions(dataset: ClipDataset, pictures: EncodedImages) -> tuple[list[int], Tensor, list[str]]:
    """Rows, right answers, and the distinct first captions."""
    rows = _spread(list(range(len(pictures.samples))), _MOST_PAIRS)
    firsts = [dataset.training_captions(pictures.samples[row][0])[0] for row in rows]
    captions = list(dict.fromkeys(firsts))
    return rows, torch.tensor([[first == caption for caption in captions] for first in firsts]), captions


def _spread(rows: Sequence[int], most: int) -> list[int]:
    """At most so many, evenly spread."""
    step = max(1.0, len(rows) / most)
    return [rows[int(place * step)] for place in range(min(len(rows), most))]


def best_scale(cosines_nc: Tensor, right_nc: Tensor) -> float:
    """The scale with the least mean cross-entropy, the target spread evenly over right answers.

    It is convex in the scale, so its slope, E[cosine] under the softmax less that of the right answers, is bisected.
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
    """The expected calibration error: over 15 equal bins of confidence, the mean gap between confidence and accuracy,
    weighted by the bins' pictures. Of equal scores a wrong one is the answer."""
    shares = logits_nc.double().softmax(1)
    confidence = shares.amax(1)
    won = ~((shares == confidence[:, None]) & ~right_nc).any(1)
    bins = (confidence * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)  # (a, b], as Guo et al. cut them
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, won.double() - confidence)
    return (gaps.abs().sum() / len(shares)).item()
