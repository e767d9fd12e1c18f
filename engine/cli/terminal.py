"""What the command says on the terminal while it works, and how Ctrl-C ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from ..report.tables import time_words


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        say(note)


def tenths(things: str) -> Callable[[int, int], None]:
    """Says how far a piece of work is, a line for each tenth."""
    said = [0]

    def count(done: int, total: int) -> None:
        if (tenth := done * 10 // max(total, 1)) > said[0]:
            said[0] = tenth
            say(f"{done} of {total} {things}")

    return count


class Meter:
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
        say(note)

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
            say(line)

    def _end_line(self) -> None:
        if self.open_line:
            print(file=sys.stderr)
            self.open_line = False


@contextlib.contextmanager
def stop_between_steps():
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


def print_any_letter() -> None:
    """Windows consoles may not be able to print every caption."""
    if os.name == "nt":
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
