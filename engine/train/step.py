"""One optimizer step: forward, loss and backward of a batch in micro-batches that fit in memory, then the optimizer."""

from __future__ import annotations

import math
import traceback
from typing import Any

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
from .memory import StepMemory, TensorBytes
from .neuron_scaling import parse_neurons, scale_neurons
from .optim.factory import build_optimizer, undo_steps
from .optim.gradient_norms import GradientMeter, GradientNorms
from .optim.parameter_groups import group_table, parameter_groups, set_learning_rates
from .optim.parameter_info import SCALARS
from .run.checkpoints import StepState, pack, unpack
from .run.metrics import StepOutcome
from .run.profile import Profile
from .run.results import Callbacks
from .schedules import SCHEDULES
from .setup import Plan

MAX_LOGIT_SCALE = math.log(100)
# Loss scale under fp16. torch's default of 65536 overflowed in 4 of the first 6 steps of a small CLIP, and a skipped
# step trains nothing. Below the lowest scale, which is fairseq's, no gradient is an overflow any more.
_FIRST_SCALE, _LOWEST_SCALE = 2.0**10, 1e-4
_LENGTHS = 8  # on CUDA captions are trimmed to multiples of it: fewer shapes, which suit the matrix units


def build_weights(model: FullCLIP, config: TrainConfig, plan: Plan) -> MasterWeights:
    """Build the master weights of a training and the network that computes with them."""
    architecture, layers = model.architecture, config.layers

    def trains(name: str) -> bool:
        train_logit_scale = config.loss.train_logit_scale
        return trains_at_all(name, architecture, config.towers, layers, train_logit_scale=train_logit_scale)

    weights = MasterWeights(model, trains, device=plan.device, dtype=DTYPES[plan.precision])
    scale_neurons(weights.network, parse_neurons(layers.scale_neurons, architecture))
    if config.memory.activation_checkpointing:
        checkpoint_activations(weights.network)
    if config.memory.compile:
        compile_blocks(weights.network)
    return weights


class TrainingStep:
    """The weights, loss and optimizer of a training, and what moves them. Knows no files.

    `gradients` and `apply` are the two halves of a step: until `apply` begins, an exception (such as one that
    `check_cancelled` raises between micro-batches) leaves the weights as they were before the step. Raises `UserError`
    if nothing would train.
    """

    def __init__(
        self,
        weights: MasterWeights,
        config: TrainConfig,
        plan: Plan,
        *,
        frozen_vision: FrozenFeatures | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.weights, self.config, self.plan, self.frozen_vision = weights, config, plan, frozen_vision
        self.callbacks = callbacks or Callbacks()
        self.network: Any = weights.network  # a clip.network.CLIP, whose class is made when it is first needed
        self.device = plan.device
        self.architecture = weights.model.architecture
        self.profile = Profile(plan.device, enabled=config.checkpoints.profile)
        settings = config.loss
        self.loss = LOSSES[settings.loss].make(settings.temperature, settings.label_smoothing).to(plan.device)
        self.trained = weights.masters | dict(self.loss.named_parameters())
        if not self.trained.keys() - SCALARS:
            raise UserError("Everything is frozen, so there is nothing to train; freeze fewer blocks.")
        groups = parameter_groups(self.trained.items(), self.architecture, config.optimizer)
        self.optimizer = build_optimizer(config.optimizer, config.learning_rate, groups, self.callbacks.notes.add)
        self.meter = GradientMeter(groups, self.architecture)
        self.group_rows = group_table(groups, config.learning_rate)
        self.broken = torch.zeros((), device=plan.device)  # above 0 once a step was not finite
        self.scaler = torch.amp.GradScaler(plan.device.type, init_scale=_FIRST_SCALE, enabled=plan.precision == "fp16")
        self.stage = -1
        self._enter_stage(0)
        self.micro_batch = config.memory.micro_batch
        if not self.micro_batch:
            self.micro_batch = self.memory().fitting_micro_batch(plan.batch_size, plan.device)

    # ---- the step --------------------------------------------------------------------------------------------------

    def __call__(self, batch: Batch, done: int) -> StepOutcome:
        """Do the step that follows `done` others."""
        return self.apply(self.gradients(batch, done), done)

    def gradients(self, batch: Batch, done: int) -> Tensor:
        """Compute the gradients of the master weights; returns the loss.

        What does not fit in memory is tried again with a smaller micro-batch.
        """
        self._enter_stage(stage_at(done, self.plan.total_steps, self.config.layers.unfreeze_stages))
        positives = positive_pairs(*(to_device(ids, self.device) for ids in (batch.originals, batch.texts)))
        texts = Side(self._encode_texts, self.trim(batch.tokens), self.trains_text)
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                sides = (self._image_side(batch), texts)
                if done == 0 and hasattr(self.loss, "begin"):
                    features = [side.features(self.micro_batch, self.callbacks.check_cancelled) for side in sides]
                    self.loss.begin(*features, self.network.logit_scale, positives)
                loss = batch_gradients(
                    sides,
                    lambda images, texts: self.loss(images, texts, self.network.logit_scale, positives),
                    micro_batch=self.micro_batch,
                    scale=self.scaler.scale,
                    check_cancelled=self.callbacks.check_cancelled,
                    timed=self.profile,
                )
                self.weights.finish_gradients()
                return loss
            except (RuntimeError, MemoryError) as error:
                pairs = min(self.micro_batch, batch.pairs)
                if not out_of_memory(error) or pairs == 1:
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
            self._halve_micro_batch(pairs)

    def _halve_micro_batch(self, pairs: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.micro_batch = pairs // 2
        self.callbacks.notes.add(
            f"The memory does not hold {pairs} pairs at once; the training continues with micro_batch "
            f"{self.micro_batch}, which changes nothing but its speed."
        )

    def apply(self, loss: Tensor, done: int) -> StepOutcome:
        """Move the weights by their gradients, with the learning rates of the step that follows `done` others.

        Once a step is not finite, none after it moves the weights, until `undo`.
        """
        settings = self.config.optimizer
        factor = SCHEDULES[settings.schedule].multiple(
            done, self.plan.total_steps, settings.warmup, settings.min_lr_ratio
        )
        rates = set_learning_rates(self.optimizer, self.config.learning_rate, factor)
        logit_scale = self.network.logit_scale.detach().exp()
        with self.profile("optimizer"):
            finite, norms = self._move(loss)
        return StepOutcome(loss, logit_scale, finite, norms, rates)

    def _move(self, loss: Tensor) -> tuple[Tensor, GradientNorms]:
        """Return whether the weights moved (bool tensor), and the gradient norms before clipping."""
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
            self.optimizer.found_inf = self.broken  # type: ignore[attr-defined]  # as torch's GradScaler sets it
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
        """Return whether an infinite gradient may be an overflow of fp16, which a lower loss scale avoids.

        The scaler skips such a step and halves its scale. A gradient that is still infinite at `_LOWEST_SCALE` will
        never be finite.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() > _LOWEST_SCALE

    # ---- the towers ------------------------------------------------------------------------------------------------

    def trim(self, tokens: Tensor) -> Tensor:
        """Trim the token batch to its longest caption."""
        return cut_to_longest(tokens, multiple=_LENGTHS if self.device.type == "cuda" else 1)

    def _image_side(self, batch: Batch) -> Side:
        frozen = self.frozen_vision
        if frozen is None:
            return Side(self.encode_images, batch.images, self.trains_vision)
        with self.profile("forward"):
            return Side(frozen.encode, frozen.inputs(batch, self.micro_batch), self.trains_vision)

    def encode_images(self, images_u8: Tensor) -> Tensor:
        return self.network.encode_image(normalize(to_device(images_u8, self.device), self.network.dtype))

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        return self.network.encode_text(to_device(tokens, self.device))

    @property
    def trains_vision(self) -> bool:
        """Whether anything of the vision tower trains in this stage."""
        return self._any_trains(vision=True)

    @property
    def trains_text(self) -> bool:
        return self._any_trains(vision=False)

    def _any_trains(self, *, vision: bool) -> bool:
        return any(
            parameter.requires_grad
            for name, parameter in self.weights.masters.items()
            if name.startswith("visual.") == vision and name not in SCALARS
        )

    def _enter_stage(self, stage: int) -> None:
        """Give gradients to exactly those parameters that train in this stage."""
        if stage == self.stage:
            return
        self.optimizer.zero_grad(set_to_none=True)
        self.stage, stages = stage, self.config.layers.unfreeze_stages
        self.weights.choose(lambda name: trains_in_stage(name, self.architecture, stage, stages))

    # ---- the state -------------------------------------------------------------------------------------------------

    def memory(self) -> StepMemory:
        """Return what the memory of a step depends on."""
        itemsize, optimizer = self.network.dtype.itemsize, self.config.optimizer.optimizer
        return StepMemory(
            tensors=TensorBytes.of(self.trained, self.network, itemsize, optimizer),
            architecture=self.architecture,
            layers=self.config.layers,
            itemsize=itemsize,
            checkpointed=self.config.memory.activation_checkpointing,
            trains_vision=self.trains_vision,
            trains_text=self.trains_text,
        )

    def undo(self, steps: int) -> None:
        """Undo the last steps, which changed nothing because one was not finite.

        Under fp16 the optimizer was not even called, so its counters are right already.
        """
        if not self.scaler.is_enabled():
            undo_steps(self.optimizer, steps)
        self.broken.zero_()

    def finite_weights(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.trained.values())

    def trained_tensors(self) -> dict[str, Tensor]:
        """Return copies of the trained tensors of the model, on the CPU."""
        return {name: master.detach().cpu().clone() for name, master in self.weights.masters.items()}

    def state(self) -> StepState:
        tensors, numbers = pack(self.weights.tensors(), self.loss, self.optimizer)
        return StepState(
            tensors=tensors, optimizer=numbers, scaler=self.scaler.state_dict(), micro_batch=self.micro_batch
        )

    def load_state(self, state: StepState) -> None:
        """Load a saved state into a newly built step."""
        unpack(state, self.weights.masters, self.loss, self.optimizer)
        self.weights.refresh()
        if state.scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state.scaler))
        if not self.config.memory.micro_batch:
            self.micro_batch = state.micro_batch
