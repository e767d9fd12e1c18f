"""The training loop, from a full CLIP and a data set to a better full CLIP and a run folder."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..clip.files import replacing, write_json
from ..clip.full_clip import FullCLIP, load_full_clip, save_full_clip
from ..clip.gmp import to_gmp
from ..clip.network import build_network
from ..data.dataset import ClipDataset
from ..data.images import normalize
from ..data.loader import Batch, TrainLoader
from ..data.tokens import Tokenizer
from ..errors import UserError
from ..evaluate.features import Encoder
from ..evaluate.retrieval import retrieval_of
from ..report.charts import loss_chart
from .compute import autocast, choose_micro_batch, default_device, resolve_precision
from .config import TrainConfig
from .large_batch import Side, batch_gradients
from .losses import LOSSES, positive_pairs
from .optimizers import build_optimizer, parameter_groups, set_learning_rates
from .run_folder import RunFolder, claim_run_folder
from .schedules import one_cycle

MAX_LOGIT_SCALE = math.log(100)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a front end shows while a training runs. `steps` and `validations` are the lines of metrics.jsonl so far."""

    step: int
    total_steps: int
    batch_size: int
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]

    @property
    def seconds_left(self) -> float | None:
        """How long the steps that are left take at the pace of the last ten; None before the first."""
        speeds = [line["pairs_per_second"] for line in self.steps[-10:]]
        if not speeds or min(speeds) <= 0:
            return None
        return (self.total_steps - self.step) * self.batch_size * sum(1 / speed for speed in speeds) / len(speeds)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The trained model: the best by validation loss, else the last. `best_step` 0 is the original.

    `notes` are sentences for the user; `already_finished` is true when the run was complete and nothing was trained.
    """

    full_clip: FullCLIP
    run_folder: Path
    best_step: int
    total_steps: int
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    notes: tuple[str, ...]
    already_finished: bool


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
    on_note: Callable[[str], None] = lambda note: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Train, and write everything into `run_folder` (or the next free one, see `claim_run_folder`).

    `on_progress` is called after each optimizer step and validation, `check_cancelled` between micro-batches too;
    either may raise anything: the state is saved first, and the same call goes on from it. `on_note` gets each
    sentence of the result's notes as soon as it is known. Raises `UserError`, also for a loss that is not finite.
    """
    config = config or TrainConfig()
    notes = _Notes(on_note)
    model = _prepare_model(full_clip, config, notes)
    train_set = _present(train_set, "training", notes)
    validation = _present(validation, "validation", notes) if validation is not None and len(validation) else None
    batch_size = _batch_size(config, train_set, notes)
    identity = {
        "settings": config.identity,
        "model": model.fingerprint,
        "train": train_set.fingerprint(),
        "validation": validation.fingerprint() if validation is not None else None,
    }
    run, claimed = claim_run_folder(Path(run_folder), identity, on_existing)
    notes.extend(claimed)
    training = _Training(
        model, train_set, validation, config, run, batch_size, torch.device(device or default_device()), notes,
        on_progress, check_cancelled,
    )  # fmt: skip
    training.describe(identity, origins)
    # A host may call this in inference mode, whose tensors cannot be trained.
    with torch.inference_mode(False), torch.enable_grad():
        return training.run_to_the_end()


class _Notes(list):
    """Sentences for the user, told as they come."""

    def __init__(self, tell: Callable[[str], None]):
        super().__init__()
        self.tell = tell

    def append(self, note: str) -> None:
        if note not in self:
            super().append(note)
            self.tell(note)

    def extend(self, notes) -> None:
        for note in notes:
            self.append(note)


def _prepare_model(full_clip: FullCLIP, config: TrainConfig, notes: _Notes) -> FullCLIP:
    notes.extend(full_clip.notes)
    if config.gmp:
        return to_gmp(full_clip)
    if full_clip.parameterization == "gmp":
        notes.append("This model is in GmP form and is trained in it; fold it first to train plain weights.")
    return full_clip


def _present(dataset: ClipDataset, what: str, notes: _Notes) -> ClipDataset:
    """Without the entries whose picture is not there."""
    missing = dataset.missing()
    if not missing:
        return dataset
    notes.append(
        f"{len(missing)} of the {len(dataset)} {what} pictures named in {dataset.name} are not there (the first is "
        f"{dataset.names[missing[0]]}); they are left out."
    )
    gone = set(missing)
    return dataset.subset([index for index in range(len(dataset)) if index not in gone])


def _batch_size(config: TrainConfig, train_set: ClipDataset, notes: _Notes) -> int:
    if len(train_set) < 2:
        raise UserError(
            f"The data set {train_set.name} has {len(train_set)} picture(s) to train on; CLIP learns by comparing "
            "pairs, so at least 2 are needed, and some hundred are better."
        )
    if len(train_set) < config.batch_size:
        notes.append(
            f"The batch is reduced from {config.batch_size} to {len(train_set)} because there are no more pictures."
        )
    return min(config.batch_size, len(train_set))


class _Training:
    """One run at work. `step` counts optimizer steps done; `whole` is false while weights, step and metrics differ."""

    def __init__(
        self, model, train_set, validation, config, run, batch_size, device, notes, on_progress, check_cancelled
    ):
        self.model: FullCLIP = model
        self.train_set: ClipDataset = train_set
        self.validation: ClipDataset | None = validation
        self.config: TrainConfig = config
        self.folder: RunFolder = run
        self.batch_size: int = batch_size
        self.device: torch.device = device
        self.notes: _Notes = notes
        self.on_progress, self.check_cancelled = on_progress, check_cancelled
        self.precision = resolve_precision(config.precision, device)
        self.steps_per_epoch = len(train_set) // batch_size
        self.total_steps = config.epochs * self.steps_per_epoch
        self.validate_every = config.validate_every or self.steps_per_epoch
        self.micro_batch = config.micro_batch
        self.step = 0
        self.validated: int | None = None  # the step whose validation is in the metrics
        self.best: dict[str, float] | None = None
        self.whole = True
        self.saved_step: int | None = None
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, Any]] = []

    # ---- the run ---------------------------------------------------------------------------------------------------

    def describe(self, identity: Mapping[str, Any], origins: Mapping[str, str] | None) -> None:
        """Write config.json: every value with its origin, what the run is made of, and with what it runs."""
        import open_clip

        write_json(
            self.folder.config_file,
            {
                "settings": self.config.origins(origins),
                "identity": identity,
                "model": {"architecture": self.model.architecture.as_dict(), "provenance": dict(self.model.provenance)},
                "data": {
                    "train": {"name": self.train_set.name, "images": len(self.train_set)},
                    "validation": self.validation and {"name": self.validation.name, "images": len(self.validation)},
                },
                "batch_size": self.batch_size,
                "steps_per_epoch": self.steps_per_epoch,
                "total_steps": self.total_steps,
                "precision": self.precision,
                "device": self.device.type,
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "open_clip": open_clip.__version__,
                },
            },
        )

    def run_to_the_end(self) -> TrainResult:
        state = self.folder.load_state()
        if state is not None and self._is_finished(state[1]):
            return self._result(already_finished=True)
        self.folder.remove_parts()
        self._build()
        if state is not None:
            self._restore(*state)
            del state
        else:
            self.folder.cut_metrics(0)
        try:
            self._loop()
        except BaseException:
            if self.whole and self.step and self.saved_step != self.step and self._weights_are_finite():
                self._save()
                if self.validation is None:
                    self._write_best()
            if self.saved_step:
                self.notes.append(
                    f"Stopped; the state of step {self.saved_step} is saved, and the same run goes on from it."
                )
            raise
        finally:
            self.loader.close()
        if self.loader.broken:
            name, reason = next(iter(self.loader.broken.items()))
            self.notes.append(
                f"{len(self.loader.broken)} training pictures cannot be opened and were left out of their batches (the "
                f"first is {name}: {reason})."
            )
        if self.saved_step != self.step or self.validation is not None:
            self._save()
        if self.validation is None:
            self._write_best()
        return self._result(already_finished=False)

    def _loop(self) -> None:
        batches = self.loader.iterate(self.step)
        last_save = last_step = time.monotonic()
        while True:
            if self._validation_is_due():
                self._validate()
                last_step = time.monotonic()
            if self.step >= self.total_steps:
                return
            self.check_cancelled()
            _, batch = next(batches)
            record = self._train_step(batch)
            now = time.monotonic()
            record["pairs_per_second"] = round(len(batch.images) / max(now - last_step, 1e-9), 3)
            last_step = now
            self.folder.log(record)
            self.steps.append(record)
            self.whole = True
            self._tell()
            every, minutes = self.config.save_every_steps, self.config.save_every_minutes
            if (every and self.step % every == 0) or (minutes and now - last_save > minutes * 60):
                self._save()
                last_save = time.monotonic()

    # ---- one step --------------------------------------------------------------------------------------------------

    def _train_step(self, batch: Batch) -> dict[str, Any]:
        config, step = self.config, self.step + 1
        factor = one_cycle(self.step, self.total_steps, config.warmup)
        rates = set_learning_rates(self.optimizer, config, factor)
        self.optimizer.zero_grad(set_to_none=True)
        positives = positive_pairs(batch.originals, batch.texts).to(self.device)
        logit_scale = self.network.logit_scale
        shown_scale = logit_scale.item()
        loss = batch_gradients(
            (Side(self._encode_images, batch.images, self.trains_vision),
             Side(self._encode_texts, batch.tokens, self.trains_text)),
            lambda images, texts: self.loss(images, texts, logit_scale, positives),
            micro_batch=self.micro_batch,
            loss_factor=self.scaler.get_scale(),
            check_cancelled=self.check_cancelled,
        )  # fmt: skip
        self.scaler.unscale_(self.optimizer)
        limit = config.max_grad_norm or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(self.trainable, limit).item()
        self._require_finite(step, loss.item(), grad_norm)
        self.whole = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if logit_scale.requires_grad:
            with torch.no_grad():
                logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        self.step = step
        return {
            "kind": "step",
            "step": step,
            "epoch": round(step / self.steps_per_epoch, 6),
            "loss": loss.item(),
            "learning_rate": rates,
            "grad_norm": grad_norm,
            "logit_scale": math.exp(shown_scale),
            "micro_batch": min(self.micro_batch, len(batch.images)),
        }

    def _encode_images(self, images_u8: torch.Tensor) -> torch.Tensor:
        images = normalize(images_u8.to(self.device, non_blocking=True), self.network.logit_scale.dtype)
        with autocast(self.precision if self.trains_vision else self.frozen_precision, self.device):
            return self.network.encode_image(images)

    def _encode_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        with autocast(self.precision if self.trains_text else self.frozen_precision, self.device):
            return self.network.encode_text(tokens.to(self.device, non_blocking=True))

    def _require_finite(self, step: int, loss: float, grad_norm: float) -> None:
        # Under fp16 an infinite gradient is how the scaler finds its scale; it skips such a step by itself.
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self.scaler.is_enabled()):
            return
        what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient became {grad_norm}"
        raise UserError(
            f"The training stopped at step {step} because {what}. The weights from before that step are kept in "
            f"{self.folder.path}. Try a lower learning_rate, or precision fp32."
        )

    # ---- validation ------------------------------------------------------------------------------------------------

    def _validation_is_due(self) -> bool:
        if self.validation is None or self.validated == self.step:
            return False
        return self.step % self.validate_every == 0 or self.step >= self.total_steps

    def _validate(self) -> None:
        self.network.eval()
        encoder = Encoder(
            self.network, self.model.architecture.image_size, self.tokenizer, self.device,
            autocast=lambda: autocast(self.frozen_precision, self.device), check_cancelled=self.check_cancelled,
        )  # fmt: skip
        measured = retrieval_of(encoder, self.validation)
        self.network.train()
        self.notes.extend(measured.notes)
        record = {
            "kind": "validation",
            "step": self.step,
            "loss": measured.loss,
            "image_to_text_r1": measured.image_to_text["r1"],
            "text_to_image_r1": measured.text_to_image["r1"],
        }
        if not math.isfinite(measured.loss):
            raise UserError(
                f"The validation at step {self.step} gave a loss of {measured.loss}: the weights are not usable. "
                "Try a lower learning_rate, or check the model with clip-finetune info."
            )
        if self.best is None or measured.loss < self.best["loss"]:
            self.best = {"step": self.step, "loss": measured.loss}
            self._write_best()
        self.validated = self.step
        self.folder.log(record)
        self.validations.append(record)
        self._write_chart()
        self._tell()

    def _tell(self) -> None:
        self.on_progress(Progress(self.step, self.total_steps, self.batch_size, self.steps, self.validations))

    # ---- files -----------------------------------------------------------------------------------------------------

    def _trained_model(self) -> FullCLIP:
        """The weights as they are now; what did not train is the original's own."""
        if self.step == 0:
            return self.model
        changed = {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.network.named_parameters()
            if parameter.requires_grad
        }
        return self.model.derive(changed, step=f"trained for {self.step} steps ({self.folder.path.name})")

    def _write_best(self) -> None:
        save_full_clip(self._trained_model(), self.folder.best_file)

    def _write_chart(self) -> None:
        with replacing(self.folder.chart_file) as beside:
            loss_chart(self.steps, self.validations, title=self.folder.path.name).save(beside, format="PNG")

    def _weights_are_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.trainable)

    def _save(self) -> None:
        tensors = {f"model.{name}": parameter for name, parameter in self.network.named_parameters()}
        numbers: dict[str, dict[str, Any]] = {}
        for name, parameter in self._named_trainable():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
                else:
                    numbers.setdefault(name, {})[key] = value
        epoch, position = divmod(self.step, self.steps_per_epoch)
        info = {
            "step": self.step,
            "total_steps": self.total_steps,
            "validated": self.validated,
            "best": self.best,
            "micro_batch": self.micro_batch,
            "metrics_bytes": self.folder.metrics_bytes(),
            "optimizer": numbers,
            "schedule": {"name": "one_cycle", "step": self.step, "warmup": self.config.warmup},
            # All randomness is a function of these, so there is no generator whose state would have to be kept.
            "sampler": {"seed": self.config.seed, "epoch": epoch, "position": position},
            "scaler": self.scaler.state_dict(),
        }
        self.folder.save_state(self.step, tensors, info, self.config.keep_states)
        self.saved_step = self.step
        self._write_chart()

    # ---- setting up ------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        config, architecture = self.config, self.model.architecture
        self.tokenizer = Tokenizer(architecture.context_length, architecture.vocab_size)
        self.network = build_network(self.model, device=self.device)
        self.trains_text, self.trains_vision = config.towers in ("both", "text"), config.towers in ("both", "vision")
        # bf16 for a tower without gradients is slow on CPUs.
        self.frozen_precision = "fp32" if self.device.type == "cpu" else self.precision
        for name, parameter in self.network.named_parameters():
            vision = name.startswith("visual.")
            trains = self.trains_vision if vision else self.trains_text
            parameter.requires_grad_(config.train_logit_scale if name == "logit_scale" else trains)
        if config.activation_checkpointing:
            self.network.set_grad_checkpointing()
        self.trainable = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(config, parameter_groups(self.network, config.weight_decay))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.loss = LOSSES[config.loss]()
        self.micro_batch = config.micro_batch or choose_micro_batch(
            architecture, self.batch_size, self.precision, self.device, config.activation_checkpointing
        )
        self.loader = TrainLoader(
            self.train_set, architecture.image_size, self.tokenizer, self.batch_size, config.seed
        )  # fmt: skip

    def _named_trainable(self):
        return [
            (name, parameter)
            for group in self.optimizer.param_groups
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]

    def _restore(self, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        for name, parameter in self._named_trainable():
            prefix = f"optimizer.{name}."
            found: dict[str, Any] = dict(info["optimizer"].get(name, {}))
            for key in [key for key in tensors if key.startswith(prefix)]:
                # AdamW keeps its step count on the CPU; everything else is where the parameter is.
                value, kind = tensors[key], key.removeprefix(prefix)
                found[kind] = value.clone() if kind == "step" else value.to(parameter.device, copy=True)
            if found:
                self.optimizer.state[parameter] = found
        self.scaler.load_state_dict(info["scaler"])
        self.step = self.saved_step = info["step"]
        self.validated, self.best = info["validated"], info["best"]
        if not self.config.micro_batch:
            self.micro_batch = info["micro_batch"]
        self.folder.cut_metrics(info["metrics_bytes"])
        self._read_metrics()
        self.notes.append(f"The run goes on from step {self.step} of {self.total_steps}.")
        if info["total_steps"] != self.total_steps:
            self.notes.append(
                f"The number of epochs has changed: the run now has {self.total_steps} steps instead of "
                f"{info['total_steps']}, and the learning rate follows the schedule of the new length from here."
            )

    def _read_metrics(self) -> None:
        lines = self.folder.metrics()
        self.steps = [line for line in lines if line["kind"] == "step"]
        self.validations = [line for line in lines if line["kind"] == "validation"]

    def _is_finished(self, info: Mapping[str, Any]) -> bool:
        if info["step"] < self.total_steps or not self.folder.best_file.is_file():
            return False
        self.step, self.best, self.validated = info["step"], info["best"], info["validated"]
        return self.validation is None or self.validated == self.step

    def _result(self, *, already_finished: bool) -> TrainResult:
        if already_finished:
            self._read_metrics()
            self.notes.append(f"This run was finished before ({self.step} steps); its result is returned as it is.")
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
