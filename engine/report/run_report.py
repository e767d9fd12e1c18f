"""The page of a training: report.html in its run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image

from .charts import learning_rate_chart, loss_chart, recall_chart
from .html import render
from .tables import Rows, time_words

_MAX_STEPS = 100  # in the table of steps
_MEASURES = (
    ("validation loss", "loss", "{:.4f}"),
    ("image finds its caption first (R@1)", "image_to_text_r1", "{:.1%}"),
    ("caption finds its image first (R@1)", "text_to_image_r1", "{:.1%}"),
)
_DEVICE_FACTS = {
    "device": "device",
    "precision": "precision",
    "batch size": "batch_size",
    "micro-batch": "micro_batch",
}
Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl


def run_report(
    name: str,
    config: Mapping[str, Any],
    steps: Lines,
    validations: Lines,
    *,
    step: int,
    total_steps: int,
    best_step: int | None,
    defaults: Mapping[str, Any],
    notes: Sequence[str] = (),
    images: Sequence[tuple[Image, str]] = (),
) -> str:
    """Return the page of a run of which `step` steps are done.

    `config` is its config.json; `steps` and `validations` are the lines of its metrics.jsonl. `images` are captioned
    ones of the validation dataset, else of the training dataset. `best_step` is None without validation.
    """
    settings = [
        {"setting": key, "value": _word(entry["value"]), "default": _word(defaults.get(key)), "from": entry["from"]}
        for key, entry in (config.get("settings") or {}).items()
    ]
    data = config.get("data") or {}
    every = max(1, math.ceil(len(steps) / _MAX_STEPS))
    return render(
        "run.html",
        title=f"Training: {name}",
        lead=_lead(step, total_steps, best_step),
        before_and_after=_before_and_after(steps, validations, best_step),
        charts=_charts(steps, validations),
        validations=[_validation_row(line) for line in validations],
        steps_heading="Every step" if every == 1 else f"One step of {every}",
        steps=[_step_row(line) for n, line in enumerate(steps) if n % every == 0 or n == len(steps) - 1],
        settings=settings,
        changed=[row for row in settings if row["value"] != row["default"]],
        data=_data(data),
        validated=bool(data.get("validation")),
        groups=config.get("groups") or [],
        samples_heading=f"Some of the {'validation' if validations else 'training'} images",
        samples=images,
        notes=[note for note in notes if not note.startswith("What trains, and how fast")],
        made_with=_made_with(config, steps),
    )


def _lead(step: int, total_steps: int, best_step: int | None) -> str:
    if step < total_steps:
        progress = f"Stopped after step {step} of {total_steps}; starting the same run again continues it."
    else:
        progress = f"Finished: all {step} steps are done."
    if best_step is None:
        return f"{progress} There was no validation dataset, so the last weights are the result."
    if best_step == 0:
        return f"{progress} No step beat the original on the validation dataset, so the original is the result."
    return f"{progress} The model of step {best_step} has the lowest validation loss and is the result."


def _before_and_after(steps: Lines, validations: Lines, best_step: int | None) -> Rows:
    by_step = {line["step"]: line for line in validations}
    if best_step is None or 0 not in by_step or best_step not in by_step:
        return _training_loss(steps)
    before, best, last = by_step[0], by_step[best_step], validations[-1]
    rows = []
    for words, key, digits in _MEASURES:
        row = {"": words, "before (step 0)": digits.format(before[key])}
        row[f"best (step {best_step})"] = digits.format(best[key])
        row["change"] = _change(best[key] - before[key], digits)
        if last["step"] != best_step:
            row[f"last (step {last['step']})"] = digits.format(last[key])
        rows.append(row)
    return rows


def _training_loss(steps: Lines) -> Rows:
    losses = [line["loss"] for line in steps if math.isfinite(line["loss"])]
    if not losses:
        return []
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    row = {"": "training loss", "first tenth": f"{first:.4f}", "last tenth": f"{last:.4f}"}
    return [row | {"change": _change(last - first, "{:.4f}")}]


def _change(difference: float, digits: str) -> str:
    return f"{100 * difference:+.1f} points" if digits.endswith("%}") else f"{difference:+.4f}"


def _charts(steps: Lines, validations: Lines) -> list[tuple[str, Image]]:
    charts = [("Training and validation loss", loss_chart(steps, validations, title="Loss"))]
    if validations:
        charts.append(("Recall at 1 on the validation images", recall_chart(validations)))
    if steps:
        charts.append(("Learning rate of each group", learning_rate_chart(steps)))
    return charts


def _step_row(line: Mapping[str, Any]) -> dict[str, str]:
    return {
        "step": str(line["step"]),
        "epoch": f"{line['epoch']:.2f}",
        "loss": f"{line['loss']:.4f}",
        "highest learning rate": f"{max(line['learning_rate'].values()):.3g}",
        "gradient norm": "skipped" if line.get("grad_norm") is None else f"{line['grad_norm']:.4g}",
        "logit scale": f"{line['logit_scale']:.2f}",
        "pairs per second": f"{line['pairs_per_second']:.1f}",
    }


def _validation_row(line: Mapping[str, Any]) -> dict[str, str]:
    return {"step": str(line["step"])} | {words: digits.format(line[key]) for words, key, digits in _MEASURES}


def _word(value: object) -> str:
    return "(empty)" if value == "" else str(value).lower() if isinstance(value, bool) else str(value)


def _data(data: Mapping[str, Any]) -> Rows:
    return [
        {"": words, "dataset": part["name"], "images": f"{part['images']:,}", "captions": f"{part['captions']:,}"}
        for words, key in (("trained on", "train"), ("measured on", "validation"))
        if (part := data.get(key))
    ]


def _made_with(config: Mapping[str, Any], steps: Lines) -> dict[str, object]:
    facts: dict[str, object] = {words: config.get(key) for words, key in _DEVICE_FACTS.items()}
    speeds = [line["pairs_per_second"] for line in steps if line["pairs_per_second"] > 0]
    if speeds and (pairs := config.get("batch_size")):
        seconds = sum(pairs / speed for speed in speeds)
        facts |= {"time of the steps": time_words(seconds), "pairs per second": f"{pairs * len(speeds) / seconds:.1f}"}
    provenance = (config.get("model") or {}).get("provenance") or {}
    facts |= {f"model, {key}": _listed(value) for key, value in provenance.items() if value is not None}
    return facts | dict(config.get("versions") or {})


def _listed(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
