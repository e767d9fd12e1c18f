"""Images with their captions below them, on one sheet."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .canvas import GROUND, INK

_SIDE, _GAP = 208, 12  # pixels: of an image, between images
_LINES, _LETTER_SIZE = 4, 13  # of a caption
_MAX_LETTERS = 400  # more are never drawn, so more are not measured


def contact_sheet(images: Sequence[tuple[Image.Image, str]], *, columns: int = 6) -> Image.Image:
    """Return (image, caption) pairs of any size as one RGB sheet with up to `columns` in a row.

    Captions are wrapped and cut to four lines. Letters that the font lacks become boxes.
    """
    columns = max(1, min(columns, len(images)))
    rows = max(1, -(-len(images) // columns))
    line_height = _LETTER_SIZE + 4
    cell = _SIDE + 6 + _LINES * line_height
    size = (columns * (_SIDE + _GAP) + _GAP, rows * (cell + _GAP) + _GAP)
    sheet = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(images):
        row, column = divmod(number, columns)
        left, top = _GAP + column * (_SIDE + _GAP), _GAP + row * (cell + _GAP)
        small = ImageOps.contain(image.convert("RGB"), (_SIDE, _SIDE))
        sheet.paste(small, (left + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2))
        for line, words in enumerate(wrapped(caption)):
            draw.text((left, top + _SIDE + 6 + line * line_height), words, fill=INK, font=font())
    if not images:
        draw.text((_GAP, _GAP), "no image that can be opened", fill=INK, font=font())
    return sheet


def wrapped(caption: str, width: int = _SIDE, lines: int = _LINES) -> list[str]:
    """Wrap a caption into at most `lines` lines of at most `width` pixels; the last ends in … if there is more."""
    rest = _drawable(caption)
    wrapped_lines: list[str] = []
    while rest and len(wrapped_lines) < lines:
        fits = _letters_that_fit(rest, width)
        if fits < len(rest) and len(wrapped_lines) == lines - 1:
            wrapped_lines.append(rest[: _letters_that_fit(rest, width - font().getlength("…"))].rstrip() + "…")
            break
        space = rest.rfind(" ", 0, fits + 1)
        cut = fits if fits == len(rest) or space <= 0 else space
        wrapped_lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return wrapped_lines


def _letters_that_fit(text: str, width: float) -> int:
    """Return how many letters fit; at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font().getlength(text[:middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return low


def _drawable(text: str) -> str:
    """Return one line without what cannot be drawn: half surrogates (from damaged file names) and control codes."""
    whole = text[:_MAX_LETTERS].encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(letter if letter.isprintable() else " " for letter in whole).split())


@functools.cache
def font() -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which comes with matplotlib and has far more letters than Pillow's own font."""
    import matplotlib

    file = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(file, _LETTER_SIZE, layout_engine=ImageFont.Layout.BASIC)
