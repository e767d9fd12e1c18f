"""The training loop: from a full CLIP and a dataset to a better full CLIP and a run folder."""

from __future__ import annotations

import contextlib
import math
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..data.images.image_cache import ImageCache
from ..data.loader import Batch, LoaderOptions, TrainLoader
from ..errors import UserError
from ..files import remove_parts
from ..notes import Notes
from ..report.tables import table
from .config import TrainConfig
from .device import out_of_memory
from .freezing import stage_at
from .frozen_features import FrozenFeatures
from .memory import Forecast
from .run.checkpoints import Checkpoint
from .run.description import describe_run
from .run.folder import RunFolder, claim_run_folder
from .run.metrics import MetricsLog, PendingSteps, StepLine, StepNumbers, ValidationLine
from .run.outcome import finished_result, make_result
from .run.results import Callbacks, Progress, TrainResult
from .run.writer import RunWriter
from .setup import TrainSetup, set_up
from .step import TrainingStep, build_weights
from .validation import Validator

_SAMPLED_CAPTIONS = 256  # to estimate how long captions are


def train(
    full_clip: FullCLIP,
    train_set: ClipDataset,
    validation: ClipDataset | None = None,
    config: TrainConfig | None = None,
    *,
    run_folder: str | os.PathLike[str],
    device: torch.device | str | None = None,
    on_existing: str = "auto",
    origins: Mapping[str, str] | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    on_note: Callable[[str], None] = lambda note: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train, and write everything into `run_folder` (or the next free one, see `claim_run_folder`).

    `cache_folder`, which runs may share, is where decoded images are cached (`image_cache_gb`); without it they are
    kept in memory, as far as they fit. `origins` says where settings came from, for config.json. `on_progress` is
    called after each optimizer step and validation, `check_cancelled` between micro-batches too; either may raise
    anything: the state is saved first, and the same call resumes from it. `on_note` gets each note as soon as it is
    known. The lines of `Progress` may be ten steps or a second late: they are fetched from the device together. Raises
    `UserError`, also for a loss that is not finite.
    """
    callbacks = Callbacks(Notes(on_note), on_progress, check_cancelled)
    setup = set_up(full_clip, train_set, validation, config or TrainConfig(), device, callbacks)
    folder = claim_run_folder(Path(run_folder), setup.identity, on_existing, setup.notes.add)
    try:
        # A host may call this in inference mode, whose tensors cannot be trained.
        with torch.inference_mode(False), torch.enable_grad():
            return _result_of_the_run(setup, folder, origins or {}, cache_folder)
    finally:
        folder.release()


def _result_of_the_run(
    setup: TrainSetup,
    folder: RunFolder,
    origins: Mapping[str, str],
    cache_folder: str | os.PathLike[str] | None,
) -> TrainResult:
    """Start or resume a run, or return the result of one that is finished."""
    checkpoint = folder.load_checkpoint(setup.notes.add)
    if checkpoint is not None and checkpoint.step >= setup.plan.total_steps:
        if (result := finished_result(setup, folder, checkpoint.step)) is not None:
            return result
    remove_parts(folder.path)
    with contextlib.ExitStack() as resources:
        trainer = _build_trainer(setup, folder, origins, cache_folder, resources)
        if checkpoint is None:
            trainer.log.start()
        else:
            trainer.resume(checkpoint)
        del checkpoint  # its tensors
        trainer.run()
        return make_result(setup, trainer.log, trainer.step, trainer.writer.best)


def _build_trainer(
    setup: TrainSetup,
    folder: RunFolder,
    origins: Mapping[str, str],
    cache_folder: str | os.PathLike[str] | None,
    resources: contextlib.ExitStack,
) -> Trainer:
    """Build everything that a training works with; `resources` closes what must be closed."""
    config, plan, notes = setup.config, setup.plan, setup.notes
    image_cache = None
    if cache_folder is not None and config.memory.image_cache_gb:
        image_cache = ImageCache(cache_folder, int(config.memory.image_cache_gb * 1e9), notes.add)
        resources.callback(image_cache.close)
    weights = build_weights(setup.model, config, plan)
    frozen_vision = FrozenFeatures.of(setup, weights.network, image_cache)
    training_step = TrainingStep(weights, config, plan, frozen_vision=frozen_vision, callbacks=setup.callbacks)
    notes.add("What trains, and how fast:\n" + table(training_step.group_rows))
    loader = TrainLoader(
        setup.train_set,
        setup.tokenizer,
        setup.transform,
        config.captions,
        LoaderOptions(
            batch_size=plan.batch_size,
            seed=config.seed,
            max_broken=config.checkpoints.max_broken,
            cache=image_cache,
            feature_cache=None if frozen_vision is None else frozen_vision.cache,
        ),
    )
    resources.callback(loader.close)
    loader.probe()
    forecast = _forecast_memory(setup, training_step)

    def describe() -> None:
        describe_run(folder, setup, origins, training_step.group_rows, training_step.micro_batch, forecast)

    def restore_folder() -> None:
        notes.add(f"Files of {folder.path} were deleted while the training ran; they are written again.")
        describe()

    describe()
    validator = Validator.of(setup, training_step, image_cache)
    return Trainer(setup, training_step, loader, validator, MetricsLog(folder, restore_folder))


def _forecast_memory(setup: TrainSetup, training_step: TrainingStep) -> Forecast:
    """Note how much memory the training needs; raises `UserError` if the device has less."""
    config, dataset, pairs = setup.config, setup.train_set, setup.plan.batch_size
    sampled = range(0, len(dataset), max(1, len(dataset) // _SAMPLED_CAPTIONS))
    longest = [max(dataset.training_captions(index), key=len) for index in sampled]
    length = training_step.trim(setup.tokenizer(longest)).shape[1]
    remedies = {
        "set towers to text": config.towers == "both",
        "set optimizer to adafactor": config.optimizer.optimizer != "adafactor",
        "switch on activation_checkpointing": not config.memory.activation_checkpointing,
    }
    memory = training_step.memory()
    memory.require(pairs, length, setup.plan.device, [remedy for remedy, helps in remedies.items() if helps])
    forecast = memory.forecast(pairs, training_step.micro_batch, length)
    setup.notes.add(str(forecast))
    return forecast


class Trainer:
    """The training loop and its state: `step` counts the optimizer steps that are done."""

    def __init__(
        self,
        setup: TrainSetup,
        training_step: TrainingStep,
        loader: TrainLoader,
        validator: Validator | None,
        log: MetricsLog,
    ) -> None:
        self.setup, self.training_step, self.log = setup, training_step, log
        self.loader, self.validator = loader, validator
        self.plan, self.notes, self.callbacks = setup.plan, setup.notes, setup.callbacks
        self.writer = RunWriter(setup, training_step, log)
        self.pending = PendingSteps(training_step.meter.groups)
        self.step = 0
        self.stage: int | None = None
        self.moving = False  # while the optimizer moves the weights, so that they are neither before nor after a step

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, in a trainer that has done nothing yet."""
        self.training_step.load_state(checkpoint)
        self.writer.resume(checkpoint)
        self.step = checkpoint.step
        self.notes.add(f"The run resumes from step {self.step} of {self.plan.total_steps}.")
        if checkpoint.total_steps != self.plan.total_steps:
            self.notes.add(
                f"The number of epochs has changed: the run now has {self.plan.total_steps} steps instead of "
                f"{checkpoint.total_steps}, and the learning rate follows the schedule of the new length from here."
            )

    def run(self) -> None:
        """Train up to the last step. Whatever stops the training is raised again after what is whole was saved."""
        try:
            self._loop()
            self._note_what_happened()
            self.writer.save_last(self.step)
            self.writer.report(self.step)
        except BaseException as error:
            if not out_of_memory(error):
                self._save_what_is_whole()
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
            self.training_step.optimizer.zero_grad(set_to_none=True)
            # Saving may find no memory either, which torch says by a RuntimeError; the message says what is saved.
            with contextlib.suppress(UserError, MemoryError, RuntimeError):
                self._save_what_is_whole()
            raise self._out_of_memory() from error

    def _loop(self) -> None:
        batches = self.loader.iterate(self.step)
        self.pending.skip_time()
        while True:
            if self._validation_is_due():
                self._settle()
                self._validate()
                self.pending.skip_time()
            if self.step >= self.plan.total_steps:
                self._settle()
                return
            self.callbacks.check_cancelled()
            self._note_stage()
            with self.training_step.profile("data"):
                _, batch = next(batches)
            self._train(batch)
            with self.training_step.profile("logging"):
                if self.pending.due():
                    self._settle()
                self._report_progress()
            if self.writer.save_is_due(self.step):
                self._settle()
                self.writer.save(self.step)
                self.pending.skip_time()

    def _train(self, batch: Batch) -> None:
        """Do one optimizer step. Its numbers stay on the device until `_settle`."""
        loss = self.training_step.gradients(batch, self.step)
        self.moving = True
        outcome = self.training_step.apply(loss, self.step)
        line: StepLine = {
            "kind": "step",
            "step": self.step + 1,
            "epoch": round((self.step + 1) / self.plan.steps_per_epoch, 6),
            "learning_rate": outcome.learning_rates,
            "micro_batch": min(self.training_step.micro_batch, batch.pairs),
        }
        self.pending.add(line, outcome, batch.pairs)
        self.step += 1
        self.training_step.profile.steps += 1
        self.moving = False

    def _settle(self) -> None:
        """Log the steps whose numbers are still on the device.

        Raises `UserError` if a step was not finite; weights, optimizer and `step` are then as before that step.
        """
        taken = self.pending.take()
        good = [numbers for numbers in taken if numbers.finite]
        for numbers in good:
            if math.isfinite(numbers.grad_norm):  # else fp16 skipped the step, which is no reason to warn
                self.notes.extend(self.training_step.meter.warnings(numbers.by_layer))
        self.log.add_steps([numbers.line for numbers in good])
        if undone := len(taken) - len(good):
            self.training_step.undo(undone)
            self.step -= undone
            raise self._not_finite(taken[len(good)])

    def _validation_is_due(self) -> bool:
        if self.validator is None or self.log.last_validated == self.step:
            return False
        every = self.setup.config.checkpoints.validate_every or self.plan.steps_per_epoch
        return self.step % every == 0 or self.step >= self.plan.total_steps

    def _validate(self) -> None:
        assert self.validator is not None
        result = self.validator.measure(self.step)
        self.notes.extend(result.notes)
        self.writer.offer(self.step, result.loss)
        line: ValidationLine = {
            "kind": "validation",
            "step": self.step,
            "loss": result.loss,
            "image_to_text_r1": result.image_to_text.r1,
            "text_to_image_r1": result.text_to_image.r1,
        }
        self.log.add_validation(line)
        self.writer.chart()
        self._report_progress()

    def _report_progress(self) -> None:
        log, plan = self.log, self.plan
        self.callbacks.on_progress(Progress(self.step, plan.total_steps, plan.batch_size, log.steps, log.validations))

    def _note_stage(self) -> None:
        stages = self.setup.config.layers.unfreeze_stages
        stage = stage_at(self.step, self.plan.total_steps, stages)
        if stages > 1 and stage != self.stage:
            self._settle()
            self.notes.add(f"Stage {stage + 1} of {stages} of unfreezing, from step {self.step + 1}.")
        self.stage = stage

    def _note_what_happened(self) -> None:
        broken, truncated, profile = self.loader.broken, self.loader.truncated, self.training_step.profile
        context_length = self.setup.tokenizer.context_length
        if broken:
            name, reason = next(iter(broken.items()))
            self.notes.add(
                f"{len(broken)} training images cannot be opened and were left out of their batches (the first is "
                f"{name}: {reason})."
            )
        if truncated:
            self.notes.add(
                f"{len(truncated)} captions are longer than the {context_length} tokens that the model reads and were "
                "cut, each after its last whole word that fits."
            )
        if skipped := sum(line.get("skipped", False) for line in self.log.steps):
            self.notes.add(
                f"{skipped} of the {len(self.log.steps)} steps changed nothing because a gradient was too large for "
                "fp16; with precision bf16 or fp32 every step trains."
            )
        if profile.enabled:
            self.notes.add("Where the time of a step went:\n" + table(profile.rows()))

    def _save_what_is_whole(self) -> None:
        """Save the training after whatever stopped it, unless that came in the middle of a step."""
        if self.moving:
            return
        try:
            self._settle()
        finally:
            if self.step and self.writer.saved_step != self.step:
                self.writer.save_last(self.step)
            if saved := self.writer.saved_step:
                self.notes.add(f"Stopped; the state of step {saved} is saved, and the same run resumes from it.")
                self.writer.report(self.step)

    def _not_finite(self, bad: StepNumbers) -> UserError:
        what = f"the loss became {bad.line['loss']}"
        if math.isfinite(bad.line["loss"]):
            what = f"the gradient became {bad.grad_norm}, {self.training_step.meter.nonfinite_layers(bad.by_layer)}"
        kept = f" The weights from before that step are kept in {self.log.folder.path}." if self.step else ""
        return UserError(
            f"The training stopped at step {bad.line['step']} because {what}.{kept} Try a lower learning_rate, or "
            "precision fp32."
        )

    def _out_of_memory(self) -> UserError:
        pairs = min(self.training_step.micro_batch, self.plan.batch_size)
        smaller = f"Set micro_batch to {max(1, pairs // 2)} (it was {pairs})" if pairs > 1 else "Set towers to text"
        checkpointing = self.setup.config.memory.activation_checkpointing
        more = "" if checkpointing else ", switch on activation_checkpointing"
        start = f"step {self.writer.saved_step}" if self.writer.saved_step else "its beginning"
        return UserError(
            f"There was not enough memory for step {self.step + 1}. {smaller}{more}, or train one tower only; the run "
            f"resumes from {start} and the result stays the same."
        )
