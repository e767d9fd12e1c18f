"""What preparing a dataset makes from one image: squares cut out of it, colour-jittered copies, mirrored copies."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from ...errors import UserError
from ...settings import Settings, setting
from .detection import Box

if TYPE_CHECKING:
    from PIL import Image

Square = tuple[int, int, int, int]  # left, top, right, bottom, in pixels
_SAME_SQUARE = 0.8  # intersection over union from which two squares show the same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation(Settings):
    """What to make of each image. Raises `UserError` for a value out of its range, or if there is nothing to do."""

    crop: Literal["none", "centre", "objects"] = setting(
        "none",
        "What to cut out. centre: the largest square in the middle. objects: a square around each object that a "
        "detector finds, each as an image of its own.",
    )
    jitter_copies: int = setting(
        0, "How many copies of each image to make with other brightness, contrast, saturation and hue.", min=0, max=20
    )
    flip: Literal["none", "safe", "all"] = setting(
        "none",
        "Make mirrored copies. safe: without the captions that mention a side, such as left, which would be wrong. "
        "all: with all captions.",
    )
    seed: int = setting(0, "Decides the colours of the copies.", min=0, max=2**53)
    brightness: float = setting(0.5, "Copies are up to this share darker or brighter.", min=0.0, max=1.0, step=0.05)
    contrast: float = setting(0.5, "Copies have up to this share less or more contrast.", min=0.0, max=1.0, step=0.05)
    saturation: float = setting(0.5, "Copies are up to this share paler or stronger.", min=0.0, max=1.0, step=0.05)
    hue: float = setting(
        0.1, "The hue of copies is shifted by up to this share of the colour circle.", min=0.0, max=0.5, step=0.01
    )
    detector: Literal["small", "medium", "large"] = setting(
        "medium",
        "For objects. small (13 MB) finds the most obvious objects; medium is 74 MB; large (167 MB) is slow without a "
        "GPU. Downloaded when first used.",
    )
    only: str = setting(
        "", "For objects: cut out only these, separated by commas, such as dog, cat. Empty: all 80 classes of COCO."
    )
    never: str = setting("", "For objects: never cut out these, such as person.")
    confidence: float = setting(
        0.7, "For objects: how confident the detector must be, from 0 to 1.", min=0.0, max=1.0, step=0.05
    )
    minimum_size: int = setting(
        112, "For objects: leave out squares with fewer pixels a side than this.", min=1, max=4096
    )
    most_objects: int = setting(
        3, "For objects: keep at most this many squares per image, highest confidence first.", min=1, max=100
    )
    without_object: Literal["centre", "leave_out"] = setting(
        "centre",
        "For objects: what an image without any becomes. centre: its centre square; leave_out: nothing.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop == "none" and not self.jitter_copies and self.flip == "none":
            raise UserError("There is nothing to do; choose a crop, jitter_copies above 0, or a flip.")


# ---- crops -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Crop:
    """A square of an image, or the whole image, and what its file's name gets for it."""

    suffix: str
    square: Square | None


def crops_of(
    image: Image.Image,
    settings: Preparation,
    detect: Callable[[Image.Image], Sequence[Box]],
    wanted: frozenset[str],
) -> list[Crop]:
    """Return what to cut out of an image: nothing if it has no wanted objects and is to be left out then.

    `detect` is called only for crop: objects. `wanted` are the classes of objects that count.
    """
    if settings.crop == "none":
        return [Crop("", None)]
    centre = [Crop("", centre_square(image.size))]
    if settings.crop == "centre":
        return centre
    boxes = [box for box in detect(image) if box.score >= settings.confidence and box.name in wanted]
    squares = squares_around(boxes, image.size, minimum=settings.minimum_size, most=settings.most_objects)
    if not squares:
        return centre if settings.without_object == "centre" else []
    return [Crop(f"_{number}_{box.name.replace(' ', '_')}", square) for number, (box, square) in enumerate(squares, 1)]


def squares_around(
    boxes: Sequence[Box], size: tuple[int, int], *, minimum: int, most: int, margin: float = 0.1
) -> list[tuple[Box, Square]]:
    """Return at most `most` boxes with their squares (see `square_around`), in the order of the boxes.

    Squares of less than `minimum` pixels a side, and those that show what an earlier one shows, are left out.
    """
    squares: list[tuple[Box, Square]] = []
    for box in boxes:
        square = square_around(box, size, margin)
        if square[2] - square[0] < minimum or any(_overlap(square, other) > _SAME_SQUARE for _, other in squares):
            continue
        squares.append((box, square))
        if len(squares) == most:
            break
    return squares


def square_around(box: Box, size: tuple[int, int], margin: float) -> Square:
    """Return the square around a box with `margin` of its longer side on each side, inside an image of `size`.

    A square that would stick out is moved inside; it is at most as large as the image's shorter side.
    """
    width, height = size
    longer = max(box.right - box.left, box.bottom - box.top)
    side = max(1, min(round(longer * (1 + 2 * margin)), width, height))
    left = round(min(max((box.left + box.right - side) / 2, 0), width - side))
    top = round(min(max((box.top + box.bottom - side) / 2, 0), height - side))
    return left, top, left + side, top + side


def centre_square(size: tuple[int, int]) -> Square:
    """Return the largest square in the centre of an image of `size` (width, height)."""
    width, height = size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _overlap(one: Square, other: Square) -> float:
    """Return the intersection over union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    areas = sum((right - left) * (bottom - top) for left, top, right, bottom in (one, other))
    return common / (areas - common)


# ---- copies ----------------------------------------------------------------------------------------------------------


def jittered(image: Image.Image, settings: Preparation, key: str) -> Image.Image:
    """Return a copy with other colours, as ColorJitter makes it; the draws depend on seed and key alone."""
    from torchvision.transforms import functional as transforms

    digest = hashlib.sha256(f"{settings.seed}/{key}".encode("utf-8", "surrogatepass")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    changes = [
        (transforms.adjust_brightness, draw(1 - settings.brightness, 1 + settings.brightness)),
        (transforms.adjust_contrast, draw(1 - settings.contrast, 1 + settings.contrast)),
        (transforms.adjust_saturation, draw(1 - settings.saturation, 1 + settings.saturation)),
        (transforms.adjust_hue, draw(-settings.hue, settings.hue)),
    ]
    for number in torch.randperm(len(changes), generator=generator).tolist():
        change, factor = changes[number]
        image = change(image, factor)
    return image


def mirrored(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.mirror(image)
