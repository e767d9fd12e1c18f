"""Pictures as CLIP sees them: uint8 squares made with CLIP's own transform, normalised on the device."""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from ..errors import UserError

# OpenAI's, the same for every model of this shape (github.com/openai/CLIP, clip/clip.py).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class BrokenImage(UserError):
    """A file that is not a whole picture; the text is the reason."""


def load_image(path: str | os.PathLike, image_size: int) -> Tensor:
    """A picture as uint8 [3, image_size, image_size]: turned as its EXIF says, alpha over white, RGB, the shorter side
    resized (bicubic, antialiased), the centre cut out. For RGB files the pixels are those of open_clip's transform.

    Raises `BrokenImage` for what cannot be decoded whole, and for pictures of a size that only an attack has.
    """
    from torchvision.transforms import functional as transforms

    picture = transforms.resize(_decode(path), image_size, transforms.InterpolationMode.BICUBIC)
    return transforms.pil_to_tensor(transforms.center_crop(picture, [image_size, image_size]))


def _decode(path: str | os.PathLike):
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                picture = ImageOps.exif_transpose(opened)
                if picture.mode.startswith("I;16"):
                    picture = picture.point(lambda value: value / 256).convert("L")
                if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                    picture = picture.convert("RGBA")
                    white = Image.new("RGBA", picture.size, "white")
                    picture = Image.alpha_composite(white, picture)
                return picture.convert("RGB")
    except FileNotFoundError as error:
        raise BrokenImage("the file is not there") from error
    except UnidentifiedImageError as error:
        raise BrokenImage("it is not a picture that Pillow can open") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenImage("it is far too large for a photograph") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, ZeroDivisionError) as error:
        raise BrokenImage(f"it cannot be decoded ({error})") from error


def normalize(images_u8_bchw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [b, 3, s, s] to floats with OpenAI's mean and deviation, on the device where the pictures are."""
    mean = torch.tensor(MEAN, dtype=dtype, device=images_u8_bchw.device)[:, None, None]
    std = torch.tensor(STD, dtype=dtype, device=images_u8_bchw.device)[:, None, None]
    return (images_u8_bchw.to(dtype) / 255 - mean) / std
