"""Words drawn into pictures: in fonts that Pillow and matplotlib bring along, so that they look alike everywhere."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Sequence

import torch
from torch import Tensor

# The first is the only one that is sure to be there; the others come with matplotlib and know far more letters.
_PILLOWS = ""
_FONTS = (_PILLOWS, "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf")
_MOST_LINES, _WIDEST = 3, 0.95
# A letter's height as a share of the picture's; how opaque the ground under the word is, of 255.
_HEIGHTS, _GROUNDS = (0.1, 0.22), (0, 150, 255)
# Ink and ground, from the strongest contrast to a weak one.
_COLOURS = (
    ("black", "white"),
    ("white", "black"),
    ("yellow", "navy"),
    ("red", "white"),
    ("#303030", "#c8c8c8"),
    ("#e0e0e0", "#707070"),
)


def can_be_drawn(word: str) -> bool:
    """Whether a font here has all its letters; others would become boxes."""
    return bool(_fonts_for(word))


def write_word(image_u8: Tensor, word: str, chance: random.Random) -> Tensor:
    """uint8 [3, s, s] with the word drawn into it, whole, in a font, size, place and colours that `chance` decides. A
    long name stands in several lines."""
    from PIL import Image, ImageColor, ImageDraw

    picture = Image.fromarray(image_u8.permute(1, 2, 0).contiguous().numpy())
    size = picture.width
    name = chance.choice(_fonts_for(word) or _FONTS[1:2])
    height, across, down = chance.uniform(*_HEIGHTS), chance.random(), chance.random()
    (ink, ground), opaque = chance.choice(_COLOURS), chance.choice(_GROUNDS)
    text, letters = _fitted(word, name, size, size * height)
    font, edge = _font(name, letters), max(1, round(letters / 16))
    draw = ImageDraw.Draw(picture, "RGBA")
    left, top, right, bottom = draw.multiline_textbbox((0, 0), text, font=font, stroke_width=edge, align="center")
    x, y = across * max(0.0, size - (right - left)), down * max(0.0, size - (bottom - top))
    if opaque:
        draw.rectangle(
            (x - 2, y - 2, x + right - left + 2, y + bottom - top + 2), fill=(*ImageColor.getrgb(ground), opaque)
        )
    draw.multiline_text(
        (x - left, y - top), text, fill=ink, font=font, stroke_width=edge, stroke_fill=ground, align="center"
    )
    return torch.from_numpy(_array(picture)).permute(2, 0, 1)


def _array(picture):
    import numpy

    return numpy.array(picture.convert("RGB"))


def _fitted(word: str, name: str, size: int, height: float) -> tuple[str, int]:
    """(the word in as many lines as make its letters largest, their size in pixels), at most `height`."""
    best = (0.0, word)
    for lines in range(1, _MOST_LINES + 1):
        text = "\n".join(_broken(word.split() or [word], lines))
        widest = max(_font(name, 64).getlength(line) for line in text.split("\n")) / 64
        letters = min(height, (size * _WIDEST - 4) / max(widest, 1e-6), size * 0.8 / (1.3 * lines))
        if letters > best[0] * 1.01:
            best = (letters, text)
    return best[1], max(1, int(best[0]))


def _broken(words: Sequence[str], lines: int) -> list[str]:
    """The words in at most so many lines, the longest of which is as short as can be."""
    if lines <= 1 or len(words) == 1:
        return [" ".join(words)]
    splits = [[" ".join(words[:first]), *_broken(words[first:], lines - 1)] for first in range(1, len(words))]
    return min(splits, key=lambda split: max(map(len, split)))


@functools.lru_cache(maxsize=10_000)
def _fonts_for(word: str) -> tuple[str, ...]:
    letters = {ord(letter) for letter in word if not letter.isspace()}
    return tuple(name for name in _FONTS if letters and letters <= _letters_of(name))


@functools.cache
def _letters_of(name: str) -> frozenset[int]:
    if name == _PILLOWS:  # Aileron; what is beyond plain letters is left to the others
        return frozenset(range(33, 127))
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_file(name)).get_charmap())


@functools.lru_cache(maxsize=256)
def _font(name: str, size: int):
    from PIL import ImageFont

    if name == _PILLOWS:
        return ImageFont.load_default(size)
    return ImageFont.truetype(_file(name), size, layout_engine=ImageFont.Layout.BASIC)


def _file(name: str) -> str:
    import matplotlib

    return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name)
