"""report.html: what a run was, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UserError
from ...files import write_text
from ..config import all_settings

if TYPE_CHECKING:
    from ..trainer import Training

_PICTURES = 12


def write_report(training: Training) -> None:
    """Write report.html out of what is in the run folder and some of the pictures. That it cannot be written
    is a note and no more: everything in it is in the other files too."""
    from ...data.tools.inspect import sample_images  # here: whoever imports the engine need not wait for them
    from ...report.run_report import run_report

    folder = training.folder
    try:
        shown = training.train_set if training.validation is None else training.validation
        page = run_report(
            folder.path.name,
            folder.config(),
            training.steps,
            training.validations,
            step=training.step,
            total_steps=training.total_steps,
            best_step=None if training.best is None else int(training.best["step"]),
            defaults={name: info.default for name, info in all_settings().items()},
            notes=training.notes,
            images=sample_images(shown, _PICTURES, side=256),
        )
        write_text(folder.report_file, page)
    except (UserError, OSError, MemoryError, LookupError, TypeError, ValueError) as error:
        # The last ones: a config.json or metrics.jsonl of another version, or one that somebody edited.
        training.notes.append(f"The report of the run could not be written ({type(error).__name__}: {error}).")
