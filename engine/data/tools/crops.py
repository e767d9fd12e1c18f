"""The pictures that are made of one: squares cut out of it, copies in other colours, mirrored copies."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .detection import Box, centre_square, squares_around
from .prepare_settings import CENTRE, NONE, Preparation


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a picture: what is added to its name, and (left, top, right, bottom); None for the whole."""

    suffix: str
    square: tuple[int, int, int, int] | None


def parts_of(
    picture, settings: Preparation, detect: Callable[[Any], Sequence[Box]], wanted: frozenset[str]
) -> list[Part]:
    """What to cut out of a picture; nothing where no object is found in it and there is to be no centre square.

    `detect` is called only where objects are what is cut out, and `wanted` are the names of those that count.
    """
    if settings.crop == NONE:
        return [Part("", None)]
    centre = [Part("", centre_square(picture.size))]
    if settings.crop == CENTRE:
        return centre
    boxes = detect(picture)
    chosen = [box for box in boxes if box.score >= settings.confidence and box.name in wanted]
    squares = squares_around(chosen, picture.size, minimum=settings.minimum_size, most=settings.most_objects)
    if not squares:
        return centre if settings.without_object == CENTRE else []
    return [Part(f"_{number}_{box.name.replace(' ', '_')}", square) for number, (box, square) in enumerate(squares, 1)]


def jittered(picture, settings: Preparation, key: str):
    """As torchvision's ColorJitter, with draws that are a function of seed and name alone."""
    from torchvision.transforms import functional as transforms

    chance = _chance(settings.seed, key)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=chance, dtype=torch.float64).item()

    changes = [
        (transforms.adjust_brightness, draw(1 - settings.brightness, 1 + settings.brightness)),
        (transforms.adjust_contrast, draw(1 - settings.contrast, 1 + settings.contrast)),
        (transforms.adjust_saturation, draw(1 - settings.saturation, 1 + settings.saturation)),
        (transforms.adjust_hue, draw(-settings.hue, settings.hue)),
    ]
    for number in torch.randperm(len(changes), generator=chance).tolist():
        change, factor = changes[number]
        picture = change(picture, factor)
    return picture


def _chance(seed: int, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{key}".encode("utf-8", "surrogatepass")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def mirror(picture):
    from PIL import ImageOps

    return ImageOps.mirror(picture)
