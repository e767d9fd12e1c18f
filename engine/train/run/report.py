"""chart.png and report.html: what a run was, for people."""

from __future__ import annotations

from ...errors import UserError
from ...files import replacing, write_text
from ...report.charts import loss_chart
from ..config import all_settings
from ..setup import TrainSetup
from .checkpoints import Best
from .metrics import MetricsLog

_IMAGES = 12


def write_chart(log: MetricsLog) -> None:
    """Write chart.png: losses and learning rate so far."""
    with replacing(log.folder.chart_file) as beside:
        loss_chart(log.steps, log.validations, title=log.folder.path.name).save(beside, format="PNG")


def write_report(setup: TrainSetup, log: MetricsLog, step: int, best: Best | None) -> None:
    """Write report.html after `step` steps, from the run folder and some images.

    A failure becomes a note: the other files hold everything in the report.
    """
    from ...data.tools.inspect import sample_images  # slow to import, and importing the engine must be quick
    from ...report.run_report import run_report

    folder, shown = log.folder, setup.train_set if setup.validation is None else setup.validation
    try:
        page = run_report(
            folder.path.name,
            folder.config(),
            log.steps,
            log.validations,
            step=step,
            total_steps=setup.plan.total_steps,
            best_step=None if best is None else best.step,
            defaults={name: info.default for name, info in all_settings().items()},
            notes=tuple(setup.notes),
            images=sample_images(shown, _IMAGES, side=256),
        )
        write_text(folder.report_file, page)
    except (UserError, OSError, MemoryError, LookupError, TypeError, ValueError) as error:
        # The last three come of a config.json or metrics.jsonl that somebody edited.
        setup.notes.add(f"The report of the run could not be written ({type(error).__name__}: {error}).")
