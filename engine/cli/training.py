"""`clip-finetune train`."""

from __future__ import annotations

import argparse
from typing import Any

from ..data.splits import split_dataset
from ..errors import UserError
from ..train.config import DEFAULT_PRESET, GMP_PRESETS, PRESETS, SECTIONS, TrainConfig, all_settings
from .arguments import (
    DEVICE_HELP,
    Commands,
    add_caption_flags,
    add_context_length,
    add_setting_flags,
    given_settings,
    open_dataset,
    open_model,
)
from .terminal import ProgressLine, print_line, stop_between_steps


def add_commands(commands: Commands) -> None:
    train = commands.add("train", run_train, "Train a CLIP on a folder of captioned images.")
    add_context_length(train)
    train.add_argument("--model", required=True, metavar="M", help="a file, or a name such as ViT-L-14/openai")
    train.add_argument("--data", required=True, metavar="DIR", help="a folder of captioned images")
    add_caption_flags(train)
    train.add_argument("--validation", metavar="DIR", help="another such folder, to validate on")
    train.add_argument(
        "--validation-split",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="without --validation: the share of the images to validate on (default: 0)",
    )
    train.add_argument("--out", required=True, metavar="RUN_DIR", help="the run folder")
    train.add_argument("--resume", action="store_true", help="resume the run in RUN_DIR, or start it")
    train.add_argument("--preset", default=DEFAULT_PRESET, choices=list(PRESETS), help=f"default: {DEFAULT_PRESET}")
    train.add_argument("--device", help=DEVICE_HELP)
    for section in ("", *SECTIONS):
        infos = [info for info in all_settings().values() if info.section == section]
        add_setting_flags(train, section or "main settings", infos)


def run_train(arguments: argparse.Namespace) -> int:
    from ..data.images.image_cache import user_cache_folder
    from ..train.trainer import train

    config, origins = config_from(arguments)
    if not 0 <= arguments.validation_split < 1:
        raise UserError(
            f"--validation-split is {arguments.validation_split}; give a share from 0 to below 1, such as 0.1."
        )
    model = open_model(arguments, arguments.model)
    train_set, validation = open_dataset(arguments, arguments.data), None
    print_line(f"{train_set.name}: {len(train_set)} images ({train_set.reason})")
    if arguments.validation:
        validation = open_dataset(arguments, arguments.validation)
    elif arguments.validation_split:
        train_set, validation = split_dataset(train_set, arguments.validation_split, config.seed)
    with stop_between_steps() as check_cancelled, ProgressLine() as progress:
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
            on_note=progress.print_line,
            on_progress=progress.show,
            check_cancelled=check_cancelled,
        )
    best = result.run_folder / "best.safetensors"
    report = f" See {result.report_file} for all about the run." if result.report_file else ""
    print_line(f"The model of step {result.best_step} of {result.total_steps} is in {best}.{report}")
    return 0 if best.is_file() else 1


def config_from(arguments: argparse.Namespace) -> tuple[TrainConfig, dict[str, str]]:
    """Return the config, and for each setting where it came from: the command line or the preset."""
    presets = GMP_PRESETS if arguments.gmp else PRESETS
    values: dict[str, Any] = dict(presets[arguments.preset].values)
    origins = dict.fromkeys(values, f"preset {arguments.preset}")
    given = given_settings(arguments, all_settings())
    return TrainConfig.from_flat(**values | given), origins | dict.fromkeys(given, "command line")
