"""The entry point of `clip-finetune`: its parser, and how errors and Ctrl-C end a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..errors import UserError
from . import benchmark, datasets, demo, evaluation, info, models, training
from .arguments import Commands
from .terminal import replace_unprintable

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The exit status is 0 only if what the command promised is on disk."""
    replace_unprintable()
    arguments = _parser().parse_args(argv)
    try:
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"clip-finetune {arguments.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"clip-finetune {arguments.command}: stopped.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip-finetune", description="Fine-tune CLIP, fold, export, merge and evaluate it."
    )
    commands = Commands(parser)
    for group in (demo, training, models, evaluation, info, datasets, benchmark):
        group.add_commands(commands)
    return parser
