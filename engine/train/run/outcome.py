"""The result of a run that is finished, now or before."""

from __future__ import annotations

from ...clip.load import load_full_clip
from ..setup import TrainSetup
from .best import read_best
from .checkpoints import Best
from .folder import RunFolder
from .metrics import MetricsLog
from .report import write_report
from .results import TrainResult


def finished_result(setup: TrainSetup, folder: RunFolder, step: int) -> TrainResult | None:
    """Return the result of a run whose last checkpoint is complete; None if something of it is still missing."""
    log = MetricsLog(folder)
    log.read()
    best, best_step = read_best(folder.best_file)
    if setup.validation is None and best_step != step:
        return None
    if setup.validation is not None and (best is None or log.last_validated != step):
        return None
    if not folder.has_newest_report():
        write_report(setup, log, step, best)
    total = setup.plan.total_steps
    surplus = f", more than the {total} that epochs now asks for" if step > total else ""
    setup.notes.add(f"This run was finished before ({step} steps{surplus}); its result is returned as it is.")
    return make_result(setup, log, step, best, already_finished=True)


def make_result(
    setup: TrainSetup, log: MetricsLog, step: int, best: Best | None, *, already_finished: bool = False
) -> TrainResult:
    """Return the result of a run of `step` steps; its model is read into memory."""
    best_step = step if best is None else best.step
    if best_step == 0:
        setup.notes.add(
            "No step of this training was better than the original on the validation set; the original comes back. "
            "Try a lower learning_rate, more images or more epochs."
        )
    return TrainResult(
        full_clip=load_full_clip(log.folder.best_file, in_memory=True),
        run_folder=log.folder.path,
        best_step=best_step,
        total_steps=setup.plan.total_steps,
        steps=log.steps,
        validations=log.validations,
        notes=tuple(setup.notes),
        already_finished=already_finished,
    )
