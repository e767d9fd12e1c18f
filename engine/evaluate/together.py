"""Several models on one data set: everything that the data allows, as one list of numbers and one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..clip.full_clip import FullCLIP, load_full_clip
from ..data.cache import PictureCache
from ..data.dataset import ClipDataset
from ..report.tables import table
from .retrieval import eval_retrieval
from .zero_shot import eval_zero_shot


def evaluate(
    models: Sequence[tuple[str, str | os.PathLike | FullCLIP]],
    dataset: ClipDataset,
    *,
    templates: str = "openai-80",
    activation: str = "auto",
    context_length: int | None = None,
    device: torch.device | str | None = None,
    cache: PictureCache | None = None,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """The list under "models" of `eval --json`: zero-shot where the data set has labels, retrieval where captions.

    `models` are pairs of a name ("model" or "baseline") and a file, hub name or FullCLIP.
    """
    results, told = [], set()
    for name, source in models:
        full_clip, file = source, None
        if not isinstance(source, FullCLIP):
            full_clip, file = load_full_clip(source, activation=activation, context_length=context_length), str(source)
        result: dict[str, Any] = {"name": name, "file": file}
        measured = []
        how = {"device": device, "cache": cache}
        if dataset.has_labels:
            measured.append(("zero_shot", eval_zero_shot(full_clip, dataset, templates=templates, **how)))
        if dataset.has_captions:
            measured.append(("retrieval", eval_retrieval(full_clip, dataset, **how)))
        for part, found in measured:
            result["images"] = found.images
            result[part] = found.as_dict()
            for note in (*full_clip.notes, *found.notes):
                if note not in told:
                    told.add(note)
                    on_note(note)
        results.append(result)
    return results


def table_of(results: Sequence[dict[str, Any]]) -> str:
    """The same numbers for a reader, a row a model, in percent."""
    rows = []
    for result in results:
        row = {"model": result["name"], "file": result["file"] or "", "images": str(result.get("images", ""))}
        if "zero_shot" in result:
            zero_shot = result["zero_shot"]
            row |= {"zero-shot top 1": percent(zero_shot["top1"]), "top 5": percent(zero_shot["top5"]),
                    "mean per class": percent(zero_shot["mean_per_class"])}  # fmt: skip
        if "retrieval" in result:
            for key, words in (("image_to_text", "image to text"), ("text_to_image", "text to image")):
                found = result["retrieval"][key]
                row |= {f"{words} R@1": percent(found["r1"]), f"{words} R@5": percent(found["r5"])}
        rows.append(row)
    return table(rows)


def percent(share: float) -> str:
    return f"{share:.1%}"
