"""Several models on one data set: everything that the data allows, as one list of numbers and one table."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ..clip.full_clip import FullCLIP
from ..clip.load import load_full_clip
from ..data.dataset import ClipDataset
from ..data.images.image_cache import ImageCache
from ..report.attack_charts import share_chart
from ..report.charts import against_baseline, bar_chart
from ..report.tables import table
from .class_names import has_classes, with_classes, with_named_classes
from .encoder import BrokenModel, Encoder, EncodingCache, encode_images, require_images
from .retrieval import retrieval_of
from .typographic.attack import TypographicResult, typographic_of
from .typographic.photographed import attacks_in
from .zero_shot import TEMPLATES, require_classes, zero_shot_of


def evaluate(
    models: Sequence[tuple[str, str | os.PathLike | FullCLIP]],
    dataset: ClipDataset,
    *,
    templates: str | None = None,
    protocol: str = "whole set",
    typographic: bool = False,
    activation: str = "auto",
    context_length: int | None = None,
    device: torch.device | str | None = None,
    cache: ImageCache | None = None,
    features: EncodingCache | None = None,
    on_note: Callable[[str], None] = lambda note: None,
    on_attack: Callable[[str, TypographicResult], None] = lambda name, found: None,
) -> list[dict[str, Any]]:
    """The list under "models" of `eval --json`: zero-shot where the data set has labels, retrieval where captions, a
    typographic attack if it is asked for. A model encodes each picture once for all of them.

    `models` are pairs of a name ("model" or "baseline") and a file, hub name or FullCLIP. `templates` None are OpenAI's
    80, but the short set for words that are on the pictures: SCAM has hundreds of names, and is published with one
    sentence for each. `on_attack` gets the name and what the attack brought, picture by picture. Raises `UserError`.
    """
    require_images(dataset)
    results, told = [], set()
    labelled, attacked = has_classes(dataset), bool(typographic and attacks_in(dataset))
    if (labelled or typographic) and not attacked:
        require_classes(with_classes(dataset)[0])  # before a model is opened for nothing
    templates = templates or ("simple" if attacked else TEMPLATES[0])
    for name, source in models:
        full_clip, file = source, None
        if not isinstance(source, FullCLIP):
            full_clip, file = load_full_clip(source, activation=activation, context_length=context_length), str(source)
        encoder = Encoder.of(full_clip, device=device, cache=cache, features=features)
        measured: dict[str, Any] = {}
        with _naming(file):
            pictures = encode_images(encoder, dataset)
            if labelled and not attacked:
                measured["zero_shot"] = zero_shot_of(
                    encoder, dataset, templates=templates, protocol=protocol, pictures=pictures
                )
            if dataset.has_captions and not attacked:
                measured["retrieval"] = retrieval_of(encoder, with_named_classes(dataset)[0], pictures=pictures)
            if typographic:
                measured["typographic"] = typographic_of(encoder, dataset, templates=templates, pictures=pictures)
                on_attack(name, measured["typographic"])
        counted = [found.images for part, found in measured.items() if part != "typographic"]
        result: dict[str, Any] = {"name": name, "file": file}
        if "zero_shot" in measured:
            result["details"] = {"zero_shot": measured["zero_shot"].details()}
        result["images"] = (counted or [len(pictures.features)])[-1]
        results.append(result | {part: found.as_dict() for part, found in measured.items()})
        for note in (note for found in measured.values() for note in (*full_clip.notes, *found.notes)):
            if note not in told:
                told.add(note)
                on_note(note)
    return results


@contextlib.contextmanager
def _naming(file: str | None) -> Iterator[None]:
    """Where several models are measured, a broken one is told by its file."""
    try:
        yield
    except BrokenModel as error:
        raise BrokenModel(f"{file}: {error}" if file else str(error)) from error


def table_of(results: Sequence[dict[str, Any]]) -> str:
    """The same numbers for a reader, a row a model, in percent."""
    return table(rows_of(results))


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The rows of `table_of`."""
    rows = []
    for result in results:
        row = {"model": result["name"], "file": result["file"] or "", "images": str(result.get("images", ""))}
        if "zero_shot" in result:
            zero_shot = result["zero_shot"]
            row |= {
                "zero-shot top 1": percent(zero_shot["top1"]),
                "top 5": percent(zero_shot["top5"]),
                "mean per class": percent(zero_shot["mean_per_class"]),
            }
            details = result.get("details", {}).get("zero_shot", {})
            if "top1_interval" in details:
                row["95 %"] = " to ".join(map(percent, details["top1_interval"]))
            if "published_in_batch_share" in details:
                row["1 of 48, not accuracy"] = percent(details["published_in_batch_share"])
        if "typographic" in result:
            found = result["typographic"]
            row |= {
                "clean": percent(found["accuracy_clean"]),
                "under attack": percent(found["accuracy_under_attack"]),
                "word wins": percent(found["word_wins"]),
            }
        if "retrieval" in result:
            for key, words in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
                found = result["retrieval"][key]
                row |= {f"{words} R@1": percent(found["r1"]), f"{words} R@5": percent(found["r5"])}
        rows.append(row)
    return rows


def charts_of(results: Sequence[dict[str, Any]]) -> list[tuple[str, Any]]:
    """(a sentence, PIL) for each kind of measurement in the results."""
    named = dict(zip(names_of(results), results, strict=True))
    charts: list[tuple[str, Any]] = []

    def sentence(what: str, number: Callable[[dict], float]) -> str:
        baseline = next((number(found) for found in results if found["name"] == "baseline"), None)
        return against_baseline(what, number(results[0]), baseline)

    if "zero_shot" in results[0]:
        measures = {"top 1": "top1", "top 5": "top5", "mean of classes": "mean_per_class"}
        details = {name: found["details"]["zero_shot"] for name, found in named.items()}
        title = sentence("Zero-shot accuracy", lambda found: found["zero_shot"]["top1"])
        chart = share_chart(
            {
                words: {name: found["zero_shot"][key] for name, found in named.items()}
                for words, key in measures.items()
            },
            title=title,
            intervals={"top 1": {name: found["top1_interval"] for name, found in details.items()}},
        )
        charts.append((title, chart))
    if "retrieval" in results[0]:
        ways = {"image to text": "image_to_text", "text to image": "text_to_image"}
        title = sentence("Recall at 1", lambda found: sum(found["retrieval"][key]["r1"] for key in ways.values()) / 2)
        groups = {
            f"{words}\nR@{k}": {name: found["retrieval"][key][f"r{k}"] for name, found in named.items()}
            for words, key in ways.items()
            for k in (1, 5)
        }
        charts.append((title, bar_chart(groups, title=title)))
    if "typographic" in results[0]:
        title = sentence("Accuracy under attack", lambda found: found["typographic"]["accuracy_under_attack"])
        groups = {
            f"right, {kind}": {name: found["typographic"]["kinds"][kind]["accuracy"] for name, found in named.items()}
            for kind in results[0]["typographic"]["kinds"]
        }
        groups["the word wins"] = {name: found["typographic"]["word_wins"] for name, found in named.items()}
        charts.append((title, share_chart(groups, title=title)))
    return charts


def names_of(results: Sequence[dict[str, Any]]) -> list[str]:
    """A name of its own for each model: its role, and its file's name where several have the same role."""
    roles = [found["name"] for found in results]
    names: list[str] = []
    for found in results:
        name = found["name"]
        if roles.count(name) > 1:
            stem = os.path.splitext(str(found["file"]))[0]
            name = "/".join(stem.replace(os.sep, "/").split("/")[-2:])  # every run's model is called best
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


def notes_of(model: Any, baseline: Any = None) -> list[str]:
    """The `notes` of what was measured, each once; of two models, what only one of them has says which."""
    mine, theirs = model.notes, (baseline or model).notes
    return [
        note if note in mine and note in theirs else f"Of the {'model' if note in mine else 'baseline'}: {note}"
        for note in dict.fromkeys((*mine, *theirs))
    ]


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
