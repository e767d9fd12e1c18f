"""The names that new pictures get, of which no two are the same."""

from __future__ import annotations

import os
import threading

_LONGEST_NAME = 200  # bytes; file systems allow 255, and ours adds to a name


class NewNames:
    """File names that no two samples share, also where upper and lower case are the same."""

    def __init__(self):
        self.taken: set[str] = set()
        self.stems: set[str] = set()
        self.lock = threading.Lock()

    def stem(self, name: str, suffix: str) -> str:
        """The beginning of all names made of a picture: folders, and the file's name without extension."""
        stem, number = self._plain_stem(name), 1
        found = stem
        while (key := (found + suffix).casefold()) in self.stems:
            number += 1
            found = f"{stem}_{number}"
        self.stems.add(key)
        return found

    @staticmethod
    def _plain_stem(name: str) -> str:
        folder, _, file = name.rpartition("/")
        folder = "".join(_letter(letter) for letter in folder)
        stem = "".join(_letter(letter) for letter in os.path.splitext(file)[0])
        stem = stem.encode("utf-8", "replace")[:_LONGEST_NAME].decode("utf-8", "ignore").lstrip(".") or "picture"
        return f"{folder}/{stem}" if folder else stem

    def file(self, stem: str, suffix: str) -> str:
        with self.lock:
            number, name = 1, stem + suffix
            while name.casefold() in self.taken:
                number += 1
                name = f"{stem}_{number}{suffix}"
            self.taken.add(name.casefold())
            return name


def _letter(letter: str) -> str:
    """What stands for a letter in a name: tables and some file systems cannot hold all."""
    return letter if letter.isprintable() and letter not in '\\:*?"<>|' else "_"
