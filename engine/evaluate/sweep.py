"""Blend sweep: measure blends from a baseline to its fine-tune and pick the best (WiSE-FT, arXiv:2109.01903)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL.Image import Image
from typing_extensions import Unpack

from ..clip.blend import blend
from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..errors import UserError
from ..notes import Notes
from ..report.comparison_charts import sweep_chart
from ..report.tables import Rows, table
from .class_names import scored_by_classes
from .drift import require_one_architecture
from .encoder import Runtime, ignore_progress, require_images
from .retrieval import eval_retrieval
from .zero_shot import eval_zero_shot

ALLOWED_LOSS = 0.01  # of the baseline's score on the general dataset
STEPS = 11
ZERO_SHOT, RETRIEVAL = "zero-shot top 1", "R@1, mean of both directions"
_EQUAL = 1e-9
_FINE = 1000  # parts of each measurement in the progress


class Point(NamedTuple):
    """A blend and its scores (0 to 1); `general` is None without a general dataset."""

    alpha: float
    score: float
    general: float | None = None

    @property
    def words(self) -> str:
        general = "" if self.general is None else f" and {self.general:.1%} in general"
        return f"{self.score:.1%}{general}"


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """`points` from alpha 0, the baseline, to 1, the model; `best` is the blend at `alpha`, chosen by `rule`."""

    points: tuple[Point, ...]
    alpha: float
    best: FullCLIP = dataclasses.field(repr=False)
    measure: str
    general_measure: str | None
    rule: str
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Point:
        return next(point for point in self.points if point.alpha == self.alpha)

    @property
    def sentence(self) -> str:
        """The result in words."""
        if self.alpha == 0:
            return f"Best at alpha 0, the baseline: no allowed blend is better than its {self.chosen.words}."
        end = " (the model as it is)" if self.alpha == 1 else ""
        return f"Best at alpha {self.alpha:g}{end}: {self.chosen.words}; the baseline has {self.points[0].words}."

    def table(self) -> str:
        """The sentence, the rule and a row for each blend, the best one marked."""
        rows: Rows = []
        for point in self.points:
            row = {"alpha": f"{point.alpha:g}", self.measure: f"{point.score:.1%}"}
            if point.general is not None:
                row[f"general: {self.general_measure}"] = f"{point.general:.1%}"
            rows.append(row | {"": "best" if point.alpha == self.alpha else ""})
        return "\n".join([self.sentence, f"Rule: {self.rule}", "", table(rows)])

    def chart(self) -> Image:
        """Draw the scores by alpha, and the trade-off if there is a general dataset."""
        general = self.points[0].general
        return sweep_chart(
            self.points,
            self.alpha,
            measure=self.measure,
            general_measure=self.general_measure,
            floor=None if general is None else general - ALLOWED_LOSS,
            title=self.sentence,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "points": [point._asdict() for point in self.points],
            "alpha": self.alpha,
            "measure": self.measure,
            "general_measure": self.general_measure,
            "rule": self.rule,
        }


def blend_sweep(
    full_clip: FullCLIP,
    baseline: FullCLIP,
    dataset: ClipDataset,
    general: ClipDataset | None = None,
    *,
    steps: int = STEPS,
    templates: str = "openai-80",
    **runtime: Unpack[Runtime],
) -> SweepResult:
    """Measure `steps` evenly spaced blends on a dataset and a general one.

    The score is zero-shot accuracy where all samples have classes (see `scored_by_classes`), else retrieval. Raises
    `UserError`, also for two architectures, and `BrokenModel`.
    """
    require_one_architecture(full_clip, baseline)
    if steps < 2:
        raise UserError(f"steps is {steps}; give at least 2, for the baseline and the model.")
    datasets = [dataset] if general is None else [dataset, general]
    for each in datasets:
        require_images(each)
    measures = [measure_of(each) for each in datasets]
    passes, points, notes = steps * len(datasets), [], Notes()
    for step in range(steps):
        alpha = step / (steps - 1)
        blended, scores = blend(full_clip, baseline, alpha), []
        own = runtime
        if blended is not full_clip and blended is not baseline:  # the blends between are measured only here
            own = {**runtime, "features": None}
        for number, (each, measure) in enumerate(zip(datasets, measures, strict=True)):
            part = _part_of(own, step * len(datasets) + number, passes)
            score, more = _score(blended, each, measure, templates, part)
            scores.append(score)
            notes.extend(more)
        points.append(Point(alpha, *scores))
    alpha = choose(points)
    return SweepResult(
        points=tuple(points),
        alpha=alpha,
        best=blend(full_clip, baseline, alpha),
        measure=measures[0],
        general_measure=None if general is None else measures[1],
        rule=rule_in_words(dataset.name, None if general is None else general.name),
        notes=tuple(notes),
    )


def _part_of(runtime: Runtime, number: int, passes: int) -> Runtime:
    """Return a runtime whose progress is one part of all passes."""
    on_progress = runtime.get("on_progress", ignore_progress)

    def count(done: int, total: int) -> None:
        on_progress(_FINE * number + _FINE * done // max(1, total), _FINE * passes)

    return {**runtime, "on_progress": count}


def measure_of(dataset: ClipDataset) -> str:
    return ZERO_SHOT if scored_by_classes(dataset) else RETRIEVAL


def _score(
    full_clip: FullCLIP, dataset: ClipDataset, measure: str, templates: str, runtime: Runtime
) -> tuple[float, Sequence[str]]:
    if measure == ZERO_SHOT:
        zero_shot = eval_zero_shot(full_clip, dataset, templates=templates, **runtime)
        return zero_shot.top1, zero_shot.notes
    retrieval = eval_retrieval(full_clip, dataset, **runtime)
    return retrieval.recall_at_1, retrieval.notes


def choose(points: Sequence[Point]) -> float:
    """Return the alpha with the highest score; among equal ones the smallest, which is nearest to the baseline.

    Only points that lose no more than `ALLOWED_LOSS` of the baseline's (the first point's) general score count.
    """
    general = points[0].general
    allowed = [
        point
        for point in points
        if general is None or (point.general is not None and point.general >= general - ALLOWED_LOSS - _EQUAL)
    ]
    best = max(point.score for point in allowed)
    return min(point.alpha for point in allowed if point.score >= best - _EQUAL)


def rule_in_words(name: str, general: str | None) -> str:
    limit = (
        ""
        if general is None
        else f" among the blends that lose at most {100 * ALLOWED_LOSS:g} point of the baseline's score on {general}"
    )
    return f"The highest score on {name}{limit}; among equal ones the smallest alpha."
