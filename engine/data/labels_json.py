"""The labels JSON, read member by member: a million pictures open in seconds, in little more memory than their captions
take, because the file's text is never held as a whole."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError

_BLOCK = 2**20  # characters
_SPACE = re.compile(r"[ \t\n\r]*")
# A file whose first names are not pictures' is some other JSON, and is not read to its end.
_ENOUGH = 20

_decoder = json.JSONDecoder()


def read_labels(file: Path, shown: str, suffixes: frozenset[str]) -> dict[str, str] | str:
    """Captions by picture name, a line for each, of a file `{"relative/path.jpg": ["caption", …]}`.

    The value may be one text; a name that comes twice has the captions of both. For another JSON: in a few words what
    it is. Errors name the file as `shown`; raises `UserError` for text that is not JSON, with the line, and for
    captions that are not texts.
    """
    labels: dict[str, str] = {}
    keys: list[str] = []
    bad, pictures = None, False
    window = _Window(file, shown)
    with window.stream:
        for name, value in _members(window):
            captions = [value] if isinstance(value, str) else value
            if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                bad = bad or name
            else:
                before = labels[name].split("\n") if name in labels else []
                labels[name] = in_lines([*before, *captions])
                pictures = pictures or os.path.splitext(name)[1].lower() in suffixes
            if not pictures:
                keys.append(name)
                if len(keys) == _ENOUGH:
                    break
    if not pictures:
        return _what(keys, window)
    if bad is not None:
        raise UserError(f'{shown}: the captions of {bad} are not a list of texts; write ["caption", …].')
    return labels


def in_lines(captions: list[str]) -> str:
    """One text with a line for each caption, without surrounding space, empty ones and repetitions."""
    if len(captions) == 1:
        return " ".join(captions[0].split())
    return "\n".join(dict.fromkeys(text for caption in captions if (text := " ".join(caption.split()))))


def _what(keys: list[str], window: _Window) -> str:
    if window.other:
        return window.other
    if {"images", "annotations"} <= set(keys):
        return "is a COCO annotation file"
    shown = ", ".join(key[:40] for key in keys[:4])
    return f"is a JSON object with {'the keys ' + shown if keys else 'nothing'} in it"


class _Window:
    """A piece of the file's text that grows and moves on."""

    def __init__(self, file: Path, shown: str):
        self.shown, self.text, self.ended, self.other = shown, "", False, ""
        self._lines = 1
        try:
            self.stream: TextIO = open(file, encoding="utf-8-sig")  # noqa: SIM115 (closed by the reader)
        except OSError as error:
            raise UserError(f"{shown} cannot be read ({error.strerror}).") from error

    def move(self, start: int) -> None:
        """Forget what is before `start` and read on, twice as much each time nothing can be forgotten."""
        self._lines += self.text.count("\n", 0, start)
        try:
            fresh = self.stream.read(max(_BLOCK, len(self.text) - start))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.shown} is not UTF-8 text; save it again as UTF-8.") from error
        except OSError as error:
            raise UserError(f"{self.shown} cannot be read ({error.strerror}).") from error
        self.ended = not fresh
        self.text = self.text[start:] + fresh

    def unreadable(self, reason: str, position: int) -> UserError:
        line = self._lines + self.text.count("\n", 0, position)
        return UserError(f"{self.shown} is not valid JSON (line {line}: {reason}); mend it or move it elsewhere.")


def _members(window: _Window) -> Iterator[tuple[str, Any]]:
    """The names and values of the outermost object; notes in `window.other` what the file is if it is none."""
    window.move(0)
    position = _SPACE.match(window.text).end()
    if window.text[position : position + 1] != "{":
        window.other = _not_an_object(window, position)
        return
    position += 1
    first = True
    while True:
        try:
            member, after = _member(window.text, position, first)
        except (json.JSONDecodeError, StopIteration, IndexError, RecursionError) as error:
            if window.ended:
                raise _reason(window, error) from error
            window.move(position)
            position = 0
            continue
        if member is None:
            break
        yield member
        position, first = after, False
    if window.text[after:].strip():
        raise window.unreadable("there is more after the end", after)


def _member(text: str, position: int, first: bool) -> tuple[tuple[str, Any] | None, int]:
    """The next name and value and the place after them; an IndexError says that the text ends before they do."""
    position = _SPACE.match(text, position).end()
    if text[position] == "}":
        return None, position + 1
    if not first:
        if text[position] != ",":
            raise json.JSONDecodeError("a comma or } is missing", text, position)
        position = _SPACE.match(text, position + 1).end()
    if text[position] != '"':
        raise json.JSONDecodeError("a name in double quotes is missing", text, position)
    name, position = json.decoder.scanstring(text, position + 1, True)
    position = _SPACE.match(text, position).end()
    if text[position] != ":":
        raise json.JSONDecodeError("a colon is missing", text, position)
    value, position = _decoder.scan_once(text, _SPACE.match(text, position + 1).end())
    text[_SPACE.match(text, position).end()]  # what ends here may go on in the next block, as a number does
    return (name, value), position


def _reason(window: _Window, error: Exception) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        return window.unreadable(error.msg[:1].lower() + error.msg[1:], error.pos)
    if isinstance(error, StopIteration) and error.value < len(window.text):
        return window.unreadable("a value is missing", error.value)
    if isinstance(error, RecursionError):
        return window.unreadable("it is nested too deep", 0)
    return window.unreadable("the end is missing", len(window.text.rstrip()))


def _not_an_object(window: _Window, position: int) -> str:
    """What a JSON is that does not begin with a brace; raises if it is no JSON."""
    while not window.ended:
        window.move(0)
    if not window.text.strip():
        raise window.unreadable("it is empty", 0)
    try:
        value = _decoder.decode(window.text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _reason(window, error) from error
    return f"is a JSON list of {len(value)}" if isinstance(value, list) else "is a JSON of a single value"
