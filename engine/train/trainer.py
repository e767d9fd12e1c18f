"""The training loop, from a full CLIP and a data set to a better full CLIP and a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..clip.exports import save_full_clip
from ..clip.full_clip import FullCLIP
from ..clip.load import load_full_clip
from ..data.dataset import ClipDataset
from ..data.images.image_cache import ImageCache
from ..data.loader import Batch, LoaderOptions, TrainLoader
from ..data.sampler import Sampler, with_template
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..evaluate.encoder import BrokenModel, EncodedImages, Encoder, Host, encode_images, with_trained_transform
from ..evaluate.retrieval import retrieval_of
from ..files import remove_parts, replacing
from ..report.charts import loss_chart
from ..report.tables import table
from .config import TrainConfig
from .device import out_of_memory, resolve_device, resolve_precision
from .freezing import stage_at
from .frozen_features import FrozenFeatures
from .memory import forecast, require_memory
from .run.description import describe_run
from .run.folder import RunFolder, claim_run_folder
from .run.metrics import PendingSteps
from .run.profile import Profile
from .run.report import write_report
from .run.results import Notes, Progress, TrainResult
from .setup import (
    check_settings,
    existing_training_images,
    fitting_batch_size,
    prepare_model,
    transform_of,
    useful_validation,
)
from .step import TrainingStep

_LOOKED_AT = 256  # captions that are looked at for how long the texts are


def train(
    full_clip: FullCLIP,
    train_set: ClipDataset,
    validation: ClipDataset | None = None,
    config: TrainConfig | None = None,
    *,
    run_folder: str | os.PathLike,
    device: torch.device | str | None = None,
    on_existing: str = "auto",
    origins: Mapping[str, str] | None = None,
    cache_folder: str | os.PathLike | None = None,
    on_note: Callable[[str], None] = lambda note: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train, and write everything into `run_folder` (or the next free one, see `claim_run_folder`).

    `cache_folder`, which runs may share, is where decoded pictures are kept (`image_cache_gb`); without it they are
    kept in memory, as far as they fit. `on_progress` is called after each optimizer step and validation,
    `check_cancelled` between micro-batches too; either may raise anything: the state is saved first, and the same call
    goes on from it. `on_note` gets each sentence of the result's notes as soon as it is known. The lines of `Progress`
    may be ten steps or a second late: they are fetched from the device together. Raises `UserError`, also for a loss
    that is not finite.
    """
    config = config or TrainConfig()
    notes = Notes(on_note)
    model = prepare_model(full_clip, config, notes)
    check_settings(model, config)
    train_set = with_template(existing_training_images(train_set, config, notes), config.captions.label_template)
    validation = useful_validation(validation and with_template(validation, config.captions.label_template), notes)
    pairs = Sampler(train_set, config.seed, config.captions).length
    batch_size = fitting_batch_size(config, train_set, pairs, notes)
    chosen_device = resolve_device(device)
    identity = {
        "settings": config.identity,
        "model": model.fingerprint,
        "train": train_set.fingerprint(),
        "validation": validation.fingerprint() if validation is not None else None,
    }
    run = claim_run_folder(Path(run_folder), identity, on_existing, notes.append)
    try:
        training = Training(
            model,
            train_set,
            validation,
            config,
            run,
            batch_size,
            pairs // batch_size,
            chosen_device,
            notes,
            cache_folder,
            on_progress,
            check_cancelled,
        )
        # A host may call this in inference mode, whose tensors cannot be trained.
        with torch.inference_mode(False), torch.enable_grad():
            return training.run_to_the_end(identity, origins or {})
    finally:
        run.release()


class Training:
    """One run at work: its folder, its numbers, and `work`, which does the steps. `step` counts those done."""

    def __init__(
        self,
        model,
        train_set,
        validation,
        config,
        run,
        batch_size,
        steps_per_epoch,
        device,
        notes,
        cache_folder,
        on_progress,
        check_cancelled,
    ):
        self.model: FullCLIP = model
        self.train_set: ClipDataset = train_set
        self.validation: ClipDataset | None = validation
        self.config: TrainConfig = config
        self.folder: RunFolder = run
        self.batch_size: int = batch_size
        self.device: torch.device = device
        self.notes: Notes = notes
        self.on_progress, self.check_cancelled = on_progress, check_cancelled
        self.precision = resolve_precision(config.memory.precision, device, model.architecture.text_width)
        self.cache_folder: str | os.PathLike | None = cache_folder
        self.transform = transform_of(config, model.architecture.image_size)
        self.steps_per_epoch: int = steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.validate_every = config.checkpoints.validate_every or self.steps_per_epoch
        self.step = 0
        self.stage: int | None = None
        self.validated: int | None = None  # the step whose validation is in the metrics
        self.best: dict[str, float] | None = None
        self.validation_images: EncodedImages | None = None  # where the tower that encodes them does not train
        self.saved_step: int | None = None
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.unlogged: list[dict[str, Any]] = []
        self.pending = PendingSteps()
        self.profile = Profile(device, config.checkpoints.profile)

    # ---- the run ---------------------------------------------------------------------------------------------------

    def run_to_the_end(self, identity: Mapping[str, Any], origins: Mapping[str, str]) -> TrainResult:
        state = self.folder.load_state(self.notes.append)
        if state is not None and self._is_finished(state[1]):
            if not self.folder.has_newest_report():
                write_report(self)
            return self._result(already_finished=True)
        remove_parts(self.folder.path)
        self._build()
        self._open_images()
        self._foresee_memory()
        self.describe = functools.partial(describe_run, self, identity, origins)
        self.describe()
        if state is not None:
            self._restore(*state)
            del state
        else:
            self.folder.cut_metrics(0)
        try:
            self._loop()
            self._finish()
        except BaseException as error:
            if not out_of_memory(error):
                self._keep_what_is_whole()
                raise
            traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
            self.work.optimizer.zero_grad(set_to_none=True)
            # Saving may find no memory either, which torch says by a RuntimeError; the sentence tells what is saved.
            with contextlib.suppress(UserError, MemoryError, RuntimeError):
                self._keep_what_is_whole()
            raise self._out_of_memory() from error
        finally:
            self._close_images()
        return self._result(already_finished=False)

    def _loop(self) -> None:
        batches = self.loader.iterate(self.step)
        last_save = time.monotonic()
        self.pending.skip_time()
        while True:
            if self._validation_is_due():
                self._settle()
                self._validate()
                self.pending.skip_time()
            if self.step >= self.total_steps:
                self._settle()
                return
            self.check_cancelled()
            self._tell_stage()
            with self.profile("data"):
                _, batch = next(batches)
            self._train_step(batch)
            with self.profile("logging"):
                if self.pending.due():
                    self._settle()
                self._tell()
            every, minutes = self.config.checkpoints.save_every_steps, self.config.checkpoints.save_every_minutes
            if (every and self.step % every == 0) or (minutes and time.monotonic() - last_save > minutes * 60):
                self._settle()
                self._save()
                last_save = time.monotonic()
                self.pending.skip_time()

    def _train_step(self, batch: Batch) -> None:
        outcome = self.work(batch, self.step)
        record = {
            "kind": "step",
            "step": self.step + 1,
            "epoch": round((self.step + 1) / self.steps_per_epoch, 6),
            "learning_rate": outcome.rates,
            "micro_batch": min(self.work.micro_batch, batch.pairs),
            "pairs": batch.pairs,
        }
        self.pending.add(record, outcome.loss, outcome.logit_scale, outcome.finite, outcome.norms)
        self.step += 1
        self.profile.steps += 1
        self.work.whole = True

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Take in the numbers that are still on the device. Raises `UserError` if a step was not finite: the weights,
        the optimizer and `step` are then as before it."""
        taken = self.pending.take()
        good = [step for step in taken if step.finite]
        lines = []
        for step in good:
            by_group = zip(self.work.meter.groups, step.by_group, strict=True)
            norms = {name: float(f"{norm:.4g}") for name, norm in by_group if norm and math.isfinite(norm)}
            if math.isfinite(step.grad_norm):
                lines.append(step.record | {"grad_norms": norms})
                self.notes.extend(self.work.meter.warnings(step.by_layer))
            else:  # fp16 only: the loss scale was too high and the step was skipped; JSON has no infinity
                lines.append(step.record | {"grad_norms": norms, "grad_norm": None, "skipped": True})
        self._log(lines)
        if len(good) == len(taken):
            return
        self.work.forget(len(taken) - len(good))
        self.step -= len(taken) - len(good)
        bad = taken[len(good)]
        what = f"the loss became {bad.loss}"
        if math.isfinite(bad.loss):
            what = f"the gradient became {bad.grad_norm}, {self.work.meter.nonfinite_layers(bad.by_layer)}"
        raise UserError(
            f"The training stopped at step {bad.record['step']} because {what}."
            + (f" The weights from before that step are kept in {self.folder.path}." if self.step else "")
            + " Try a lower learning_rate, or precision fp32."
        )

    def _log(self, lines: list[dict[str, Any]]) -> None:
        self.steps += [line for line in lines if line["kind"] == "step"]
        self.validations += [line for line in lines if line["kind"] == "validation"]
        self.unlogged += lines  # until they are in the file, no state is saved that speaks of them
        if self.folder.is_whole():
            self.folder.log(self.unlogged)
            self.unlogged = []
            return
        self.notes.append(f"Files of {self.folder.path} were deleted while the training ran; they are written again.")
        self.describe()
        self.folder.rewrite_metrics(sorted(self.steps + self.validations, key=lambda line: line["step"]))
        self.unlogged = []

    def _tell(self) -> None:
        self.on_progress(Progress(self.step, self.total_steps, self.batch_size, self.steps, self.validations))

    # ---- validation ------------------------------------------------------------------------------------------------

    def _validation_is_due(self) -> bool:
        if self.validation is None or self.validated == self.step:
            return False
        return self.step % self.validate_every == 0 or self.step >= self.total_steps

    def _validate(self) -> None:
        self.work.network.eval()
        encoder = Encoder(
            self.work.network,
            self.transform.deterministic,
            self.tokenizer,
            host=Host(check_cancelled=self.check_cancelled, cache=self.cache),
        )
        try:
            pictures = self.validation_images or encode_images(encoder, self.validation)
            if self.config.towers == "text":
                self.validation_images = pictures
            measured = retrieval_of(encoder, self.validation, images=pictures)
        except BrokenModel as error:
            raise UserError(f"The validation at step {self.step} failed: {error} Try a lower learning_rate.") from error
        finally:
            self.work.network.train()
        self.notes.extend(measured.notes)
        record = {
            "kind": "validation",
            "step": self.step,
            "loss": measured.loss,
            "image_to_text_r1": measured.image_to_text.r1,
            "text_to_image_r1": measured.text_to_image.r1,
        }
        if self.best is None or measured.loss < self.best["loss"]:
            best = {"step": self.step, "loss": measured.loss}
            self._write_best(best)
            self.best = best
        self._log([record])
        self.validated = self.step
        self._write_chart()
        self._tell()

    # ---- files -----------------------------------------------------------------------------------------------------

    def _trained_model(self) -> FullCLIP:
        """The weights as they are now; what did not train is the original's own."""
        if self.step == 0:
            return self.model
        return self.model.derive(self.work.changed(), step=f"trained for {self.step} steps ({self.folder.path.name})")

    def _write_best(self, validation: Mapping[str, float] | None) -> None:
        """`best.safetensors` says itself which step it is of, so that a crash cannot make the two differ."""
        model = self._trained_model()
        about = {**model.provenance, "validation": validation, "step": self.step}
        about = with_trained_transform(about, self.transform)
        save_full_clip(dataclasses.replace(model, provenance=about), self.folder.best_file)

    def _write_chart(self) -> None:
        with replacing(self.folder.chart_file) as beside:
            loss_chart(self.steps, self.validations, title=self.folder.path.name).save(beside, format="PNG")

    def _save(self) -> None:
        """Save the state; nothing may be pending. Raises `UserError` for weights that are not finite."""
        self._require_finite_weights()
        self._log([])
        self.folder.sync_metrics()
        tensors, numbers = self.work.pack()
        epoch, position = divmod(self.step, self.steps_per_epoch)
        info = {
            "step": self.step,
            "total_steps": self.total_steps,
            "best": self.best,
            "metrics_bytes": self.folder.metrics_bytes(),
            "schedule": {
                "name": self.config.optimizer.schedule,
                "step": self.step,
                "warmup": self.config.optimizer.warmup,
            },
            # All randomness is a function of these, so there is no generator whose state would have to be kept.
            "sampler": {"seed": self.config.seed, "epoch": epoch, "position": position},
            **numbers,
        }
        self.folder.save_state(self.step, tensors, info, self.config.checkpoints.keep_checkpoints)
        self.saved_step = self.step
        self._write_chart()

    def _require_finite_weights(self) -> None:
        if not self.work.finite_weights():
            raise UserError(
                f"The weights became infinite by step {self.step}; they are not saved, and the last good state is kept "
                f"in {self.folder.path}. Try a lower learning_rate."
            )

    def _keep_what_is_whole(self) -> None:
        """After whatever stopped the training: save it, unless that would save something half done."""
        if not self.work.whole:
            return
        try:
            self._settle()
        finally:
            if self.step and self.saved_step != self.step:
                self._require_finite_weights()
                if self.validation is None:
                    self._write_best(None)  # first, so that a state at the end means that its model is there
                self._save()
            if self.saved_step:
                self.notes.append(
                    f"Stopped; the state of step {self.saved_step} is saved, and the same run goes on from it."
                )
                write_report(self)

    def _finish(self) -> None:
        if self.loader.broken:
            name, reason = next(iter(self.loader.broken.items()))
            self.notes.append(
                f"{len(self.loader.broken)} training pictures cannot be opened and were left out of their batches (the "
                f"first is {name}: {reason})."
            )
        if self.loader.truncated:
            self.notes.append(
                f"{len(self.loader.truncated)} captions are longer than the {self.tokenizer.context_length} tokens "
                "that the model reads and were cut, each behind its last whole word that fits."
            )
        if skipped := sum(line.get("skipped", False) for line in self.steps):
            self.notes.append(
                f"{skipped} of the {len(self.steps)} steps changed nothing because a gradient was too large for fp16; "
                "with precision bf16 or fp32 every step trains."
            )
        if self.profile.enabled:
            self.notes.append("Where the time of a step went:\n" + table(self.profile.rows()))
        if self.validation is not None and not self.folder.best_file.is_file():
            self.notes.append(f"{self.folder.best_file} was deleted; the last weights take its place.")
            self.best = {"step": self.step, "loss": self.validations[-1]["loss"]}
            self._write_best(self.best)
        self._require_finite_weights()
        if self.validation is None:
            self._write_best(None)
        self._save()
        write_report(self)

    def _out_of_memory(self) -> UserError:
        pairs = min(self.work.micro_batch, self.batch_size)
        smaller = f"Set micro_batch to {max(1, pairs // 2)} (it was {pairs})" if pairs > 1 else "Set towers to text"
        more = "" if self.config.memory.activation_checkpointing else ", switch on activation_checkpointing"
        start = f"step {self.saved_step}" if self.saved_step else "its beginning"
        return UserError(
            f"There was not enough memory for step {self.step + 1}. {smaller}{more}, or train one tower only; the run "
            f"goes on from {start} and the result stays the same."
        )

    # ---- setting up ------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        architecture = self.model.architecture
        self.tokenizer = Tokenizer(architecture.context_length, architecture.vocab_size)
        self.work = TrainingStep(
            self.model,
            self.config,
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
            total_steps=self.total_steps,
            say=self.notes.append,
            check_cancelled=self.check_cancelled,
            timed=self.profile,
        )
        self.notes.append("What trains, and how fast:\n" + table(self.work.group_rows))

    def _tell_stage(self) -> None:
        stages = self.config.layers.unfreeze_stages
        stage = stage_at(self.step, self.total_steps, stages)
        if stages > 1 and stage != self.stage:
            self._settle()
            self.notes.append(f"Stage {stage + 1} of {stages} of unfreezing, from step {self.step + 1}.")
        self.stage = stage

    def _open_images(self) -> None:
        """The loader and the cache of decoded pictures; raises `UserError` if too many of the pictures are broken."""
        config, self.cache = self.config, None
        if self.cache_folder is not None and config.memory.image_cache_gb:
            self.cache = ImageCache(self.cache_folder, int(config.memory.image_cache_gb * 1e9), self.notes.append)
        frozen = self.work.frozen_vision = FrozenFeatures.of(self.work, self.train_set, self.transform, self.cache)
        self.loader = TrainLoader(
            self.train_set,
            self.tokenizer,
            self.transform,
            config.captions,
            LoaderOptions(
                batch_size=self.batch_size,
                seed=config.seed,
                max_broken=config.checkpoints.max_broken,
                cache=self.cache,
                feature_cache=frozen and frozen.kept,
            ),
        )
        try:
            self.loader.probe()
        except BaseException:
            self._close_images()
            raise

    def _foresee_memory(self) -> None:
        """Tell how much memory the run takes; raises `UserError` if the device has not that much."""
        some = range(0, len(self.train_set), max(1, len(self.train_set) // _LOOKED_AT))
        longest = [max(self.train_set.training_captions(index), key=len) for index in some]
        length = self.work.cut(self.tokenizer(longest)).shape[1]
        try:
            require_memory(self.work, self.batch_size, length)
        except UserError:
            self._close_images()
            raise
        self.memory = forecast(self.work, self.batch_size, self.work.micro_batch, length)
        self.notes.append(str(self.memory))

    def _close_images(self) -> None:
        self.loader.close()
        if self.cache is not None:
            self.cache.close()

    def _restore(self, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
        self.work.unpack(tensors, info)
        self.step = self.saved_step = info["step"]
        self.best = self._best_of_the_file()
        if info["best"] and self.best is None:
            self.notes.append(f"{self.folder.best_file} was deleted; the best model is looked for anew from here.")
        self.folder.cut_metrics(info["metrics_bytes"])
        self._read_metrics()
        if len(self.steps) < self.step:
            self.notes.append(f"metrics.jsonl has lost the lines of {self.step - len(self.steps)} steps.")
        self.notes.append(f"The run goes on from step {self.step} of {self.total_steps}.")
        if info["total_steps"] != self.total_steps:
            self.notes.append(
                f"The number of epochs has changed: the run now has {self.total_steps} steps instead of "
                f"{info['total_steps']}, and the learning rate follows the schedule of the new length from here."
            )

    def _best_of_the_file(self) -> dict[str, float] | None:
        """{"step", "loss"} of the model in best.safetensors, which says itself what it is."""
        if self.validation is None or not self.folder.best_file.is_file():
            return None
        return load_full_clip(self.folder.best_file).provenance.get("validation")

    def _read_metrics(self) -> None:
        lines = self.folder.metrics()
        self.steps = [line for line in lines if line["kind"] == "step"]
        self.validations = [line for line in lines if line["kind"] == "validation"]
        self.validated = self.validations[-1]["step"] if self.validations else None

    def _is_finished(self, info: Mapping[str, Any]) -> bool:
        if info["step"] < self.total_steps or not self.folder.best_file.is_file():
            return False
        self.step, self.best = info["step"], self._best_of_the_file()
        self._read_metrics()
        if self.validation is None:
            return load_full_clip(self.folder.best_file).provenance.get("step") == self.step
        return self.validated == self.step and self.best is not None

    def _result(self, *, already_finished: bool) -> TrainResult:
        if already_finished:
            more = (
                f", more than the {self.total_steps} that epochs now asks for" if self.step > self.total_steps else ""
            )
            self.notes.append(
                f"This run was finished before ({self.step} steps{more}); its result is returned as it is."
            )
        best_step = int(self.best["step"]) if self.best else self.step
        if best_step == 0:
            self.notes.append(
                "No step of this training was better than the original on the validation set; the original comes back. "
                "Try a lower learning_rate, more pictures or more epochs."
            )
        saved = load_full_clip(self.folder.best_file, in_memory=True)
        return TrainResult(
            full_clip=saved,
            run_folder=self.folder.path,
            best_step=best_step,
            total_steps=self.total_steps,
            steps=self.steps,
            validations=self.validations,
            notes=tuple(self.notes),
            already_finished=already_finished,
        )
