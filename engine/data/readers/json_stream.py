"""JSON read member by member: the text is never held as a whole, so a million captions open in little more memory than
they take.

The library ijson is faster, but not used: its errors have no line numbers; it refuses NaN and long numbers and replaces
half surrogates, which Python reads; and a file of 100,000 brackets exhausts the memory (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from ...errors import UserError
from ..text_files import open_text

T = TypeVar("T")

_BLOCK = 2**20  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
# Nearly every name of nearly every file: half the time of the general way.
_PLAIN_NAME = re.compile(r'[ \t\n\r]*,[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:')
# A mistake this far from the end of what was read so far is one whatever follows: no escape or number is as long.
_LONGEST_TOKEN = 4096


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
        self._lines = 1  # the number of the line that the window starts in
        self._empty = True  # nothing was parsed so far

    def members(self, lists: frozenset[str]) -> Iterator[tuple[str | None, Any]]:
        opening = self._take(_next_letter)
        if opening == "{":
            yield from self._object(lists)
        elif opening == "[":
            yield from ((None, value) for value in self._elements())
        else:
            yield None, self._single_value()
            return
        if self._text[self._position :].strip():
            raise self._invalid("there is more after the end", self._position)

    def _object(self, lists: frozenset[str]) -> Iterator[tuple[str, Any]]:
        self._position += 1
        parse = _first_name
        while (name := self._take(parse)) is not None:
            if name in lists and self._take(_next_letter) == "[":
                yield from ((name, value) for value in self._elements())
            else:
                yield name, self._take(_value)
            parse = _later_name

    def _elements(self) -> Iterator[Any]:
        self._position += 1
        parse = _first_element
        while (element := self._take(parse)) is not _END:
            yield element
            parse = _later_element

    def _single_value(self) -> Any:
        while not self._ended:
            self._read_on()
        try:
            return json.loads(self._text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise self._user_error(error) from error

    def _take(self, parse: Callable[[str, int], tuple[T, int]]) -> T:
        """Return what `parse` makes of the text here; read on for as long as it needs more."""
        while True:
            try:
                value, self._position = parse(self._text, self._position)
            except (json.JSONDecodeError, IndexError, RecursionError) as error:
                if self._ended or _is_final(error, len(self._text)):
                    raise self._user_error(error) from error
                self._read_on()
            else:
                self._empty = False
                return value

    def _read_on(self) -> None:
        """Drop what was taken and read on: twice as much each time, where nothing can be dropped."""
        self._lines += self._text.count("\n", 0, self._position)
        block = self._stream.read(max(_BLOCK, len(self._text) - self._position))
        self._ended = not block
        self._text = self._text[self._position :] + block
        self._position = 0

    def _user_error(self, error: Exception) -> UserError:
        if isinstance(error, json.JSONDecodeError) and error.pos < len(self._text):
            reason = "a value is missing" if error.msg == "Expecting value" else error.msg[:1].lower() + error.msg[1:]
            return self._invalid(reason, error.pos)
        if isinstance(error, RecursionError):
            return self._invalid("it is nested too deep", self._position)
        if self._empty and not self._text.strip():
            return self._invalid("it is empty", 0)
        return self._invalid("the end is missing", len(self._text.rstrip()))

    def _invalid(self, reason: str, position: int) -> UserError:
        line = self._lines + self._text.count("\n", 0, position)
        return UserError(f"{self._file} is not valid JSON (line {line}: {reason}); mend it or move it elsewhere.")


# ---- parsers: (text, position) to (value, position after it). An IndexError says that the text ends too early --------

_END = object()
_decode = json.JSONDecoder().raw_decode


def _is_final(error: Exception, length: int) -> bool:
    """Whether the error stays whatever follows. A string that is not closed is reported where it begins, so it may."""
    if not isinstance(error, json.JSONDecodeError):
        return isinstance(error, RecursionError)
    return not error.msg.startswith("Unterminated string") and error.pos + _LONGEST_TOKEN < length


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None, "no space is a match too"
    return match.end()


def _next_letter(text: str, position: int) -> tuple[str, int]:
    position = _skip_space(text, position)
    return text[position], position


def _value(text: str, position: int) -> tuple[Any, int]:
    value, position = _decode(text, _skip_space(text, position))
    if not isinstance(value, (str, dict, list)):
        text[position]  # a number may go on in the next block; an IndexError asks for it
    return value, position


def _first_name(text: str, position: int) -> tuple[str | None, int]:
    letter, position = _next_letter(text, position)
    if letter == "}":
        return None, position + 1
    if letter != '"':
        raise json.JSONDecodeError("a name in double quotes is missing", text, position)
    name, position = _decode(text, position)
    letter, position = _next_letter(text, position)
    if letter != ":":
        raise json.JSONDecodeError("a colon is missing", text, position)
    return name, position + 1


def _later_name(text: str, position: int) -> tuple[str | None, int]:
    if (plain := _PLAIN_NAME.match(text, position)) is not None:
        return plain[1], plain.end()
    letter, position = _next_letter(text, position)
    if letter == "}":
        return None, position + 1
    if letter != ",":
        raise json.JSONDecodeError("a comma or } is missing", text, position)
    name, position = _first_name(text, position + 1)
    if name is None:
        raise json.JSONDecodeError("there is a comma before }", text, position - 1)
    return name, position


def _first_element(text: str, position: int) -> tuple[Any, int]:
    letter, position = _next_letter(text, position)
    return (_END, position + 1) if letter == "]" else _value(text, position)


def _later_element(text: str, position: int) -> tuple[Any, int]:
    letter, position = _next_letter(text, position)
    if letter == "]":
        return _END, position + 1
    if letter != ",":
        raise json.JSONDecodeError("a comma or ] is missing", text, position)
    return _value(text, position + 1)
