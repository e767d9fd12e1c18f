"""Geometry of embeddings against scikit-learn and plain numpy."""

import json
import math

import numpy
import pytest
import torch
from clips import gigabytes_above
from torch.nn import functional as F

from clip_finetune.engine.evaluate import encoder as encoder_module
from clip_finetune.engine.evaluate import geometry

PAIRS = [list(range(3 * image, 3 * image + 3)) for image in range(60)]  # three texts an image


def unit(*shape, seed=0):
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(noise + 0.7, dim=1)  # off the centre, as CLIP's are


@pytest.fixture(scope="module")
def clouds():
    return unit(60, 16), unit(180, 16, seed=1)


def test_axes_are_those_of_scikit_learns_pca(clouds):
    from sklearn.decomposition import PCA

    images, texts = clouds
    theirs = PCA(2, svd_solver="full").fit(torch.cat(clouds).double().numpy())
    axes = geometry.fit_axes(images, texts)
    numpy.testing.assert_allclose(axes.shares, theirs.explained_variance_ratio_, atol=1e-6)
    other = unit(30, 16, seed=2)  # another model's, on the same axes
    for part in (images, texts, other):
        numpy.testing.assert_allclose(axes.project(part), theirs.transform(part.double().numpy()), atol=1e-6)


def plain_numbers(images, texts):
    """Every measure by its definition, over explicit lists of pairs, in numpy float64."""
    images, texts = images.double().numpy(), texts.double().numpy()

    def pairs_within(rows):
        return [(x, y) for number, x in enumerate(rows) for y in rows[:number]]

    def uniformity(rows):
        return math.log(numpy.mean([math.exp(-2 * ((x - y) ** 2).sum()) for x, y in pairs_within(rows)]))

    def effective_rank(rows):
        values = numpy.linalg.svd(rows, compute_uv=False)
        shares = values / values.sum()
        return math.exp(-(shares * numpy.log(shares)).sum())

    matching = [images[row] @ texts[column] for row, columns in enumerate(PAIRS) for column in columns]
    others = [images[row] @ texts[column] for row in range(60) for column in range(180) if column not in PAIRS[row]]
    return {
        "matching": numpy.mean(matching),
        "other": numpy.mean(others),
        "separation": (numpy.mean(matching) - numpy.mean(others)) / numpy.std(others),
        "similarity_images": numpy.mean([x @ y for x, y in pairs_within(images)]),
        "similarity_texts": numpy.mean([x @ y for x, y in pairs_within(texts)]),
        "effective_rank_images": effective_rank(images),
        "effective_rank_texts": effective_rank(texts),
        "modality_gap": numpy.linalg.norm(images.mean(0) - texts.mean(0)),
        "uniformity_images": uniformity(images),
        "uniformity_texts": uniformity(texts),
        "alignment": numpy.mean(
            [((images[row] - texts[column]) ** 2).sum() for row, columns in enumerate(PAIRS) for column in columns]
        ),
        "histogram_matching": numpy.histogram(matching, geometry.BINS, (-1, 1))[0].tolist(),
        "histogram_other": numpy.histogram(others, geometry.BINS, (-1, 1))[0].tolist(),
    }


@pytest.mark.parametrize("chunk", [7, 1024])
def test_measures_are_their_definitions_in_numpy_whatever_the_chunks(clouds, monkeypatch, chunk):
    monkeypatch.setattr(geometry, "_CHUNK", chunk)
    images, texts = clouds
    pictures = encoder_module.EncodedImages(images, [[row] for row in range(60)], ())
    found = geometry.geometry_of(geometry.Embedded(pictures, texts, PAIRS), geometry.fit_axes(images, texts))
    for name, expected in plain_numbers(images, texts).items():
        assert getattr(found, name) == (
            tuple(expected) if isinstance(expected, list) else pytest.approx(expected, abs=1e-6)
        ), name
    assert found.images == 60 and found.texts == 180 and not found.notes
    json.dumps(found.as_dict(), allow_nan=False)


def test_the_effective_rank_of_known_spectra():
    assert geometry.effective_rank(torch.eye(8)) == pytest.approx(8)
    assert geometry.effective_rank(torch.ones(8, 8)) == pytest.approx(1)
    # Fewer rows than columns: the many zeros must not add up.
    assert geometry.effective_rank(torch.eye(4, 768)) == pytest.approx(4, abs=1e-6)


def test_a_large_set_is_sampled_where_each_pair_counts_and_says_so(clouds, monkeypatch):
    images, texts = clouds
    pictures = encoder_module.EncodedImages(images, [[row] for row in range(60)], ("a note",))
    embedded = geometry.Embedded(pictures, texts, PAIRS)
    whole = geometry.geometry_of(embedded, geometry.axes_of(embedded))
    monkeypatch.setattr(geometry, "MAX_ROWS", 50)
    part = geometry.geometry_of(embedded, geometry.axes_of(embedded))
    by_sums = ("matching", "other", "separation", "similarity_texts", "effective_rank_texts", "alignment")
    assert all(getattr(part, name) == getattr(whole, name) for name in by_sums)
    assert part.uniformity_texts == pytest.approx(whole.uniformity_texts, abs=0.2)
    assert part.uniformity_texts != whole.uniformity_texts
    assert 50 * 50 - 150 <= sum(part.histogram_other) <= 50 * 50
    assert part.notes[0] == "a note" and "50 images and texts" in part.notes[1]


@pytest.mark.soak
def test_the_geometry_of_100_000_images_fits_in_memory():
    images, texts = unit(100_000, 768), unit(100_000, 768, seed=1)
    pictures = encoder_module.EncodedImages(images, [[row] for row in range(100_000)], ())
    embedded = geometry.Embedded(pictures, texts, [[row] for row in range(100_000)])
    with gigabytes_above() as grown:
        found = geometry.geometry_of(embedded, geometry.axes_of(embedded))
    assert found.images == 100_000 and grown[0] < 1, grown
