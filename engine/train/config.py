"""The settings of a training, in sections, and the presets.

One description of each setting serves the nodes, the command line and the run folder.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

from ..data.images.transforms import ImagesConfig
from ..data.sampler import CaptionsConfig
from ..errors import UserError
from ..settings import SettingInfo, Settings, setting, setting_infos
from .freezing import LayersConfig, Towers
from .losses import LossConfig
from .memory import MemoryConfig
from .optim.factory import OptimizerConfig
from .run.checkpoints import CheckpointsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of one training: the six that matter most, and one section per concern.

    Names are unique across sections, so `from_flat` and `flat` need no section names. Raises `UserError` for a value
    out of its range.
    """

    epochs: int = setting(
        10,
        "How often the training goes through the whole dataset; each epoch uses every image with one of its captions.",
        min=1,
        max=10_000,
    )
    learning_rate: float = setting(
        1e-6,
        "The peak learning rate of the schedule. A higher one learns faster and forgets more.",
        min=1e-10,
        max=1.0,
        step=1e-7,
    )
    batch_size: int = setting(
        32,
        "How many pairs are compared with each other in one step. More is better; micro_batch keeps memory in bounds.",
        min=2,
        max=65_536,
    )
    towers: Towers = setting(
        "both", "What to train: both towers, only the text tower (the text encoder) or only the vision tower."
    )
    seed: int = setting(
        0,
        "Decides the order of the images and which captions are drawn. The same seed gives the same training.",
        min=0,
        max=2**53,
    )
    gmp: bool = setting(False, "Train in GmP form: the length and direction of each MLP row separately.")
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    layers: LayersConfig = LayersConfig()
    images: ImagesConfig = ImagesConfig()
    captions: CaptionsConfig = CaptionsConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()

    def __post_init__(self) -> None:
        if type(self.batch_size) is int and self.batch_size < 2:
            raise UserError(
                f"batch_size is {self.batch_size}: CLIP learns by comparing the pairs of a batch with each other, so a "
                "batch needs at least two pairs; 16 or more is better."
            )
        super().__post_init__()

    @classmethod
    def from_flat(cls, **values: Any) -> TrainConfig:
        """Make a config from settings of any section, by name. Raises `UserError` for an unknown name."""
        by_section: dict[str, dict[str, Any]] = {section: {} for section in ("", *SECTIONS)}
        for name, value in values.items():
            if name not in all_settings():
                raise UserError(f"{name} is not a setting; choose from: {', '.join(all_settings())}.")
            by_section[all_settings()[name].section][name] = value
        top = by_section.pop("")
        return cls(**top | {section: SECTIONS[section](**given) for section, given in by_section.items()})

    def flat(self) -> dict[str, Any]:
        """Return the value of every setting by name."""
        return {
            name: getattr(getattr(self, info.section) if info.section else self, name)
            for name, info in all_settings().items()
        }

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide the result of a training; without `epochs`, because a run can be made longer."""
        values = self.flat()
        return {
            name: values[name] for name, info in all_settings().items() if not info.bookkeeping and name != "epochs"
        }

    def origins(self, given: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
        """Return each value and where it came from: the word in `given`, else "default" or "given"."""
        given, infos = given or {}, all_settings()
        return {
            name: {
                "value": value,
                "from": given.get(name) or ("default" if value == infos[name].default else "given"),
            }
            for name, value in self.flat().items()
        }


# The sections of TrainConfig by name, in order.
SECTIONS: Mapping[str, type[Settings]] = types.MappingProxyType(
    {name: type(value) for name, value in vars(TrainConfig()).items() if isinstance(value, Settings)}
)


@functools.cache
def all_settings() -> Mapping[str, SettingInfo]:
    """Return every setting by name, in order; `section` is empty for those of TrainConfig itself."""
    infos = dict(setting_infos(TrainConfig))
    for section, section_class in SECTIONS.items():
        for name, info in setting_infos(section_class).items():
            assert name not in infos, f"two settings are called {name}"
            infos[name] = dataclasses.replace(info, section=section)
    return types.MappingProxyType(infos)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """Values for the settings on the training node; `values` is flat, as `TrainConfig.from_flat` takes it."""

    description: str
    values: Mapping[str, Any]


DEFAULT_PRESET = "balanced"


def _preset(description: str, **changes: Any) -> Preset:
    """Return a preset: the defaults of the settings that presets fill, with `changes`."""
    filled = ("epochs", "learning_rate", "batch_size", "towers", "loss")
    values = {name: all_settings()[name].default for name in filled} | changes
    return Preset(description=description, values=types.MappingProxyType(values))


def _presets(*, strong: float) -> Mapping[str, Preset]:
    presets = {
        DEFAULT_PRESET: _preset("Learns a style or subject and keeps most of what the model knew."),
        "gentle": _preset(
            "Small changes; for a model that must stay close to the original.", epochs=5, learning_rate=3e-7
        ),
        "strong": _preset(
            "Large changes; for many images (thousands), or a style far from photographs.",
            epochs=20,
            learning_rate=strong,
            batch_size=64,
        ),
        "text encoder only": _preset(
            "Trains only what SD and SDXL use; needs less memory and time.", learning_rate=2e-6, towers="text"
        ),
        "fixed temperature": _preset(
            "The recipe of popular text encoders: temperature 0.07 and label smoothing 0.1, which keep similar "
            "captions near each other.",
            batch_size=64,
            loss="fixed_temperature",
        ),
    }
    return types.MappingProxyType(presets)


PRESETS = _presets(strong=5e-6)
GMP_PRESETS = _presets(strong=3e-6)
