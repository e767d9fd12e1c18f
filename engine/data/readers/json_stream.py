"""JSON read member by member: the text is never held as a whole, so a million captions open in little more memory than
they take.

The library ijson is faster, but not used: its errors have no line numbers, it refuses NaN and long numbers and replaces
half surrogates, all of which Python reads, and a file of 40,000 brackets takes 3.9 GB (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ...errors import UserError
from ..text_files import open_text

_BLOCK = 2**20  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
# Nearly every name of nearly every file: half the time of the general way.
_PLAIN_NAME = re.compile(r'[ \t\n\r]*,[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:')
# A mistake this far from the end of what was read so far is one whatever follows: no escape or number is as long.
_LONGEST_TOKEN = 4096
_decode = json.JSONDecoder().raw_decode


def json_members(file: Path, lists: frozenset[str] = frozenset()) -> Iterator[tuple[str | None, Any]]:
    """Yield (name, value) of each member of the outermost object, or (None, element) of the outermost list.

    A member that is a list and named in `lists` is yielded element by element, each under its name. A file that is a
    single value yields it under the name None. Raises `UserError` for what is not JSON, with the line.
    """
    with open_text(file) as stream:
        yield from _Parser(stream, file).members(lists)


def json_object(members: Iterable[tuple[str, object]]) -> Iterator[str]:
    """The text of a JSON object, a member a line."""
    for number, (name, value) in enumerate(members):
        dumped = json.dumps(value, ensure_ascii=False)
        yield f"{',' if number else '{'}\n {json.dumps(name, ensure_ascii=False)}: {dumped}"
    yield "\n}\n"


class _Parser:
    """A window onto the file's text, which grows until a value is complete and then moves on."""

    def __init__(self, stream: TextIO, file: Path) -> None:
        self._stream, self._file = stream, file
        self._text, self._position, self._ended = "", 0, False
        self._line = 1  # that the window starts in

    def members(self, lists: frozenset[str]) -> Iterator[tuple[str | None, Any]]:
        if not self._at_more():
            raise self._invalid("it is empty")
        opening = self._text[self._position]
        if opening == "{":
            yield from self._object(lists)
        elif opening == "[":
            yield from ((None, self._value()) for _ in self._items("]"))
        else:
            yield None, self._value()
        if self._at_more():
            raise self._invalid("there is more after the end")

    def _object(self, lists: frozenset[str]) -> Iterator[tuple[str, Any]]:
        for name in self._names():
            if name in lists and self._next_letter() == "[":
                yield from ((name, self._value()) for _ in self._items("]"))
            else:
                yield name, self._value()

    def _names(self) -> Iterator[str]:
        """Move past the name and the colon of each member; whoever asks for the next has moved past the value."""
        for _ in self._items("}"):
            if self._next_letter() != '"':
                raise self._invalid("a name in double quotes is missing")
            name = self._value()
            if self._next_letter() != ":":
                raise self._invalid("a colon is missing")
            self._position += 1
            yield name
            while (plain := _PLAIN_NAME.match(self._text, self._position)) is not None:
                self._position = plain.end()
                yield plain[1]

    def _items(self, closing: str) -> Iterator[None]:
        """Move to each item of the object or list that begins here, and then past its end."""
        self._position += 1
        if self._next_letter() != closing:
            yield
            while (letter := self._next_letter()) != closing:
                if letter != ",":
                    raise self._invalid(f"a comma or {closing} is missing")
                self._position += 1
                yield
        self._position += 1

    def _next_letter(self) -> str:
        """Move to the next character that is not whitespace."""
        if not self._at_more():
            raise self._invalid("the end is missing")
        return self._text[self._position]

    def _at_more(self) -> bool:
        """Move to the next character that is not whitespace; whether there is one."""
        while True:
            space = _SPACE.match(self._text, self._position)
            self._position = space.end() if space else self._position
            if self._position < len(self._text):
                return True
            if self._ended:
                return False
            self._read_on()

    def _value(self) -> Any:
        """Move past the value here, and return it."""
        self._next_letter()
        while True:
            try:
                value, end = _decode(self._text, self._position)
                # A number may go on in the next block.
                if end < len(self._text) or self._ended or isinstance(value, (str, dict, list)):
                    self._position = end
                    return value
            except json.JSONDecodeError as error:
                # A string that is not closed is reported where it begins, so it may be a correct one that goes on.
                is_final = not error.msg.startswith("Unterminated") and error.pos + _LONGEST_TOKEN < len(self._text)
                if is_final or self._ended:
                    raise self._unreadable(error) from error
            except RecursionError as error:
                raise self._invalid("it is nested too deep") from error
            self._read_on()

    def _read_on(self) -> None:
        """Drop what was taken and read on: twice as much each time, where nothing can be dropped."""
        self._line += self._text.count("\n", 0, self._position)
        block = self._stream.read(max(_BLOCK, len(self._text) - self._position))
        self._ended = not block
        self._text = self._text[self._position :] + block
        self._position = 0

    def _unreadable(self, error: json.JSONDecodeError) -> UserError:
        self._position = error.pos
        if error.pos >= len(self._text):
            return self._invalid("the end is missing")
        known = error.msg == "Expecting value"
        return self._invalid("a value is missing" if known else error.msg[:1].lower() + error.msg[1:])

    def _invalid(self, reason: str) -> UserError:
        line = self._line + self._text.rstrip().count("\n", 0, self._position)
        return UserError(f"{self._file} is not valid JSON (line {line}: {reason}); mend it or move it elsewhere.")
