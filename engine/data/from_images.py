"""A data set of pictures that another program holds in memory, such as ComfyUI's IMAGE lists."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy

from ..errors import UserError
from .dataset import ClipDataset
from .readers.caption_texts import Gathered
from .readers.registry import Captions

# Of every file: a picture that is written again is the same to a run that goes on. 2001-09-09.
_TIME = 1_000_000_000
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def dataset_from_images(pictures: Iterable[numpy.ndarray], captions: Sequence[str], folder: Path) -> ClipDataset:
    """A data set of uint8 pictures [height, width, 1, 3 or 4] and a text for each, of which every line is a caption.

    The pictures are written to `folder` as PNG, named by what is in them, so that the same ones are the same files; a
    picture that comes twice has the captions of both. Raises `UserError`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found, count = Gathered(), 0
    for count, picture in enumerate(pictures, 1):
        if count <= len(captions):
            found.add(_write(picture, folder), captions[count - 1].splitlines() or [""])
    if count != len(captions):
        raise UserError(
            f"There are {count} pictures and {len(captions)} captions; connect one caption for each picture."
        )
    texts = {name: text for name, text in found.texts().items() if text}
    if not texts:
        raise UserError("None of the pictures has a caption; connect the texts of a captioner, one for each picture.")
    left_out = len(found.texts()) - len(texts)
    return ClipDataset(
        name=f"{len(texts)} images",
        folder=folder.absolute(),
        format="images",
        reason="images and captions were connected",
        names=list(texts),
        captions=Captions(list(texts.values())),
        labels=[None] * len(texts),
        notes=(f"{left_out} pictures have no caption and are left out.",) if left_out else (),
    )


def _write(picture: numpy.ndarray, folder: Path) -> str:
    from PIL import Image

    digest = hashlib.sha256(repr(picture.shape).encode())
    digest.update(numpy.ascontiguousarray(picture))
    name = f"{digest.hexdigest()[:32]}.png"
    if not (folder / name).is_file():
        part = folder / f".{secrets.token_hex(4)}.part"
        mode = _MODES[picture.shape[2]]
        plain = picture[:, :, 0] if mode == "L" else picture
        Image.fromarray(plain, mode).save(part, format="PNG", compress_level=1)
        os.utime(part, (_TIME, _TIME))
        os.replace(part, folder / name)
    return name
