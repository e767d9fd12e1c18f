"""Notes: sentences for the user that are not errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

OnNote = Callable[[str], None]


def ignore_note(note: str) -> None:
    """The default of `on_note`."""


class Notes:
    """Notes in the order in which they came, each kept once and passed on to `on_note` at once."""

    def __init__(self, on_note: OnNote = ignore_note) -> None:
        self._on_note = on_note
        self._notes: dict[str, None] = {}

    def add(self, note: str) -> None:
        if note not in self._notes:
            self._notes[note] = None
            self._on_note(note)

    def extend(self, notes: Iterable[str]) -> None:
        for note in notes:
            self.add(note)

    def __iter__(self) -> Iterator[str]:
        return iter(self._notes)

    def __len__(self) -> int:
        return len(self._notes)
