"""The pack's socket types. Their values are the engine's `FullCLIP` and `ClipDataset`, and `TrainOptions`."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

FullClip = io.Custom("FULL_CLIP")
Dataset = io.Custom("CLIP_DATASET")
TrainOptionsSocket = io.Custom("CLIP_TRAIN_OPTIONS")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Training settings from chained option nodes: the values of each section that a node sets, by setting name."""

    sections: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=lambda: types.MappingProxyType({}))

    def with_section(self, section: str, values: Mapping[str, Any]) -> TrainOptions:
        """Return options in which these values replace all earlier ones of the section."""
        values = types.MappingProxyType(dict(values))
        return TrainOptions(types.MappingProxyType({**self.sections, section: values}))

    def flat(self) -> dict[str, Any]:
        """Return the values of all sections; names are unique across sections."""
        return {name: value for values in self.sections.values() for name, value in values.items()}
