"""What each command does, from its arguments; `eval` is in eval_command."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any

from ..data.dataset import ClipDataset
from ..data.load import load_dataset
from ..data.readers.caption_files import holds_captions
from ..data.splits import split_dataset
from ..data.tools.convert import convert_captions
from ..data.tools.prepare import Preparation, prepare_images
from ..errors import UserError
from ..train.config import GMP_PRESETS, PRESETS, TrainConfig, all_settings
from .terminal import Meter, print_notes, say, stop_between_steps, tenths


def open_model(arguments: argparse.Namespace, source: str):
    from ..clip.load import load_full_clip

    return load_full_clip(source, activation=arguments.activation, context_length=arguments.context_length)


def open_data(arguments: argparse.Namespace, place: str) -> ClipDataset:
    return load_dataset(
        place, arguments.caption_format, image_column=arguments.image_column, caption_column=arguments.caption_column
    )


def require_writable(path: str, *others: str | None) -> None:
    """Before anything is measured for nothing: raise `UserError` where a file cannot be written, or would take the
    place of one of the `others`, of captions, or of what is no ordinary file."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the name of a file.")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no ordinary file, and it is not replaced; give another name.")
    above = Path(os.path.abspath(path)).parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{path} cannot be written, because {above} is no folder that you can write to.")
    for other in filter(None, others):
        if os.path.abspath(other) == os.path.abspath(path) or _same_file(path, other):
            raise UserError(f"{path} would take the place of what is read or written besides; give another name.")
    if os.path.isfile(path) and holds_captions(path):
        raise UserError(f"{path} holds captions, and they are not replaced; give another name.")


def _same_file(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def run_demo(arguments: argparse.Namespace) -> None:
    from . import demo

    demo.run_demo(Path(arguments.out), seed=arguments.seed, say=say)


def run_train(arguments: argparse.Namespace) -> int:
    from ..data.images.image_cache import user_cache_folder
    from ..train.trainer import train

    config, origins = config_from(arguments)
    if not 0 <= arguments.validation_split < 1:
        raise UserError(
            f"--validation-split is {arguments.validation_split}; give a share from 0 to below 1, such as 0.1."
        )
    model = open_model(arguments, arguments.model)
    train_set, validation = open_data(arguments, arguments.data), None
    say(f"{train_set.name}: {len(train_set)} pictures ({train_set.reason})")
    if arguments.validation:
        validation = open_data(arguments, arguments.validation)
    elif arguments.validation_split:
        train_set, validation = split_dataset(train_set, arguments.validation_split, config.seed)
    with stop_between_steps() as check_cancelled, Meter() as meter:
        result = train(
            model,
            train_set,
            validation,
            config,
            run_folder=arguments.out,
            device=arguments.device,
            on_existing="resume" if arguments.resume else "auto",
            origins=origins,
            cache_folder=user_cache_folder(),
            on_note=meter.say,
            on_progress=meter.show,
            check_cancelled=check_cancelled,
        )
    best = result.run_folder / "best.safetensors"
    where = f", of step {result.best_step} of {result.total_steps}"
    report = f" {result.report_file} tells all about the run." if result.report_file else ""
    say(f"The model{where}, is in {best}.{report}")
    return 0 if best.is_file() else 1


def config_from(arguments: argparse.Namespace) -> tuple[TrainConfig, dict[str, str]]:
    """The settings, and for each where it came from: the command line, the preset or the default."""
    presets = GMP_PRESETS if arguments.gmp else PRESETS
    values: dict[str, Any] = dict(presets[arguments.preset].values)
    origins = dict.fromkeys(values, f"preset {arguments.preset}")
    for name in all_settings():
        given = getattr(arguments, name)
        if given is not None:
            values[name], origins[name] = given, "command line"
    return TrainConfig.from_flat(**values), origins


def run_fold(arguments: argparse.Namespace) -> None:
    from ..clip.exports import save_full_clip
    from ..clip.gmp import fold_gmp
    from ..clip.tensor_files import require_safetensors_path

    require_safetensors_path(arguments.output)
    folded = fold_gmp(open_model(arguments, arguments.input))
    print_notes(folded.notes)
    say(f"Wrote {save_full_clip(folded, arguments.output)}.")


def run_export(arguments: argparse.Namespace) -> None:
    from ..clip.exports import check_export, export

    format, output, dtype = arguments.format, arguments.output, arguments.dtype
    check_export(output, format=format, dtype=dtype, with_baseline=bool(arguments.baseline))
    model = open_model(arguments, arguments.input)
    print_notes(model.notes)
    baseline = open_model(arguments, arguments.baseline) if arguments.baseline else None
    print_notes(baseline.notes if baseline else ())
    export(model, output, format=format, dtype=dtype, baseline=baseline, rank=arguments.rank, on_note=say)
    say(f"Wrote {output}.")


def run_merge(arguments: argparse.Namespace) -> None:
    from ..clip.exports import save_full_clip
    from ..clip.merge import merge_text_encoder, merge_vision_encoder
    from ..clip.tensor_files import require_safetensors_path

    if not arguments.text and not arguments.vision:
        raise UserError("merge needs --text, --vision or both: what to put into the full CLIP.")
    require_safetensors_path(arguments.output)
    merged = open_model(arguments, arguments.model)
    if arguments.text:
        merged = merge_text_encoder(arguments.text, merged)
    if arguments.vision:
        merged = merge_vision_encoder(arguments.vision, merged)
    print_notes(merged.notes)
    say(f"Wrote {save_full_clip(merged, arguments.output)}.")


def run_convert(arguments: argparse.Namespace) -> None:
    dataset = open_data(arguments, arguments.data)
    say(f"{dataset.name}: {len(dataset)} pictures ({dataset.reason})")
    print_notes(dataset.notes)
    print_notes(convert_captions(dataset, arguments.to, arguments.output))


def run_prepare(arguments: argparse.Namespace) -> None:
    from ..train.device import resolve_device

    names = [field.name for field in dataclasses.fields(Preparation)]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    settings, dataset = Preparation(**given), open_data(arguments, arguments.data)
    say(f"{dataset.name}: {len(dataset)} pictures ({dataset.reason})")
    print_notes(dataset.notes)
    with stop_between_steps() as check_cancelled:
        prepared = prepare_images(
            dataset,
            arguments.output,
            settings,
            device=resolve_device(arguments.device),
            on_note=say,
            on_progress=tenths("pictures"),
            check_cancelled=check_cancelled,
        )
    print_notes(prepared.notes)
    say(f"Wrote {prepared.folder}.")


def run_info(arguments: argparse.Namespace) -> None:
    from ..files import write_json
    from .info import describe, in_words

    if arguments.json:
        require_writable(arguments.json, arguments.path)
    facts = describe(arguments.path, arguments.activation)
    if arguments.json:
        write_json(arguments.json, facts)
    print(in_words(facts))


def run_bench(arguments: argparse.Namespace) -> None:
    from ..bench.measure import bench
    from ..files import write_json

    if arguments.json:
        require_writable(arguments.json, arguments.model)
    found = bench(
        arguments.model,
        batch_size=arguments.batch_size,
        rounds=arguments.rounds,
        precision=arguments.precision,
        threads=arguments.threads,
        device=arguments.device,
        activation=arguments.activation,
        on_note=say,
    )
    if arguments.json:
        write_json(arguments.json, found.as_dict())
    print(found.table())
