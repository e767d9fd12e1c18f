"""metrics.jsonl: its lines, the steps whose numbers are still on the device, and the log that writes them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from ...errors import UserError
from ...files import write_text
from ..optim.gradient_norms import GradientNorms
from .folder import RunFolder

# A line is in the file after this many steps or seconds, whichever is sooner.
STEPS, SECONDS = 10, 0.8


class StepLine(TypedDict, total=False):
    """The line of an optimizer step. Only a step that fp16 skipped has `skipped`; it has no gradient norm."""

    kind: Literal["step"]
    step: int
    epoch: float
    learning_rate: dict[str, float]
    micro_batch: int
    loss: float
    grad_norm: float | None
    logit_scale: float
    pairs_per_second: float
    grad_norms: dict[str, float]
    skipped: bool


class ValidationLine(TypedDict):
    """The line of a validation."""

    kind: Literal["validation"]
    step: int
    loss: float
    image_to_text_r1: float
    text_to_image_r1: float


class StepOutcome(NamedTuple):
    """The numbers of a step, still on the device.

    `logit_scale` is exp(logit_scale) before the step, `finite` (bool) whether the weights moved, `norms` are the
    gradient norms before clipping.
    """

    loss: Tensor
    logit_scale: Tensor
    finite: Tensor
    norms: GradientNorms
    learning_rates: dict[str, float]


@dataclasses.dataclass(frozen=True)
class StepNumbers:
    """The numbers of a step on the host; `finite` is whether the weights moved."""

    line: StepLine
    grad_norm: float
    by_layer: list[float]
    finite: bool


class PendingSteps:
    """Steps whose numbers are still on the device: they are fetched several at a time."""

    def __init__(self, groups: Sequence[str]) -> None:
        self._groups = groups
        self._waiting: list[tuple[StepLine, int, Tensor]] = []  # with the number of pairs
        self._since = time.monotonic()

    def add(self, line: StepLine, outcome: StepOutcome, pairs: int) -> None:
        """Add a step; `line` gets the fields that the device knows when it is taken."""
        norms, dtype = outcome.norms, torch.promote_types(outcome.loss.dtype, torch.float32)
        scalars = (outcome.loss, outcome.logit_scale, outcome.finite, norms.total)
        parts = [*(value.reshape(1) for value in scalars), norms.by_group, norms.by_layer]
        self._waiting.append((line, pairs, torch.cat([part.to(dtype) for part in parts])))

    def due(self) -> bool:
        return len(self._waiting) >= STEPS or time.monotonic() - self._since > SECONDS

    def take(self) -> list[StepNumbers]:
        """Return all steps, oldest first; waits for the device once. Their speed is that of all since the last call."""
        waiting, since = self._waiting, self._since
        rows = torch.stack([numbers for *_, numbers in waiting]).tolist() if waiting else []
        self._waiting, self._since = [], time.monotonic()
        seconds = max(self._since - since, 1e-9)
        speed = round(sum(pairs for _, pairs, _ in waiting) / seconds, 3)
        return [self._numbers(line, speed, *row) for (line, *_), row in zip(waiting, rows, strict=True)]

    def _numbers(
        self, line: StepLine, speed: float, loss: float, logit_scale: float, finite: float, total: float, *norms: float
    ) -> StepNumbers:
        by_group = dict(zip(self._groups, norms, strict=False))
        line["loss"] = loss
        line["grad_norm"] = total
        line["logit_scale"] = logit_scale
        line["pairs_per_second"] = speed
        line["grad_norms"] = {
            name: float(f"{norm:.4g}") for name, norm in by_group.items() if norm and math.isfinite(norm)
        }
        if not math.isfinite(total):  # under fp16, the loss scale was too high; JSON has no infinity
            line["grad_norm"], line["skipped"] = None, True
        return StepNumbers(line, total, list(norms[len(self._groups) :]), bool(finite))

    def skip_time(self) -> None:
        """Leave the time since the last `take` out of the speed; nothing may be pending."""
        self._since = time.monotonic()


class MetricsLog:
    """All lines of metrics.jsonl, and those that are not in the file yet.

    `restore_folder` is called when files of the run folder have been deleted; it makes the folder and config.json anew.
    """

    def __init__(self, folder: RunFolder, restore_folder: Callable[[], None] = lambda: None) -> None:
        self.folder, self.file, self.restore_folder = folder, folder.metrics_file, restore_folder
        self.steps: list[StepLine] = []
        self.validations: list[ValidationLine] = []
        self._unwritten: list[StepLine | ValidationLine] = []

    @property
    def last_validated(self) -> int | None:
        """The step of the last validation."""
        return self.validations[-1]["step"] if self.validations else None

    @property
    def bytes(self) -> int:
        return self.file.stat().st_size if self.file.is_file() else 0

    def read(self) -> None:
        """Read the file, up to a line that a crash cut short."""
        lines = []
        with contextlib.suppress(FileNotFoundError, ValueError):
            for line in self.file.read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(line))
        self.steps = [line for line in lines if line["kind"] == "step"]
        self.validations = [line for line in lines if line["kind"] == "validation"]

    def start(self, size: int = 0) -> None:
        """Start from the first `size` bytes of the file; a resumed run writes the lines after them again."""
        self._append("")
        text = self.file.read_bytes()[:size]
        os.truncate(self.file, text.rfind(b"\n") + 1)
        self.read()

    def add_steps(self, lines: Sequence[StepLine]) -> None:
        self.steps += lines
        self._unwritten += lines
        self.flush()

    def add_validation(self, line: ValidationLine) -> None:
        self.validations.append(line)
        self._unwritten.append(line)
        self.flush()

    def flush(self, *, sync: bool = False) -> None:
        """Write what is not in the file yet.

        With `sync` it reaches the disk before this returns, so that a checkpoint never counts on lines that a crash
        took.
        """
        if self.folder.is_whole():
            self._append(_as_jsonl(self._unwritten))
        else:
            self.restore_folder()
            lines: list[StepLine | ValidationLine] = sorted(
                [*self.steps, *self.validations], key=lambda line: line["step"]
            )
            write_text(self.file, _as_jsonl(lines))
        self._unwritten = []
        if sync:
            with open(self.file, "rb+") as file:
                os.fsync(file.fileno())

    def _append(self, text: str) -> None:
        """Append all of the text, or nothing."""
        size = self.bytes
        try:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            if self.bytes > size:
                os.truncate(self.file, size)
            raise UserError(
                f"{self.file} could not be written ({error.strerror}); free some space or choose a folder that you can "
                "write to, and start the same run again: it resumes from its last checkpoint."
            ) from error


def _as_jsonl(lines: Sequence[StepLine | ValidationLine]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)
