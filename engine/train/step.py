"""One optimizer step: forward, loss and backward of a batch in parts that fit in memory, then the optimizer."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..clip.full_clip import FullCLIP
from ..clip.network import checkpoint_activations, compile_blocks
from ..data.images.decoding import normalize
from ..data.loader import Batch
from ..data.tokenizer import cut_to_longest
from ..errors import UserError
from .config import TrainConfig
from .device import DTYPES, out_of_memory, to_device
from .freezing import stage_at, trains_at_all, trains_in_stage
from .frozen_features import FrozenFeatures
from .grad_cache import Side, batch_gradients
from .losses import LOSSES, positive_pairs
from .master_weights import MasterWeights
from .memory import fitting_micro_batch
from .neuron_scaling import parse_neurons, scale_neurons
from .optim.factory import build_optimizer, undo_steps
from .optim.gradient_norms import GradientMeter, GradientNorms
from .optim.parameter_groups import group_table, parameter_groups, set_learning_rates
from .optim.parameter_info import SCALARS
from .run import checkpoints
from .schedules import SCHEDULES

MAX_LOGIT_SCALE = math.log(100)
# Loss scale under fp16. torch's default of 65536 overflowed in 4 of the first 6 steps of a small CLIP, and a skipped
# step trains nothing. Below the lowest scale, which is fairseq's, no gradient is an overflow any more.
_FIRST_SCALE, _LOWEST_SCALE = 2.0**10, 1e-4
_LENGTHS = 8  # on CUDA texts are cut to multiples of it: fewer shapes, which suit the units that multiply


class Outcome(NamedTuple):
    """What a step gave, still on the device: the loss, exp(logit_scale) before the step, whether the weights moved, the
    lengths of the gradients before clipping; and the rates by group."""

    loss: Tensor
    logit_scale: Tensor
    finite: Tensor
    norms: GradientNorms
    rates: dict[str, float]


class TrainingStep:
    """The model, loss and optimizer of a training, and what moves them. It knows no files.

    `say` gets a sentence for the user, `check_cancelled` is called between micro-batches and may raise anything: the
    weights are then as before the step. `timed` measures the parts of a step. `whole` is false from when the optimizer
    begins to move the weights until the caller, who has counted the step, sets it. Raises `UserError` if nothing would
    train.
    """

    def __init__(
        self,
        model: FullCLIP,
        config: TrainConfig,
        *,
        device: torch.device,
        precision: str,
        batch_size: int,
        total_steps: int,
        say: Callable[[str], None] = lambda note: None,
        check_cancelled: Callable[[], None] = lambda: None,
        timed: Callable[[str], contextlib.AbstractContextManager] = lambda part: contextlib.nullcontext(),
    ):
        self.model, self.config, self.device, self.total_steps = model, config, device, total_steps
        self.say, self.check_cancelled, self.timed = say, check_cancelled, timed
        self.whole = True
        self.frozen_vision: FrozenFeatures | None = None  # where what it gives is kept
        self.stage: int | None = None
        architecture = model.architecture
        self.weights = MasterWeights(
            model,
            lambda name: trains_at_all(
                name, architecture, config.towers, config.layers, train_logit_scale=config.loss.train_logit_scale
            ),
            device=device,
            dtype=DTYPES[precision],
        )
        self.network = self.weights.network
        scale_neurons(self.network, parse_neurons(config.layers.scale_neurons, architecture))
        if config.memory.activation_checkpointing:
            checkpoint_activations(self.network)
        if config.memory.compile:
            compile_blocks(self.network)
        self.loss = LOSSES[config.loss.loss].make(config.loss.temperature, config.loss.label_smoothing).to(device)
        self.trained = self.weights.masters | dict(self.loss.named_parameters())
        if not self.trained.keys() - SCALARS:
            raise UserError("Everything is frozen, so there is nothing to train; freeze fewer blocks.")
        groups = parameter_groups(self.trained.items(), architecture, config.optimizer)
        self.optimizer = build_optimizer(config.optimizer, config.learning_rate, groups, say)
        self.meter = GradientMeter(groups, architecture)
        self.group_rows = group_table(groups, config.learning_rate)
        self.broken = torch.zeros((), device=device)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=_FIRST_SCALE, enabled=precision == "fp16")
        self._enter_stage(0)
        self.micro_batch = config.memory.micro_batch or fitting_micro_batch(self, batch_size)

    # ---- the step --------------------------------------------------------------------------------------------------

    def __call__(self, batch: Batch, done: int) -> Outcome:
        """The step after `done` others. Once a step is not finite, none after it moves the weights, until `forget`."""
        config = self.config
        self._enter_stage(stage_at(done, self.total_steps, config.layers.unfreeze_stages))
        optim = config.optimizer
        factor = SCHEDULES[optim.schedule].multiple(done, self.total_steps, optim.warmup, optim.min_lr_ratio)
        rates = set_learning_rates(self.optimizer, config.learning_rate, factor)
        shown_scale = self.network.logit_scale.detach().exp()
        loss = self._gradients(batch, begins=done == 0)
        self.whole = False
        with self.timed("optimizer"):
            finite, norms = self._move(loss)
        return Outcome(loss, shown_scale, finite, norms, rates)

    def _gradients(self, batch: Batch, *, begins: bool) -> Tensor:
        """The loss; its gradients lie at the masters. What does not fit in memory is tried again in smaller parts."""
        positives = positive_pairs(*(to_device(which, self.device) for which in (batch.originals, batch.texts)))
        logit_scale = self.network.logit_scale
        texts = Side(self._encode_texts, self.cut(batch.tokens), self.trains_text)
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                sides = (self._image_side(batch), texts)
                if begins and hasattr(self.loss, "begin"):
                    features = [side.features(self.micro_batch, self.check_cancelled) for side in sides]
                    self.loss.begin(*features, logit_scale, positives)
                loss = batch_gradients(
                    sides,
                    lambda images, texts: self.loss(images, texts, logit_scale, positives),
                    micro_batch=self.micro_batch,
                    scale=self.scaler.scale,
                    check_cancelled=self.check_cancelled,
                    timed=self.timed,
                )
                self.weights.finish_gradients()
                return loss
            except (RuntimeError, MemoryError) as error:
                parts = min(self.micro_batch, batch.pairs)
                if not out_of_memory(error) or parts == 1:
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_batch = parts // 2
            self.say(
                f"The memory does not hold {parts} pairs at once; the training goes on with micro_batch "
                f"{self.micro_batch}, which changes nothing but its speed."
            )

    def _move(self, loss: Tensor) -> tuple[Tensor, GradientNorms]:
        """(a bool tensor: the weights moved, or all is still as before a step that was not finite; the norms before
        clipping)."""
        self.scaler.unscale_(self.optimizer)
        norms = self.meter.measure()
        if self.config.optimizer.max_grad_norm:
            self.meter.clip(norms, self.config.optimizer.max_grad_norm)
        finite = torch.isfinite(loss)
        if not self._can_lower_scale():
            finite = finite & norms.total.isfinite()
        self.broken.copy_(torch.maximum(self.broken, (~finite).float()))
        finite = self.broken == 0
        if not self.scaler.is_enabled():
            self.optimizer.found_inf = self.broken
            self.optimizer.step()
        elif finite:
            self.scaler.step(self.optimizer)  # does nothing where a gradient overflowed
            self.scaler.update()
        else:
            self.scaler.update(self.scaler.get_scale())  # ends the step and changes nothing
        if self.network.logit_scale.requires_grad:
            with torch.no_grad():
                self.network.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        self.weights.refresh()
        return finite, norms

    def _can_lower_scale(self) -> bool:
        """Whether an infinite gradient may be an overflow of fp16, which a lower loss scale avoids.

        The scaler skips such a step and halves its scale. A gradient that is still infinite at `_LOWEST_SCALE` will
        never be finite.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() > _LOWEST_SCALE

    def cut(self, tokens: Tensor) -> Tensor:
        """As much of the texts as is computed."""
        return cut_to_longest(tokens, multiple=_LENGTHS if self.device.type == "cuda" else 1)

    def pictures(self, images_u8: Tensor) -> Tensor:
        """What the network reads, on the device."""
        return normalize(to_device(images_u8, self.device), self.network.dtype)

    def _image_side(self, batch: Batch) -> Side:
        frozen = self.frozen_vision
        if frozen is None:
            return Side(self._encode_images, batch.images, self.trains_vision)
        with self.timed("forward"):
            return Side(frozen.encode, frozen.inputs(batch), self.trains_vision)

    def _encode_images(self, images_u8: Tensor) -> Tensor:
        return self.network.encode_image(self.pictures(images_u8))

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        return self.network.encode_text(to_device(tokens, self.device))

    def _enter_stage(self, stage: int) -> None:
        """Let exactly those parameters have gradients that this stage trains."""
        if stage == self.stage:
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.stage, stages = stage, self.config.layers.unfreeze_stages
        architecture = self.model.architecture
        self.weights.choose(lambda name: trains_in_stage(name, architecture, stage, stages))
        self.trains_vision, self.trains_text = (
            any(
                p.requires_grad
                for name, p in self.weights.masters.items()
                if name.startswith("visual.") == vision and name not in SCALARS
            )
            for vision in (True, False)
        )

    # ---- what is kept of it ----------------------------------------------------------------------------------------

    def forget(self, steps: int) -> None:
        """Undo the last steps, which changed nothing because one was not finite.

        Under fp16 the optimizer was not even called, so its counters are right already.
        """
        if not self.scaler.is_enabled():
            undo_steps(self.optimizer, steps)
        self.broken.zero_()

    def finite_weights(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.trained.values())

    def changed(self) -> dict[str, Tensor]:
        """The trained tensors of the model as they are now, on the CPU."""
        return {name: master.detach().cpu().clone() for name, master in self.weights.masters.items()}

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state: named tensors, and plain numbers for `unpack`."""
        tensors, numbers = checkpoints.pack(self.weights.tensors(), self.loss, self.optimizer)
        return tensors, {
            "optimizer": numbers,
            "scaler": self.scaler.state_dict(),
            "micro_batch": self.micro_batch,
        }

    def unpack(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Put what `pack` gave back into a freshly built step."""
        checkpoints.unpack(tensors, numbers["optimizer"], self.weights.masters, self.loss, self.optimizer)
        self.weights.refresh()
        if numbers["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(numbers["scaler"])
        if not self.config.memory.micro_batch:
            self.micro_batch = numbers["micro_batch"]
