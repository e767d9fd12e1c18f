"""The command `clip-finetune`: what can be said on the command line; `commands` and `eval_command` do it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import get_type_hints

from ..clip.exports import EXPORTS
from ..data.readers.registry import CAPTION_FORMATS, FORMAT_NAMES, WRITERS
from ..data.tools.prepare import Preparation
from ..errors import UserError
from ..settings import SettingInfo
from ..train.config import DEFAULT_PRESET, PRESETS, all_settings
from . import commands
from .evaluate import run_eval
from .terminal import print_any_letter

_PREPARE = (
    "Make a new data set out of another: colour-jittered and mirrored copies, centre squares, squares around objects."
)
STOPPED = 130  # what a shell reports of a command ended by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0 only if what it promised is on the disk."""
    print_any_letter()
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"clip-finetune {arguments.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read what is printed, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"clip-finetune {arguments.command}: stopped.", file=sys.stderr)
        return STOPPED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip-finetune", description="Fine-tune CLIP, fold, export, merge and evaluate it."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = functools.partial(_command, subparsers)
    what = "Train, fold, export and evaluate a small CLIP on pictures that are drawn for it."
    _add_demo(command("demo", commands.run_demo, what, opens_a_model=False))
    _add_train(command("train", commands.run_train, "Train a CLIP on a folder of captioned pictures."))
    _add_fold(command("fold", commands.run_fold, "Turn a model in GmP form back into one with plain weights."))
    what = "Write a model for other programs: its text encoder, or --format."
    _add_export(command("export", commands.run_export, what))
    what = "Put a text or vision encoder, or both, into a full CLIP, which gives the rest."
    _add_merge(command("merge", commands.run_merge, what))
    what = "Measure models: zero-shot where there are labels, retrieval where captions are."
    _add_eval(command("eval", run_eval, what))
    what = "Write captions in another format, in a new place."
    _add_convert(command("convert", commands.run_convert, what, opens_a_model=False))
    _add_prepare(command("prepare", commands.run_prepare, _PREPARE, opens_a_model=False))
    what = "Tell what a model, data set or run is, and what is wrong with it."
    _add_info(command("info", commands.run_info, what, stretches=False))
    what = "Measure how fast a training step is on this machine, beside open_clip's and Hugging Face's."
    _add_bench(command("bench", commands.run_bench, what, stretches=False))
    return parser


def _command(
    subparsers, name: str, run: Callable, help: str, *, opens_a_model: bool = True, stretches: bool = True
) -> argparse.ArgumentParser:
    added = subparsers.add_parser(name, help=help, description=help)
    if opens_a_model:
        added.add_argument(
            "--activation",
            choices=("auto", "quick_gelu", "gelu"),
            default="auto",
            help="what a model's MLPs compute, where its file does not say it (default: auto)",
        )
    if opens_a_model and stretches:
        added.add_argument(
            "--context-length",
            type=int,
            choices=(248,),
            metavar="248",
            help="give a model that reads 77 tokens room for 248, as Long-CLIP has (default: as in the file)",
        )
    added.set_defaults(run=run)
    return added


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="clip_finetune_demo", metavar="DIR", help="where everything goes")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures (default: 0)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="a file, or a name such as ViT-L-14/openai")
    parser.add_argument("--data", required=True, metavar="DIR", help="a folder of captioned pictures")
    _add_captions(parser)
    parser.add_argument("--validation", metavar="DIR", help="another such folder, to measure on")
    parser.add_argument(
        "--validation-split",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="without --validation: the share of the pictures to measure on (default: 0)",
    )
    parser.add_argument("--out", required=True, metavar="RUN_DIR", help="the run folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in RUN_DIR, or begin it")
    parser.add_argument("--preset", default=DEFAULT_PRESET, choices=list(PRESETS), help=f"default: {DEFAULT_PRESET}")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    _add_settings(parser, all_settings())


def _add_fold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN.safetensors")
    parser.add_argument("output", metavar="OUT.safetensors")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN")
    parser.add_argument("output", metavar="OUT", help="a .safetensors file; for huggingface, a new folder")
    parser.add_argument(
        "--format",
        choices=tuple(EXPORTS),
        default="text",
        help=" ".join(f"{name}: {export.help}." for name, export in EXPORTS.items()) + " Default: text.",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp16", "bf16", "fp32", "mixed"),
        help="default: fp16 for text, vision and lora, else the model's own; mixed (openai, gmp): OpenAI's layout",
    )
    parser.add_argument("--baseline", metavar="M", help="for lora: the model that this one was trained from")
    parser.add_argument("--rank", type=int, default=32, help="for lora: more keeps more (default: 32)")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="TE.safetensors", help="a text encoder or a checkpoint with one")
    parser.add_argument("--vision", metavar="VISION.safetensors", help="a file for ComfyUI's Load CLIP Vision")
    parser.add_argument("--model", required=True, metavar="FULL", help="the full CLIP")
    parser.add_argument("output", metavar="OUT.safetensors")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", default=[], metavar="M", help="may be given several times")
    parser.add_argument("--baseline", metavar="M", help="the model to compare with")
    parser.add_argument("--data", metavar="DIR")
    _add_captions(parser)
    parser.add_argument(
        "--templates",
        choices=("openai-80", "simple", "none"),
        help="sentences that a class name is put into (default: openai-80; simple for words that are on the pictures)",
    )
    parser.add_argument(
        "--protocol",
        choices=("whole set", "published"),
        default="whole set",
        help="published: also the share of pictures that know their label among the 48 of a shuffled batch, which was "
        "published as the accuracy of fine-tunes and is none",
    )
    parser.add_argument(
        "--typographic",
        action="store_true",
        help="also draw wrong words into the pictures; or, in a folder such as SCAM's, measure those that are on them",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="with --baseline: also tell whether the model is sound, by its embeddings, its weights and what image "
        "models read of it",
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--html", metavar="FILE", help="write a page with tables and charts there too")
    parser.add_argument(
        "--selfcheck",
        action="store_true",
        help="instead of --data: does OpenAI's ViT-L/14, or --model, reach its published figures on these sets?",
    )
    parser.add_argument("--imagenet", metavar="DIR", help="the validation pictures, in a subfolder for each class")
    parser.add_argument("--coco", metavar="DIR", help="COCO's pictures, with Karpathy's dataset_coco.json")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DIR", help="a data set in any format: a folder, or a caption file")
    parser.add_argument(
        "--to",
        required=True,
        choices=WRITERS,
        metavar="FORMAT",
        help=" ".join(f"{known.name}: {known.help}." for known in CAPTION_FORMATS if known.writer),
    )
    parser.add_argument(
        "output",
        metavar="OUT",
        help="a new folder, which gets the pictures too, as hard links or copies; or a new file for the captions alone",
    )
    _add_captions(parser)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DIR", help="a data set in any format: a folder, or a caption file")
    parser.add_argument("output", metavar="OUT", help="a new folder; DIR stays as it is")
    _add_captions(parser)
    parser.add_argument("--device", help="for the detector: cuda, cuda:1 or cpu (default: cuda where there is one)")
    _add_fields(parser, Preparation)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="FILE_OR_FOLDER")
    parser.add_argument("--json", metavar="FILE", help="write the facts there too")


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


def _add_captions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--caption-format",
        choices=FORMAT_NAMES,
        default="auto",
        metavar="FORMAT",
        help=f"what format the captions of DIR are in: {', '.join(FORMAT_NAMES)} (default: auto, which recognises it)",
    )
    parser.add_argument("--image-column", default="", metavar="NAME", help="of a table: where the pictures' names are")
    parser.add_argument(
        "--caption-column", default="", metavar="NAME[,NAME]", help="of a table: where the captions are"
    )


def _add_settings(parser: argparse.ArgumentParser, infos: Mapping[str, SettingInfo]) -> None:
    """Add a flag for each setting; its value is None where it is not given."""
    for name, info in infos.items():
        flag, help = "--" + name.replace("_", "-"), info.help.replace("%", "%%") + f" (default: {info.default})"
        if info.kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            parser.add_argument(flag, type=info.kind, choices=info.choices or None, default=None, help=help)


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
