"""Confidence intervals: how far a measured share may be off because of which images were in the dataset."""

from __future__ import annotations

from torch import Tensor

_DRAWS, _SEED, _LEVEL = 10_000, 0, 0.95


def bootstrap_interval(values_n: Tensor, *, seed: int = _SEED) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of `values_n` [n] (Efron 1979).

    Deterministic, whatever the order of the values. Equal values are drawn together: how often each distinct value
    comes in a draw of n is multinomial, so the cost does not grow with n. That equals drawing n values with
    replacement 10,000 times.
    """
    import numpy

    distinct, counts = values_n.double().unique(return_counts=True)
    total = int(counts.sum())
    rng = numpy.random.default_rng(seed)
    draws = rng.multinomial(total, (counts.double() / total).numpy(), size=_DRAWS)
    means = draws @ distinct.numpy() / total
    tail = (1 - _LEVEL) / 2
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def difference_interval(model_n: Tensor, baseline_n: Tensor) -> tuple[float, float]:
    """Return the interval of the model's mean minus the baseline's, both of the same images in the same order."""
    return bootstrap_interval(model_n.double() - baseline_n.double())
