"""`clip-finetune convert` and `prepare`: from datasets to datasets."""

from __future__ import annotations

import argparse

from ..data.dataset import ClipDataset
from ..data.readers.registry import CAPTION_FORMATS, WRITERS
from ..data.tools.prepare import Preparation
from ..settings import setting_infos
from .arguments import DEVICE_HELP, Commands, add_caption_flags, add_setting_flags, given_settings, open_dataset
from .terminal import print_line, print_notes, print_tenths, stop_between_steps

_INPUT_HELP = "a dataset in any format: a folder, or a caption file"


def add_commands(commands: Commands) -> None:
    convert = commands.add("convert", run_convert, "Write captions in another format.", opens_model=False)
    convert.add_argument("data", metavar="DIR", help=_INPUT_HELP)
    convert.add_argument(
        "--to",
        required=True,
        choices=list(WRITERS),
        metavar="FORMAT",
        help=" ".join(f"{format.name}: {format.help}." for format in CAPTION_FORMATS if format.writer),
    )
    convert.add_argument(
        "output",
        metavar="OUT",
        help="a new folder, with the images as hard links or copies; or a new file for the captions alone",
    )
    add_caption_flags(convert)

    prepare = commands.add(
        "prepare",
        run_prepare,
        "Make a new dataset: colour-jittered and mirrored copies, centre squares, squares around objects.",
        opens_model=False,
    )
    prepare.add_argument("data", metavar="DIR", help=_INPUT_HELP)
    prepare.add_argument("output", metavar="OUT", help="a new folder; DIR is not changed")
    add_caption_flags(prepare)
    prepare.add_argument("--device", help=f"for the detector: {DEVICE_HELP}")
    add_setting_flags(prepare, "what to make", setting_infos(Preparation).values())


def run_convert(arguments: argparse.Namespace) -> None:
    from ..data.tools.convert import convert_captions

    dataset = _open(arguments)
    print_notes(convert_captions(dataset, arguments.to, arguments.output))


def run_prepare(arguments: argparse.Namespace) -> None:
    from ..data.tools.prepare import prepare_images
    from ..train.device import resolve_device

    settings = Preparation(**given_settings(arguments, setting_infos(Preparation)))
    dataset = _open(arguments)
    with stop_between_steps() as check_cancelled:
        prepared = prepare_images(
            dataset,
            arguments.output,
            settings,
            device=resolve_device(arguments.device),
            on_note=print_line,
            on_progress=print_tenths("images"),
            check_cancelled=check_cancelled,
        )
    print_notes(prepared.notes)
    print_line(f"Wrote {prepared.folder}.")


def _open(arguments: argparse.Namespace) -> ClipDataset:
    dataset = open_dataset(arguments, arguments.data)
    print_line(f"{dataset.name}: {len(dataset)} images ({dataset.reason})")
    print_notes(dataset.notes)
    return dataset
