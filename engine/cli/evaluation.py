"""The command `eval`: measure and compare models and write a page, or check the evaluators themselves."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.dataset import ClipDataset
from ..errors import UserError
from ..notes import Notes
from .arguments import Commands, add_caption_flags, add_context_length, open_dataset, open_model, require_writable
from .terminal import print_line, print_notes

if TYPE_CHECKING:
    from ..evaluate.comparison import Comparison
    from ..evaluate.encoder import Runtime
    from ..evaluate.suite import ModelResult


def add_commands(commands: Commands) -> None:
    parser = commands.add(
        "eval",
        run_evaluation,
        "Measure models: zero-shot accuracy where there are labels, retrieval where there are captions.",
    )
    add_context_length(parser)
    parser.add_argument("--model", action="append", default=[], metavar="M", help="can be given several times")
    parser.add_argument("--baseline", metavar="M", help="the model to compare with")
    parser.add_argument("--data", metavar="DIR", help="a labelled or captioned dataset")
    add_caption_flags(parser)
    parser.add_argument(
        "--templates",
        choices=("openai-80", "simple", "none"),
        help="sentences that a class name is put into (default: openai-80; simple for words written on images)",
    )
    parser.add_argument(
        "--protocol",
        choices=("whole set", "published"),
        default="whole set",
        help="published: also the share of images that find their label among the 48 of a shuffled batch, which was "
        "published as the accuracy of fine-tunes and is not one",
    )
    parser.add_argument(
        "--typographic",
        action="store_true",
        help="also draw wrong words onto the images; in a folder such as SCAM's, use the words that are on them",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="with --baseline: also judge whether the model is sound, by its embeddings, its weights and what image "
        "models read from it",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--html", metavar="FILE", help="also write a page with tables and charts to FILE")
    parser.add_argument(
        "--selfcheck",
        action="store_true",
        help="instead of --data: does OpenAI's ViT-L/14, or --model, reach its published figures on these sets?",
    )
    parser.add_argument("--imagenet", metavar="DIR", help="the validation images, in a subfolder for each class")
    parser.add_argument("--coco", metavar="DIR", help="COCO's images, with Karpathy's dataset_coco.json")


def run_evaluation(arguments: argparse.Namespace) -> int:
    from ..data.images.image_cache import ImageCache, user_cache_folder
    from ..evaluate.encoder import EncodingCache
    from ..evaluate.suite import Candidate, Request, evaluate, rows_of
    from ..files import write_json
    from ..report.tables import table

    if arguments.selfcheck:
        return _selfcheck(arguments)
    _check_arguments(arguments)
    dataset = _load_attacks(arguments) or open_dataset(arguments, arguments.data)
    if arguments.compare:
        _check_comparable(arguments, dataset)
    files = [("model", file) for file in arguments.model]
    if arguments.baseline:
        files.append(("baseline", arguments.baseline))
    request = Request(templates=arguments.templates, protocol=arguments.protocol, typographic=arguments.typographic)
    notes = Notes(print_line)
    with contextlib.closing(ImageCache(user_cache_folder(), on_note=print_line)) as cache:
        runtime: Runtime = {"cache": cache, "features": EncodingCache()}
        candidates = (Candidate(role, file, open_model(arguments, file)) for role, file in files)
        results = evaluate(candidates, dataset, request, on_note=notes.add, **runtime)
        print_line(f"{dataset.name}: {len(dataset)} images ({dataset.reason})")
        notes.extend(dataset.notes)
        comparisons = _compare(arguments, dataset, notes, runtime) if arguments.compare else {}
    if arguments.json:
        numbers: dict[str, Any] = {"models": [result.as_dict() for result in results]}
        if comparisons:
            numbers["comparisons"] = [{"file": file} | found.as_dict() for file, found in comparisons.items()]
        write_json(arguments.json, numbers)
    if arguments.html:
        _write_page(arguments, dataset, results, comparisons, notes)
    print(table(rows_of(results)))
    for file, comparison in comparisons.items():
        print("\n".join([f"\n{file} beside {arguments.baseline}:", *comparison.verdict]))
    return 0 if all(os.path.isfile(path) for path in (arguments.json, arguments.html) if path) else 1


def _check_arguments(arguments: argparse.Namespace) -> None:
    if not arguments.model or not arguments.data:
        raise UserError("eval needs --model and --data: what to measure, and on which dataset.")
    if arguments.imagenet or arguments.coco:
        raise UserError("--imagenet and --coco are for --selfcheck; give --data.")
    if arguments.compare and not arguments.baseline:
        raise UserError("--compare needs --baseline: the model that the training started from.")
    inputs = (*arguments.model, arguments.baseline, arguments.data)
    for path, other in ((arguments.json, arguments.html), (arguments.html, arguments.json)):
        if path:
            require_writable(path, other, *inputs)


def _compare(
    arguments: argparse.Namespace, dataset: ClipDataset, notes: Notes, runtime: Runtime
) -> dict[str, Comparison]:
    """Compare each model with the baseline; by its file."""
    from ..evaluate.comparison import compare_full_clips

    baseline, comparisons = open_model(arguments, arguments.baseline), {}
    for file in dict.fromkeys(arguments.model):
        comparisons[file] = compare_full_clips(open_model(arguments, file), baseline, dataset, **runtime)
        notes.extend(comparisons[file].notes)
    return comparisons


def _check_comparable(arguments: argparse.Namespace, dataset: ClipDataset) -> None:
    """Refuse before anything is measured for nothing."""
    from ..evaluate.drift import require_one_architecture

    if len(dataset) < 2:
        raise UserError(f"--compare needs a few hundred images, and {dataset.name} has {len(dataset)}; give more.")
    baseline = open_model(arguments, arguments.baseline)
    for file in arguments.model:
        require_one_architecture(open_model(arguments, file), baseline)


def _write_page(
    arguments: argparse.Namespace,
    dataset: ClipDataset,
    results: Sequence[ModelResult],
    comparisons: Mapping[str, Comparison],
    notes: Notes,
) -> None:
    from ..data.tools.inspect import sample_images
    from ..evaluate.suite import measurements_of, rows_of
    from ..files import write_text
    from ..report.evaluation_report import ComparisonSection, EvaluationPage, evaluation_report

    counts = {
        "images": len(dataset),
        "captions": sum(map(len, dataset.captions)),
        "classes": len(dataset.class_names),
    }
    data = {"name": dataset.name} | {what: f"{count:,}" for what, count in counts.items() if count}
    settings = {
        "models": ", ".join(arguments.model),
        "baseline": arguments.baseline or "none",
        "templates": arguments.templates or "default",
        "protocol": arguments.protocol,
    }
    page = EvaluationPage(
        dataset=dataset.name,
        rows=rows_of(results),
        measurements=measurements_of(dataset, results),
        comparisons=[
            ComparisonSection(f"{file} beside {arguments.baseline}", found.verdict, found.chart(), found.tables())
            for file, found in comparisons.items()
        ],
        facts={"Data": data | {"format": dataset.reason}, "Settings": settings},
        notes=tuple(notes),
        samples=sample_images(dataset, 12, side=256),
    )
    print_line(f"The page is {write_text(arguments.html, evaluation_report(page))}.")


def _load_attacks(arguments: argparse.Namespace) -> ClipDataset | None:
    from ..evaluate.typographic.photographed import load_attacks

    return load_attacks(arguments.data) if arguments.typographic else None


def _selfcheck(arguments: argparse.Namespace) -> int:
    from ..data.images.image_cache import ImageCache, user_cache_folder
    from ..evaluate.selfcheck import require_folders, selfcheck
    from ..evaluate.zero_shot import PROTOCOLS
    from ..files import write_json

    imagenet, coco = arguments.imagenet or os.environ.get("IMAGENET"), arguments.coco or os.environ.get("COCO")
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
        raise UserError(f"--selfcheck measures what was published and does nothing with {given[0]}; leave it out.")
    require_folders(imagenet, coco)
    if arguments.json:
        require_writable(arguments.json, *arguments.model)
    source = (*arguments.model, os.environ.get("CLIP_WEIGHTS") or "ViT-L-14/openai")[0]
    model = open_model(arguments, source)
    print_notes(model.notes)
    with contextlib.closing(ImageCache(user_cache_folder(), on_note=print_line)) as cache:
        found = selfcheck(model, imagenet=imagenet, coco=coco, cache=cache, on_note=print_line)
    print_notes(found.notes)
    if arguments.json:
        write_json(arguments.json, found.as_dict())
    print(found.table())
    print(found.verdict)
    return 0 if found.passed else 1
