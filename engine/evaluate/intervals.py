"""How far a measured share may be off by the luck of which pictures were at hand."""

from __future__ import annotations

from torch import Tensor

_DRAWS, _SEED, _LEVEL = 10_000, 0, 0.95


def bootstrap_interval(values_n: Tensor, *, seed: int = _SEED) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of `values_n` [n] (Efron 1979), always the same for the same
    values, in whatever order.

    Values that are equal are drawn together: how often each distinct one comes in a draw of n is multinomial, so the
    cost does not grow with n. That is the same as drawing n values with replacement, 10,000 times.
    """
    import numpy

    distinct, counts = values_n.double().unique(return_counts=True)
    total = int(counts.sum())
    chance = numpy.random.default_rng(seed)
    drawn = chance.multinomial(total, (counts.double() / total).numpy(), size=_DRAWS)
    means = drawn @ distinct.numpy() / total
    tail = (1 - _LEVEL) / 2
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def difference_interval(model_n: Tensor, baseline_n: Tensor) -> tuple[float, float]:
    """The interval of how much the mean of the one is above that of the other, both of the same pictures in the same
    order."""
    return bootstrap_interval(model_n.double() - baseline_n.double())
