"""What is decided and checked before a training begins: `set_up` gives one frozen `TrainSetup`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from ..clip.full_clip import FullCLIP
from ..clip.gmp import to_gmp
from ..clip.health import require_finite
from ..data.dataset import ClipDataset
from ..data.decoded_images import allowed_broken, too_many_broken
from ..data.images.transforms import Transform
from ..data.sampler import Sampler, with_template
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..notes import Notes
from .config import TrainConfig
from .device import resolve_device, resolve_precision
from .freezing import check_freezing
from .neuron_scaling import parse_neurons
from .optim.parameter_groups import LearningRateMultipliers
from .run.results import Callbacks

_STORED_STATISTICS = (
    "The vision tower is a ResNet: its BatchNorm layers normalise by the averages that are stored in the model, in "
    "training too, and leave those unchanged, so that an image's features do not depend on the rest of its batch."
)
# A loss may read none of the broken values in these: a fixed temperature, tokens that no caption has, positions behind
# the longest caption. Anything else that is broken makes the first loss NaN.
_NOT_ALWAYS_READ = ("logit_scale", "token_embedding.weight", "positional_embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Where a training computes, and how long. `precision` is fp32, bf16 or fp16."""

    device: torch.device
    precision: str
    batch_size: int
    steps_per_epoch: int
    total_steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """One training before it begins: what is trained, on what, where and how long."""

    config: TrainConfig
    model: FullCLIP
    train_set: ClipDataset
    validation: ClipDataset | None
    plan: Plan
    transform: Transform
    tokenizer: Tokenizer
    callbacks: Callbacks

    @property
    def notes(self) -> Notes:
        return self.callbacks.notes

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What makes another training another run."""
        return {
            "settings": self.config.identity,
            "model": self.model.fingerprint,
            "train": self.train_set.fingerprint(),
            "validation": None if self.validation is None else self.validation.fingerprint(),
        }


def set_up(
    full_clip: FullCLIP,
    train_set: ClipDataset,
    validation: ClipDataset | None,
    config: TrainConfig,
    device: torch.device | str | None,
    callbacks: Callbacks,
) -> TrainSetup:
    """Check that the settings fit the model and the data, and decide what is left open.

    Raises `UserError`; what the user should know goes to the notes of `callbacks`.
    """
    notes = callbacks.notes
    model = _prepare_model(full_clip, config, notes)
    a = model.architecture
    transform = Transform.of(config.images, a.image_size)
    _check_settings(model, config)
    train_set = _training_images(train_set, config, notes)
    if validation is not None:
        validation = _useful_validation(with_template(validation, config.captions.label_template), notes)
    pairs = Sampler(train_set, config.seed, config.captions).length
    batch_size = _fitting_batch_size(config, train_set, pairs, notes)
    device = resolve_device(device)
    plan = Plan(
        device=device,
        precision=resolve_precision(config.memory.precision, device, a.text_width),
        batch_size=batch_size,
        steps_per_epoch=pairs // batch_size,
        total_steps=config.epochs * (pairs // batch_size),
    )
    return TrainSetup(
        config=config,
        model=model,
        train_set=train_set,
        validation=validation,
        plan=plan,
        transform=transform,
        tokenizer=Tokenizer(a.context_length, a.vocab_size),
        callbacks=callbacks,
    )


def _prepare_model(full_clip: FullCLIP, config: TrainConfig, notes: Notes) -> FullCLIP:
    """Return the model in the form in which it is trained.

    Raises `UserError` for NaN that would otherwise be found only when the trained model is saved.
    """
    require_finite(full_clip, "The training did not start", matters=lambda name: name in _NOT_ALWAYS_READ)
    notes.extend(full_clip.notes)
    if full_clip.architecture.resnet and config.towers != "text":
        notes.add(_STORED_STATISTICS)
    if config.gmp:
        return to_gmp(full_clip)
    if full_clip.parameterization == "gmp":
        notes.add("This model is in GmP form and is trained in it; fold it first to train plain weights.")
    return full_clip


def _check_settings(model: FullCLIP, config: TrainConfig) -> None:
    """Raise `UserError` for settings that this model does not fit."""
    check_freezing(model.architecture, config.layers)
    parse_neurons(config.layers.scale_neurons, model.architecture)
    LearningRateMultipliers.parse(config.optimizer.lr_multipliers)


def _training_images(dataset: ClipDataset, config: TrainConfig, notes: Notes) -> ClipDataset:
    """Return the samples whose image exists; raises `UserError` if more are missing than max_broken allows."""
    present = _existing_images(dataset, "training", notes)
    missing, limit = len(dataset) - len(present), config.checkpoints.max_broken
    if allowed_broken(limit, len(dataset)) < missing < len(dataset):
        reasons = {dataset.names[index]: "the file is not there" for index in dataset.missing()}
        raise too_many_broken(reasons, len(dataset), limit, dataset.name)
    return with_template(present, config.captions.label_template)


def _existing_images(dataset: ClipDataset, purpose: str, notes: Notes) -> ClipDataset:
    """Return the samples whose image exists, and note the others, and what opening the dataset left out."""
    notes.extend(dataset.notes)
    missing = set(dataset.missing())
    if not missing:
        return dataset
    notes.add(
        f"{len(missing)} of the {len(dataset)} {purpose} images named in {dataset.name} do not exist (the first is "
        f"{dataset.names[min(missing)]}); they are left out."
    )
    return dataset.subset([index for index in range(len(dataset)) if index not in missing])


def _useful_validation(dataset: ClipDataset, notes: Notes) -> ClipDataset | None:
    """Return the validation set, or None if it cannot tell one model from another."""
    if not len(dataset):
        return None
    dataset = _existing_images(dataset, "validation", notes)
    captions = {caption for index in range(len(dataset)) for caption in dataset.training_captions(index)}
    if len(dataset) < 2 or len(captions) < 2:
        notes.add(
            f"The validation set has {len(dataset)} image(s) with {len(captions)} different caption(s), which cannot "
            "tell a better model from a worse one; nothing is validated, and the last weights count as the best."
        )
        return None
    return dataset


def _fitting_batch_size(config: TrainConfig, train_set: ClipDataset, pairs: int, notes: Notes) -> int:
    """Return `batch_size`, or the number of `pairs` in an epoch if that is smaller."""
    if len(train_set) < 2:
        raise UserError(
            f"The dataset {train_set.name} has {len(train_set)} image(s) to train on; CLIP learns by comparing pairs, "
            "so at least 2 are needed, and some hundred are better."
        )
    if pairs < config.batch_size:
        notes.add(f"The batch size is reduced from {config.batch_size} to {pairs} because there are no more images.")
    return min(config.batch_size, pairs)
