"""Objects in pictures, found by one of torchvision's detectors that were trained on COCO, and squares around them."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from ...errors import UserError

# Torchvision's names, and its box mAP on COCO val2017.
DETECTORS = {
    "small": "ssdlite320_mobilenet_v3_large",  # 21.3
    "medium": "fasterrcnn_mobilenet_v3_large_fpn",  # 32.8
    "large": "fasterrcnn_resnet50_fpn_v2",  # 46.7
}
_NOT_CLASSES = ("__background__", "N/A")
_LONGEST_SIDE = 1333  # pixels; the detectors make larger pictures smaller themselves, but only as floats
_SAME_SQUARE = 0.8  # of two squares' common area, from which on they show the same


@dataclasses.dataclass(frozen=True)
class Box:
    """An object in a picture: its class, how sure the detector is (0 to 1), and its edges in pixels."""

    name: str
    score: float
    left: float
    top: float
    right: float
    bottom: float


class Detector(Protocol):
    def __call__(self, picture) -> list[Box]:
        """The objects in a picture (PIL, RGB), the surest first."""


def coco_classes() -> tuple[str, ...]:
    """The names of what the detectors find, 80 of them."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights as Weights

    return tuple(name for name in Weights.DEFAULT.meta["categories"] if name not in _NOT_CLASSES)


def parse_classes(text: str) -> frozenset[str]:
    """Class names between commas; plurals will do. Raises `UserError` for one that the detectors do not know."""
    known = coco_classes()
    found = set()
    for word in filter(None, (part.strip().lower() for part in text.split(","))):
        forms = [{"people": "person"}.get(word, word), word.removesuffix("s"), word.removesuffix("es")]
        name = next((form for form in forms if form in known), None)
        if name is None:
            like = difflib.get_close_matches(word, known, n=3) or known[:20]
            raise UserError(
                f"The detector knows no {word!r}; it knows {', '.join(like)} and others of COCO's 80 classes."
            )
        found.add(name)
    return frozenset(found)


def load_detector(
    name: str, device: torch.device | str = "cpu", on_note: Callable[[str], None] = lambda note: None
) -> Detector:
    """One of `DETECTORS`. Its weights are downloaded when they are not there; `on_note`
    is told before. Raises `UserError`."""
    from torchvision.models import get_model, get_model_weights

    if name not in DETECTORS:
        raise UserError(f"The detector {name!r} is not known; choose {' or '.join(DETECTORS)}.")
    weights = get_model_weights(DETECTORS[name]).DEFAULT
    model = get_model(DETECTORS[name], weights=None, weights_backbone=None, num_classes=len(weights.meta["categories"]))
    model.load_state_dict(_weights(weights, on_note))
    return TorchvisionDetector(model, weights.meta["categories"], device)


def _weights(weights, on_note: Callable[[str], None]) -> dict[str, torch.Tensor]:
    place = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(weights.url))
    if not place.is_file():
        on_note(
            f"The detector ({weights.meta['_file_size']:.0f} MB) is downloaded once, from {weights.url} to "
            f"{place.parent}."
        )
    try:
        # Tensors only: nothing in the file is run.
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:  # no network; no room; another content than its name says
        raise UserError(
            f"The detector could not be fetched ({_first_line(error)}); connect to the internet once, or put "
            f"{weights.url} into {place.parent}."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


class TorchvisionDetector:
    """A detection model of torchvision's (its `forward` takes a list of pictures and gives boxes, labels, scores)."""

    def __init__(self, model: torch.nn.Module, categories: Sequence[str], device: torch.device | str = "cpu"):
        self.model, self.categories, self.device = model.eval().to(device), tuple(categories), device

    def __call__(self, picture) -> list[Box]:
        from torchvision.transforms.functional import pil_to_tensor

        small = picture.copy()
        small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        with torch.inference_mode():
            (found,) = self.model([pil_to_tensor(small).to(self.device).float() / 255])
        wide, high = picture.width / small.width, picture.height / small.height
        rows = zip(found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)
        boxes = [
            Box(self.categories[label], score, left * wide, top * high, right * wide, bottom * high)
            for label, score, (left, top, right, bottom) in rows
            if self.categories[label] not in _NOT_CLASSES
        ]
        return sorted(boxes, key=lambda box: -box.score)


def squares_around(
    boxes: Sequence[Box], size: tuple[int, int], *, minimum: int, most: int, margin: float = 0.1
) -> list[tuple[Box, tuple[int, int, int, int]]]:
    """(box, (left, top, right, bottom)) of the squares to cut out, at most `most`, in the order of the boxes.

    A square is as wide as its box's longer side and `margin` of it on each side, as far as the picture goes, which is
    of `size` (width, height): moved inside where it would stick out, and as large as the picture's shorter side at
    most. Left out are squares of less than `minimum` pixels a side, and those that show what one before them shows.
    """
    found: list[tuple[Box, tuple[int, int, int, int]]] = []
    for box in boxes:
        square = square_around(box, size, margin)
        if square[2] - square[0] < minimum or any(_common(square, other) > _SAME_SQUARE for _, other in found):
            continue
        found.append((box, square))
        if len(found) == most:
            break
    return found


def square_around(box: Box, size: tuple[int, int], margin: float) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the square around one box, inside the picture."""
    width, height = size
    longer = max(box.right - box.left, box.bottom - box.top)
    side = max(1, min(round(longer * (1 + 2 * margin)), width, height))
    left = round(min(max((box.left + box.right - side) / 2, 0), width - side))
    top = round(min(max((box.top + box.bottom - side) / 2, 0), height - side))
    return left, top, left + side, top + side


def centre_square(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the largest square in the middle of a picture of `size` (width, height)."""
    width, height = size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _common(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Intersection over union of two rectangles."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    common = max(wide, 0) * max(high, 0)
    areas = sum((right - left) * (bottom - top) for left, top, right, bottom in (one, other))
    return common / (areas - common)
