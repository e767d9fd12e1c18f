"""Writes what a training gives into the run folder: the best model, checkpoints, chart and report."""

from __future__ import annotations

import time

from ...errors import UserError
from ..setup import TrainSetup
from ..step import TrainingStep
from .checkpoints import Best, Checkpoint
from .metrics import MetricsLog
from .outcome import read_best, write_best
from .report import write_chart, write_report


class RunWriter:
    """The files of one run, and which step the newest of them are from. `best` is None without a validation."""

    def __init__(self, setup: TrainSetup, training_step: TrainingStep, log: MetricsLog) -> None:
        self.setup, self.training_step, self.log, self.folder = setup, training_step, log, log.folder
        self.best: Best | None = None
        self.saved_step: int | None = None
        self._last_save = time.monotonic()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint: read metrics.jsonl up to it, and which model is the best."""
        self.saved_step = checkpoint.step
        if self.setup.validation is not None:
            self.best, _ = read_best(self.folder.best_file)
        if checkpoint.best and self.best is None:
            self.setup.notes.add(f"{self.folder.best_file} was deleted; the best model is searched for anew from here.")
        self.log.start(checkpoint.metrics_bytes)
        if lost := checkpoint.step - len(self.log.steps):
            self.setup.notes.add(f"metrics.jsonl has lost the lines of {lost} steps.")

    def offer(self, step: int, loss: float) -> None:
        """Write the weights to best.safetensors if this validation loss is the lowest so far."""
        if self.best is None or loss < self.best.loss:
            self._write_best(step, Best(step, loss))

    def save_is_due(self, step: int) -> bool:
        checkpoints = self.setup.config.checkpoints
        if checkpoints.save_every_steps and step % checkpoints.save_every_steps == 0:
            return True
        minutes = checkpoints.save_every_minutes
        return bool(minutes) and time.monotonic() - self._last_save > minutes * 60

    def save(self, step: int) -> None:
        """Save a checkpoint; nothing may be pending. Raises `UserError` for weights that are not finite."""
        self._require_finite_weights(step)
        self._save_checkpoint(step)

    def save_last(self, step: int) -> None:
        """Save the last weights for now: as the best ones where nothing is validated, and in a checkpoint."""
        self._require_finite_weights(step)
        if self.setup.validation is None:
            self._write_best(step, None)  # first, so that a checkpoint of the last step means that the model exists
        elif not self.folder.best_file.is_file() and step == self.log.last_validated:
            self.setup.notes.add(f"{self.folder.best_file} was deleted; the last weights take its place.")
            self._write_best(step, Best(step, self.log.validations[-1]["loss"]))
        self._save_checkpoint(step)

    def report(self, step: int) -> None:
        write_report(self.setup, self.log, step, self.best)

    def chart(self) -> None:
        write_chart(self.log)

    def _write_best(self, step: int, best: Best | None) -> None:
        """Save the weights as they are now; what did not train is the original's own."""
        model = self.setup.model
        if step:
            origin = f"trained for {step} steps ({self.folder.path.name})"
            model = model.derive(self.training_step.trained_tensors(), step=origin)
        write_best(self.folder.best_file, model, self.setup.transform, step, best)
        self.best = best

    def _save_checkpoint(self, step: int) -> None:
        self.log.flush(sync=True)
        config, plan = self.setup.config, self.setup.plan
        epoch, position = divmod(step, plan.steps_per_epoch)
        checkpoint = Checkpoint(
            step=step,
            total_steps=plan.total_steps,
            best=self.best,
            metrics_bytes=self.log.bytes,
            schedule={"name": config.optimizer.schedule, "step": step, "warmup": config.optimizer.warmup},
            sampler={"seed": config.seed, "epoch": epoch, "position": position},
            **vars(self.training_step.state()),
        )
        self.folder.save_checkpoint(checkpoint, config.checkpoints.keep_checkpoints)
        self.saved_step, self._last_save = step, time.monotonic()
        write_chart(self.log)

    def _require_finite_weights(self, step: int) -> None:
        if not self.training_step.finite_weights():
            raise UserError(
                f"The weights became infinite by step {step}; they are not saved, and the last good checkpoint is kept "
                f"in {self.folder.path}. Try a lower learning_rate."
            )
