"""Rows of words as an aligned table in plain text, and numbers in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Rows = list[dict[str, str]]  # a row: its cells by their headings


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a line of headings, a rule, and a line for each row; headings in the order in which they first come.

    The first column is aligned left and the others right.
    """
    headings = list(dict.fromkeys(key for row in rows for key in row))
    cells = [headings] + [[str(row.get(heading, "")) for heading in headings] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(headings))]

    def line(words: Sequence[str]) -> str:
        aligned = [
            word.rjust(width) if column else word.ljust(width)
            for column, (word, width) in enumerate(zip(words, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headings), "  ".join("-" * width for width in widths), *(line(row) for row in cells[1:])])


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def time_words(seconds: float | None) -> str:
    """Return a duration in words: 40 s, 12 min, 3 h 20 min."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
