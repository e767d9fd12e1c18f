"""Pictures from their files: RGB of 8 bits, whatever they were, or the reason why not; and as numbers for a network."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ...openai import MEAN, STD
from .image_files import TOO_LARGE, BrokenImage, MissingImage, open_bytes, open_image

_LONGEST = 64  # times its shorter side
_ORIENTATION = 0x0112  # EXIF's tag


def load_image(path: str | os.PathLike, image_size: int) -> Tensor:
    """A picture as uint8 [3, image_size, image_size]: turned as its EXIF says, alpha over white, RGB, the shorter side
    resized (bicubic, antialiased), the centre cut out. For RGB files the pixels are those of open_clip's transform.

    Raises `BrokenImage` for what cannot be decoded whole, and for pictures of a size that only an attack has.
    """
    from .transforms import Transform

    return Transform(image_size=image_size).load(path)


def decode(path: str | os.PathLike, background: str = "white"):
    """A picture as PIL's RGB: the first frame, turned as its EXIF says, alpha over `background` (a colour's name or
    #rrggbb). Raises `BrokenImage`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with open_image(path) as opened:
            if Image.MAX_IMAGE_PIXELS and opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
                raise BrokenImage(TOO_LARGE)
            ImageOps.exif_transpose(opened, in_place=True)  # otherwise it copies all pixels, as convert does below
            picture = _not_too_long(opened)
            if picture.mode.startswith("I"):  # 16 bits, whatever Pillow calls it
                picture = picture.point(lambda value: value / 256).convert("L")
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
            picture.load()
            return picture if picture.mode == "RGB" else picture.convert("RGB")
    except BrokenImage:
        raise
    except FileNotFoundError as error:
        raise MissingImage("the file is not there") from error
    except UnidentifiedImageError as error:
        raise BrokenImage("it is not a picture that Pillow can open") from error
    except Image.DecompressionBombError as error:
        raise BrokenImage(TOO_LARGE) from error
    except Exception as error:  # damaged files make Pillow's readers raise whatever they stumble over
        raise BrokenImage(f"it cannot be decoded ({error})") from error


def decode_plain_jpeg(path: str | os.PathLike) -> Tensor | None:
    """The pixels of `decode` as uint8 [3, h, w] from torchvision's decoder, whose bits are those of Pillow's; None for
    what is not a whole RGB JPEG that stands upright, of an ordinary size: that is Pillow's to open, or to refuse."""
    try:
        from torchvision.io import decode_jpeg  # which torchvision means to remove one day

        with open_bytes(path) as file, open_image(file) as opened:
            width, height = opened.size
            upright = opened.getexif().get(_ORIENTATION, 1) == 1
            plain = opened.format == "JPEG" and opened.mode == "RGB" and upright and _is_ordinary(width, height)
            if not plain:
                return None
            file.seek(0)
            pixels = decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8))
    except Exception:  # as above; `decode`, which comes next, tells the reason
        return None
    return pixels if pixels.shape == (3, height, width) else None


def _is_ordinary(width: int, height: int) -> bool:
    from PIL import Image

    few = not Image.MAX_IMAGE_PIXELS or width * height <= Image.MAX_IMAGE_PIXELS
    return few and max(width, height) <= _LONGEST * min(width, height)


def _not_too_long(picture):
    """The middle of a picture that is so long that its resized whole, of which the middle is cut, would fill memory."""
    width, height = picture.size
    limit = _LONGEST * min(width, height)
    if max(width, height) <= limit:
        return picture
    kept_width, kept_height = min(width, limit), min(height, limit)
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return picture.crop((left, top, left + kept_width, top + kept_height))


def normalize(images_u8_bchw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [b, 3, s, s] to floats with OpenAI's mean and deviation, on the device where the pictures are."""
    mean, std = (_by_channel(values, dtype, images_u8_bchw.device) for values in (MEAN, STD))
    return (images_u8_bchw.to(dtype) / 255 - mean) / std


def _by_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[3, 1, 1], filled in on the device: a copy from the host would be waited for."""
    return torch.stack([torch.full((1, 1), value, dtype=dtype, device=device) for value in values])
