"""The page of an evaluation: what `clip-finetune eval --html` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .html import Html, Page, facts, fold, html_table, paragraph


def evaluation_report(
    data: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    *,
    charts: Sequence[tuple[str, Any]] = (),
    attacked: tuple[str, Sequence[tuple]] = ("", ()),
    comparisons: Sequence[Mapping[str, Any]] = (),
    settings: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
    pictures: Sequence[tuple] = (),
) -> str:
    """A page about models measured on one data set.

    `data` has its name and its counts; `results` are what `eval --json` has, of the models called `names`, and `rows`
    the same as a table; `charts` are (sentence, PIL). `attacked` is a heading and pictures with words on them. A
    comparison is {"title", "verdict" (sentences), "chart" (PIL), "tables" (rows by heading)}. Pictures are (PIL,
    caption) pairs.
    """
    page = Page(f"Evaluation on {data['name']}")
    page.add("", *(paragraph(f"{told}.", "lead") for told, _ in charts), html_table(rows), page.charts(charts))
    page.add(attacked[0], page.sheet(attacked[1]))
    for comparison in comparisons:
        verdict = comparison["verdict"]
        page.add(
            comparison["title"],
            paragraph(verdict[0], "lead"),
            *(paragraph(sentence) for sentence in verdict[1:]),
            paragraph("The thresholds of this verdict are provisional: it is a hint where to look, no proof.", "soft"),
            page.charts([(verdict[0], comparison["chart"])]),
            *(fold(f"Numbers: {what}", html_table(found)) for what, found in comparison["tables"].items()),
        )
    page.add("Classes", *_classes(results, names))
    page.add("Data", facts(data))
    page.add("Some of the pictures", page.sheet(pictures))
    page.add("What was said", *(paragraph(note) for note in notes))
    page.add("Settings", facts(settings or {}))
    return page.text()


def _classes(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Html]:
    details = {
        name: found["details"]["zero_shot"] for name, found in zip(names, results, strict=True) if "details" in found
    }
    if not details:
        return []
    shares: dict[str, dict[str, Any]] = {}
    for name, found in details.items():
        for entry in found["per_class"]:
            row = shares.setdefault(entry["class"], {"class": entry["class"], "pictures": entry["images"]})
            row[name] = f"{entry['top1']:.1%}"
    parts = [fold(f"Each of {len(shares)} classes: how many are right", html_table(list(shares.values())))]
    for name, found in details.items():
        confused = [
            {"class": entry["class"], "taken for": entry["taken_for"], "times": entry["images"]}
            for entry in found["confused"]
        ]
        parts.append(fold(f"What the {name} takes for something else", html_table(confused)))
    return parts
