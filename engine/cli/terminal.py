"""What the command prints while it works, and how Ctrl-C ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from ..train.run.results import Progress


def print_line(text: str) -> None:
    """Print on stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        print_line(note)


def print_tenths(things: str) -> Callable[[int, int], None]:
    """Return a progress callback (done, total) that prints a line for each tenth."""
    last_tenth = 0

    def count(done: int, total: int) -> None:
        nonlocal last_tenth
        if (tenth := done * 10 // max(total, 1)) > last_tenth:
            last_tenth = tenth
            print_line(f"{done} of {total} {things}")

    return count


class ProgressLine:
    """A training's progress: a bar on a terminal, elsewhere a line for each tenth of the run and each validation."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._shown = (-1, 0)

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def print_line(self, note: str) -> None:
        tqdm.write(note, file=sys.stderr)

    def show(self, progress: Progress) -> None:
        if sys.stderr.isatty():
            self._show_bar(progress)
            return
        tenth = (progress.step * 10 // max(progress.total_steps, 1), len(progress.validations))
        if tenth != self._shown:
            self._shown = tenth
            print_line(f"step {progress.step}/{progress.total_steps}  {_numbers(progress)}")

    def _show_bar(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = tqdm(total=progress.total_steps, initial=progress.step, unit="step", dynamic_ncols=True)
        self._bar.set_postfix_str(_numbers(progress), refresh=False)
        self._bar.update(progress.step - self._bar.n)


def _numbers(progress: Progress) -> str:
    parts = []
    if progress.steps:
        last = progress.steps[-1]
        parts.append(f"loss {last['loss']:.4f}  {last['pairs_per_second']:.1f} pairs/s")
    if progress.validations:
        line = progress.validations[-1]
        recall = (line["image_to_text_r1"] + line["text_to_image_r1"]) / 2
        parts.append(f"validation loss {line['loss']:.4f}, recall at 1 {recall:.1%} (step {line['step']})")
    return "  ".join(parts)


@contextlib.contextmanager
def stop_between_steps() -> Iterator[Callable[[], None]]:
    """Yield a function that raises `KeyboardInterrupt` once Ctrl-C or SIGTERM came.

    The training calls it between steps, so an optimizer step is never interrupted in the middle.
    """
    signals: list[int] = []

    def check_cancelled() -> None:
        if signals:
            raise KeyboardInterrupt

    previous = {
        number: signal.signal(number, lambda number, _: signals.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield check_cancelled
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def replace_unprintable() -> None:
    """Print a replacement for letters that a Windows console cannot show, instead of failing."""
    if os.name == "nt":
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
