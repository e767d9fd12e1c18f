"""What is looked at before a training begins: does the model fit the settings, are the pictures there?"""

from __future__ import annotations

from ..clip.full_clip import FullCLIP
from ..clip.gmp import to_gmp
from ..data.dataset import ClipDataset
from ..data.decoded_images import allowed_broken, too_many_broken
from ..data.images.transforms import Transform
from ..data.sampler import DEFAULT_TEMPLATE
from ..errors import UserError
from .config import TrainConfig
from .freezing import check_freezing
from .neuron_scaling import parse_neurons
from .optim.parameter_groups import LearningRateMultipliers
from .run.results import Notes

_STORED_STATISTICS = (
    "The vision tower is a ResNet: its BatchNorm layers normalise by the averages that are stored in the model, in "
    "training too, and leave those as they are, so that a picture's features do not depend on the rest of its batch."
)


def prepare_model(full_clip: FullCLIP, config: TrainConfig, notes: Notes) -> FullCLIP:
    """The model in the form in which it is trained; what the user should know of it goes to `notes`."""
    notes.extend(full_clip.notes)
    if full_clip.architecture.resnet and config.towers != "text":
        notes.append(_STORED_STATISTICS)
    if config.gmp:
        return to_gmp(full_clip)
    if full_clip.parameterization == "gmp":
        notes.append("This model is in GmP form and is trained in it; fold it first to train plain weights.")
    return full_clip


def check_settings(model: FullCLIP, config: TrainConfig) -> None:
    """Raise `UserError` for settings that this model does not fit."""
    check_freezing(model.architecture, config.layers)
    parse_neurons(config.layers.scale_neurons, model.architecture)
    LearningRateMultipliers.parse(config.optimizer.lr_multipliers)
    transform_of(config, model.architecture.image_size)
    template = config.captions.label_template
    if "{}" not in template:
        raise UserError(
            f"label_template is {template!r}; write a sentence with {{}} where the class goes, such as "
            f'"{DEFAULT_TEMPLATE}"'
        )


def transform_of(config: TrainConfig, image_size: int) -> Transform:
    """How the training's pictures become squares; raises `UserError` for a background that is no colour."""
    return Transform.of(config.images, image_size)


def existing_training_images(dataset: ClipDataset, config: TrainConfig, notes: Notes) -> ClipDataset:
    """As `existing_images`; raises `UserError` if more are missing than max_broken allows."""
    present = existing_images(dataset, "training", notes)
    gone = len(dataset) - len(present)
    if gone > allowed_broken(config.checkpoints.max_broken, len(dataset)) and gone < len(dataset):
        reasons = {dataset.names[index]: "the file is not there" for index in dataset.missing()}
        raise too_many_broken(reasons, len(dataset), config.checkpoints.max_broken, dataset.name)
    return present


def existing_images(dataset: ClipDataset, what: str, notes: Notes) -> ClipDataset:
    """Without the entries whose picture is not there; what was left out when it was opened is told too."""
    notes.extend(dataset.notes)
    missing = dataset.missing()
    if not missing:
        return dataset
    notes.append(
        f"{len(missing)} of the {len(dataset)} {what} pictures named in {dataset.name} are not there (the first is "
        f"{dataset.names[missing[0]]}); they are left out."
    )
    gone = set(missing)
    return dataset.subset([index for index in range(len(dataset)) if index not in gone])


def useful_validation(dataset: ClipDataset | None, notes: Notes) -> ClipDataset | None:
    """The validation set, or None where it cannot tell one model from another."""
    if dataset is None or not len(dataset):
        return None
    dataset = existing_images(dataset, "validation", notes)
    captions = {caption for index in range(len(dataset)) for caption in dataset.training_captions(index)}
    if len(dataset) < 2 or len(captions) < 2:
        notes.append(
            f"The validation set has {len(dataset)} picture(s) with {len(captions)} different caption(s), which cannot "
            "tell a better model from a worse one; nothing is validated, and the last weights count as the best."
        )
        return None
    return dataset


def fitting_batch_size(config: TrainConfig, train_set: ClipDataset, pairs: int, notes: Notes) -> int:
    """`batch_size`, or less for a data set that has fewer `pairs` in an epoch; raises `UserError` for one picture."""
    if len(train_set) < 2:
        raise UserError(
            f"The data set {train_set.name} has {len(train_set)} picture(s) to train on; CLIP learns by comparing "
            "pairs, so at least 2 are needed, and some hundred are better."
        )
    if pairs < config.batch_size:
        notes.append(f"The batch is reduced from {config.batch_size} to {pairs} because there are no more pictures.")
    return min(config.batch_size, pairs)
