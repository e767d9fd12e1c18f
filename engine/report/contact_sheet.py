"""Pictures with their captions under them, on one sheet."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from .canvas import GROUND, INK

_SIDE, _GAP, _LINES, _LETTERS = 208, 12, 4, 13  # pixels; of a picture, between them; lines of a caption; their size
_MOST_LETTERS = 400  # more is never drawn, so more is not measured


def contact_sheet(pictures: Sequence[tuple], *, columns: int = 6):
    """(picture, caption) pairs, PIL of any size, as one PIL RGB sheet of up to `columns` a row.

    Captions are wrapped and cut to four lines. Letters that the font lacks become boxes.
    """
    from PIL import Image, ImageDraw

    columns = max(1, min(columns, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    line_height = _LETTERS + 4
    cell = _SIDE + 6 + _LINES * line_height
    size = (columns * (_SIDE + _GAP) + _GAP, rows * (cell + _GAP) + _GAP)
    sheet = Image.new("RGB", size, GROUND)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(pictures):
        row, column = divmod(number, columns)
        left, top = _GAP + column * (_SIDE + _GAP), _GAP + row * (cell + _GAP)
        small = _fitted(picture)
        sheet.paste(small, (left + (_SIDE - small.width) // 2, top + (_SIDE - small.height) // 2))
        for line, words in enumerate(wrapped(caption)):
            draw.text((left, top + _SIDE + 6 + line * line_height), words, fill=INK, font=font())
    if not pictures:
        draw.text((_GAP, _GAP), "no picture that can be opened", fill=INK, font=font())
    return sheet


def wrapped(caption: str, width: int = _SIDE, lines: int = _LINES) -> list[str]:
    """The caption as at most `lines` lines of at most `width` pixels; the last ends in … if there is more."""
    rest, found = _drawable(caption), []
    while rest and len(found) < lines:
        fits = _fitting(rest, width)
        if fits < len(rest) and len(found) == lines - 1:
            found.append(rest[: _fitting(rest, width - font().getlength("…"))].rstrip() + "…")
            break
        space = rest.rfind(" ", 0, fits + 1)
        cut = fits if fits == len(rest) or space <= 0 else space
        found.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return found


def _fitting(text: str, width: float) -> int:
    """How many letters fit; one at least."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font().getlength(text[:middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return low


def _drawable(text: str) -> str:
    """One line without letters that cannot be drawn: half surrogates (out of damaged file names) and control codes."""
    whole = text[:_MOST_LETTERS].encode("utf-8", "replace").decode("utf-8")
    return " ".join("".join(letter if letter.isprintable() else " " for letter in whole).split())


def _fitted(picture):
    from PIL import ImageOps

    return ImageOps.contain(picture.convert("RGB"), (_SIDE, _SIDE))


@functools.cache
def font():
    """DejaVu Sans, which comes with matplotlib and knows far more letters than Pillow's own font."""
    import matplotlib
    from PIL import ImageFont

    file = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(file, _LETTERS, layout_engine=ImageFont.Layout.BASIC)
