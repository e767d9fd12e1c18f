"""Object detection with torchvision's models that were trained on COCO."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image

# Torchvision's names, and its box mAP on COCO val2017.
DETECTORS = {
    "small": "ssdlite320_mobilenet_v3_large",  # 21.3
    "medium": "fasterrcnn_mobilenet_v3_large_fpn",  # 32.8
    "large": "fasterrcnn_resnet50_fpn_v2",  # 46.7
}
_NOT_CLASSES = ("__background__", "N/A")
_LONGEST_SIDE = 1333  # pixels; the detectors would shrink larger images too, but only as floats


@dataclasses.dataclass(frozen=True)
class Box:
    """An object in an image: its class, the detector's confidence (0 to 1), and its edges in pixels."""

    name: str
    score: float
    left: float
    top: float
    right: float
    bottom: float


class Detector(Protocol):
    def __call__(self, image: Image.Image) -> list[Box]:
        """Return the objects in an RGB image, the highest confidence first."""


def coco_classes() -> tuple[str, ...]:
    """Return the names of the 80 classes that the detectors find."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights as Weights

    return tuple(name for name in Weights.DEFAULT.meta["categories"] if name not in _NOT_CLASSES)


def parse_classes(text: str) -> frozenset[str]:
    """Return the classes named in comma-separated text, also in the plural. Raises `UserError` for an unknown one."""
    known = coco_classes()
    classes = set()
    for word in filter(None, (part.strip().lower() for part in text.split(","))):
        forms = [{"people": "person"}.get(word, word), word.removesuffix("s"), word.removesuffix("es")]
        name = next((form for form in forms if form in known), None)
        if name is None:
            similar = difflib.get_close_matches(word, known, n=3) or known[:20]
            raise UserError(
                f"The detector does not know {word!r}; it knows {', '.join(similar)} and others of COCO's 80 classes."
            )
        classes.add(name)
    return frozenset(classes)


def load_detector(
    name: str, device: torch.device | str = "cpu", on_note: Callable[[str], None] = lambda note: None
) -> Detector:
    """Load one of `DETECTORS`; a note announces the download if its weights are missing. Raises `UserError`."""
    from torchvision.models import get_model, get_model_weights

    if name not in DETECTORS:
        raise UserError(f"There is no detector {name!r}; choose {' or '.join(DETECTORS)}.")
    weights = get_model_weights(DETECTORS[name]).DEFAULT
    categories = weights.meta["categories"]
    model = get_model(DETECTORS[name], weights=None, weights_backbone=None, num_classes=len(categories))
    model.load_state_dict(_state_dict(weights, on_note))
    return TorchvisionDetector(model, categories, device)


def _state_dict(weights: Any, on_note: Callable[[str], None]) -> dict[str, torch.Tensor]:
    folder = Path(torch.hub.get_dir(), "checkpoints")
    if not (folder / os.path.basename(weights.url)).is_file():
        on_note(
            f"The detector ({weights.meta['_file_size']:.0f} MB) is downloaded once, from {weights.url} to {folder}."
        )
    try:
        # weights_only: tensors alone are read, and nothing in the file is run.
        return weights.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError) as error:  # no network, a full disk, or another content than the hash says
        raise UserError(
            f"The detector could not be downloaded ({one_line(error)}). Connect to the internet once, or put "
            f"{weights.url} into {folder}."
        ) from error


class TorchvisionDetector:
    """A detection model from torchvision, which takes a list of tensors and returns boxes, labels and scores."""

    def __init__(self, model: torch.nn.Module, categories: Sequence[str], device: torch.device | str = "cpu"):
        self.model, self.categories, self.device = model.eval().to(device), tuple(categories), device

    def __call__(self, image: Image.Image) -> list[Box]:
        from torchvision.transforms.functional import pil_to_tensor

        small = image.copy()
        small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        with torch.inference_mode():
            (output,) = self.model([pil_to_tensor(small).to(self.device).float() / 255])
        x_scale, y_scale = image.width / small.width, image.height / small.height
        rows = zip(output["labels"].tolist(), output["scores"].tolist(), output["boxes"].tolist(), strict=True)
        boxes = [
            Box(self.categories[label], score, left * x_scale, top * y_scale, right * x_scale, bottom * y_scale)
            for label, score, (left, top, right, bottom) in rows
            if self.categories[label] not in _NOT_CLASSES
        ]
        return sorted(boxes, key=lambda box: -box.score)
