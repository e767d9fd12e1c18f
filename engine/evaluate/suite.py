"""The evaluation suite: what can be measured on a dataset, and several models measured together.

`EVALUATORS` is the one list of measurements. The command, its page and the nodes read it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from PIL.Image import Image
from typing_extensions import Unpack

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..notes import Notes
from ..report.charts import against_baseline
from ..report.evaluation_report import Measurement
from ..report.tables import Rows, table
from . import retrieval, zero_shot
from .class_names import has_classes, with_classes
from .encoder import BrokenModel, EncodedImages, Encoder, Runtime, encode_images, require_images
from .typographic import attack, examples
from .typographic.photographed import attacks_in

BASELINE = "baseline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure. `templates` None: OpenAI's 80, or the short set where words are written on the images.

    (SCAM has hundreds of names, and is published with one sentence for each.)
    """

    templates: str | None = None
    custom_templates: tuple[str, ...] = ()
    protocol: str = "whole set"
    typographic: bool = False
    seed: int = 0


DEFAULT_REQUEST = Request()


class Result(Protocol):
    """What every evaluator returns: a frozen dataclass with these."""

    @property
    def images(self) -> int: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def as_dict(self) -> dict[str, Any]:
        """Its numbers for the JSON."""

    def rows(self) -> dict[str, str]:
        """Its numbers for a table, by what they are."""


R = TypeVar("R", bound=Result)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator(Generic[R]):
    """One measurement. `name` is its key in the JSON; `title` and `score` make its sentence.

    `run` gets the dataset's encoded images, or None to encode them itself. `require` raises `UserError` if `run` would.
    `tables` are more numbers, by heading; `details` what is in the JSON beside `as_dict`; `remarks` further sentences
    on a model and perhaps its baseline; `examples` a heading and captioned images.
    """

    name: str
    title: str
    applies: Callable[[ClipDataset, Request], bool]
    require: Callable[[ClipDataset], None]
    run: Callable[[Encoder, ClipDataset, Request, EncodedImages | None], R]
    score: Callable[[R], float]
    chart: Callable[[Mapping[str, R], str], Image]
    tables: Callable[[Mapping[str, R]], dict[str, Rows]] = lambda results: {}
    details: Callable[[R], dict[str, Any]] = lambda result: {}
    remarks: Callable[[R, R | None], list[str]] = lambda model, baseline: []
    examples: Callable[[ClipDataset, R, R | None], tuple[str, list[tuple[Image, str]]]] = (
        lambda dataset, model, baseline: ("", [])
    )

    def sentence(self, model: R, baseline: R | None) -> str:
        return against_baseline(self.title, self.score(model), None if baseline is None else self.score(baseline))

    def table(self, results: Mapping[str, R]) -> str:
        """A row for each number and a column for each model, and the further tables below."""
        first = next(iter(results.values()))
        rows = [
            {self.title: number} | {name: result.rows()[number] for name, result in results.items()}
            for number in first.rows()
        ]
        return "\n\n".join([table(rows), *(table(more) for more in self.tables(results).values() if more)])


# ---- the evaluators --------------------------------------------------------------------------------------------------


def _has_written_words(dataset: ClipDataset, request: Request) -> bool:
    return request.typographic and bool(attacks_in(dataset))


def _templates(dataset: ClipDataset, request: Request) -> str:
    return request.templates or ("simple" if _has_written_words(dataset, request) else zero_shot.TEMPLATES[0])


ZERO_SHOT: Evaluator[zero_shot.ZeroShotResult] = Evaluator(
    name="zero_shot",
    title="Zero-shot accuracy",
    applies=lambda dataset, request: has_classes(dataset) and not _has_written_words(dataset, request),
    require=lambda dataset: zero_shot.require_classes(with_classes(dataset)[0]),
    run=lambda encoder, dataset, request, images: zero_shot.zero_shot_of(
        encoder,
        dataset,
        templates=_templates(dataset, request),
        custom_templates=request.custom_templates,
        protocol=request.protocol,
        images=images,
    ),
    score=lambda result: result.top1,
    chart=zero_shot.zero_shot_chart,
    tables=zero_shot.class_tables,
    details=lambda result: result.details(),
    remarks=zero_shot.difference_remark,
)
RETRIEVAL: Evaluator[retrieval.RetrievalResult] = Evaluator(
    name="retrieval",
    title="Recall at 1",
    applies=lambda dataset, request: dataset.has_captions and not _has_written_words(dataset, request),
    require=retrieval.require_captions,
    run=lambda encoder, dataset, request, images: retrieval.named_retrieval_of(encoder, dataset, images=images),
    score=lambda result: result.recall_at_1,
    chart=retrieval.retrieval_chart,
    remarks=lambda model, baseline: [model.remark()],
)
TYPOGRAPHIC: Evaluator[attack.TypographicResult] = Evaluator(
    name="typographic",
    title="Accuracy under attack",
    applies=lambda dataset, request: request.typographic,
    require=attack.require_attackable,
    run=lambda encoder, dataset, request, images: attack.typographic_of(
        encoder, dataset, seed=request.seed, templates=_templates(dataset, request), images=images
    ),
    score=lambda result: result.accuracy_under_attack,
    chart=attack.typographic_chart,
    tables=attack.kind_tables,
    examples=examples.examples_of,
)
EVALUATORS: tuple[Evaluator[Any], ...] = (ZERO_SHOT, RETRIEVAL, TYPOGRAPHIC)


def measure(
    evaluator: Evaluator[R], full_clip: FullCLIP, dataset: ClipDataset, request: Request, **runtime: Unpack[Runtime]
) -> R:
    """Run one evaluator on one model. Raises `UserError` for a dataset it cannot measure on."""
    evaluator.require(dataset)
    return evaluator.run(Encoder.of(full_clip, **runtime), dataset, request, None)


# ---- several models --------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """A model to measure: its role ("model" or "baseline"), the file it came from, and itself."""

    role: str
    file: str | None
    full_clip: FullCLIP


@dataclasses.dataclass(frozen=True)
class ModelResult:
    """What was measured of one model, by evaluator name; `images` are the distinct ones of the dataset that counted."""

    role: str
    file: str | None
    images: int
    measured: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """An entry of the list under "models" in the JSON of `eval`."""
        evaluators = [evaluator for evaluator in EVALUATORS if evaluator.name in self.measured]
        details = {each.name: found for each in evaluators if (found := each.details(self.measured[each.name]))}
        numbers = {each.name: self.measured[each.name].as_dict() for each in evaluators}
        return (
            {"name": self.role, "file": self.file}
            | ({"details": details} if details else {})
            | {"images": self.images}
            | numbers
        )


def evaluate(
    candidates: Iterable[Candidate],
    dataset: ClipDataset,
    request: Request = DEFAULT_REQUEST,
    *,
    on_note: Callable[[str], None] = lambda note: None,
    **runtime: Unpack[Runtime],
) -> list[ModelResult]:
    """Run every evaluator that applies on each model, which encodes each image once for all of them.

    Models are taken one at a time, so a generator opens each when it is needed, after the dataset was checked. Raises
    `UserError`.
    """
    require_images(dataset)
    evaluators = [evaluator for evaluator in EVALUATORS if evaluator.applies(dataset, request)]
    for evaluator in evaluators:
        evaluator.require(dataset)
    results, notes = [], Notes(on_note)
    for role, file, full_clip in candidates:
        encoder = Encoder.of(full_clip, **runtime)
        try:
            images = encode_images(encoder, dataset)
            measured = {each.name: each.run(encoder, dataset, request, images) for each in evaluators}
        except BrokenModel as error:  # of several models, say which
            raise BrokenModel(f"{file}: {error}" if file else str(error)) from error
        counts = [result.images for name, result in measured.items() if name != TYPOGRAPHIC.name]  # it counts attacks
        results.append(ModelResult(role, file, counts[-1] if counts else len(images.samples), measured))
        for result in measured.values():
            notes.extend((*full_clip.notes, *result.notes))
    return results


def rows_of(results: Sequence[ModelResult]) -> Rows:
    """Return a row for each model."""
    rows: Rows = []
    for result in results:
        row = {"model": result.role, "file": result.file or "", "images": str(result.images)}
        for measured in result.measured.values():
            row |= measured.rows()
        rows.append(row)
    return rows


def measurements_of(dataset: ClipDataset, results: Sequence[ModelResult]) -> list[Measurement]:
    """Return what a page shows of each kind of measurement."""
    named = dict(zip(names_of(results), results, strict=True))
    baseline = next((result for result in results if result.role == BASELINE), None)
    measurements = []
    for evaluator in EVALUATORS:
        if evaluator.name not in results[0].measured:
            continue
        by_name = {name: result.measured[evaluator.name] for name, result in named.items()}
        model, base = results[0].measured[evaluator.name], baseline and baseline.measured[evaluator.name]
        sentence = evaluator.sentence(model, base)
        heading, images = evaluator.examples(dataset, model, base)
        measurements.append(
            Measurement(
                sentence=sentence,
                chart=evaluator.chart(by_name, sentence),
                remarks=evaluator.remarks(model, base),
                tables=evaluator.tables(by_name),
                examples_heading=heading,
                examples=images,
            )
        )
    return measurements


def names_of(results: Sequence[ModelResult]) -> list[str]:
    """Return a distinct name for each model: its role, or its file's name where several have the same role."""
    roles = [result.role for result in results]
    names: list[str] = []
    for result in results:
        name = result.role
        if roles.count(name) > 1:
            stem = os.path.splitext(str(result.file))[0]
            name = "/".join(stem.replace(os.sep, "/").split("/")[-2:])  # every run's model file is called best
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names
