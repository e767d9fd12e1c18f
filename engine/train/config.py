"""What a user may set about a training: one description that feeds the nodes, the command line and the run folder."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, get_type_hints

from ..data.images.transforms import RESIZE_BACKENDS, RESIZE_MODES
from ..data.sampler import DEFAULT_TEMPLATE, POLICIES
from ..errors import UserError
from .losses import LOSSES
from .neuron_scaling import EXAMPLE
from .schedules import SCHEDULES


def _option(
    default, help: str, *, min=None, max=None, step=None, choices=None, advanced=True, node=True, bookkeeping=False
):
    """`node`: shown in the graph. `bookkeeping`: changing it does not change the result, so the run goes on."""
    metadata = dict(
        help=help, min=min, max=max, step=step, choices=choices, advanced=advanced, node=node, bookkeeping=bookkeeping
    )
    return dataclasses.field(default=default, metadata=types.MappingProxyType(metadata))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training. Raises `UserError` for a value out of its range."""

    epochs: int = _option(
        10,
        "How often the whole data set is gone through; each time every picture comes with one of its captions.",
        min=1,
        max=10_000,
        advanced=False,
    )
    learning_rate: float = _option(
        1e-6,
        "The highest learning rate of the schedule. Higher learns faster and forgets more.",
        min=1e-10,
        max=1.0,
        step=1e-7,
        advanced=False,
    )
    batch_size: int = _option(
        32,
        "Pairs that are compared with each other in one step. More is better; micro_batch keeps memory in bounds.",
        min=2,
        max=65_536,
        advanced=False,
    )
    towers: str = _option(
        "both",
        "What is trained: both towers, only the text tower (the text encoder) or only the vision tower.",
        choices=("both", "text", "vision"),
        advanced=False,
    )
    seed: int = _option(
        0,
        "Decides the order of the pictures and which caption is drawn. The same seed gives the same training.",
        min=0,
        max=2**53,
        advanced=False,
    )
    gmp: bool = _option(False, "Train in GmP form (length and direction of each MLP row apart).", node=False)
    micro_batch: int = _option(
        0,
        "Pairs that go through the model at once; changes memory and speed, never the result's mathematics. "
        "0 chooses by the memory there is.",
        min=0,
        max=65_536,
        bookkeeping=True,
    )
    precision: str = _option(
        "auto",
        "Number format of the computation; weights are kept in fp32. auto: bf16 where it is fast, else fp32.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    loss: str = _option(
        "infonce",
        "What the training makes small. " + "; ".join(f"{name}: {loss.words}" for name, loss in LOSSES.items()) + ".",
        choices=tuple(LOSSES),
    )
    optimizer: str = _option(
        "adabelief",
        "The optimizer. adafactor needs the least memory (no moments of the size of the weights); its "
        "learning_rate is a share of each weight's usual size, so give it about 50 times more than the others.",
        choices=("adabelief", "adamw", "adafactor"),
    )
    weight_decay: float = _option(
        0.01,
        "Pulls the weights of linear layers towards zero, in proportion to the learning rate.",
        min=0.0,
        max=1.0,
        step=0.001,
    )
    beta1: float = _option(0.9, "The optimizer's memory of the gradient.", min=0.0, max=0.999, step=0.01)
    beta2: float = _option(0.999, "The optimizer's memory of the gradient's size.", min=0.0, max=0.99999, step=0.001)
    warmup: float = _option(
        0.1, "Share of the steps in which the learning rate rises to its peak.", min=0.0, max=0.9, step=0.05
    )
    max_grad_norm: float = _option(
        1.0,
        "Longer gradients are shortened to this length before each step; 0 leaves them as they are.",
        min=0.0,
        max=1e6,
        step=0.1,
    )
    train_logit_scale: bool = _option(True, "Train the temperature (logit_scale) too; it never rises above 100.")
    activation_checkpointing: bool = _option(
        False, "Uses about a tenth of the memory for a third more time; the result is the same.", bookkeeping=True
    )
    validate_every: int = _option(
        0, "Validate each time this many steps are done; 0 is once an epoch.", min=0, max=1_000_000_000
    )
    save_every_steps: int = _option(
        0,
        "Save the state of the training each time this many steps are done; 0 leaves it to save_every_minutes.",
        min=0,
        max=1_000_000_000,
        bookkeeping=True,
    )
    save_every_minutes: float = _option(
        10.0,
        "Save the state of the training this often, so that little is lost when the power fails; 0 is never.",
        min=0.0,
        max=100_000.0,
        bookkeeping=True,
    )
    keep_checkpoints: int = _option(
        1, "How many of the newest saved states stay on the disk.", min=1, max=1000, bookkeeping=True
    )
    # New settings go last: workflows store widgets by their place.
    schedule: str = _option(
        "one_cycle",
        "How the learning rate falls after the warm-up: as half a cosine, in a straight line, or not at "
        "all. one_cycle is a cosine with a cosine's warm-up.",
        choices=tuple(SCHEDULES),
    )
    min_lr_ratio: float = _option(
        0.01,
        "The learning rate of the last step as a share of the highest; constant has none.",
        min=0.0,
        max=1.0,
        step=0.01,
    )
    lr_multipliers: str = _option(
        "",
        "Makes groups learn slower or faster than others, such as vision=0.5, text.embeddings=0.1. The fastest "
        "group has learning_rate.",
    )
    layer_decay: float = _option(
        1.0,
        "Below 1, each layer learns slower than the one above it by this factor, such as 0.8.",
        min=0.05,
        max=1.0,
        step=0.05,
    )
    freeze_embeddings: bool = _option(
        False, "Leave what comes before the first block as it is: tokens, positions and patches."
    )
    freeze_text_blocks: int = _option(0, "Leave so many of the text tower's first blocks as they are.", min=0, max=1000)
    freeze_vision_blocks: int = _option(
        0, "Leave so many of the vision tower's first blocks as they are.", min=0, max=1000
    )
    unfreeze_stages: int = _option(
        1,
        "Above 1: begin with the top blocks alone and unfreeze the others from the top down, in so many equal stages.",
        min=1,
        max=1000,
    )
    temperature: float = _option(
        0.07,
        "For the losses with a fixed temperature; smaller is stricter. The others learn their own (logit_scale).",
        min=0.001,
        max=10.0,
        step=0.01,
    )
    label_smoothing: float = _option(
        0.1,
        "For fixed_temperature and entropy_penalty: the share of the target that goes to all captions alike.",
        min=0.0,
        max=0.99,
        step=0.01,
    )
    scale_neurons: str = _option(
        "",
        "An experiment: makes units of the vision tower's MLPs louder while training, as block:unit=factor, such "
        f"as {EXAMPLE}. Validation and the saved model are without it.",
    )
    profile: bool = _option(False, "Measure where the time of a step goes, and tell it at the end.", bookkeeping=True)
    resize_mode: str = _option(
        "crop",
        "How a picture becomes a square. crop: the middle of it; pad: all of it, with background beside it; "
        "squash: all of it, pressed; random_crop: another part of it each time (validation sees the middle).",
        choices=RESIZE_MODES,
    )
    min_crop_area: float = _option(
        0.5,
        "For resize_mode: random_crop. The smallest share of a picture's area that a part of it has.",
        min=0.05,
        max=1.0,
        step=0.05,
    )
    horizontal_flip: bool = _option(
        False,
        "Mirror half of the pictures, chosen anew each epoch. Not for captions that say left or right, nor for "
        "writing.",
    )
    color_jitter: float = _option(
        0.0,
        "Change brightness, contrast and saturation at random by up to this share, and the hue by a fifth of it. "
        "Not for captions that name colours.",
        min=0.0,
        max=1.0,
        step=0.05,
    )
    background: str = _option(
        "white", "What lies under transparent pictures, and beside those that are padded: a colour's name, or #808080."
    )
    resize_backend: str = _option(
        "exact",
        "exact: the pixels of OpenAI's own transform. fast: decodes and resizes about three times as fast; "
        "in most pictures one value in 300 differs, by one or two of 255.",
        choices=RESIZE_BACKENDS,
    )
    caption_policy: str = _option(
        "random",
        "Which of a picture's captions comes: another one each epoch (random), the first, long and short "
        "ones mixed by long_caption_ratio, or all, each as a pair of its own in every epoch.",
        choices=POLICIES,
    )
    long_caption_ratio: float = _option(
        0.5,
        "For caption_policy: mixed. How often a long caption comes instead of a short one.",
        min=0.0,
        max=1.0,
        step=0.05,
    )
    caption_dropout: float = _option(
        0.0, "The share of pairs whose caption is left empty.", min=0.0, max=0.9, step=0.05
    )
    shuffle_tags: bool = _option(False, "Reorder what stands between the commas of a caption, anew each epoch.")
    keep_tokens: int = _option(0, "For shuffle_tags: so many of the first tags stay in their places.", min=0, max=1000)
    label_template: str = _option(
        DEFAULT_TEMPLATE, "The caption of a picture that has a class and no caption; {} is the class."
    )
    max_broken: float = _option(
        0.05,
        "The training stops, or does not begin, if more than this share of the pictures is missing or damaged. A "
        "single one is always left out and named, unless this is 0.",
        min=0.0,
        max=1.0,
        step=0.01,
        bookkeeping=True,
    )
    image_cache_gb: float = _option(
        20.0,
        "Decoded pictures are kept on the disk, up to this size and half of the free space, so that each is "
        "decoded once and not once an epoch. 0 keeps none.",
        min=0.0,
        max=100_000.0,
        step=1.0,
        bookkeeping=True,
    )
    cache_features: bool = _option(
        True,
        "Where the vision tower, or its first blocks with the embeddings, is frozen: run that part once for each "
        "picture and keep what it gives, as far as there is room (image_cache_gb).",
        bookkeeping=True,
    )
    cached_views: int = _option(
        0,
        "With a frozen vision tower and pictures that are flipped, jittered or cropped at random: so many variants "
        "of each picture, which come in turn, so that they can be kept too. 0 makes new ones each time.",
        min=0,
        max=1000,
    )
    compile: bool = _option(
        False,
        "Let torch.compile make one program of each block: faster on graphics cards, after a minute of work at "
        "the start. It needs a C compiler, which portable ComfyUI for Windows lacks.",
        bookkeeping=True,
    )

    def __post_init__(self):
        for field, kind in _fields_with_types(type(self)):
            value = getattr(self, field.name)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field.name, value := float(value))
            if type(value) is not kind:
                raise UserError(f"{field.name} is {value!r}; it must be {_KINDS[kind]}.")
            _check_range(field, value)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide what a training gives; `epochs` is left out because a run can be made longer."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not field.metadata["bookkeeping"] and field.name != "epochs"
        }

    def origins(self, given: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
        """Each value with where it came from: `given`'s word for it, else "default" or "given"."""
        given = given or {}
        result = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            origin = given.get(field.name) or ("default" if value == field.default else "given")
            result[field.name] = {"value": value, "from": origin}
        return result


_KINDS = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}


def _fields_with_types(cls):
    hints = get_type_hints(cls)
    return [(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _check_range(field: dataclasses.Field, value) -> None:
    choices, low, high = (field.metadata[key] for key in ("choices", "min", "max"))
    if choices and value not in choices:
        raise UserError(f"{field.name} is {value!r}; choose {' or '.join(choices)}.")
    if field.name == "batch_size" and value < 2:
        raise UserError(
            f"batch_size is {value}: CLIP learns by comparing the pairs of a batch with each other, so a batch needs "
            "two pairs at least; 16 or more is better."
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{field.name} is {value}; it must be a number.")
    if (low is not None and value < low) or (high is not None and value > high):
        raise UserError(f"{field.name} is {value}; it must lie between {low} and {high}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Named values for the settings that a user would otherwise have to weigh."""

    description: str
    values: Mapping[str, Any]


def _preset(description: str, **values) -> Preset:
    return Preset(description=description, values=types.MappingProxyType(values))


DEFAULT_PRESET = "balanced"


def _presets(*, strong: float) -> Mapping[str, Preset]:
    own = dict(loss="infonce")
    return types.MappingProxyType(
        {
            # These are TrainConfig's own defaults.
            DEFAULT_PRESET: _preset(
                "Learns a style or subject and keeps most of what the model knew.",
                epochs=10,
                learning_rate=1e-6,
                batch_size=32,
                towers="both",
                **own,
            ),
            "gentle": _preset(
                "Small changes; for a model that must stay close to the original.",
                epochs=5,
                learning_rate=3e-7,
                batch_size=32,
                towers="both",
                **own,
            ),
            "strong": _preset(
                "Large changes; for many pictures (thousands), or a style far from photographs.",
                epochs=20,
                learning_rate=strong,
                batch_size=64,
                towers="both",
                **own,
            ),
            "text encoder only": _preset(
                "Trains only what SD and SDXL use; needs less memory and time.",
                epochs=10,
                learning_rate=2e-6,
                batch_size=32,
                towers="text",
                **own,
            ),
            "fixed temperature": _preset(
                "The recipe of popular text encoders: temperature 0.07 and label smoothing 0.1, "
                "which keep similar captions near each other.",
                epochs=10,
                learning_rate=1e-6,
                batch_size=64,
                towers="both",
                loss="fixed_temperature",
            ),
        }
    )


PRESETS = _presets(strong=5e-6)
GMP_PRESETS = _presets(strong=3e-6)
