"""Makes a dataset of images that another program holds in memory, such as ComfyUI's IMAGE lists."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy

from ..errors import UserError
from .dataset import ClipDataset
from .readers.parsed import CaptionCollector, Captions

# The time of every file, so that an image that is written again leaves the dataset's fingerprint as it was. 2001-09-09.
_TIME = 1_000_000_000
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def dataset_from_images(images: Iterable[numpy.ndarray], captions: Sequence[str], folder: Path) -> ClipDataset:
    """Return a dataset of uint8 images [height, width, 1, 3 or 4] with a text each, of which every line is a caption.

    The images are written to `folder` as PNG, named by a hash of their pixels: the same images are the same files, and
    an image that comes twice has the captions of both. Raises `UserError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    collector, count = CaptionCollector(), 0
    for count, image in enumerate(images, 1):
        if count <= len(captions):
            collector.add(_write(image, folder), captions[count - 1].splitlines() or [""])
    if count != len(captions):
        raise UserError(f"There are {count} images and {len(captions)} captions; connect one caption for each image.")
    by_image = collector.by_image()
    captioned = {name: lines for name, lines in by_image.items() if lines}
    if not captioned:
        raise UserError("None of the images has a caption; connect the texts of a captioner, one for each image.")
    empty = len(by_image) - len(captioned)
    return ClipDataset(
        name=f"{len(captioned)} images",
        folder=folder.absolute(),
        format="images",
        reason="images and captions were connected",
        names=list(captioned),
        captions=Captions(list(captioned.values())),
        labels=[None] * len(captioned),
        notes=(f"{empty} images have no caption and are left out.",) if empty else (),
    )


def _write(image: numpy.ndarray, folder: Path) -> str:
    from PIL import Image

    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(numpy.ascontiguousarray(image).tobytes())
    name = f"{digest.hexdigest()[:32]}.png"
    if not (folder / name).is_file():
        unfinished = folder / f".{secrets.token_hex(4)}.part"
        mode = _MODES[image.shape[2]]
        pixels = image[:, :, 0] if mode == "L" else image
        Image.fromarray(pixels, mode).save(unfinished, format="PNG", compress_level=1)
        os.utime(unfinished, (_TIME, _TIME))
        os.replace(unfinished, folder / name)
    return name
