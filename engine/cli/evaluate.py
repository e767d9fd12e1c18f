"""What `clip-finetune eval` does: measure, compare and write a page, or check the measurements themselves."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

from ..data.dataset import ClipDataset
from ..errors import UserError
from .commands import open_data, open_model, require_writable
from .terminal import print_notes, say


def run_eval(arguments: argparse.Namespace) -> int:
    from ..data.images.image_cache import ImageCache, user_cache_folder
    from ..evaluate.encoder import EncodingCache
    from ..evaluate.suite import evaluate, table_of
    from ..files import write_json

    if arguments.selfcheck:
        return _selfcheck(arguments)
    if not arguments.model or not arguments.data:
        raise UserError("eval needs --model and --data: what to measure, and on which data set.")
    if arguments.imagenet or arguments.coco:
        raise UserError("--imagenet and --coco are for --selfcheck; give --data.")
    if arguments.compare and not arguments.baseline:
        raise UserError("--compare needs --baseline: the model that the training began from.")
    read = (*arguments.model, arguments.baseline, arguments.data)
    for path, other in ((arguments.json, arguments.html), (arguments.html, arguments.json)):
        if path:
            require_writable(path, other, *read)
    dataset = _load_attacks(arguments) or open_data(arguments, arguments.data)
    if arguments.compare:
        _check_comparable(arguments, dataset)
    models = [("model", file) for file in arguments.model]
    if arguments.baseline:
        models.append(("baseline", arguments.baseline))
    notes, features, attacks = _Told(), EncodingCache(), {}
    with contextlib.closing(ImageCache(user_cache_folder(), on_note=say)) as cache:
        results = evaluate(
            models,
            dataset,
            templates=arguments.templates,
            protocol=arguments.protocol,
            typographic=arguments.typographic,
            activation=arguments.activation,
            context_length=arguments.context_length,
            cache=cache,
            features=features,
            on_note=notes.say,
            on_attack=attacks.setdefault,
        )
        say(f"{dataset.name}: {len(dataset)} pictures ({dataset.reason})")
        for note in dataset.notes:
            notes.say(note)
        compared = _compare(arguments, dataset, cache, features, notes) if arguments.compare else {}
    found: dict[str, Any] = {"models": results}
    if compared:
        found["comparisons"] = [{"file": file} | comparison.as_dict() for file, comparison in compared.items()]
    if arguments.json:
        write_json(arguments.json, found)
    if arguments.html:
        _write_page(arguments, dataset, results, attacks, compared, notes)
    print(table_of(results))
    for file, comparison in compared.items():
        print("\n".join([f"\n{file} beside {arguments.baseline}:", *comparison.verdict]))
    return 0 if all(os.path.isfile(path) for path in (arguments.json, arguments.html) if path) else 1


def _compare(arguments: argparse.Namespace, dataset: ClipDataset, cache, features, notes: _Told) -> dict[str, Any]:
    """A comparison with the baseline for each model, by its file."""
    from ..evaluate.comparison import compare_full_clips

    baseline, compared = open_model(arguments, arguments.baseline), {}
    for file in dict.fromkeys(arguments.model):
        found = compare_full_clips(open_model(arguments, file), baseline, dataset, cache=cache, features=features)
        compared[file] = found
        for note in found.notes:
            notes.say(note)
    return compared


def _check_comparable(arguments: argparse.Namespace, dataset: ClipDataset) -> None:
    """Before anything is measured for nothing."""
    from ..evaluate.drift import require_one_architecture

    if len(dataset) < 2:
        raise UserError(f"--compare needs some hundred pictures, and {dataset.name} has {len(dataset)}; give more.")
    baseline = open_model(arguments, arguments.baseline)
    for file in arguments.model:
        require_one_architecture(open_model(arguments, file), baseline)


def _write_page(arguments: argparse.Namespace, dataset: ClipDataset, results, attacks, compared, notes: _Told) -> None:
    from ..data.tools.inspect import sample_images
    from ..evaluate.suite import charts_of, names_of, rows_of
    from ..evaluate.typographic.attack import sheet_heading, sheet_of
    from ..files import write_text
    from ..report.evaluation_report import evaluation_report

    counts = {
        "pictures": len(dataset),
        "captions": sum(map(len, dataset.captions)),
        "classes": len(dataset.class_names),
    }
    data = {"name": dataset.name} | {what: f"{count:,}" for what, count in counts.items() if count}
    data["format"] = dataset.reason
    settings = {
        "models": ", ".join(arguments.model),
        "baseline": arguments.baseline or "none",
        "templates": arguments.templates or "default",
        "protocol": arguments.protocol,
    }
    attacked = ("", [])
    if attacks:
        baseline = attacks.get("baseline")
        attacked = sheet_heading(baseline is not None), sheet_of(dataset, attacks["model"], baseline)
    page = evaluation_report(
        data,
        results,
        names_of(results),
        rows_of(results),
        charts=charts_of(results),
        attacked=attacked,
        comparisons=[
            {
                "title": f"{file} beside {arguments.baseline}",
                "verdict": found.verdict,
                "chart": found.chart(),
                "tables": found.tables(),
            }
            for file, found in compared.items()
        ],
        settings=settings,
        notes=notes,
        pictures=sample_images(dataset, 12, side=256),
    )
    say(f"The page is {write_text(arguments.html, page)}.")


class _Told(list):
    """Sentences that were said, for the page."""

    def say(self, note: str) -> None:
        if note not in self:
            self.append(note)
            say(note)


def _load_attacks(arguments: argparse.Namespace) -> ClipDataset | None:
    from ..evaluate.typographic.photographed import load_attacks

    return load_attacks(arguments.data) if arguments.typographic else None


def _selfcheck(arguments: argparse.Namespace) -> int:
    from ..data.images.image_cache import ImageCache, user_cache_folder
    from ..evaluate.selfcheck import require_sets, selfcheck
    from ..evaluate.zero_shot import PROTOCOLS
    from ..files import write_json

    sets = {
        "imagenet": arguments.imagenet or os.environ.get("IMAGENET"),
        "coco": arguments.coco or os.environ.get("COCO"),
    }
    if arguments.data or len(arguments.model) > 1:
        raise UserError("--selfcheck takes one --model at most, and --imagenet and --coco instead of --data.")
    others = {
        "--html": arguments.html,
        "--baseline": arguments.baseline,
        "--compare": arguments.compare,
        "--typographic": arguments.typographic,
        "--protocol": arguments.protocol != PROTOCOLS[0],
        "--templates": arguments.templates,
    }
    if given := [flag for flag, value in others.items() if value]:
        raise UserError(f"--selfcheck measures what was published, and does nothing with {given[0]}; leave it out.")
    require_sets(**sets)
    if arguments.json:
        require_writable(arguments.json, *arguments.model)
    source = (*arguments.model, os.environ.get("CLIP_WEIGHTS") or "ViT-L-14/openai")[0]
    model = open_model(arguments, source)
    print_notes(model.notes)
    with contextlib.closing(ImageCache(user_cache_folder(), on_note=say)) as cache:
        found = selfcheck(model, **sets, cache=cache, on_note=say)
    print_notes(found.notes)
    if arguments.json:
        write_json(arguments.json, found.as_dict())
    print(found.table())
    print(found.verdict)
    return 0 if found.passed else 1
