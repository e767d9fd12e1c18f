"""The page of an evaluation, which `clip-finetune eval --html` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from PIL.Image import Image

from .html import render
from .tables import Rows


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One kind of measurement of all models: a sentence and chart on top, tables folded at the end of the page.

    `examples` are captioned images that the models see differently.
    """

    sentence: str
    chart: Image
    remarks: Sequence[str] = ()
    tables: Mapping[str, Rows] = dataclasses.field(default_factory=dict)
    examples_heading: str = ""
    examples: Sequence[tuple[Image, str]] = ()


@dataclasses.dataclass(frozen=True)
class ComparisonSection:
    """A model beside its baseline: the verdict in sentences, a chart, and tables by topic."""

    title: str
    verdict: Sequence[str]
    chart: Image
    tables: Mapping[str, Rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationPage:
    """What the page shows. `rows` is the table of all models; `facts` are more values by heading, such as Data and
    Settings; `samples` are captioned images of the dataset."""

    dataset: str
    rows: Rows
    measurements: Sequence[Measurement]
    comparisons: Sequence[ComparisonSection] = ()
    facts: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    samples: Sequence[tuple[Image, str]] = ()


def evaluation_report(page: EvaluationPage) -> str:
    """Return the page about models measured on one dataset."""
    charts = [(measurement.sentence, measurement.chart) for measurement in page.measurements]
    return render("evaluation.html", title=f"Evaluation on {page.dataset}", charts=charts, **vars(page))
