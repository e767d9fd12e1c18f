"""What a training tells its caller: callbacks, progress, notes and the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from ...clip.full_clip import FullCLIP
from ...notes import Notes
from .folder import REPORT
from .metrics import StepLine, ValidationLine


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a front end shows while a training runs. `steps` and `validations` are the lines of metrics.jsonl so far."""

    step: int
    total_steps: int
    batch_size: int
    steps: Sequence[StepLine]
    validations: Sequence[ValidationLine]

    @property
    def seconds_left(self) -> float | None:
        """Estimate the remaining time from the speed of the last ten steps; None before the first."""
        speeds = [line["pairs_per_second"] for line in self.steps[-10:]]
        if not speeds or min(speeds) <= 0:
            return None
        return (self.total_steps - self.step) * self.batch_size * sum(1 / speed for speed in speeds) / len(speeds)


@dataclasses.dataclass(frozen=True)
class Callbacks:
    """How a training talks to its caller; `on_progress` and `check_cancelled` may raise anything to stop it."""

    notes: Notes = dataclasses.field(default_factory=Notes)
    on_progress: Callable[[Progress], None] = lambda progress: None
    check_cancelled: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The trained model: the best by validation loss, else the last. `best_step` 0 is the original.

    `already_finished` is true when the run was complete before and nothing was trained.
    """

    full_clip: FullCLIP
    run_folder: Path
    best_step: int
    total_steps: int
    steps: Sequence[StepLine]
    validations: Sequence[ValidationLine]
    notes: tuple[str, ...]
    already_finished: bool

    @property
    def report_file(self) -> Path | None:
        """The report of the run; None if it could not be written."""
        file = self.run_folder / REPORT
        return file if file.is_file() else None
