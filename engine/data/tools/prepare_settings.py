"""What may be chosen for a new data set that is made out of another."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

from ...errors import UserError
from .detection import DETECTORS

NONE, CENTRE, OBJECTS, LEAVE_OUT = "none", "centre", "objects", "leave_out"
SAFE, ALL = "safe", "all"


def _option(default, help: str, *, min=None, max=None, step=None, choices=None, advanced=False):
    metadata = dict(help=help, min=min, max=max, step=step, choices=choices, advanced=advanced)
    return dataclasses.field(default=default, metadata=types.MappingProxyType(metadata))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
    """What to make of each picture. Raises `UserError` for a value out of its range, or where nothing is to be done."""

    crop: str = _option(
        NONE,
        "What is cut out. centre: the largest square in the middle. objects: a square around each thing that a "
        "detector finds, every one as a picture of its own.",
        choices=(NONE, CENTRE, OBJECTS),
    )
    jitter_copies: int = _option(
        0, "Copies of each picture in other brightness, contrast, saturation and hue.", min=0, max=20
    )
    flip: str = _option(
        NONE,
        "Mirrored copies. safe: without the captions that name a side, such as left, which would be wrong. "
        "all: with all captions.",
        choices=(NONE, SAFE, ALL),
    )
    seed: int = _option(0, "Decides the colours of the copies.", min=0, max=2**53)
    brightness: float = _option(
        0.5, "Copies: up to this share darker or brighter.", min=0.0, max=1.0, step=0.05, advanced=True
    )
    contrast: float = _option(
        0.5, "Copies: up to this share less or more contrast.", min=0.0, max=1.0, step=0.05, advanced=True
    )
    saturation: float = _option(
        0.5, "Copies: up to this share paler or more colourful.", min=0.0, max=1.0, step=0.05, advanced=True
    )
    hue: float = _option(
        0.1,
        "Copies: colours turned by up to this share of the colour circle.",
        min=0.0,
        max=0.5,
        step=0.01,
        advanced=True,
    )
    detector: str = _option(
        "medium",
        "For objects: small (13 MB) finds the most obvious, medium is 74 MB, large (167 MB) is slow without "
        "a graphics card. Downloaded when first used.",
        choices=tuple(DETECTORS),
    )
    only: str = _option("", "For objects: only these, between commas, such as dog, cat. Empty: all 80 classes of COCO.")
    never: str = _option("", "For objects: none of these, such as person.")
    confidence: float = _option(
        0.7, "For objects: how sure the detector must be, from 0 to 1.", min=0.0, max=1.0, step=0.05, advanced=True
    )
    minimum_size: int = _option(
        112, "For objects: smaller squares, in pixels a side, are left out.", min=1, max=4096, advanced=True
    )
    most_objects: int = _option(
        3, "For objects: squares of one picture at most, the surest first.", min=1, max=100, advanced=True
    )
    without_object: str = _option(
        CENTRE,
        "For objects: whether a picture in which nothing is found gives its centre square, or none.",
        choices=(CENTRE, LEAVE_OUT),
        advanced=True,
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), field.metadata)
        if self.crop == NONE and not self.jitter_copies and self.flip == NONE:
            raise UserError("Nothing is chosen to be done; choose a crop, jitter_copies above 0, or a flip.")


def _check(name: str, value: Any, limits) -> None:
    if limits["choices"] and value not in limits["choices"]:
        raise UserError(f"{name} is {value!r}; choose {' or '.join(map(repr, limits['choices']))}.")
    if limits["min"] is not None and not limits["min"] <= value <= limits["max"]:
        raise UserError(f"{name} is {value}; choose a value from {limits['min']} to {limits['max']}.")
