"""The one exception that is shown to the user as it is, and how what is in a file comes into its sentence."""

from __future__ import annotations

import reprlib


class UserError(ValueError):
    """Something the user can mend: one plain sentence that says what is wrong, in which file, and what to do."""


def one_line(said: object, most: int = 200) -> str:
    """The beginning of what a file or another library says, fit to stand in a sentence: one line, printable, short."""
    first = str(said).strip().partition("\n")[0][:most]
    return "".join(letter if letter.isprintable() else " " for letter in first)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def shown(value: object, most: int = 120) -> str:
    """A value out of a file as Python writes it, cut short if it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
