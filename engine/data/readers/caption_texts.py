"""What counts as a caption in a file's fields, and captions as they are kept: one text a picture, a line for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..tokenizer import encode

_CONTEXT = 77
_MOST_LETTERS = 4096  # of what is tokenised to see whether it fits; more never does
# caption, text_2, long caption, original_caption, prompt: and not caption_id or text_length.
_CAPTION_FIELD = re.compile(
    r"(?:.*[_ -])?(?:captions?|texts?|descriptions?|comments?|sentences?|tags|long|short)(?:[_ -]?\d+)?"
    r"|(?:caption|text|description)[_ -](?:long|short|en)"
)


def in_lines(captions: Sequence[str]) -> str:
    """One text with a line for each caption, without surrounding space, empty ones and repetitions."""
    if len(captions) == 1:
        return " ".join(captions[0].split())
    return "\n".join(dict.fromkeys(text for caption in captions if (text := " ".join(caption.split()))))


def is_caption_field(name: str) -> bool:
    """Whether a column or field of this name, in any case, holds captions."""
    return _CAPTION_FIELD.fullmatch(name.strip().lower()) is not None


def captions_of(value: Any) -> list[str] | None:
    """The captions in a JSON value: a text, a list of such values, or an object with fields for captions, in which
    every line is one; None if it is none of these."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        if len(value) == 1 and isinstance(value[0], str):  # as nearly always; a million of them take time
            return value
        return _joined(map(captions_of, value))
    if isinstance(value, Mapping):
        fields = [captions_of(inner) for name, inner in value.items() if inner is not None and is_caption_field(name)]
        return [line for text in _joined(fields) or [] for line in text.splitlines()] if fields else None
    return None


def _joined(parts: Iterable[list[str] | None]) -> list[str] | None:
    joined: list[str] = []
    for part in parts:
        if part is None:
            return None
        joined += part
    return joined


class Gathered:
    """Captions by picture name, of which most come once: a name with one text has no list, which halves the memory."""

    def __init__(self):
        self._found: dict[str, str | list[str]] = {}

    def add(self, name: str, captions: Sequence[str]) -> None:
        lines = in_lines(captions)
        before = self._found.setdefault(name, lines)
        if before is lines:
            return
        if isinstance(before, str):
            before = self._found[name] = [before]
        before.append(lines)

    def texts(self) -> dict[str, str]:
        """A line for each caption, by picture name, in the order of their first coming. Nothing can be added after."""
        for name, found in self._found.items():
            if not isinstance(found, str):
                self._found[name] = in_lines([line for text in found for line in text.split("\n")])
        return self._found  # type: ignore[return-value]


def prompt_captions(prompt: str, context_length: int = _CONTEXT) -> list[str]:
    """What CLIP Interrogator says of a picture: each part between commas is a caption, as many as fit in the context
    together. The first is always kept, cut at a word if need be, so that no picture is left without."""
    room = context_length - 2  # the start and the end
    parts = [part for part in map(str.strip, prompt.split(",")) if part]
    kept = [_cut(parts[0], room)] if parts else []
    used = _length(kept[0]) if kept else 0
    for part in parts[1:]:
        used += 1 + _length(part)  # the comma is a token too
        if used > room:
            break
        kept.append(part)
    return kept


def _cut(text: str, room: int) -> str:
    """As many of a text's first words as fit; at least one."""
    words = text.split()[:room]
    while len(words) > 1 and _length(" ".join(words)) > room:
        words.pop()
    return " ".join(words)


def _length(text: str) -> int:
    """In tokens; of a text that is far too long, some number that is too large."""
    return len(text) if len(text) > _MOST_LETTERS else len(encode(text))
