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

from ..clip.files import remove_parts, replacing
from ..clip.full_clip import FullCLIP, load_full_clip, save_full_clip
from ..clip.network import build_network, checkpoint_activations
from ..data.cache import PictureCache
from ..data.dataset import ClipDataset
from ..data.epochs import Epochs, with_template
from ..data.images import normalize
from ..data.loader import Batch, TrainLoader
from ..data.tokens import Tokenizer
from ..errors import UserError
from ..evaluate.features import BrokenModel, Encoder, with_trained_transform
from ..evaluate.retrieval import retrieval_of
from ..report.charts import loss_chart
from ..report.tables import table
from . import checkpoints
from .compute import autocast, choose_micro_batch, out_of_memory, resolve_device, resolve_precision
from .config import TrainConfig
from .description import describe_run
from .freezing import stage_at, trains_at_all, trains_in_stage
from .gradients import GradientMeter
from .large_batch import Side, batch_gradients
from .losses import LOSSES, positive_pairs
from .metrics import PendingSteps
from .neurons import parse_neurons, scale_neurons
from .optimizers import build_optimizer, forget_steps, group_table, parameter_groups, set_learning_rates
from .parts import SCALARS
from .preparation import (
    caption_policy_of,
    check_settings,
    fitting_batch_size,
    prepare_model,
    present_training_pictures,
    transform_of,
    useful_validation,
)  # fmt: skip
from .profile import Profile
from .results import Notes, Progress, TrainResult
from .run_folder import RunFolder, claim_run_folder
from .schedules import SCHEDULES

MAX_LOGIT_SCALE = math.log(100)


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

    `cache_folder`, which runs may share, is where decoded pictures are kept (`picture_cache_gb`); without it they are
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
    train_set = with_template(present_training_pictures(train_set, config, notes), config.label_template)
    validation = useful_validation(validation and with_template(validation, config.label_template), notes)
    pairs = Epochs(train_set, config.seed, caption_policy_of(config)).length
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
            model, train_set, validation, config, run, batch_size, pairs // batch_size, chosen_device, notes,
            cache_folder, on_progress, check_cancelled,
        )  # fmt: skip
        # A host may call this in inference mode, whose tensors cannot be trained.
        with torch.inference_mode(False), torch.enable_grad():
            return training.run_to_the_end(identity, origins or {})
    finally:
        run.release()


class Training:
    """One run at work. `step` counts optimizer steps done; `whole` is false while weights and step do not belong
    together."""

    def __init__(
        self, model, train_set, validation, config, run, batch_size, steps_per_epoch, device, notes, cache_folder,
        on_progress, check_cancelled,
    ):  # fmt: skip
        self.model: FullCLIP = model
        self.train_set: ClipDataset = train_set
        self.validation: ClipDataset | None = validation
        self.config: TrainConfig = config
        self.folder: RunFolder = run
        self.batch_size: int = batch_size
        self.device: torch.device = device
        self.notes: Notes = notes
        self.on_progress, self.check_cancelled = on_progress, check_cancelled
        self.precision = resolve_precision(config.precision, device)
        self.cache_folder: str | os.PathLike | None = cache_folder
        self.transform = transform_of(config, model.architecture.image_size)
        self.steps_per_epoch: int = steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.validate_every = config.validate_every or self.steps_per_epoch
        self.micro_batch = config.micro_batch
        self.step = 0
        self.stage: int | None = None
        self.validated: int | None = None  # the step whose validation is in the metrics
        self.best: dict[str, float] | None = None
        self.whole = True
        self.saved_step: int | None = None
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []
        self.unlogged: list[dict[str, Any]] = []
        self.pending = PendingSteps()
        self.profile = Profile(device, config.profile)

    # ---- the run ---------------------------------------------------------------------------------------------------

    def run_to_the_end(self, identity: Mapping[str, Any], origins: Mapping[str, str]) -> TrainResult:
        state = self.folder.load_state(self.notes.append)
        if state is not None and self._is_finished(state[1]):
            return self._result(already_finished=True)
        remove_parts(self.folder.path)
        self._build()
        self._open_pictures()
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
            self.optimizer.zero_grad(set_to_none=True)
            # Saving may find no memory either, which torch says by a RuntimeError; the sentence tells what is saved.
            with contextlib.suppress(UserError, MemoryError, RuntimeError):
                self._keep_what_is_whole()
            raise self._out_of_memory() from error
        finally:
            self._close_pictures()
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
            self._enter_stage(stage_at(self.step, self.total_steps, self.config.unfreeze_stages))
            with self.profile("data"):
                _, batch = next(batches)
            self._train_step(batch)
            with self.profile("logging"):
                if self.pending.due():
                    self._settle()
                self._tell()
            every, minutes = self.config.save_every_steps, self.config.save_every_minutes
            if (every and self.step % every == 0) or (minutes and time.monotonic() - last_save > minutes * 60):
                self._settle()
                self._save()
                last_save = time.monotonic()
                self.pending.skip_time()

    # ---- one step --------------------------------------------------------------------------------------------------

    def _train_step(self, batch: Batch) -> None:
        config, timed = self.config, self.profile
        factor = SCHEDULES[config.schedule](self.step, self.total_steps, config.warmup, config.floor)
        rates = set_learning_rates(self.optimizer, config.learning_rate, factor)
        self.optimizer.zero_grad(set_to_none=True)
        positives = positive_pairs(batch.originals, batch.texts).to(self.device)
        logit_scale = self.network.logit_scale
        shown_scale = logit_scale.detach().exp()
        sides = (Side(self._encode_images, batch.images, self.trains_vision),
                 Side(self._encode_texts, batch.tokens, self.trains_text))  # fmt: skip
        if self.step == 0 and hasattr(self.loss, "begin"):
            features = [side.features(self.micro_batch, self.check_cancelled) for side in sides]
            self.loss.begin(*features, logit_scale, positives)
        loss = batch_gradients(
            sides,
            lambda images, texts: self.loss(images, texts, logit_scale, positives),
            micro_batch=self.micro_batch,
            loss_factor=self.scaler.get_scale() if self.scaler.is_enabled() else 1.0,
            check_cancelled=self.check_cancelled,
            timed=timed,
        )  # fmt: skip
        self.whole = False
        with timed("optimizer"):
            finite, norms = self._optimizer_step(loss)
        record = {
            "kind": "step",
            "step": self.step + 1,
            "epoch": round((self.step + 1) / self.steps_per_epoch, 6),
            "learning_rate": rates,
            "micro_batch": min(self.micro_batch, len(batch.images)),
            "pairs": len(batch.images),
        }
        self.pending.add(record, loss, shown_scale, finite, norms)
        self.step += 1
        self.profile.steps += 1
        self.whole = True

    def _optimizer_step(self, loss: torch.Tensor):
        """(a bool tensor: the weights moved, or all is still as before a step that was not finite; the norms before
        clipping). Once a step is not finite, none after it moves the weights, until the host finds out and stops."""
        self.scaler.unscale_(self.optimizer)
        norms = self.meter.measure()
        if self.config.max_grad_norm:
            self.meter.clip(norms, self.config.max_grad_norm)
        # Under fp16 an infinite gradient is how the scaler finds its scale: it skips such a step and goes on.
        finite = torch.isfinite(loss) if self.scaler.is_enabled() else torch.isfinite(loss) & norms.total.isfinite()
        self.broken.copy_(torch.maximum(self.broken, (~finite).float()))
        finite = self.broken == 0
        if self.scaler.is_enabled():
            if bool(norms.total.isfinite() & finite):
                self.optimizer.step()
            self.scaler.update()
        else:
            self.optimizer.found_inf = self.broken
            self.optimizer.step()
        if self.network.logit_scale.requires_grad:
            with torch.no_grad():
                self.network.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return finite, norms

    def _encode_images(self, images_u8: torch.Tensor) -> torch.Tensor:
        images = normalize(images_u8.to(self.device, non_blocking=True), self.network.logit_scale.dtype)
        with autocast(self.precision if self.trains_vision else self.frozen_precision, self.device):
            return self.network.encode_image(images)

    def _encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        with autocast(self.precision if self.trains_text else self.frozen_precision, self.device):
            return self.network.encode_text(tokens.to(self.device, non_blocking=True))

    def _enter_stage(self, stage: int) -> None:
        """Let exactly those parameters have gradients that this stage trains."""
        if stage == self.stage:
            return
        self._settle()
        self.optimizer.zero_grad(set_to_none=True)
        self.stage, stages = stage, self.config.unfreeze_stages
        for name, parameter in self.trained.items():
            parameter.requires_grad_(trains_in_stage(name, self.model.architecture, stage, stages))
        self.trains_vision, self.trains_text = (
            any(p.requires_grad for name, p in self.trained.items() if name.startswith("visual.") == vision
                and name not in SCALARS)
            for vision in (True, False)
        )  # fmt: skip
        if stages > 1:
            self.notes.append(f"Stage {stage + 1} of {stages} of unfreezing, from step {self.step + 1}.")

    # ---- numbers ---------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Take in the numbers that are still on the device. Raises `UserError` if a step was not finite: the weights,
        the optimizer and `step` are then as before it."""
        taken = self.pending.take()
        good = [step for step in taken if step.finite]
        lines = []
        for step in good:
            by_group = zip(self.meter.groups, step.by_group, strict=True)
            norms = {name: float(f"{norm:.4g}") for name, norm in by_group if norm and math.isfinite(norm)}
            # Under fp16: the scaler skipped this step, and JSON knows no infinity.
            skipped = {} if math.isfinite(step.grad_norm) else {"grad_norm": None, "skipped": True}
            lines.append(step.record | {"grad_norms": norms} | skipped)
            self.notes.extend(self.meter.warnings(step.by_layer))
        self._log(lines)
        if len(good) == len(taken):
            return
        if not self.scaler.is_enabled():
            forget_steps(self.optimizer, len(taken) - len(good))
        self.step -= len(taken) - len(good)
        self.broken.zero_()
        bad = taken[len(good)]
        what = f"the loss became {bad.loss}"
        if math.isfinite(bad.loss):
            what = f"the gradient became {bad.grad_norm}, {self.meter.broken_place(bad.by_layer)}"
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
        self.network.eval()
        encoder = Encoder(
            self.network, self.transform.without_chance, self.tokenizer, self.device, cache=self.cache,
            autocast=lambda: autocast(self.frozen_precision, self.device), check_cancelled=self.check_cancelled,
        )  # fmt: skip
        try:
            measured = retrieval_of(encoder, self.validation)
        except BrokenModel as error:
            raise UserError(f"The validation at step {self.step} failed: {error} Try a lower learning_rate.") from error
        finally:
            self.network.train()
        self.notes.extend(measured.notes)
        record = {
            "kind": "validation",
            "step": self.step,
            "loss": measured.loss,
            "image_to_text_r1": measured.image_to_text["r1"],
            "text_to_image_r1": measured.text_to_image["r1"],
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
        changed = {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.trained.items()
            if name in self.model.state_dict
        }
        return self.model.derive(changed, step=f"trained for {self.step} steps ({self.folder.path.name})")

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
        tensors, numbers = checkpoints.pack(self.network, self.loss, self.optimizer)
        epoch, position = divmod(self.step, self.steps_per_epoch)
        info = {
            "step": self.step,
            "total_steps": self.total_steps,
            "best": self.best,
            "micro_batch": self.micro_batch,
            "metrics_bytes": self.folder.metrics_bytes(),
            "optimizer": numbers,
            "schedule": {"name": self.config.schedule, "step": self.step, "warmup": self.config.warmup},
            # All randomness is a function of these, so there is no generator whose state would have to be kept.
            "sampler": {"seed": self.config.seed, "epoch": epoch, "position": position},
            "scaler": self.scaler.state_dict(),
        }
        self.folder.save_state(self.step, tensors, info, self.config.keep_states)
        self.saved_step = self.step
        self._write_chart()

    def _require_finite_weights(self) -> None:
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.trained.values()):
            raise UserError(
                f"The weights became infinite by step {self.step}; they are not saved, and the last good state is kept "
                f"in {self.folder.path}. Try a lower learning_rate."
            )

    def _keep_what_is_whole(self) -> None:
        """After whatever stopped the training: save it, unless that would save something half done."""
        if not self.whole:
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

    def _finish(self) -> None:
        if self.loader.broken:
            name, reason = next(iter(self.loader.broken.items()))
            self.notes.append(
                f"{len(self.loader.broken)} training pictures cannot be opened and were left out of their batches (the "
                f"first is {name}: {reason})."
            )
        if self.loader.cut:
            self.notes.append(
                f"{len(self.loader.cut)} captions are longer than the {self.tokenizer.context_length} tokens that the "
                "model reads and were cut, each behind its last whole word that fits."
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

    def _out_of_memory(self) -> UserError:
        smaller = max(1, min(self.micro_batch, self.batch_size) // 2)
        more = "" if self.config.activation_checkpointing else ", switch on activation_checkpointing"
        return UserError(
            f"There was not enough memory for step {self.step + 1}. Set micro_batch to {smaller} (it was "
            f"{min(self.micro_batch, self.batch_size)}){more}, or train one tower only; the run goes on from "
            f"{'its beginning' if not self.saved_step else f'step {self.saved_step}'} and the result stays the same."
        )

    # ---- setting up ------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        config, architecture = self.config, self.model.architecture
        self.tokenizer = Tokenizer(architecture.context_length, architecture.vocab_size)
        self.network = build_network(self.model, device=self.device)
        scale_neurons(self.network, parse_neurons(config.scale_neurons, architecture))
        self.loss = LOSSES[config.loss].make(config.temperature, config.label_smoothing).to(self.device)
        # bf16 for a tower without gradients is slow on CPUs.
        self.frozen_precision = "fp32" if self.device.type == "cpu" else self.precision
        everything = [*self.network.named_parameters(), *self.loss.named_parameters()]
        self.trained = {name: p for name, p in everything if trains_at_all(name, architecture, config)}
        for name, parameter in everything:
            parameter.requires_grad_(name in self.trained)
        if not self.trained.keys() - SCALARS:
            raise UserError("Everything is frozen, so there is nothing to train; freeze fewer blocks.")
        if config.activation_checkpointing:
            checkpoint_activations(self.network)
        groups = parameter_groups(self.trained.items(), architecture, config)
        self.optimizer = build_optimizer(config, groups)
        self.meter = GradientMeter(groups, architecture)
        self.group_rows = group_table(groups, config.learning_rate)
        self.notes.append("What trains, and how fast:\n" + table(self.group_rows))
        self.broken = torch.zeros((), device=self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.micro_batch = config.micro_batch or choose_micro_batch(
            architecture, self.batch_size, self.precision, self.device, config.activation_checkpointing
        )

    def _open_pictures(self) -> None:
        """The loader and the cache of decoded pictures; raises `UserError` if too many of the pictures are broken."""
        config, self.cache = self.config, None
        if self.cache_folder is not None and config.picture_cache_gb:
            self.cache = PictureCache(self.cache_folder, int(config.picture_cache_gb * 1e9), self.notes.append)
        self.loader = TrainLoader(
            self.train_set, self.transform.image_size, self.tokenizer, self.batch_size, config.seed,
            transform=self.transform, policy=caption_policy_of(config), cache=self.cache, max_broken=config.max_broken,
        )  # fmt: skip
        try:
            self.loader.probe()
        except BaseException:
            self._close_pictures()
            raise

    def _close_pictures(self) -> None:
        self.loader.close()
        if self.cache is not None:
            self.cache.close()

    def _restore(self, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
        checkpoints.unpack(tensors, info["optimizer"], self.network, self.loss, self.optimizer)
        if info["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(info["scaler"])
        self.step = self.saved_step = info["step"]
        self.best = self._best_of_the_file()
        if info["best"] and self.best is None:
            self.notes.append(f"{self.folder.best_file} was deleted; the best model is looked for anew from here.")
        if not self.config.micro_batch:
            self.micro_batch = info["micro_batch"]
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
