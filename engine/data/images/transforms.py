"""How a picture becomes the square that a network sees: the part that is always the same, and the part left to chance.

What is always the same (`base`) may be kept (cache.py); chance (`finish`) comes after it, so that pixels do not depend
on whether they were kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import random
from typing import Literal

import numpy
import torch
from torch import Tensor

from ...errors import UserError
from ...settings import Settings, setting
from .decoding import decode, decode_plain_jpeg

RESIZE_MODES = ("crop", "pad", "squash", "random_crop")
RESIZE_BACKENDS = ("exact", "fast")
# Of a picture from which random parts are taken, the middle is kept up to this many times its shorter side, and it is
# made smaller only as far as its smallest part still fills the square, or to twice the square.
_LONGEST_BASE, _LARGEST_BASE = 4, 2.0
_ASPECTS = (3 / 4, 4 / 3)  # of random parts, as in torchvision's RandomResizedCrop
_TRIES = 10


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
class Transform:
    """From a file to uint8 [3, image_size, image_size].

    `square`: crop (the shorter side resized, the centre cut out), pad (the whole picture on `background`), squash (the
    sides resized alike, whatever their ratio) or random (a part of at least `min_crop_area` of the area). `resize`:
    exact gives Pillow's bits; fast is torch's kernel, where a value in 300 of most pictures differs, by 1 or 2 of 255
    (benchmarks/RESULTS.md). `jitter` is the largest change of brightness, contrast and saturation, and five times that
    of hue.
    """

    image_size: int
    resize_mode: str = "crop"
    background: str = "white"
    resize_backend: str = "exact"
    min_crop_area: float = 0.5
    horizontal_flip: bool = False
    color_jitter: float = 0.0

    @classmethod
    def of(cls, config: ImagesConfig, image_size: int) -> Transform:
        names = [field.name for field in dataclasses.fields(cls) if field.name != "image_size"]
        return cls(image_size=image_size, **{name: getattr(config, name) for name in names})

    def __post_init__(self):
        for name, choices in (("resize_mode", RESIZE_MODES), ("resize_backend", RESIZE_BACKENDS)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; choose {' or '.join(choices)}.")
        _rgb(self.background)

    @property
    def is_random(self) -> bool:
        return self.resize_mode == "random_crop" or self.horizontal_flip or self.color_jitter > 0

    @property
    def deterministic(self) -> Transform:
        """The same for validation and evaluation: nothing random, the centre in place of a random part."""
        square = "crop" if self.resize_mode == "random_crop" else self.resize_mode
        return dataclasses.replace(self, resize_mode=square, horizontal_flip=False, color_jitter=0.0)

    @functools.cached_property
    def base_name(self) -> str:
        """Equal for transforms, and versions of the libraries that decode, that give the same `base`."""
        import PIL

        base = self.resize_mode if self.resize_mode != "random_crop" else f"random/{self._base_side}"
        versions = f"Pillow {PIL.__version__}" + (
            f", torch {torch.__version__}" if self.resize_backend == "fast" else ""
        )
        return f"1/{self.image_size}/{base}/{_rgb(self.background)}/{self.resize_backend}/{versions}"

    @property
    def augmentation_name(self) -> str:
        """Equal for transforms that make the same of a `base` and equal chances."""
        return (
            f"{self.resize_mode}/{self.min_crop_area}/{self.horizontal_flip}/{self.color_jitter}"
            if self.is_random
            else ""
        )

    def load(self, path: str | os.PathLike, chance: random.Random | None = None) -> Tensor:
        """uint8 [3, image_size, image_size]; raises `BrokenImage`."""
        return self.finish(self.base(path), chance)

    def base(self, path: str | os.PathLike) -> Tensor:
        """uint8 [3, h, w], contiguous: all that does not depend on chance; raises `BrokenImage`."""
        picture = self._opened(path)
        size = self.image_size
        if self.resize_mode == "pad":
            return self._padded(picture)
        if self.resize_mode == "squash":
            return _tensor(_resized(picture, size, size)).contiguous()
        width, height = _size(picture)
        if self.resize_mode == "crop":
            wide, high = _with_shorter_side(width, height, size)
            return _tensor(_centre(_resized(picture, wide, high), size, size)).contiguous()
        limit = _LONGEST_BASE * min(width, height)
        picture = _centre(picture, min(width, limit), min(height, limit))
        width, height = _size(picture)
        if min(width, height) > self._base_side:
            picture = _resized(picture, *_with_shorter_side(width, height, self._base_side))
        return _tensor(picture).contiguous()

    def finish(self, base_chw: Tensor, chance: random.Random | None = None) -> Tensor:
        """uint8 [3, image_size, image_size], a function of `base` and of what `chance` gives; a transform that is
        random needs it."""
        if not self.is_random:
            return base_chw
        if chance is None:
            raise ValueError("a random transform needs chance")
        picture = base_chw
        if self.resize_mode == "random_crop":
            left, top, width, height = _random_part(*_size(base_chw), self.min_crop_area, chance)
            part = _cut(base_chw, left, top, width, height)
            picture = _resized(part if self.resize_backend == "fast" else _pil(part), self.image_size, self.image_size)
        if self.horizontal_flip and chance.random() < 0.5:
            picture = _tensor(picture).flip(2)
        if self.color_jitter:
            picture = _jittered(_pil(picture), self.color_jitter, chance)
        return _tensor(picture).contiguous()

    @property
    def _base_side(self) -> int:
        return math.ceil(self.image_size * min(_LARGEST_BASE, 1 / math.sqrt(self.min_crop_area)))

    def _opened(self, path: str | os.PathLike):
        """A PIL picture or, for `fast`, a tensor [3, h, w]."""
        if self.resize_backend == "exact":
            return decode(path, self.background)
        pixels = decode_plain_jpeg(path)
        return _tensor(decode(path, self.background)) if pixels is None else pixels

    def _padded(self, picture) -> Tensor:
        width, height = _size(picture)
        size, longest = self.image_size, max(width, height)
        wide, high = (max(1, round(side * size / longest)) for side in (width, height))
        square = torch.tensor(_rgb(self.background), dtype=torch.uint8)[:, None, None].repeat(1, size, size)
        left, top = (size - wide) // 2, (size - high) // 2
        square[:, top : top + high, left : left + wide] = _tensor(_resized(picture, wide, high))
        return square


@functools.cache
def _rgb(colour: str) -> tuple[int, int, int]:
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(colour)[:3]
    except ValueError as error:
        raise UserError(f"background is {colour!r}; give a colour's name, such as white, or #808080.") from error


# ---- pictures as PIL's or as tensors [3, h, w] -----------------------------------------------------------------------


def _size(picture) -> tuple[int, int]:
    return (picture.shape[2], picture.shape[1]) if isinstance(picture, Tensor) else picture.size


def _tensor(picture) -> Tensor:
    # Not with torchvision's functions, whose import takes seconds where the first batch is waited for.
    return picture if isinstance(picture, Tensor) else torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)


def _pil(picture):
    from PIL import Image

    if not isinstance(picture, Tensor):
        return picture
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def _resized(picture, width: int, height: int):
    """Bicubic, antialiased."""
    from PIL import Image

    if not isinstance(picture, Tensor):
        return picture.resize((width, height), Image.Resampling.BICUBIC)
    size = (height, width)
    return torch.nn.functional.interpolate(picture[None], size=size, mode="bicubic", antialias=True)[0]


def _cut(picture, left: int, top: int, width: int, height: int):
    if isinstance(picture, Tensor):
        return picture[:, top : top + height, left : left + width]
    return picture.crop((left, top, left + width, top + height))


def _centre(picture, width: int, height: int):
    whole_width, whole_height = _size(picture)
    return _cut(picture, round((whole_width - width) / 2), round((whole_height - height) / 2), width, height)


def _with_shorter_side(width: int, height: int, side: int) -> tuple[int, int]:
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


# ---- chance ----------------------------------------------------------------------------------------------------------


def _random_part(width: int, height: int, share: float, chance: random.Random) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a part with at least this share of the area; where none of the usual aspects fits,
    the middle, as much of it as has one."""
    for _ in range(_TRIES):
        area = width * height * chance.uniform(share, 1.0)
        aspect = math.exp(chance.uniform(*map(math.log, _ASPECTS)))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            return int(chance.random() * (width - wide + 1)), int(chance.random() * (height - high + 1)), wide, high
    wide, high = min(width, round(height * _ASPECTS[1])), min(height, round(width / _ASPECTS[0]))
    return (width - wide) // 2, (height - high) // 2, wide, high


def _jittered(picture, strength: float, chance: random.Random):
    """In whole numbers throughout (Pillow's), so that the bits do not depend on how sums are split over threads."""
    from torchvision.transforms import functional as transforms

    for adjust in (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation):
        picture = adjust(picture, chance.uniform(max(0.0, 1 - strength), 1 + strength))
    return transforms.adjust_hue(picture, chance.uniform(-strength / 5, strength / 5))
