"""The command `clip-finetune`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from .data.captions import FORMATS
from .data.convert import TARGETS, convert_captions
from .data.dataset import ClipDataset, load_dataset
from .data.preparation import Preparation, prepare_images
from .errors import UserError
from .report.tables import time_words
from .train.config import DEFAULT_PRESET, GMP_PRESETS, PRESETS, TrainConfig

_EXPORTS = ("text", "vision", "openai", "gmp", "huggingface", "lora")
_PREPARE = (
    "Make a new data set out of another: colour-jittered and mirrored copies, centre squares, squares around objects."
)
STOPPED = 130  # what a shell reports of a command ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 only if what it promised is on the disk."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        print(f"clip-finetune {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"clip-finetune {arguments.command}: stopped.", file=sys.stderr)
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip-finetune", description="Fine-tune CLIP, fold, export, merge and evaluate it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, help: str, *, opens_a_model: bool = True, stretches: bool = True):
        added = commands.add_parser(name, help=help, description=help)
        if opens_a_model:
            added.add_argument(
                "--activation", choices=("auto", "quick_gelu", "gelu"), default="auto",
                help="what a model's MLPs compute, where its file does not say it (default: auto)",
            )  # fmt: skip
        if opens_a_model and stretches:
            added.add_argument(
                "--context-length", type=int, choices=(248,), metavar="248",
                help="give a model that reads 77 tokens room for 248, as Long-CLIP has (default: as in the file)",
            )  # fmt: skip
        added.set_defaults(run=run)
        return added

    demo = command(
        "demo",
        _demo,
        "Train, fold, export and evaluate a small CLIP on pictures that are drawn for it.",
        opens_a_model=False,
    )
    demo.add_argument("--out", default="clip_finetune_demo", metavar="DIR", help="where everything goes")
    demo.add_argument("--seed", type=int, default=0, help="another seed draws other pictures (default: 0)")

    _add_train(command("train", _train, "Train a CLIP on a folder of captioned pictures."))

    fold = command("fold", _fold, "Turn a model in GmP form back into one with plain weights.")
    fold.add_argument("input", metavar="IN.safetensors")
    fold.add_argument("output", metavar="OUT.safetensors")

    _add_export(command("export", _export, "Write a model for other programs: its text encoder, or --format."))

    merge = command("merge", _merge, "Put a text or vision encoder, or both, into a full CLIP, which gives the rest.")
    merge.add_argument("--text", metavar="TE.safetensors", help="a text encoder or a checkpoint with one")
    merge.add_argument("--vision", metavar="VISION.safetensors", help="a file for ComfyUI's Load CLIP Vision")
    merge.add_argument("--model", required=True, metavar="FULL", help="the full CLIP")
    merge.add_argument("output", metavar="OUT.safetensors")

    evaluate = command("eval", _eval, "Measure models: zero-shot where there are labels, retrieval where captions are.")
    _add_eval(evaluate)

    convert = command("convert", _convert, "Write captions in another format, in a new place.", opens_a_model=False)
    convert.add_argument("data", metavar="DIR", help="a data set in any format: a folder, or a caption file")
    convert.add_argument(
        "--to", required=True, choices=TARGETS, metavar="FORMAT",
        help="json: a labels JSON. sidecar: a text file beside each picture. kohya: meta_cap.json. metadata: Hugging "
        "Face's metadata.jsonl. csv: image,caption. coco: COCO's captions.",
    )  # fmt: skip
    convert.add_argument(
        "output", metavar="OUT",
        help="a new folder, which gets the pictures too, as hard links or copies; or a new file for the captions alone",
    )  # fmt: skip
    _add_captions(convert)

    _add_prepare(command("prepare", _prepare, _PREPARE, opens_a_model=False))

    what = "Tell what a model, data set or run is, and what is wrong with it."
    info = command("info", _info, what, stretches=False)
    info.add_argument("path", metavar="FILE_OR_FOLDER")
    info.add_argument("--json", metavar="FILE", help="write the facts there too")

    what = "Measure how fast a training step is on this machine, beside open_clip's and Hugging Face's."
    _add_bench(command("bench", _bench, what, stretches=False))
    return parser


def _add_captions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--caption-format", choices=FORMATS, default="auto", metavar="FORMAT",
        help=f"what format the captions of DIR are in: {', '.join(FORMATS)} (default: auto, which recognises it)",
    )  # fmt: skip
    parser.add_argument("--image-column", default="", metavar="NAME", help="of a table: where the pictures' names are")
    parser.add_argument(
        "--caption-column", default="", metavar="NAME[,NAME]", help="of a table: where the captions are"
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", default=[], metavar="M", help="may be given several times")
    parser.add_argument("--baseline", metavar="M", help="the model to compare with")
    parser.add_argument("--data", metavar="DIR")
    _add_captions(parser)
    parser.add_argument(
        "--templates", choices=("openai-80", "simple", "none"), default="openai-80", help="default: openai-80"
    )
    parser.add_argument(
        "--protocol", choices=("whole set", "published"), default="whole set",
        help="published: also the share of pictures that know their label among the 48 of a shuffled batch, which was "
        "published as the accuracy of fine-tunes and is none",
    )  # fmt: skip
    parser.add_argument(
        "--typographic", action="store_true",
        help="also draw wrong words into the pictures; or, in a folder such as SCAM's, measure those that are on them",
    )  # fmt: skip
    parser.add_argument(
        "--compare", action="store_true",
        help="with --baseline: also tell whether the model is sound, by its embeddings, its weights and what image "
        "models read of it",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--html", metavar="FILE", help="write a page with tables and charts there too")
    parser.add_argument(
        "--selfcheck", action="store_true",
        help="instead of --data: does OpenAI's ViT-L/14, or --model, reach its published figures on these sets?",
    )  # fmt: skip
    parser.add_argument("--imagenet", metavar="DIR", help="the validation pictures, in a subfolder for each class")
    parser.add_argument("--coco", metavar="DIR", help="COCO's validation pictures and annotations")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DIR", help="a data set in any format: a folder, or a caption file")
    parser.add_argument("output", metavar="OUT", help="a new folder; DIR stays as it is")
    _add_captions(parser)
    parser.add_argument("--device", help="for the detector: cuda, cuda:1 or cpu (default: cuda where there is one)")
    _add_fields(parser, Preparation)


def _add_fields(parser: argparse.ArgumentParser, settings: type) -> None:
    """A flag for each field of a class of settings; None where it is not given."""
    kinds = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        flag, kind = "--" + field.name.replace("_", "-"), kinds[field.name]
        text = field.metadata["help"].replace("%", "%%") + f" (default: {field.default})"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, type=kind, choices=field.metadata["choices"], default=None, help=text)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ViT-B-32", metavar="M", help="ViT-B-32 (default), ViT-L-14, or a file")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pairs in a step (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often all take a turn (default: 3)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of our steps (default: auto)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="cores to use (default: all)")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")


def _load(arguments: argparse.Namespace, place: str) -> ClipDataset:
    return load_dataset(
        place, arguments.caption_format, image_column=arguments.image_column, caption_column=arguments.caption_column
    )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT", help="a .safetensors file; for huggingface, a new folder")
    parser.add_argument(
        "--format", choices=_EXPORTS, default="text",
        help="text: for ComfyUI, diffusers, Forge and kohya (default). vision: for ComfyUI's Load CLIP Vision. openai: "
        "both towers, plain. gmp: both, in GmP form. huggingface: a folder for transformers. lora: what the text tower "
        "has over --baseline's.",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32", "mixed"),
        help="default: fp16 for text, vision and lora, else the model's own; mixed (openai, gmp): OpenAI's layout",
    )  # fmt: skip
    parser.add_argument("--baseline", metavar="M", help="for lora: the model that this one was trained from")
    parser.add_argument("--rank", type=int, default=32, help="for lora: more keeps more (default: 32)")


# ---- train -----------------------------------------------------------------------------------------------------------


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="a file, or a name such as ViT-L-14/openai")
    parser.add_argument("--data", required=True, metavar="DIR", help="a folder of captioned pictures")
    _add_captions(parser)
    parser.add_argument("--validation", metavar="DIR", help="another such folder, to measure on")
    parser.add_argument(
        "--validation-split", type=float, default=0.0, metavar="SHARE",
        help="without --validation: the share of the pictures to measure on (default: 0)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, metavar="RUN_DIR", help="the run folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in RUN_DIR, or begin it")
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=list(PRESETS), help=f"default: {DEFAULT_PRESET}")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    _add_fields(parser, TrainConfig)


def config_from(arguments: argparse.Namespace) -> tuple[TrainConfig, dict[str, str]]:
    """The settings, and for each where it came from: the command line, the preset or the default."""
    presets = GMP_PRESETS if arguments.gmp else PRESETS
    values: dict[str, Any] = dict(presets[arguments.preset].values)
    origins = dict.fromkeys(values, f"preset {arguments.preset}")
    for field in dataclasses.fields(TrainConfig):
        given = getattr(arguments, field.name)
        if given is not None:
            values[field.name], origins[field.name] = given, "command line"
    return TrainConfig(**values), origins


def _train(arguments: argparse.Namespace) -> int:
    from .data.cache import user_cache_folder
    from .data.dataset import split_dataset
    from .train.trainer import train

    config, origins = config_from(arguments)
    if not 0 <= arguments.validation_split < 1:
        raise UserError(
            f"--validation-split is {arguments.validation_split}; give a share from 0 to below 1, such as 0.1."
        )
    model = _open(arguments, arguments.model)
    train_set, validation = _load(arguments, arguments.data), None
    _say(f"{train_set.name}: {len(train_set)} pictures ({train_set.reason})")
    if arguments.validation:
        validation = _load(arguments, arguments.validation)
    elif arguments.validation_split:
        train_set, validation = split_dataset(train_set, arguments.validation_split, config.seed)
    with _stop_between_steps() as check_cancelled, _Meter() as meter:
        result = train(
            model, train_set, validation, config, run_folder=arguments.out, device=arguments.device,
            on_existing="resume" if arguments.resume else "auto", origins=origins, cache_folder=user_cache_folder(),
            on_note=meter.say, on_progress=meter.show, check_cancelled=check_cancelled,
        )  # fmt: skip
    best = result.run_folder / "best.safetensors"
    where = f", of step {result.best_step} of {result.total_steps}"
    report = result.run_folder / "report.html"
    _say(f"The model{where}, is in {best}; {report} tells all about the run.")
    return 0 if best.is_file() else 1


@contextlib.contextmanager
def _stop_between_steps():
    """Ctrl-C and SIGTERM take effect where the training asks, not in the middle of an optimizer step."""
    asked: list[int] = []

    def check_cancelled() -> None:
        if asked:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, lambda *_: asked.append(1)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check_cancelled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Meter:
    """One line that is rewritten on a terminal; elsewhere a line for each tenth of the run and each validation."""

    def __init__(self):
        self.rewrites = sys.stderr.isatty()
        self.open_line = False
        self.shown = (-1, 0)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._end_line()

    def say(self, note: str) -> None:
        self._end_line()
        _say(note)

    def show(self, progress) -> None:
        mark = (progress.step * 10 // max(progress.total_steps, 1), len(progress.validations))
        if not self.rewrites and mark == self.shown:
            return
        self.shown = mark
        line = f"step {progress.step}/{progress.total_steps}"
        if progress.steps:
            line += f"  loss {progress.steps[-1]['loss']:.4f}  {progress.steps[-1]['pairs_per_second']:.1f} pairs/s"
            line += f"  {time_words(progress.seconds_left)} left"
        if progress.validations:
            last = progress.validations[-1]
            right = (last["image_to_text_r1"] + last["text_to_image_r1"]) / 2
            line += f"  validation loss {last['loss']:.4f}, recall at 1 {right:.1%} (step {last['step']})"
        if self.rewrites:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
            self.open_line = True
        else:
            _say(line)

    def _end_line(self) -> None:
        if self.open_line:
            print(file=sys.stderr)
            self.open_line = False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- the other commands ----------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(Path(arguments.out), seed=arguments.seed, say=_say)


def _check_output(path: str) -> None:
    """Before a model is opened, or even downloaded, for nothing."""
    if not path.endswith(".safetensors"):
        raise UserError(f"{path} must end in .safetensors.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the name of a file.")


def _open(arguments: argparse.Namespace, source: str):
    from .clip.full_clip import load_full_clip

    return load_full_clip(source, activation=arguments.activation, context_length=arguments.context_length)


def _fold(arguments: argparse.Namespace) -> None:
    from .clip.full_clip import save_full_clip
    from .clip.gmp import fold_gmp

    _check_output(arguments.output)
    folded = fold_gmp(_open(arguments, arguments.input))
    _tell_notes(folded.notes)
    _say(f"Wrote {save_full_clip(folded, arguments.output)}.")


def _export(arguments: argparse.Namespace) -> None:
    from .clip import export
    from .clip.full_clip import save_full_clip
    from .clip.gmp import fold_gmp, to_gmp
    from .clip.huggingface import save_huggingface

    kind, output = arguments.format, arguments.output
    # For image programs fp16; what may be trained on keeps its own.
    dtype = arguments.dtype or (None if kind in ("openai", "gmp", "huggingface") else "fp16")
    if dtype == "mixed" and kind not in ("openai", "gmp"):
        raise UserError(f"--dtype mixed is for --format openai and gmp; for {kind} choose fp16, bf16 or fp32.")
    if (kind == "lora") != bool(arguments.baseline):
        raise UserError("--format lora and --baseline, the model that this one was trained from, go together.")
    if kind != "huggingface":
        _check_output(output)
    model = _open(arguments, arguments.input)
    _tell_notes(model.notes)
    if kind == "lora":
        _export_lora(arguments, model, dtype)
    elif kind == "huggingface":
        _tell_notes(save_huggingface(model, output, dtype=dtype)[1])
    elif kind == "gmp":
        save_full_clip(to_gmp(model), output, dtype=dtype)
    else:
        if model.parameterization == "gmp":
            model = fold_gmp(model)
            _say("The model is in GmP form; it is folded to plain weights for the export.")
        writers = {"text": export.export_text_encoder, "vision": export.export_vision_encoder, "openai": save_full_clip}
        writers[kind](model, output, dtype=dtype)
    _say(f"Wrote {output}.")


def _export_lora(arguments: argparse.Namespace, model, dtype: str) -> None:
    from .clip.lora import export_lora

    baseline = _open(arguments, arguments.baseline)
    report = export_lora(model, baseline, arguments.output, rank=arguments.rank, dtype=dtype)
    _tell_notes((*baseline.notes, *report.notes, report.sentence))


def _merge(arguments: argparse.Namespace) -> None:
    from .clip.full_clip import save_full_clip
    from .clip.merge import merge_text_encoder, merge_vision_encoder

    if not arguments.text and not arguments.vision:
        raise UserError("merge needs --text, --vision or both: what to put into the full CLIP.")
    _check_output(arguments.output)
    merged = _open(arguments, arguments.model)
    if arguments.text:
        merged = merge_text_encoder(arguments.text, merged)
    if arguments.vision:
        merged = merge_vision_encoder(arguments.vision, merged)
    _tell_notes(merged.notes)
    _say(f"Wrote {save_full_clip(merged, arguments.output)}.")


def _eval(arguments: argparse.Namespace) -> int:
    from .clip.files import write_json
    from .data.cache import PictureCache, user_cache_folder
    from .evaluate.features import FeatureCache
    from .evaluate.together import evaluate, table_of

    if arguments.selfcheck:
        return _selfcheck(arguments)
    if not arguments.model or not arguments.data:
        raise UserError("eval needs --model and --data: what to measure, and on which data set.")
    if arguments.imagenet or arguments.coco:
        raise UserError("--imagenet and --coco are for --selfcheck; give --data.")
    if arguments.compare and not arguments.baseline:
        raise UserError("--compare needs --baseline: the model that the training began from.")
    if arguments.html:
        _check_page(arguments.html)
    dataset = _load_attacks(arguments) or _load(arguments, arguments.data)
    if arguments.compare:
        _check_comparable(arguments)
    models = [("model", file) for file in arguments.model]
    if arguments.baseline:
        models.append(("baseline", arguments.baseline))
    notes, features = _Told(), FeatureCache()
    with contextlib.closing(PictureCache(user_cache_folder(), say=_say)) as cache:
        results = evaluate(
            models, dataset, templates=arguments.templates, protocol=arguments.protocol,
            typographic=arguments.typographic, activation=arguments.activation,
            context_length=arguments.context_length, cache=cache, features=features, on_note=notes.say,
        )  # fmt: skip
        print(table_of(results))
        compared = _compare(arguments, dataset, cache, features, notes) if arguments.compare else {}
    found: dict[str, Any] = {"models": results}
    if compared:
        found["comparisons"] = [{"file": file} | comparison.as_dict() for file, comparison in compared.items()]
    if arguments.json:
        write_json(arguments.json, found)
    if not arguments.html:
        return 0
    _write_page(arguments, dataset, results, compared, notes)
    return 0 if os.path.isfile(arguments.html) else 1


def _compare(arguments: argparse.Namespace, dataset: ClipDataset, cache, features, notes: _Told) -> dict[str, Any]:
    """A comparison with the baseline for each model, by its file, told as they come."""
    from .evaluate.comparison import compare_full_clips

    baseline, compared = _open(arguments, arguments.baseline), {}
    for file in dict.fromkeys(arguments.model):
        found = compare_full_clips(_open(arguments, file), baseline, dataset, cache=cache, features=features)
        compared[file] = found
        print(f"\n{file} beside {arguments.baseline}:")
        print("\n".join(found.verdict))
        for note in found.notes:
            notes.say(note)
    return compared


def _check_comparable(arguments: argparse.Namespace) -> None:
    """Before anything is measured for nothing."""
    from .evaluate.drift import require_one_architecture

    baseline = _open(arguments, arguments.baseline)
    for file in arguments.model:
        require_one_architecture(_open(arguments, file), baseline)


def _check_page(path: str) -> None:
    """Before anything is measured for nothing."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the name of a file, such as {os.path.join(path, 'report.html')}.")
    above = Path(path).parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{path} cannot be written, because {above} is no folder that you can write to.")


def _write_page(arguments: argparse.Namespace, dataset: ClipDataset, results, compared, notes: _Told) -> None:
    from .clip.files import write_text
    from .data.inspection import sample_pictures
    from .evaluate.together import charts_of, names_of, rows_of
    from .report.evaluation_report import evaluation_report

    counts = {"pictures": len(dataset), "captions": sum(map(len, dataset.captions)),
              "classes": len(dataset.class_names)}  # fmt: skip
    data = {"name": dataset.name} | {what: f"{count:,}" for what, count in counts.items() if count}
    data["format"] = dataset.reason
    settings = {
        "models": ", ".join(arguments.model), "baseline": arguments.baseline or "none",
        "templates": arguments.templates, "protocol": arguments.protocol,
    }  # fmt: skip
    page = evaluation_report(
        data, results, names_of(results), rows_of(results), charts=charts_of(results),
        comparisons=[
            {"title": f"{file} beside {arguments.baseline}", "verdict": found.verdict, "chart": found.chart(),
             "tables": found.tables()}
            for file, found in compared.items()
        ],
        settings=settings, notes=notes, pictures=sample_pictures(dataset, 12, side=256),
    )  # fmt: skip
    _say(f"The page is {write_text(arguments.html, page)}.")


class _Told(list):
    """Sentences that were said, for the page."""

    def say(self, note: str) -> None:
        if note not in self:
            self.append(note)
            _say(note)


def _load_attacks(arguments: argparse.Namespace) -> ClipDataset | None:
    from .evaluate.attacks import load_attacks

    return load_attacks(arguments.data) if arguments.typographic else None


def _selfcheck(arguments: argparse.Namespace) -> int:
    from .clip.files import write_json
    from .data.cache import PictureCache, user_cache_folder
    from .evaluate.selfcheck import require_sets, selfcheck

    sets = {"imagenet": arguments.imagenet or os.environ.get("IMAGENET"),
            "coco": arguments.coco or os.environ.get("COCO")}  # fmt: skip
    if arguments.data or len(arguments.model) > 1:
        raise UserError("--selfcheck takes one --model at most, and --imagenet and --coco instead of --data.")
    require_sets(**sets)
    source = (*arguments.model, os.environ.get("CLIP_WEIGHTS") or "ViT-L-14/openai")[0]
    model = _open(arguments, source)
    _tell_notes(model.notes)
    with contextlib.closing(PictureCache(user_cache_folder(), say=_say)) as cache:
        found = selfcheck(model, **sets, cache=cache, on_note=_say)
    _tell_notes(found.notes)
    print(found.table())
    print(found.verdict)
    if arguments.json:
        write_json(arguments.json, found.as_dict())
    return 0 if found.passed else 1


def _convert(arguments: argparse.Namespace) -> None:
    dataset = _load(arguments, arguments.data)
    _say(f"{dataset.name}: {len(dataset)} pictures ({dataset.reason})")
    _tell_notes(dataset.notes)
    _tell_notes(convert_captions(dataset, arguments.to, arguments.output))


def _prepare(arguments: argparse.Namespace) -> None:
    from .train.compute import resolve_device

    names = [field.name for field in dataclasses.fields(Preparation)]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    settings, dataset = Preparation(**given), _load(arguments, arguments.data)
    _say(f"{dataset.name}: {len(dataset)} pictures ({dataset.reason})")
    _tell_notes(dataset.notes)
    with _stop_between_steps() as check_cancelled:
        prepared = prepare_images(
            dataset, arguments.output, settings, device=resolve_device(arguments.device), on_note=_say,
            on_progress=_tenths("pictures"), check_cancelled=check_cancelled,
        )  # fmt: skip
    _tell_notes(prepared.notes)
    _say(f"Wrote {prepared.folder}.")


def _tenths(things: str) -> Callable[[int, int], None]:
    """Says how far a piece of work is, a line for each tenth."""
    said = [0]

    def count(done: int, total: int) -> None:
        if (tenth := done * 10 // max(total, 1)) > said[0]:
            said[0] = tenth
            _say(f"{done} of {total} {things}")

    return count


def _info(arguments: argparse.Namespace) -> None:
    from .clip.files import write_json
    from .info import describe, in_words

    facts = describe(arguments.path, arguments.activation)
    print(in_words(facts))
    if arguments.json:
        write_json(arguments.json, facts)


def _bench(arguments: argparse.Namespace) -> None:
    from .bench import bench
    from .clip.files import write_json

    found = bench(
        arguments.model, batch_size=arguments.batch_size, rounds=arguments.rounds, precision=arguments.precision,
        threads=arguments.threads, device=arguments.device, activation=arguments.activation, say=_say,
    )  # fmt: skip
    print(found.table())
    if arguments.json:
        write_json(arguments.json, found.as_dict())


def _tell_notes(notes: Sequence[str]) -> None:
    for note in notes:
        _say(note)


if os.name == "nt":  # Windows consoles may not be able to print every caption
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
