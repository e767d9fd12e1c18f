"""Learning-rate schedules as pure functions of the optimizer step; each gives a factor of the group's peak rate."""

from __future__ import annotations

import math

START = 1 / 25
FLOOR = 1 / 100


def one_cycle(step: int, total_steps: int, warmup: float) -> float:
    """The factor for optimizer step `step` (0-based) of `total_steps`: up from 1/25 to 1, then down to 1/100.

    Both slopes are half cosines, as in torch's OneCycleLR (Smith and Topin 2017, arXiv:1708.07120) with
    `div_factor=25` and `final_div_factor=4`; it does not touch the betas. `warmup` is the share of the steps on the
    rising slope. A single step has the peak; of two the first has the start and the second the floor.
    """
    if total_steps == 1:
        return 1.0
    last = total_steps - 1
    peak = min(max(warmup * total_steps - 1, 1.0), last - 1.0)
    if step <= peak:
        return _cosine(START, 1.0, step / peak) if peak > 0 else START
    return _cosine(1.0, FLOOR, (step - peak) / (last - peak))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
