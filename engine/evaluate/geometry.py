"""The shape of a model's embeddings: where images and texts lie, how far apart, and in how many directions.

Everything is computed in float64 and in chunks, by sums where possible, so that 100,000 images fit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..errors import UserError
from .class_names import with_named_classes
from .encoder import EncodedImages, Encoder, Runtime, encode_images, never_cancelled, require_images
from .retrieval import relevant_captions

BINS = 400  # of the histograms of cosines, from -1 to 1
# Measures that need every pair of rows use this many rows, drawn with a fixed seed, if there are more.
MAX_ROWS = 10_000
MAX_POINTS = 300  # of images and of texts on the map
_CHUNK = 1024
_SAMPLE_SEED = 0


class Embedded(NamedTuple):
    """One model's distinct images and texts: unit rows; `relevant[i]` are the texts of image i."""

    images: EncodedImages
    texts: Tensor
    relevant: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The two directions in which some features differ most, and the share of their variance along each."""

    centre: Tensor
    directions: Tensor
    shares: tuple[float, float]

    def project(self, features_nd: Tensor) -> tuple[tuple[float, float], ...]:
        return tuple((x, y) for x, y in ((features_nd.double() - self.centre) @ self.directions.T).tolist())


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Numbers of one model on one dataset.

    `matching` and `other`: mean cosine of an image with its own texts, and with other texts. `separation`: the
    difference of the two in standard deviations of the others. `similarity`: mean cosine of two images, or two texts.
    `effective_rank`: in how many directions they spread. `modality_gap`: the distance between the mean image and the
    mean text. `uniformity` (lower: more even) and `alignment` (lower: nearer) are Wang and Isola's. Histograms count
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


def eval_geometry(full_clip: FullCLIP, dataset: ClipDataset, **runtime: Unpack[Runtime]) -> Geometry:
    """Measure one model, on axes of its own; raises `UserError` for fewer than two distinct images or texts."""
    require_images(dataset)
    encoder = Encoder.of(full_clip, **runtime)
    embedded = embed(encoder, dataset)
    return geometry_of(embedded, axes_of(embedded), check_cancelled=encoder.host.check_cancelled)


def embed(encoder: Encoder, dataset: ClipDataset) -> Embedded:
    """Encode each distinct image and text once; a sample that has only a class is captioned by it.

    Raises `UserError` if there are fewer than two of either.
    """
    dataset, notes = with_named_classes(dataset)
    images = encode_images(encoder, dataset)
    captions, relevant = relevant_captions(dataset, images)
    if len(relevant) < 2 or len(captions) < 2:
        raise UserError(
            f"{dataset.name} has {len(relevant)} distinct images and {len(captions)} distinct texts that can be used; "
            "at least two of each are needed, and a few hundred are better. Choose a larger dataset."
        )
    images = dataclasses.replace(images, notes=(*notes, *images.notes))
    return Embedded(images, encoder.encode_texts(captions), relevant)


def axes_of(embedded: Embedded) -> Axes:
    """Fit axes on a model's images and texts together."""
    return fit_axes(embedded.images.features, embedded.texts)


def geometry_of(embedded: Embedded, axes: Axes, *, check_cancelled: Callable[[], None] = never_cancelled) -> Geometry:
    """Return the numbers of what was encoded, with points on `axes`, which may have been fitted on another model."""
    images, texts, relevant = embedded.images.features, embedded.texts, embedded.relevant
    matching = matching_cosines(images, texts, relevant)
    other, deviation = other_cosines(images, texts, relevant)
    notes = list(embedded.images.notes)
    if max(len(images), len(texts)) > MAX_ROWS:
        notes.append(
            f"Uniformity and the histogram of other pairs are those of {MAX_ROWS} images and texts, drawn at random."
        )
    check_cancelled()
    return Geometry(
        images=len(images),
        texts=len(texts),
        matching=matching.mean().item(),
        other=other,
        separation=(matching.mean().item() - other) / max(deviation, 1e-12),
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
        points_images=axes.project(_sample(images, MAX_POINTS)[0]),
        points_texts=axes.project(_sample(texts, MAX_POINTS)[0]),
        notes=tuple(notes),
    )


# ---- measures of one set of features ---------------------------------------------------------------------------------


def fit_axes(*groups: Tensor) -> Axes:
    """Return the first two principal components of all rows together, with the signs that scikit-learn gives them."""
    centre = _row_sum(*groups) / sum(map(len, groups))
    width = len(centre)
    scatter = torch.zeros(width, width, dtype=torch.float64)
    for chunk in _chunks(*groups):
        scatter += (chunk - centre).T @ (chunk - centre)
    values, vectors = torch.linalg.eigh(scatter)  # in ascending order
    directions = vectors[:, -2:].flip(1).T.contiguous()
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    shares = (values.flip(0)[:2] / values.sum().clamp_min(1e-300)).tolist()
    return Axes(centre, directions * largest.sign(), (shares[0], shares[1]))


def mean_similarity(features_nd: Tensor) -> float:
    """Return the mean cosine of two different rows, by sums: (‖Σx‖² − Σ‖x‖²) / (n(n − 1))."""
    count = len(features_nd)
    squares = sum(chunk.square().sum().item() for chunk in _chunks(features_nd))
    return (_row_sum(features_nd).square().sum().item() - squares) / (count * (count - 1))


def effective_rank(features_nd: Tensor) -> float:
    """Return exp of the entropy of the singular values divided by their sum; from 1 to min(n, d).

    Roy and Vetterli 2007, "The effective rank", EUSIPCO. The features are not centred.
    """
    triangle = torch.zeros(0, features_nd.shape[1], dtype=torch.float64)
    for chunk in _chunks(features_nd):  # R of a QR decomposition is small and has the singular values of the whole
        triangle = torch.linalg.qr(torch.cat([triangle, chunk]), mode="r").R
    values = torch.linalg.svdvals(triangle)
    shares = values / values.sum()
    return math.exp(torch.special.entr(shares).sum().item())


def uniformity(features_nd: Tensor, *, check_cancelled: Callable[[], None] = never_cancelled) -> float:
    """Return log of the mean of exp(−2‖x − y‖²) over pairs of rows (Wang and Isola 2020, arXiv:2005.10242)."""
    features, count, total = features_nd.double(), len(features_nd), 0.0
    squares = features.square().sum(1)
    for start in range(0, count, _CHUNK):
        check_cancelled()
        rows = features[start : start + _CHUNK]
        rest = features[start:]  # each pair once
        distances = (rows.square().sum(1, keepdim=True) + squares[start:] - 2 * rows @ rest.T).clamp_min_(0)
        total += distances.mul_(-2).exp_().triu_(1).sum().item()
    return math.log(total / (count * (count - 1) / 2))


# ---- measures of images and texts ------------------------------------------------------------------------------------


def modality_gap(images_nd: Tensor, texts_md: Tensor) -> float:
    """Return the distance of the mean image from the mean text (Liang et al. 2022, arXiv:2203.02053)."""
    centres = [_row_sum(group) / len(group) for group in (images_nd, texts_md)]
    return (centres[0] - centres[1]).norm().item()


def alignment(images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]]) -> float:
    """Return the mean of ‖x − y‖² over matching pairs (Wang and Isola 2020, with α = 2)."""
    total = sum((x - y).square().sum().item() for x, y in _pairs(images_nd, texts_md, relevant))
    return total / sum(map(len, relevant))


def matching_cosines(images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]]) -> Tensor:
    """Return float64 [pairs]: the cosine of each image with each of its texts."""
    return torch.cat([(x * y).sum(1) for x, y in _pairs(images_nd, texts_md, relevant)])


def other_cosines(images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return mean and deviation of the cosines of images with texts that are not theirs.

    By sums over all pairs, less the matching ones: Σx·Σy, and ⟨XᵀX, YᵀY⟩ for the squares.
    """
    matching = matching_cosines(images_nd, texts_md, relevant)
    count = len(images_nd) * len(texts_md) - len(matching)
    if count == 0:
        return 0.0, 0.0
    products = (_gram(images_nd) * _gram(texts_md)).sum()
    mean = ((_row_sum(images_nd) @ _row_sum(texts_md)) - matching.sum()).item() / count
    square = (products - matching.square().sum()).item() / count
    return mean, math.sqrt(max(0.0, square - mean**2))


def histogram_of_others(
    images_nd: Tensor,
    texts_md: Tensor,
    relevant: Sequence[Sequence[int]],
    *,
    check_cancelled: Callable[[], None] = never_cancelled,
) -> tuple[int, ...]:
    """Count the cosines of pairs that do not match, by bin; of a sample, if there are very many."""
    images, rows = _sample(images_nd)
    texts, columns = _sample(texts_md)
    column_of = {text: column for column, text in enumerate(columns)}
    counts = torch.zeros(BINS, dtype=torch.int64)
    for start in range(0, len(images), _CHUNK):
        check_cancelled()
        cosines = images[start : start + _CHUNK].double() @ texts.double().T
        for row, image in enumerate(rows[start : start + _CHUNK]):
            cosines[row, [column_of[text] for text in relevant[image] if text in column_of]] = math.nan
        counts += torch.tensor(_histogram(cosines[~cosines.isnan()]))
    return tuple(counts.tolist())


def _histogram(cosines: Tensor) -> tuple[int, ...]:
    bins = ((cosines + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    return tuple(torch.bincount(bins.flatten(), minlength=BINS).tolist())


def _pairs(images_nd: Tensor, texts_md: Tensor, relevant: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of matching rows, float64."""
    pairs = [(image, text) for image, texts in enumerate(relevant) for text in texts]
    for start in range(0, len(pairs), _CHUNK):
        rows, columns = zip(*pairs[start : start + _CHUNK], strict=True)
        yield images_nd[list(rows)].double(), texts_md[list(columns)].double()


def _chunks(*groups: Tensor) -> Iterator[Tensor]:
    for features_nd in groups:
        for start in range(0, len(features_nd), _CHUNK):
            yield features_nd[start : start + _CHUNK].double()


def _row_sum(*groups: Tensor) -> Tensor:
    total = torch.zeros(groups[0].shape[1], dtype=torch.float64)
    for chunk in _chunks(*groups):
        total += chunk.sum(0)
    return total


def _gram(features_nd: Tensor) -> Tensor:
    """Return XᵀX."""
    total = torch.zeros(features_nd.shape[1], features_nd.shape[1], dtype=torch.float64)
    for chunk in _chunks(features_nd):
        total += chunk.T @ chunk
    return total


def _sample(features_nd: Tensor, limit: int | None = None) -> tuple[Tensor, list[int]]:
    """Return at most `limit` rows and their indices: all of them, or a draw that depends on their number alone."""
    limit, count = limit or MAX_ROWS, len(features_nd)
    if count <= limit:
        return features_nd, list(range(count))
    rng = torch.Generator().manual_seed(_SAMPLE_SEED)
    chosen = torch.randperm(count, generator=rng)[:limit].sort().values
    return features_nd[chosen], chosen.tolist()
