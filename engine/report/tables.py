"""Rows of words as an aligned table in plain text, and how long something takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A line of headings, a rule, and a line for each row; the headings are the keys in the order they first come.

    The first column is aligned left and the others right.
    """
    headings = list(dict.fromkeys(key for row in rows for key in row))
    cells = [headings] + [[str(row.get(heading, "")) for heading in headings] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(headings))]

    def line(words: Sequence[str]) -> str:
        aligned = [
            word.rjust(width) if n else word.ljust(width)
            for n, (word, width) in enumerate(zip(words, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headings), "  ".join("-" * width for width in widths), *(line(row) for row in cells[1:])])


def time_words(seconds: float | None) -> str:
    """A duration as a reader says it: 40 s, 12 min, 3 h 20 min."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
