"""The shape of a model's embeddings: where pictures and texts lie, how far apart, and in how many directions.

Everything is computed in float64 and in chunks: sums, where a measure is one, so that 100,000 pictures fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..data.images.image_cache import ImageCache
from ..errors import UserError
from .class_names import with_named_classes
from .encoder import EncodedImages, Encoder, EncodingCache, encode_images, require_images

BINS = 400  # of the histograms of cosines, from -1 to 1
# What needs each pair of rows is measured on this many of them, drawn by a fixed seed, if there are more.
MOST_ROWS = 10_000
MOST_POINTS = 300  # of each kind on the map
_CHUNK = 1024
_SAMPLE_SEED = 0


class Embedded(NamedTuple):
    """One model's distinct pictures and texts: rows of length 1, `relevant[i]` the texts of picture i."""

    pictures: EncodedImages
    texts: Tensor
    relevant: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The two directions in which some features differ most, and the share of their variance along each."""

    centre: Tensor
    directions: Tensor
    shares: tuple[float, float]

    def project(self, features_nd: Tensor) -> list[tuple[float, float]]:
        return [tuple(row) for row in ((features_nd.double() - self.centre) @ self.directions.T).tolist()]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Numbers of one model on one data set.

    `matching` and `other`: mean cosine of a picture with its own texts, and with those of others. `separation`: how
    many standard deviations of the others lie between the two. `similarity`: mean cosine of two pictures, or texts.
    `effective_rank`: in how many directions they spread. `modality_gap`: the distance of the centres of pictures and
    texts. `uniformity` (lower is more even) and `alignment` (lower is nearer) are Wang and Isola's. Histograms count
    cosines in `BINS` equal bins from -1 to 1. Points are on `Axes`.
    """

    images: int
    texts: int
    matching: float
    other: float
    separation: float
    similarity_images: float
    similarity_texts: float
    effective_rank_images: float
    effective_rank_texts: float
    modality_gap: float
    uniformity_images: float
    uniformity_texts: float
    alignment: float
    histogram_matching: tuple[int, ...] = dataclasses.field(repr=False)
    histogram_other: tuple[int, ...] = dataclasses.field(repr=False)
    points_images: tuple[tuple[float, float], ...] = dataclasses.field(default=(), repr=False)
    points_texts: tuple[tuple[float, float], ...] = dataclasses.field(default=(), repr=False)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The numbers; points are for charts."""
        skipped = ("points_images", "points_texts", "notes")
        return {name: value for name, value in vars(self).items() if name not in skipped}


def eval_geometry(
    full_clip: FullCLIP,
    dataset: ClipDataset,
    *,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
    cache: ImageCache | None = None,
    features: EncodingCache | None = None,
) -> Geometry:
    """The geometry of one model on axes of its own. Raises `UserError` for a data set with fewer than two distinct
    pictures or texts."""
    require_images(dataset)
    encoder = Encoder.of(
        full_clip,
        device=device,
        on_progress=on_progress,
        check_cancelled=check_cancelled,
        cache=cache,
        features=features,
    )
    embedded = embed(encoder, dataset)
    return geometry_of(embedded, axes_of(embedded), check_cancelled=check_cancelled)


def embed(encoder: Encoder, dataset: ClipDataset) -> Embedded:
    """Encode each distinct picture and each distinct text once; a sample that has only a class is captioned by it.

    Raises `UserError` if there are fewer than two of either.
    """
    dataset, notes = with_named_classes(dataset)
    pictures = encode_images(encoder, dataset)
    numbers: dict[str, int] = {}
    relevant = []
    for samples in pictures.samples:
        texts = sorted({text for index in samples for text in dataset.training_captions(index)})
        relevant.append([numbers.setdefault(text, len(numbers)) for text in texts])
    if len(relevant) < 2 or len(numbers) < 2:
        raise UserError(
            f"{dataset.name} has {len(relevant)} distinct pictures and {len(numbers)} distinct texts that can be used; "
            "two of each are needed at least, and some hundred are better: choose a larger data set."
        )
    pictures = dataclasses.replace(pictures, notes=(*notes, *pictures.notes))
    return Embedded(pictures, encoder.texts(list(numbers)), relevant)


def axes_of(embedded: Embedded) -> Axes:
    """Axes fitted on a model's pictures and texts together."""
    return fit_axes(embedded.pictures.features, embedded.texts)


def geometry_of(embedded: Embedded, axes: Axes, *, check_cancelled: Callable[[], None] = lambda: None) -> Geometry:
    """The numbers of what was encoded, with points on `axes`, which may have been fitted on another model."""
    images, texts, relevant = embedded.pictures.features, embedded.texts, embedded.relevant
    matching, others = matching_cosines(images, texts, relevant), other_cosines(images, texts, relevant)
    notes = list(embedded.pictures.notes)
    if max(len(images), len(texts)) > MOST_ROWS:
        notes.append(
            f"Uniformity and the histogram of other pairs are those of {MOST_ROWS} pictures and texts, drawn from all."
        )
    check_cancelled()
    return Geometry(
        images=len(images),
        texts=len(texts),
        matching=matching.mean().item(),
        other=others.mean,
        separation=(matching.mean().item() - others.mean) / max(others.deviation, 1e-12),
        similarity_images=mean_similarity(images),
        similarity_texts=mean_similarity(texts),
        effective_rank_images=effective_rank(images),
        effective_rank_texts=effective_rank(texts),
        modality_gap=modality_gap(images, texts),
        uniformity_images=uniformity(_sample(images)[0], check_cancelled=check_cancelled),
        uniformity_texts=uniformity(_sample(texts)[0], check_cancelled=check_cancelled),
        alignment=alignment(images, texts, relevant),
        histogram_matching=_histogram(matching),
        histogram_other=histogram_of_others(images, texts, relevant, check_cancelled=check_cancelled),
        points_images=tuple(axes.project(_sample(images, MOST_POINTS)[0])),
        points_texts=tuple(axes.project(_sample(texts, MOST_POINTS)[0])),
        notes=tuple(notes),
    )


# ---- measures of one set of features ---------------------------------------------------------------------------------


def fit_axes(*parts: Tensor) -> Axes:
    """The first two principal components of all rows together, with the signs that scikit-learn gives them."""
    count = sum(len(part) for part in parts)
    centre = sum(chunk.sum(0) for part in parts for chunk in _chunks(part)) / count
    scatter = sum((chunk - centre).T @ (chunk - centre) for part in parts for chunk in _chunks(part))
    values, vectors = torch.linalg.eigh(scatter)  # from the smallest
    directions = vectors[:, -2:].flip(1).T.contiguous()
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    shares = (values.flip(0)[:2] / values.sum().clamp_min(1e-300)).tolist()
    return Axes(centre, directions * largest.sign(), (shares[0], shares[1]))


def mean_similarity(features_nd: Tensor) -> float:
    """The mean cosine of two different rows, by sums: (‖Σx‖² − Σ‖x‖²) / (n(n − 1))."""
    count = len(features_nd)
    total = sum(chunk.sum(0) for chunk in _chunks(features_nd))
    squares = sum(chunk.square().sum() for chunk in _chunks(features_nd))
    return ((total.square().sum() - squares) / (count * (count - 1))).item()


def effective_rank(features_nd: Tensor) -> float:
    """exp of the entropy of the singular values divided by their sum (Roy and Vetterli 2007, "The effective rank",
    EUSIPCO), of the features as they are, not centred; from 1 to min(n, d)."""
    triangle = torch.zeros(0, features_nd.shape[1], dtype=torch.float64)
    for chunk in _chunks(features_nd):  # R of a QR has the singular values of the whole, and is small
        triangle = torch.linalg.qr(torch.cat([triangle, chunk]), mode="r").R
    values = torch.linalg.svdvals(triangle)
    shares = values / values.sum()
    return math.exp(torch.special.entr(shares).sum().item())


def uniformity(features_nd: Tensor, *, check_cancelled: Callable[[], None] = lambda: None) -> float:
    """log of the mean of exp(−2‖x − y‖²) over pairs of different rows (Wang and Isola 2020, arXiv:2005.10242)."""
    everything, count, total = features_nd.double(), len(features_nd), 0.0
    squares = everything.square().sum(1)
    for start in range(0, count, _CHUNK):
        check_cancelled()
        rows = everything[start : start + _CHUNK]
        rest = everything[start:]  # each pair once
        distances = (rows.square().sum(1, keepdim=True) + squares[start:] - 2 * rows @ rest.T).clamp_min_(0)
        total += distances.mul_(-2).exp_().triu_(1).sum().item()
    return math.log(total / (count * (count - 1) / 2))


# ---- measures of pictures and texts ----------------------------------------------------------------------------------


def modality_gap(images_nd: Tensor, texts_md: Tensor) -> float:
    """The distance of the mean picture from the mean text (Liang et al. 2022, arXiv:2203.02053)."""
    centres = [sum(chunk.sum(0) for chunk in _chunks(part)) / len(part) for part in (images_nd, texts_md)]
    return (centres[0] - centres[1]).norm().item()


def alignment(images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]]) -> float:
    """The mean of ‖x − y‖² over matching pairs (Wang and Isola 2020, with α = 2)."""
    total = sum((x - y).square().sum().item() for x, y in _pairs(images_nd, texts_md, relevant))
    return total / sum(map(len, relevant))


def matching_cosines(images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]]) -> Tensor:
    """float64 [pairs]: the cosine of each picture with each of its texts."""
    return torch.cat([(x * y).sum(1) for x, y in _pairs(images_nd, texts_md, relevant)])


class Others(NamedTuple):
    """Of the cosines of pictures with texts that are not theirs."""

    mean: float
    deviation: float


def other_cosines(images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]]) -> Others:
    """By sums over all pairs less the matching ones: Σx·Σy, and ⟨XᵀX, YᵀY⟩ for the squares."""
    matching = matching_cosines(images_nd, texts_md, relevant)
    count = len(images_nd) * len(texts_md) - len(matching)
    if count == 0:
        return Others(0.0, 0.0)
    sums = [sum(chunk.sum(0) for chunk in _chunks(part)) for part in (images_nd, texts_md)]
    squares = [sum(chunk.T @ chunk for chunk in _chunks(part)) for part in (images_nd, texts_md)]
    mean = ((sums[0] @ sums[1]) - matching.sum()).item() / count
    square = ((squares[0] * squares[1]).sum() - matching.square().sum()).item() / count
    return Others(mean, math.sqrt(max(0.0, square - mean**2)))


def histogram_of_others(
    images_nd: Tensor,
    texts_md: Tensor,
    relevant: Sequence[Sequence[int]],
    *,
    check_cancelled: Callable[[], None] = lambda: None,
) -> tuple[int, ...]:
    """How many cosines of pairs that do not match are in each bin; of a sample, if there are very many."""
    images, rows = _sample(images_nd)
    texts, columns = _sample(texts_md)
    place = {text: number for number, text in enumerate(columns)}
    counts = torch.zeros(BINS, dtype=torch.int64)
    for start in range(0, len(images), _CHUNK):
        check_cancelled()
        cosines = images[start : start + _CHUNK].double() @ texts.double().T
        for row, image in enumerate(rows[start : start + _CHUNK]):
            cosines[row, [place[text] for text in relevant[image] if text in place]] = math.nan
        counts += torch.tensor(_histogram(cosines[~cosines.isnan()]))
    return tuple(counts.tolist())


def _histogram(cosines: Tensor) -> tuple[int, ...]:
    bins = ((cosines + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    return tuple(torch.bincount(bins.flatten(), minlength=BINS).tolist())


def _pairs(images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of matching rows, float64."""
    pairs = [(image, text) for image, texts in enumerate(relevant) for text in texts]
    for start in range(0, len(pairs), _CHUNK):
        rows, columns = zip(*pairs[start : start + _CHUNK], strict=True)
        yield images_nd[list(rows)].double(), texts_md[list(columns)].double()


def _chunks(features_nd: Tensor) -> Iterator[Tensor]:
    for start in range(0, len(features_nd), _CHUNK):
        yield features_nd[start : start + _CHUNK].double()


def _sample(features_nd: Tensor, most: int | None = None) -> tuple[Tensor, list[int]]:
    """At most so many rows, and which: all in order, or some that only their number decides."""
    most, count = most or MOST_ROWS, len(features_nd)
    if count <= most:
        return features_nd, list(range(count))
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(_SAMPLE_SEED))[:most].sort().values
    return features_nd[chosen], chosen.tolist()
