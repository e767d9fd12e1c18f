"""What a run gives: the model in best.safetensors, and the result that is returned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...clip.exports import save_full_clip
from ...clip.full_clip import FullCLIP
from ...clip.load import load_full_clip
from ...data.images.transforms import Transform
from ...evaluate.encoder import with_trained_transform
from ..setup import TrainSetup
from .checkpoints import Best
from .folder import RunFolder
from .metrics import MetricsLog
from .report import write_report
from .results import TrainResult


def write_best(file: Path, model: FullCLIP, transform: Transform, step: int, best: Best | None) -> None:
    """Save the model; its own metadata say which step it is from, so that a crash cannot make the two differ."""
    provenance = {**model.provenance, "validation": best and dataclasses.asdict(best), "step": step}
    save_full_clip(dataclasses.replace(model, provenance=with_trained_transform(provenance, transform)), file)


def read_best(file: Path) -> tuple[Best | None, int | None]:
    """Return the validation of the model in the file and its step; None for what is not there."""
    if not file.is_file():
        return None, None
    provenance = load_full_clip(file).provenance
    best = provenance.get("validation")
    return Best(**best) if best else None, provenance.get("step")


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
