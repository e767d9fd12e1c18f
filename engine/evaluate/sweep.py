"""From a baseline to its fine-tune in steps: where on the way is the best model? (WiSE-FT, arXiv:2109.01903.)"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..clip.blend import blend
from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..data.images.image_cache import ImageCache
from ..errors import UserError
from ..report.comparison_charts import sweep_chart
from ..report.tables import table
from .class_names import scored_by_classes
from .drift import require_one_architecture
from .encoder import EncodingCache, require_images
from .retrieval import eval_retrieval
from .zero_shot import eval_zero_shot

ALLOWED_LOSS = 0.01  # of the baseline's score on the general set
STEPS = 11
ZERO_SHOT, RETRIEVAL = "zero-shot top 1", "R@1, mean of both directions"
_EQUAL = 1e-9


class Point(NamedTuple):
    """A blend and its scores (0 to 1); `general` is None without a general set."""

    alpha: float
    score: float
    general: float | None = None


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
        """What was found, in words."""
        baseline, chosen = (_scores(point) for point in (self.points[0], self.chosen))
        if self.alpha == 0:
            return f"Best at alpha 0, the baseline: no blend that may be chosen is better than its {chosen}."
        end = " (the model as it is)" if self.alpha == 1 else ""
        return f"Best at alpha {self.alpha:g}{end}: {chosen}, where the baseline has {baseline}."

    def table(self) -> str:
        """The sentence, the rule and a row a blend, the best marked."""
        rows = []
        for point in self.points:
            row = {"alpha": f"{point.alpha:g}", self.measure: f"{point.score:.1%}"}
            if point.general is not None:
                row[f"general: {self.general_measure}"] = f"{point.general:.1%}"
            rows.append(row | {"": "best" if point.alpha == self.alpha else ""})
        return "\n".join([self.sentence, f"Rule: {self.rule}", "", table(rows)])

    def chart(self):
        """PIL, RGB: the scores along the way, and the frontier if there is a general set."""
        floor = None if self.general_measure is None else self.points[0].general - ALLOWED_LOSS
        return sweep_chart(
            self.points,
            self.alpha,
            measure=self.measure,
            general_measure=self.general_measure,
            floor=floor,
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
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
    cache: ImageCache | None = None,
    features: EncodingCache | None = None,
) -> SweepResult:
    """Measure `steps` blends, evenly spaced, on a data set and a general one: zero-shot accuracy where all samples
    have classes (`scored_by_classes`), else retrieval. Raises `UserError`, also for two architectures, and
    `BrokenModel`."""
    require_one_architecture(full_clip, baseline)
    if steps < 2:
        raise UserError(f"steps is {steps}; give 2 at least, for the baseline and the model.")
    sets = [dataset] if general is None else [dataset, general]
    for found in sets:
        require_images(found)
    measures = [measure_of(found) for found in sets]
    passes, points, notes = steps * len(sets), [], {}
    for step in range(steps):
        alpha = step / (steps - 1)
        mixed, scores = blend(full_clip, baseline, alpha), []
        for place, (data, measure) in enumerate(zip(sets, measures, strict=True)):
            done = step * len(sets) + place

            def count(pictures: int, total: int, done=done) -> None:
                on_progress(1000 * done + 1000 * pictures // max(1, total), 1000 * passes)

            host = dict(device=device, on_progress=count, check_cancelled=check_cancelled, cache=cache)
            if mixed in (full_clip, baseline):  # what else is measured is measured once
                host["features"] = features
            score, more = _score(mixed, data, measure, templates, host)
            scores.append(score)
            notes |= dict.fromkeys(more)
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


def _scores(point: Point) -> str:
    return f"{point.score:.1%}" if point.general is None else f"{point.score:.1%} and {point.general:.1%} in general"


def measure_of(dataset: ClipDataset) -> str:
    return ZERO_SHOT if scored_by_classes(dataset) else RETRIEVAL


def _score(
    model: FullCLIP, dataset: ClipDataset, measure: str, templates: str, host: dict[str, Any]
) -> tuple[float, Sequence[str]]:
    if measure == ZERO_SHOT:
        found = eval_zero_shot(model, dataset, templates=templates, **host)
        return found.top1, found.notes
    found = eval_retrieval(model, dataset, **host)
    return found.recall_at_1, found.notes


def choose(points: Sequence[Point]) -> float:
    """The alpha of the highest score among the points that lose no more than `ALLOWED_LOSS` of the baseline's (the
    first point's) general score; of equal ones the smallest alpha, which is nearest to the baseline."""
    allowed = [
        point for point in points if point.general is None or point.general >= points[0].general - ALLOWED_LOSS - _EQUAL
    ]
    best = max(point.score for point in allowed)
    return min(point.alpha for point in allowed if point.score >= best - _EQUAL)


def rule_in_words(name: str, general: str | None) -> str:
    kept = (
        ""
        if general is None
        else (f" among the blends that lose at most {100 * ALLOWED_LOSS:g} point of the baseline's score on {general}")
    )
    return f"The highest score on {name}{kept}; of equal ones the smallest alpha."
