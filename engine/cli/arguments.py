"""Flags and checks that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.load import load_dataset
from ..data.readers.caption_files import holds_captions
from ..data.readers.registry import FORMAT_NAMES
from ..errors import UserError
from ..settings import SettingInfo

if TYPE_CHECKING:
    from ..clip.full_clip import FullCLIP
    from ..data.dataset import ClipDataset

DEVICE_HELP = "cuda, cuda:1 or cpu (default: cuda where there is one)"


class Commands:
    """The commands of `clip-finetune`. Each has a function that takes its arguments and returns an exit status."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        self, name: str, run: Callable[[argparse.Namespace], int | None], help: str, *, opens_model: bool = True
    ) -> argparse.ArgumentParser:
        """Add a command and return its parser. None as the status means 0."""
        command = self._subparsers.add_parser(name, help=help, description=help)
        command.set_defaults(run=run, context_length=None)
        if opens_model:
            command.add_argument(
                "--activation",
                choices=("auto", "quick_gelu", "gelu"),
                default="auto",
                help="activation of the model's MLPs, if its file does not say (default: auto)",
            )
        return command


def add_context_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context-length",
        type=int,
        choices=(248,),
        metavar="248",
        help="stretch a model for 77 tokens to 248, as Long-CLIP does (default: as in the file)",
    )


def add_caption_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--caption-format",
        choices=FORMAT_NAMES,
        default="auto",
        metavar="FORMAT",
        help=f"format of the captions: {', '.join(FORMAT_NAMES)} (default: auto, which recognises it)",
    )
    parser.add_argument("--image-column", default="", metavar="NAME", help="for tables: the column of image names")
    parser.add_argument(
        "--caption-column", default="", metavar="NAME[,NAME]", help="for tables: the columns of captions"
    )


def add_setting_flags(parser: argparse.ArgumentParser, title: str, infos: Iterable[SettingInfo]) -> None:
    """Add a flag for each setting, as one group of the help. A flag that is not given is None."""
    group = parser.add_argument_group(title)
    for info in infos:
        flag = "--" + info.name.replace("_", "-")
        default = "none" if info.default == "" else info.default
        text = f"{info.help} (default: {default})".replace("%", "%%")
        if info.kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(flag, type=info.kind, choices=info.choices or None, default=None, help=text)


def given_settings(arguments: argparse.Namespace, infos: Mapping[str, SettingInfo]) -> dict[str, Any]:
    """Return the settings that stand on the command line."""
    return {name: getattr(arguments, name) for name in infos if getattr(arguments, name) is not None}


def open_model(arguments: argparse.Namespace, source: str) -> FullCLIP:
    from ..clip.load import load_full_clip

    return load_full_clip(source, activation=arguments.activation, context_length=arguments.context_length)


def open_dataset(arguments: argparse.Namespace, path: str) -> ClipDataset:
    return load_dataset(
        path, arguments.caption_format, image_column=arguments.image_column, caption_column=arguments.caption_column
    )


def require_writable(path: str, *others: str | None) -> None:
    """Check an output path before anything is measured for nothing.

    Raises `UserError` if the file cannot be written, or would replace one of the `others`, captions, or anything but a
    regular file.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give the name of a file.")
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is not a regular file and is not replaced; give another name.")
    parent = Path(os.path.abspath(path)).parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{path} cannot be written, because {parent} is not a folder that you can write to.")
    for other in filter(None, others):
        if os.path.abspath(other) == os.path.abspath(path) or _same_file(path, other):
            raise UserError(f"{path} is also read or written by this command; give another name.")
    if os.path.isfile(path) and holds_captions(path):
        raise UserError(f"{path} holds captions and is not replaced; give another name.")


def _same_file(first: str, second: str) -> bool:
    return os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)
