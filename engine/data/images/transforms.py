"""Turn an image file into the square that a network sees.

`Transform.base` is the deterministic part, whose result can be cached; `Transform.finish` is the random part. The
pixels are the same whether or not the base comes from a cache.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import random
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy
import torch
from torch import Tensor

from ...errors import UserError
from ...settings import Settings, setting
from .decoding import decode, decode_plain_jpeg

if TYPE_CHECKING:
    from PIL import Image

    Pixels = Image.Image | Tensor  # RGB; a tensor is uint8 [3, h, w]

# For random crops the base keeps the centre of the image, up to this aspect ratio, and is reduced no further than the
# smallest crop needs to fill the square, or than twice the square.
_MAX_BASE_ASPECT, _MAX_BASE_SCALE = 4, 2.0
_CROP_ASPECTS = (3 / 4, 4 / 3)  # as in torchvision's RandomResizedCrop
_CROP_TRIES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImagesConfig(Settings):
    """How a training turns image files into squares."""

    resize_mode: Literal["crop", "pad", "squash", "random_crop"] = setting(
        "crop",
        "How an image becomes a square. crop: cut out the centre; pad: keep the whole image and fill the rest with the "
        "background; squash: keep the whole image, distorted; random_crop: cut out a different part each epoch "
        "(validation uses the centre).",
    )
    min_crop_area: float = setting(
        0.5,
        "For resize_mode random_crop: the smallest share of the image's area that a crop covers.",
        min=0.05,
        max=1.0,
        step=0.05,
    )
    horizontal_flip: bool = setting(
        False,
        "Mirror half of the images, chosen anew each epoch. Leave it off if captions mention left or right, or if the "
        "images contain writing.",
    )
    color_jitter: float = setting(
        0.0,
        "Change brightness, contrast and saturation at random by up to this share, and the hue by a fifth of it. "
        "Leave it at 0 if captions name colours.",
        min=0.0,
        max=1.0,
        step=0.05,
    )
    background: str = setting(
        "white", "The colour behind transparent images and around padded ones: a colour name, or a code like #808080."
    )
    resize_backend: Literal["exact", "fast"] = setting(
        "exact",
        "exact: the same pixels as OpenAI's own transform. fast: decodes and resizes about three times as fast; in "
        "most images one value in 300 differs, by one or two of 255.",
    )
    cached_views: int = setting(
        0,
        "For a frozen vision tower with flips, jitter or random crops: make this many variants of each image and use "
        "them in turn, so that their features can be cached. 0 makes new ones each epoch, which cannot be cached.",
        min=0,
        max=1000,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _rgb(self.background)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transform(ImagesConfig):
    """The transform from an image file to uint8 [3, image_size, image_size] that an `ImagesConfig` describes.

    resize_backend exact gives Pillow's bits. fast uses torch's kernel: in most images one value in 300 differs, by 1 or
    2 of 255 (benchmarks/RESULTS.md).
    """

    image_size: int

    @classmethod
    def of(cls, config: ImagesConfig, image_size: int) -> Transform:
        return cls(image_size=image_size, **dataclasses.asdict(config))

    @property
    def is_random(self) -> bool:
        return self.resize_mode == "random_crop" or self.horizontal_flip or self.color_jitter > 0

    @property
    def deterministic(self) -> Transform:
        """The transform for validation and evaluation, with a centre crop instead of a random one."""
        mode = "crop" if self.resize_mode == "random_crop" else self.resize_mode
        return dataclasses.replace(self, resize_mode=mode, horizontal_flip=False, color_jitter=0.0, cached_views=0)

    @functools.cached_property
    def base_name(self) -> str:
        """A name that is equal for transforms, and versions of the decoding libraries, with the same `base`."""
        import PIL

        mode = self.resize_mode if self.resize_mode != "random_crop" else f"random/{self._base_side}"
        torch_version = f", torch {torch.__version__}" if self.resize_backend == "fast" else ""
        versions = f"Pillow {PIL.__version__}{torch_version}"
        return f"1/{self.image_size}/{mode}/{_rgb(self.background)}/{self.resize_backend}/{versions}"

    @property
    def augmentation_name(self) -> str:
        """A name that is equal for transforms whose `finish` does the same."""
        if not self.is_random:
            return ""
        return f"{self.resize_mode}/{self.min_crop_area}/{self.horizontal_flip}/{self.color_jitter}"

    def load(self, path: str | os.PathLike | BinaryIO, rng: random.Random | None = None) -> Tensor:
        """Return uint8 [3, image_size, image_size]. Raises `BrokenImage`."""
        return self.finish(self.base(path), rng)

    def base(self, path: str | os.PathLike | BinaryIO) -> Tensor:
        """Return the result of the deterministic part, uint8 [3, h, w], contiguous. Raises `BrokenImage`."""
        image, size = self._decode(path), self.image_size
        if self.resize_mode == "pad":
            return self._padded(image)
        if self.resize_mode == "squash":
            return _to_tensor(_resized(image, size, size)).contiguous()
        width, height = _size(image)
        if self.resize_mode == "crop":
            resized = _resized(image, *_with_shorter_side(width, height, size))
            return _to_tensor(_centre(resized, size, size)).contiguous()
        limit = _MAX_BASE_ASPECT * min(width, height)
        image = _centre(image, min(width, limit), min(height, limit))
        width, height = _size(image)
        if min(width, height) > self._base_side:
            image = _resized(image, *_with_shorter_side(width, height, self._base_side))
        return _to_tensor(image).contiguous()

    def finish(self, base_chw: Tensor, rng: random.Random | None = None) -> Tensor:
        """Augment a `base`: uint8 [3, image_size, image_size]. A random transform needs an rng."""
        if not self.is_random:
            return base_chw
        if rng is None:
            raise ValueError("a random transform needs an rng")
        image: Pixels = base_chw
        if self.resize_mode == "random_crop":
            left, top, width, height = _random_box(*_size(base_chw), self.min_crop_area, rng)
            crop = _cut(base_chw, left, top, width, height)
            image = _resized(crop if self.resize_backend == "fast" else _to_pil(crop), self.image_size, self.image_size)
        if self.horizontal_flip and rng.random() < 0.5:
            image = _to_tensor(image).flip(2)
        if self.color_jitter:
            image = _jittered(_to_pil(image), self.color_jitter, rng)
        return _to_tensor(image).contiguous()

    @property
    def _base_side(self) -> int:
        return math.ceil(self.image_size * min(_MAX_BASE_SCALE, 1 / math.sqrt(self.min_crop_area)))

    def _decode(self, path: str | os.PathLike | BinaryIO) -> Pixels:
        if self.resize_backend == "exact":
            return decode(path, self.background)
        pixels = decode_plain_jpeg(path)
        return _to_tensor(decode(path, self.background)) if pixels is None else pixels

    def _padded(self, image: Pixels) -> Tensor:
        size, longest = self.image_size, max(_size(image))
        width, height = (max(1, round(side * size / longest)) for side in _size(image))
        square = torch.tensor(_rgb(self.background), dtype=torch.uint8)[:, None, None].repeat(1, size, size)
        left, top = (size - width) // 2, (size - height) // 2
        square[:, top : top + height, left : left + width] = _to_tensor(_resized(image, width, height))
        return square


@functools.cache
def _rgb(colour: str) -> tuple[int, ...]:
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError as error:
        raise UserError(
            f"background is {colour!r}; give a colour name such as white, or a code like #808080."
        ) from error


# ---- images as PIL images or as tensors ------------------------------------------------------------------------------


def _size(image: Pixels) -> tuple[int, int]:
    """Return (width, height)."""
    return (image.shape[2], image.shape[1]) if isinstance(image, Tensor) else image.size


def _to_tensor(image: Pixels) -> Tensor:
    # torchvision has functions for this, but importing them takes seconds while the first batch is waited for.
    return image if isinstance(image, Tensor) else torch.from_numpy(numpy.array(image)).permute(2, 0, 1)


def _to_pil(image: Pixels) -> Image.Image:
    from PIL import Image

    if not isinstance(image, Tensor):
        return image
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _resized(image: Pixels, width: int, height: int) -> Pixels:
    """Resize with antialiased bicubic interpolation."""
    from PIL import Image

    if not isinstance(image, Tensor):
        return image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.nn.functional.interpolate(image[None], size=(height, width), mode="bicubic", antialias=True)[0]


def _cut(image: Pixels, left: int, top: int, width: int, height: int) -> Pixels:
    if isinstance(image, Tensor):
        return image[:, top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height))


def _centre(image: Pixels, width: int, height: int) -> Pixels:
    whole_width, whole_height = _size(image)
    return _cut(image, round((whole_width - width) / 2), round((whole_height - height) / 2), width, height)


def _with_shorter_side(width: int, height: int, side: int) -> tuple[int, int]:
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


# ---- augmentation ----------------------------------------------------------------------------------------------------


def _random_box(width: int, height: int, min_area: float, rng: random.Random) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) of a random crop with at least this share of the area.

    If no crop of a usual aspect ratio fits, it is the largest centre crop that has one.
    """
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(min_area, 1.0)
        aspect = math.exp(rng.uniform(*map(math.log, _CROP_ASPECTS)))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return int(rng.random() * (width - wide + 1)), int(rng.random() * (height - high + 1)), wide, high
    wide, high = min(width, round(height * _CROP_ASPECTS[1])), min(height, round(width / _CROP_ASPECTS[0]))
    return (width - wide) // 2, (height - high) // 2, wide, high


def _jittered(image: Image.Image, strength: float, rng: random.Random) -> Image.Image:
    """Change brightness, contrast, saturation and hue, as torchvision's ColorJitter does.

    On PIL images these functions compute in whole numbers, so bits do not depend on how sums are split over threads.
    """
    from torchvision.transforms import functional as transforms

    for adjust in (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation):
        image = adjust(image, rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return transforms.adjust_hue(image, rng.uniform(-strength / 5, strength / 5))
