"""Decode image files to RGB with 8 bits per channel, and normalise pixels for a network."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from ...openai import MEAN, STD
from .image_files import NOT_AN_IMAGE, TOO_LARGE, BrokenImage, MissingImage, open_bytes, open_image

if TYPE_CHECKING:
    from PIL import Image

_MAX_ASPECT = 64  # longer side divided by shorter side
_ORIENTATION = 0x0112  # EXIF's tag


def decode(path: str | os.PathLike | BinaryIO, background: str = "white") -> Image.Image:
    """Decode an image to RGB: its first frame, rotated as its EXIF says, transparency over `background`.

    `background` is a colour name or #rrggbb. Raises `BrokenImage` for a file that cannot be decoded completely, and for
    an image of a size that only an attack has.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with open_image(path) as opened:
            if Image.MAX_IMAGE_PIXELS and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                raise BrokenImage(TOO_LARGE)
            ImageOps.exif_transpose(opened, in_place=True)  # otherwise it copies all pixels, as convert does below
            image: Image.Image = _limit_aspect(opened)
            if image.mode.startswith("I"):  # Pillow has several modes for 16 bits, all of them beginning with I
                image = image.point(lambda value: value / 256).convert("L")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except BrokenImage:
        raise
    except FileNotFoundError as error:
        raise MissingImage("the file is not there") from error
    except UnidentifiedImageError as error:
        raise BrokenImage(NOT_AN_IMAGE) from error
    except Image.DecompressionBombError as error:
        raise BrokenImage(TOO_LARGE) from error
    except Exception as error:  # for a damaged file, Pillow's decoders raise errors of almost any type
        raise BrokenImage(f"it cannot be decoded ({error})") from error


def decode_plain_jpeg(path: str | os.PathLike | BinaryIO) -> Tensor | None:
    """Return the pixels of `decode`, uint8 [3, h, w], from torchvision's faster decoder; its bits equal Pillow's.

    Returns None for anything but a complete, upright RGB JPEG of ordinary size: that is for `decode` to open or refuse.
    """
    try:
        from torchvision.io import decode_jpeg  # torchvision has announced that it will remove this

        with open_bytes(path) as file, open_image(file) as opened:
            width, height = opened.size
            upright = opened.getexif().get(_ORIENTATION, 1) == 1
            if opened.format != "JPEG" or opened.mode != "RGB" or not upright or not _is_ordinary(width, height):
                return None
            file.seek(0)
            pixels = decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8))
    except Exception:  # as above; `decode`, which the caller tries next, reports the reason
        return None
    return pixels if pixels.shape == (3, height, width) else None


def _is_ordinary(width: int, height: int) -> bool:
    from PIL import Image

    few_pixels = not Image.MAX_IMAGE_PIXELS or width * height <= Image.MAX_IMAGE_PIXELS
    return few_pixels and max(width, height) <= _MAX_ASPECT * min(width, height)


def _limit_aspect(image: Image.Image) -> Image.Image:
    """Crop an extremely long image to its centre: resized to a square's height it would fill the memory."""
    width, height = image.size
    limit = _MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    new_width, new_height = min(width, limit), min(height, limit)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


def normalize(images_u8_bchw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uint8 [b, 3, s, s] as floats with OpenAI's mean and standard deviation, on the same device."""
    mean, std = (_per_channel(values, dtype, images_u8_bchw.device) for values in (MEAN, STD))
    return (images_u8_bchw.to(dtype) / 255 - mean) / std


def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [3, 1, 1], filled on the device: copying it from the host would make the host wait."""
    return torch.stack([torch.full((1, 1), value, dtype=dtype, device=device) for value in values])
