"""What a caption reader gets and returns, and how captions are stored: one string per image, one line per caption."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import overload

from ..images.folder_tree import Tree
from .columns import Columns


class Captions(Sequence[tuple[str, ...]]):
    """The captions of each sample. Stored as one string per sample, which takes a third of the memory of tuples."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = lines

    @classmethod
    def concatenated(cls, datasets: Iterable[Sequence[tuple[str, ...]]]) -> Captions:
        lines: list[str] = []
        for captions in datasets:
            lines += captions.lines if isinstance(captions, Captions) else map("\n".join, captions)
        return cls(lines)

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Captions: ...
    def __getitem__(self, index: int | slice) -> tuple[str, ...] | Captions:
        if isinstance(index, slice):
            return Captions(self.lines[index])
        lines = self.lines[index]
        return tuple(lines.split("\n")) if lines else ()

    def select(self, indices: Sequence[int]) -> Captions:
        return Captions([self.lines[index] for index in indices])


def caption_lines(captions: Sequence[str]) -> str:
    """Return captions as one string, one per line: whitespace collapsed, empty ones and duplicates dropped."""
    if len(captions) == 1:
        return " ".join(captions[0].split())
    return "\n".join(dict.fromkeys(text for caption in captions if (text := " ".join(caption.split()))))


class CaptionCollector:
    """Collects captions by image name. Most names come once; those have no list, which halves the memory."""

    def __init__(self) -> None:
        self._once: dict[str, str] = {}
        self._repeated: dict[str, list[str]] = {}

    def add(self, name: str, captions: Sequence[str]) -> None:
        lines = caption_lines(captions)
        first = self._once.setdefault(name, lines)
        if first is not lines:
            self._repeated.setdefault(name, [first]).append(lines)

    def by_image(self) -> dict[str, str]:
        """Caption lines by image name, in the order in which the names first came."""
        for name, texts in self._repeated.items():
            self._once[name] = caption_lines([line for text in texts for line in text.split("\n")])
        self._repeated.clear()
        return self._once


@dataclasses.dataclass(frozen=True)
class Source:
    """What is read: a folder, or one caption file that the user chose (`single`, alone in its tree)."""

    tree: Tree
    columns: Columns = Columns()
    single: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileCaptions:
    """Contents of one caption file: caption lines, or class names, by image name as written.

    `image_folders` are where this format usually keeps the images, if not beside the file. `disputed` counts images
    whose rows disagree about the class.
    """

    by_image: dict[str, str]
    are_classes: bool = False
    image_folders: tuple[str, ...] = ()
    disputed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParsedCaptions:
    """What a reader returns, one entry per image: its name as written, the folder that this starts from (`origins`),
    its caption lines, its class ("" for none) and its repeats per epoch.

    `reason` says briefly why this format was chosen; `notes` are sentences for the user; `originals` maps the absolute
    path of each copy to that of its original.
    """

    format: str
    reason: str
    names: list[str]
    origins: list[str]
    captions: list[str]
    classes: list[str] | None = None
    repeats: list[int] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    originals: Mapping[str, str] = dataclasses.field(default_factory=dict)
