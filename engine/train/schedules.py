"""Learning-rate schedules: pure functions of the optimizer step that return a multiple of the peak learning rate.

`step` counts from 0 to `total_steps` - 1, `warmup` is the share of steps in which the rate rises, and `min_ratio` is
the multiple at the last step. Multiples keep the ratios between parameter groups; no schedule changes the betas. To add
a schedule, write a function and its record in SCHEDULES, and add it to the tests in test_schedules.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

START = 1 / 25  # where every warm-up begins


def one_cycle(step: int, total_steps: int, warmup: float, min_ratio: float = 0.01) -> float:
    """Rise from 1/25 to 1 and fall to `min_ratio`, both along half a cosine.

    Same as torch's OneCycleLR (Smith and Topin 2017, arXiv:1708.07120) with `div_factor=25` and `final_div_factor=1/(25
    min_ratio)`. A single step gets the peak; of two, the first gets the start and the second the minimum.
    """
    if total_steps == 1:
        return 1.0
    last = total_steps - 1
    peak = min(max(warmup * total_steps - 1, 1.0), last - 1.0)
    if step <= peak:
        return _cosine(START, 1.0, step / peak) if peak > 0 else START
    return _cosine(1.0, min_ratio, (step - peak) / (last - peak))


def cosine(step: int, total_steps: int, warmup: float, min_ratio: float = 0.01) -> float:
    """Rise linearly from 1/25, then fall along half a cosine: torch's LinearLR, then CosineAnnealingLR."""
    multiple, progress = _warm_up(step, total_steps, warmup)
    return multiple if progress is None else _cosine(1.0, min_ratio, progress)


def linear(step: int, total_steps: int, warmup: float, min_ratio: float = 0.01) -> float:
    """Rise linearly from 1/25, then fall linearly: torch's LinearLR twice."""
    multiple, progress = _warm_up(step, total_steps, warmup)
    return multiple if progress is None else 1.0 + (min_ratio - 1.0) * progress


def constant(step: int, total_steps: int, warmup: float, min_ratio: float = 0.01) -> float:
    """Rise linearly from 1/25, then stay at the peak; `min_ratio` is ignored."""
    return _warm_up(step, total_steps, warmup)[0]


def _warm_up(step: int, total_steps: int, warmup: float) -> tuple[float, float | None]:
    """Return (multiple, None) during the warm-up and (1, progress through the remaining steps from 0 to 1) after it."""
    rising = min(int(warmup * total_steps), total_steps - 1)
    if step < rising:
        return START + (1.0 - START) * step / rising, None
    rest = total_steps - 1 - rising
    return 1.0, (step - rising) / rest if rest else 0.0


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * progress))


@dataclasses.dataclass(frozen=True)
class ScheduleInfo:
    """A schedule that the user can choose; `help` follows the name."""

    name: str
    multiple: Callable[[int, int, float, float], float]
    help: str


_RECORDS = (
    ScheduleInfo("one_cycle", one_cycle, "half a cosine up, half a cosine down"),
    ScheduleInfo("cosine", cosine, "a linear warm-up, then half a cosine down"),
    ScheduleInfo("linear", linear, "a linear warm-up, then a straight line down"),
    ScheduleInfo("constant", constant, "a linear warm-up, then the peak until the end"),
)
SCHEDULES: dict[str, ScheduleInfo] = {schedule.name: schedule for schedule in _RECORDS}
