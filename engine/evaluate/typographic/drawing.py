"""Draw words into images, in fonts that come with Pillow and matplotlib, so that they look alike everywhere."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Sequence

import numpy
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

# Pillow's own font is the only one that is always there; the others come with matplotlib and have far more letters.
_PILLOW_FONT = ""
_FONTS = (_PILLOW_FONT, "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf")
_MAX_LINES, _MAX_WIDTH = 3, 0.95
# The height of a letter as a share of the image's; the opacity of the ground under the word, out of 255.
_HEIGHTS, _OPACITIES = (0.1, 0.22), (0, 150, 255)
# Ink and ground, from strong to weak contrast.
_COLOURS = (
    ("black", "white"),
    ("white", "black"),
    ("yellow", "navy"),
    ("red", "white"),
    ("#303030", "#c8c8c8"),
    ("#e0e0e0", "#707070"),
)


def can_be_drawn(word: str) -> bool:
    """Return whether some font has all its letters; missing ones would become boxes."""
    return bool(_fonts_for(word))


def write_word(image_u8: Tensor, word: str, rng: random.Random) -> Tensor:
    """Return uint8 [3, s, s] with the whole word drawn into it; `rng` decides font, size, position and colours.

    A long name is broken into several lines.
    """
    image = Image.fromarray(image_u8.permute(1, 2, 0).contiguous().numpy())
    size = image.width
    font_name = rng.choice(_fonts_for(word) or _FONTS[1:2])
    height, across, down = rng.uniform(*_HEIGHTS), rng.random(), rng.random()
    (ink, ground), opacity = rng.choice(_COLOURS), rng.choice(_OPACITIES)
    text, letter_size = _fitted(word, font_name, size, size * height)
    font, edge = _font(font_name, letter_size), max(1, round(letter_size / 16))
    draw = ImageDraw.Draw(image, "RGBA")
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, stroke_width=edge, align="center")
    x, y = across * max(0.0, size - (right - left)), down * max(0.0, size - (bottom - top))
    if opacity:
        box = (x - 2, y - 2, x + right - left + 2, y + bottom - top + 2)
        draw.rectangle(box, fill=(*ImageColor.getrgb(ground)[:3], opacity))
    draw.multiline_text(
        (x - left, y - top), text, fill=ink, font=font, stroke_width=edge, stroke_fill=ground, align="center"
    )
    return torch.from_numpy(numpy.array(image.convert("RGB"))).permute(2, 0, 1)


def _fitted(word: str, font_name: str, size: int, height: float) -> tuple[str, int]:
    """Return the word in as many lines as make its letters largest, and their size in pixels, at most `height`."""
    best = (0.0, word)
    for lines in range(1, _MAX_LINES + 1):
        text = "\n".join(_broken(word.split() or [word], lines))
        widest = max(_font(font_name, 64).getlength(line) for line in text.split("\n")) / 64
        letter_size = min(height, (size * _MAX_WIDTH - 4) / max(widest, 1e-6), size * 0.8 / (1.3 * lines))
        if letter_size > best[0] * 1.01:
            best = (letter_size, text)
    return best[1], max(1, int(best[0]))


def _broken(words: Sequence[str], lines: int) -> list[str]:
    """Break words into at most `lines` lines, so that the longest line is as short as possible."""
    if lines <= 1 or len(words) == 1:
        return [" ".join(words)]
    splits = [[" ".join(words[:first]), *_broken(words[first:], lines - 1)] for first in range(1, len(words))]
    return min(splits, key=lambda split: max(map(len, split)))


@functools.lru_cache(maxsize=10_000)
def _fonts_for(word: str) -> tuple[str, ...]:
    letters = {ord(letter) for letter in word if not letter.isspace()}
    return tuple(name for name in _FONTS if letters and letters <= _letters_of(name))


@functools.cache
def _letters_of(font_name: str) -> frozenset[int]:
    if font_name == _PILLOW_FONT:  # Aileron; the other fonts serve whatever is beyond ASCII
        return frozenset(range(33, 127))
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_file(font_name)).get_charmap())


@functools.lru_cache(maxsize=256)
def _font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if name == _PILLOW_FONT:
        return ImageFont.load_default(size)
    return ImageFont.truetype(_font_file(name), size, layout_engine=ImageFont.Layout.BASIC)


def _font_file(name: str) -> str:
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name)
