"""HTML pages: single files without scripts that fetch nothing, readable on dark and light screens.

Jinja2 fills the templates in `templates/` and escapes every value: captions and names come from anywhere.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup
from PIL.Image import Image

from .tables import Rows

_MAX_LETTERS, _MAX_ROWS = 2000, 500  # of one text; of one table
_IMAGE_BYTES = 1_500_000  # for all images of a page together, as base64
_CHART_BYTES, _THUMBNAIL_BYTES = 250_000, 25_000
_THUMBNAIL_SIDE = 208  # pixels
_LARGE = 600  # a chart higher than this gets more width
_QUALITIES = (85, 70, 50, 30, 10)


class Figure(NamedTuple):
    """An image in a page; `uri` is empty if there was no room for it."""

    uri: Markup
    width: int
    height: int

    @property
    def large(self) -> bool:
        return self.height > _LARGE


class PageImages:
    """Turns images into data URIs until the page is full; then they are left out, and the page says so."""

    def __init__(self) -> None:
        self.bytes_left = _IMAGE_BYTES

    def chart(self, image: Image) -> Figure:
        return self._figure(image, _CHART_BYTES, photo=False)

    def thumbnail(self, image: Image) -> Figure:
        small = image.convert("RGB")
        small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        return self._figure(small, _THUMBNAIL_BYTES, photo=True)

    def _figure(self, image: Image, limit: int, *, photo: bool) -> Figure:
        data, form = _compressed(image, limit, photo=photo)
        uri = f"data:image/{form};base64,{base64.b64encode(data).decode('ascii')}"
        if len(uri) > self.bytes_left:
            uri = ""
        self.bytes_left -= len(uri)
        return Figure(Markup(uri), image.width, image.height)


def _compressed(image: Image, limit: int, *, photo: bool) -> tuple[bytes, str]:
    """Return bytes and format: PNG for drawings, JPEG for photos and for what would be larger than `limit`."""

    def saved(form: str, **options: int) -> bytes:
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    if not photo and len(data := saved("PNG")) <= limit:
        return data, "png"
    for quality in _QUALITIES:
        if len(data := saved("JPEG", quality=quality)) <= limit:
            break
    return data, "jpeg"


def render(template: str, **values: Any) -> str:
    """Fill a template. It gets `images`, a fresh `PageImages`, besides the values."""
    return _environment().get_template(template).render(images=PageImages(), **values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_printable,
    )
    environment.globals |= {"columns_of": _columns_of, "facts_of": _facts_of, "max_rows": _MAX_ROWS}
    return environment


def _printable(value: object) -> str | Markup:
    """Cut long texts, and replace half surrogates, which come from damaged file names. Jinja2 escapes the result."""
    if isinstance(value, Markup):
        return value
    text = str(value)
    if len(text) > _MAX_LETTERS:
        text = f"{text[:_MAX_LETTERS]}…"
    return text.encode("utf-8", "replace").decode("utf-8")


def _columns_of(rows: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _facts_of(facts: Mapping[str, object]) -> Rows:
    """Return a row for each fact that is known, for a table without headings."""
    return [{"": name, " ": str(value)} for name, value in facts.items() if value not in ("", None)]
