"""The one exception whose text is shown to the user, and helpers that quote untrusted values in it."""

from __future__ import annotations

import reprlib


class UserError(ValueError):
    """Something that the user can fix: one sentence that says what is wrong, in which file, and what to do."""


def one_line(text: object, max_length: int = 200) -> str:
    """Return the first line of a text from a file or another library: printable and at most `max_length` long."""
    first = str(text).strip().partition("\n")[0][:max_length]
    return "".join(letter if letter.isprintable() else " " for letter in first)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def shown(value: object, max_length: int = 120) -> str:
    """Return the `repr` of a value from a file, shortened so that it fits in a sentence."""
    text = _SHORT.repr(value)
    return text if len(text) <= max_length else f"{text[:max_length]}…"
