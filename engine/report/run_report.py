"""The page of a training: report.html in its run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .charts import learning_rate_chart, loss_chart, recall_chart
from .html import Html, Page, facts, fold, html_table, joined, paragraph
from .tables import time_words

_LINES = 100  # of the table of steps
_MEASURES = (
    ("validation loss", "loss", "{:.4f}"),
    ("picture finds its caption first (R@1)", "image_to_text_r1", "{:.1%}"),
    ("caption finds its picture first (R@1)", "text_to_image_r1", "{:.1%}"),
)


def run_report(
    name: str,
    config: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    validations: Sequence[Mapping[str, Any]],
    *,
    step: int,
    total_steps: int,
    best_step: int | None,
    defaults: Mapping[str, Any],
    notes: Sequence[str] = (),
    pictures: Sequence[tuple] = (),
) -> str:
    """A page about a run of which `step` steps are done. `config` is its config.json, `steps` and `validations` are the
    lines of its metrics.jsonl, `defaults` the settings that nobody chose, `pictures` (PIL, caption) pairs of the
    validation set, else of the training; `best_step` is that of the best model, None if nothing told which it is."""
    page = Page(f"Training: {name}")
    lead = _lead(step, total_steps, best_step)
    page.add("", paragraph(lead, "lead"), _before_and_after(steps, validations, best_step))
    page.add("Curves", page.charts(_charts(steps, validations)), _tables_of_numbers(steps, validations))
    page.add("Settings", *_settings(config.get("settings") or {}, defaults))
    page.add("Data", _data(config.get("data") or {}))
    groups = config.get("groups") or []
    page.add("What trains, and how fast", fold(f"{len(groups)} groups", html_table(groups)))
    which = "validation" if validations else "training"
    page.add(f"Some of the {which} pictures", page.sheet(pictures))
    page.add("What was said", *(paragraph(note) for note in notes if not note.startswith("What trains, and how fast")))
    page.add("Made with", _made_with(config, steps))
    return page.text()


def _lead(step: int, total_steps: int, best_step: int | None) -> str:
    if step < total_steps:
        done = f"Stopped after step {step} of {total_steps}; the same run goes on from there."
    else:
        done = f"Finished: all {step} steps are done."
    if best_step is None:
        return f"{done} There was no validation set, so the last weights are the result."
    if best_step == 0:
        return f"{done} No step was better on the validation set than the original, which is the result."
    return f"{done} The model of step {best_step} has the lowest validation loss and is the result."


def _before_and_after(steps, validations, best_step: int | None) -> Html:
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
    return html_table(rows)


def _training_loss(steps) -> Html:
    losses = [line["loss"] for line in steps if math.isfinite(line["loss"])]
    if not losses:
        return Html("")
    part = max(1, len(losses) // 10)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    row = {"": "training loss", "first tenth": f"{first:.4f}", "last tenth": f"{last:.4f}"}
    return html_table([row | {"change": _change(last - first, "{:.4f}")}])


def _change(difference: float, digits: str) -> str:
    if digits.endswith("%}"):
        return f"{100 * difference:+.1f} points"
    return f"{difference:+.4f}"


def _charts(steps, validations) -> list[tuple[str, Any]]:
    charts = [("Loss of the training and of the validations", loss_chart(steps, validations, title="Loss"))]
    if validations:
        charts.append(("Recall at 1 of the validations", recall_chart(validations)))
    if steps:
        charts.append(("Learning rate of each group", learning_rate_chart(steps)))
    return charts


def _tables_of_numbers(steps, validations) -> Html:
    every = math.ceil(len(steps) / _LINES) if steps else 1
    shown = [line for number, line in enumerate(steps) if number % every == 0 or number == len(steps) - 1]
    of_steps = [
        {
            "step": line["step"],
            "epoch": f"{line['epoch']:.2f}",
            "loss": f"{line['loss']:.4f}",
            "highest learning rate": f"{max(line['learning_rate'].values()):.3g}",
            "gradient": "skipped" if line.get("grad_norm") is None else f"{line['grad_norm']:.4g}",
            "logit scale": f"{line['logit_scale']:.2f}",
            "pairs a second": f"{line['pairs_per_second']:.1f}",
        }
        for line in shown
    ]
    of_validations = [
        {"step": line["step"]} | {words: digits.format(line[key]) for words, key, digits in _MEASURES}
        for line in validations
    ]
    which = "Every step" if every == 1 else f"One step of {every}"
    return joined(
        [
            fold(f"All {len(validations)} validations as numbers", html_table(of_validations)),
            fold(f"{which} as numbers (all are in metrics.jsonl)", html_table(of_steps)),
        ]
    )


def _settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Html]:
    rows, changed = [], []
    for name, entry in settings.items():
        value, usual = entry["value"], defaults.get(name)
        rows.append({"setting": name, "value": _word(value), "default": _word(usual), "from": entry["from"]})
        if value != usual:
            changed.append(rows[-1])
    first = html_table(changed, words=True) if changed else paragraph("All settings are the defaults.")
    return [first, fold(f"All {len(rows)} settings", html_table(rows, words=True))]


def _word(value: Any) -> str:
    return "(empty)" if value == "" else str(value).lower() if isinstance(value, bool) else str(value)


def _data(data: Mapping[str, Any]) -> Html:
    rows = [
        {"": words, "data set": found["name"], "pictures": f"{found['images']:,}", "captions": f"{found['captions']:,}"}
        for words, part in (("trained on", "train"), ("measured on", "validation"))
        if (found := data.get(part))
    ]
    none = "" if data.get("validation") else paragraph("There was no validation set.", "soft")
    return joined([html_table(rows), none])


def _made_with(config: Mapping[str, Any], steps) -> Html:
    speeds = [line["pairs_per_second"] for line in steps if line["pairs_per_second"] > 0]
    ways = {
        "device": "device",
        "precision": "precision",
        "pairs in a batch": "batch_size",
        "pairs at once": "micro_batch",
    }
    known: dict[str, Any] = {words: config.get(key) for words, key in ways.items()}
    if speeds and (pairs := config.get("batch_size")):
        seconds = sum(pairs / speed for speed in speeds)
        known |= {"time of the steps": time_words(seconds), "pairs a second": f"{pairs * len(speeds) / seconds:.1f}"}
    made_of = (config.get("model") or {}).get("provenance") or {}
    known |= {f"model, {key}": _listed(value) for key, value in made_of.items() if value is not None}
    return facts(known | dict(config.get("versions") or {}))


def _listed(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)
