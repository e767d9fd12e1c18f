"""Learning-rate schedules as pure functions of the optimizer step; each gives a factor of the group's peak rate.

`step` is 0-based, of `total_steps`; `warmup` is the share of the steps in which the rate rises, `floor` the factor of
the last step. Being factors, they keep the ratios between groups; none touches the betas.
"""

from __future__ import annotations

import math
from collections.abc import Callable

START = 1 / 25


def one_cycle(step: int, total_steps: int, warmup: float, floor: float = 0.01) -> float:
    """Up from 1/25 to 1, then down to the floor, both slopes half cosines.

    torch's OneCycleLR (Smith and Topin 2017, arXiv:1708.07120) with `div_factor=25`, `final_div_factor=1/(25 floor)`.
    A single step has the peak; of two the first has the start and the second the floor.
    """
    if total_steps == 1:
        return 1.0
    last = total_steps - 1
    peak = min(max(warmup * total_steps - 1, 1.0), last - 1.0)
    if step <= peak:
        return _cosine(START, 1.0, step / peak) if peak > 0 else START
    return _cosine(1.0, floor, (step - peak) / (last - peak))


def cosine(step: int, total_steps: int, warmup: float, floor: float = 0.01) -> float:
    """A straight rise from 1/25, then half a cosine to the floor: torch's LinearLR, then CosineAnnealingLR."""
    rise, share = _rise(step, total_steps, warmup)
    return rise if share is None else _cosine(1.0, floor, share)


def linear(step: int, total_steps: int, warmup: float, floor: float = 0.01) -> float:
    """A straight rise from 1/25, then a straight fall to the floor: torch's LinearLR twice."""
    rise, share = _rise(step, total_steps, warmup)
    return rise if share is None else 1.0 + (floor - 1.0) * share


def constant(step: int, total_steps: int, warmup: float, floor: float = 0.01) -> float:
    """A straight rise from 1/25, then the peak to the end; the floor has no part in it."""
    rise, share = _rise(step, total_steps, warmup)
    return rise if share is None else 1.0


def _rise(step: int, total_steps: int, warmup: float) -> tuple[float, float | None]:
    """(the rising factor, None) in the warm-up, then (1, the share of the rest that is done)."""
    rising = min(int(warmup * total_steps), total_steps - 1)
    if step < rising:
        return START + (1.0 - START) * step / rising, None
    rest = total_steps - 1 - rising
    return 1.0, (step - rising) / rest if rest else 0.0


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


SCHEDULES: dict[str, Callable[[int, int, float, float], float]] = {
    "one_cycle": one_cycle,
    "cosine": cosine,
    "linear": linear,
    "constant": constant,
}
