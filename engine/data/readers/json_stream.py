"""JSON read member by member: a file's text is never held as a whole, so that a million captions open in little more
memory than they take."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, TypeVar

from ...errors import UserError

T = TypeVar("T")

_BLOCK = 2**20  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
# Nearly every name of nearly every file: half the time of the general way.
_PLAIN_NAME = re.compile(r'[ \t\n\r]*,[ \t\n\r]*"([^"\\\x00-\x1f]*)"[ \t\n\r]*:')
# A mistake this far from the end of what was read so far is one whatever follows: no escape or number is as long.
_AHEAD = 4096

_decoder = json.JSONDecoder()


class JsonStream:
    """A piece of the file's text that grows and moves on. Close it, or use it in a `with`."""

    def __init__(self, file: Path, shown: str | None = None):
        """Errors name the file as `shown`. Raises `UserError` if it cannot be opened."""
        self.shown, self._text, self._position, self._ended, self._lines = shown or str(file), "", 0, False, 1
        self._begun = False
        try:
            self._stream: TextIO = open(file, encoding="utf-8-sig")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise UserError(f"{self.shown} cannot be read ({error.strerror}).") from error

    def __enter__(self) -> JsonStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._stream.close()

    def members(self, lists: frozenset[str] = frozenset()) -> Iterator[tuple[str | None, Any]]:
        """The names and values of the outermost object, or the elements of the outermost list under the name None.

        A member that is a list and named in `lists` is given element by element, each under its name. A file that is a
        single value gives it under the name None. Raises `UserError` for what is not JSON, with the line.
        """
        opening = self._take(_next_letter)
        if opening == "{":
            yield from self._object(lists)
        elif opening == "[":
            yield from ((None, value) for value in self._elements())
        else:
            yield None, self._single_value()
            return
        if self._text[self._position :].strip():
            raise self._unreadable("there is more after the end", self._position)

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
            self._move()
        try:
            return _decoder.decode(self._text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise self._reason(error) from error

    def _take(self, parse: Callable[[str, int], tuple[T, int]]) -> T:
        """What `parse` makes of the text here, of which as much is read as it needs."""
        while True:
            try:
                value, self._position = parse(self._text, self._position)
            except (json.JSONDecodeError, StopIteration, IndexError, RecursionError) as error:
                if self._ended or _is_final(error, len(self._text)):
                    raise self._reason(error) from error
                self._move()
            else:
                self._begun = True
                return value

    def _move(self) -> None:
        """Forget what has been taken and read on, twice as much each time nothing can be forgotten."""
        self._lines += self._text.count("\n", 0, self._position)
        try:
            fresh = self._stream.read(max(_BLOCK, len(self._text) - self._position))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.shown} is not UTF-8 text; save it again as UTF-8.") from error
        except OSError as error:
            raise UserError(f"{self.shown} cannot be read ({error.strerror}).") from error
        self._ended = not fresh
        self._text = self._text[self._position :] + fresh
        self._position = 0

    def _reason(self, error: Exception) -> UserError:
        if isinstance(error, json.JSONDecodeError):
            return self._unreadable(error.msg[:1].lower() + error.msg[1:], error.pos)
        if isinstance(error, StopIteration) and error.value < len(self._text):
            return self._unreadable("a value is missing", error.value)
        if isinstance(error, RecursionError):
            return self._unreadable("it is nested too deep", self._position)
        if not self._begun and not self._text.strip():
            return self._unreadable("it is empty", 0)
        return self._unreadable("the end is missing", len(self._text.rstrip()))

    def _unreadable(self, reason: str, position: int) -> UserError:
        line = self._lines + self._text.count("\n", 0, position)
        return UserError(f"{self.shown} is not valid JSON (line {line}: {reason}); mend it or move it elsewhere.")


# ---- parsers: (text, position) to (value, position after it); an IndexError says that the text ends before ----------

_END = object()


def _is_final(error: Exception, length: int) -> bool:
    """Whether more text would not mend it. A text that is not closed is reported where it begins."""
    if isinstance(error, RecursionError):
        return True
    cut = not isinstance(error, json.JSONDecodeError) or error.msg.startswith("Unterminated string")
    return not cut and error.pos + _AHEAD < length


def _next_letter(text: str, position: int) -> tuple[str, int]:
    position = _SPACE.match(text, position).end()
    return text[position], position


def _value(text: str, position: int) -> tuple[Any, int]:
    value, position = _decoder.scan_once(text, _SPACE.match(text, position).end())
    if not isinstance(value, (str, dict, list)):
        text[position]  # a number may go on in the next block; an IndexError asks for it
    return value, position


def _first_name(text: str, position: int) -> tuple[str | None, int]:
    letter, position = _next_letter(text, position)
    if letter == "}":
        return None, position + 1
    if letter != '"':
        raise json.JSONDecodeError("a name in double quotes is missing", text, position)
    name, position = json.decoder.scanstring(text, position + 1, True)
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
