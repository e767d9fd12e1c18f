"""What a training tells: its progress, its sentences for the user, and its result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...clip.full_clip import FullCLIP

REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a front end shows while a training runs. `steps` and `validations` are the lines of metrics.jsonl so far."""

    step: int
    total_steps: int
    batch_size: int
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]

    @property
    def seconds_left(self) -> float | None:
        """How long the steps that are left take at the pace of the last ten; None before the first."""
        speeds = [line["pairs_per_second"] for line in self.steps[-10:]]
        if not speeds or min(speeds) <= 0:
            return None
        return (self.total_steps - self.step) * self.batch_size * sum(1 / speed for speed in speeds) / len(speeds)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The trained model: the best by validation loss, else the last. `best_step` 0 is the original.

    `notes` are sentences for the user; `already_finished` is true when the run was complete and nothing was trained.
    """

    full_clip: FullCLIP
    run_folder: Path
    best_step: int
    total_steps: int
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    notes: tuple[str, ...]
    already_finished: bool

    @property
    def report_file(self) -> Path | None:
        """The page about the run; None if it could not be written."""
        file = self.run_folder / REPORT
        return file if file.is_file() else None


class Notes(list):
    """Sentences for the user, told as they come."""

    def __init__(self, tell: Callable[[str], None]):
        super().__init__()
        self.tell = tell

    def append(self, note: str) -> None:
        if note not in self:
            super().append(note)
            self.tell(note)

    def extend(self, notes) -> None:
        for note in notes:
            self.append(note)
