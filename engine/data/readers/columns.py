"""Which columns of a table, and which fields of JSON, hold image names, captions and classes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

_IMAGE_COLUMNS = "image filename file_name image_path filepath path file image_name image_file img img_path".split()
# caption, text_2, long caption, original_caption; but not caption_id or text_length.
_CAPTION_FIELD = re.compile(
    r"(?:.*[_ -])?(?:captions?|texts?|descriptions?|comments?|sentences?|tags|long|short)(?:[_ -]?\d+)?"
    r"|(?:caption|text|description)[_ -](?:long|short|en)"
)
_PROMPT_COLUMN = "prompt"  # written by CLIP Interrogator
# SCAM calls it object_label; CIFAR-100 has a fine and a coarse one.
_CLASS_COLUMNS = ("label", "class", "class_name", "category", "object_label", "fine_label")


def is_caption_field(name: str) -> bool:
    """Whether a column or field of this name, in any case, holds captions."""
    return _CAPTION_FIELD.fullmatch(name.strip().lower()) is not None


def captions_in(value: Any) -> list[str] | None:
    """Return the captions in a JSON value: a text, a list of such values, or an object with caption fields, of which
    every line is a caption. None if it is none of these."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        fields = [inner for name, inner in value.items() if inner is not None and is_caption_field(name)]
        return [line for text in captions_in(fields) or [] for line in text.splitlines()] if fields else None
    if not isinstance(value, list):
        return None
    if len(value) == 1 and isinstance(value[0], str):  # by far the most common case, a million times over
        return value
    captions: list[str] = []
    for inner in value:
        if (texts := captions_in(inner)) is None:
            return None
        captions += texts
    return captions


@dataclasses.dataclass(frozen=True)
class ChosenColumns:
    """The columns that are read: the image's name, and those with `content`."""

    content: Literal["captions", "prompts", "classes"]
    image: str
    values: tuple[str, ...]

    @property
    def caption_columns(self) -> str:
        """The columns by name if there are several: users may not expect that all of them are read. Else ""."""
        return ", ".join(self.values) if len(self.values) > 1 else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Columns:
    """The column names that the user gave, in any case; several caption columns are separated by commas. Empty ones are
    recognised."""

    image: str = ""
    caption: str = ""

    def choose(self, names: Sequence[str]) -> ChosenColumns | None:
        """Return which of a table's columns to read; None if it has no image column or nothing to read beside it."""
        by_name = {name.strip().lower(): name for name in reversed(names)}
        image_names = [self.image.strip().lower()] if self.image.strip() else _IMAGE_COLUMNS
        image = next((by_name[name] for name in image_names if name in by_name), None)
        if image is None:
            return None
        if self.caption:
            wanted = [name.strip().lower() for name in self.caption.split(",") if name.strip()]
            complete = all(name in by_name for name in wanted)
            return ChosenColumns("captions", image, tuple(by_name[name] for name in wanted)) if complete else None
        if captions := tuple(name for name in dict.fromkeys(names) if is_caption_field(name)):
            return ChosenColumns("captions", image, captions)
        if _PROMPT_COLUMN in by_name:
            return ChosenColumns("prompts", image, (by_name[_PROMPT_COLUMN],))
        label = next((by_name[name] for name in _CLASS_COLUMNS if name in by_name), None)
        return None if label is None else ChosenColumns("classes", image, (label,))
