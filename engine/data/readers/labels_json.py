"""Labels JSON: captions by image name, `{"relative/path.jpg": ["a caption", …]}`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..images.folder_tree import is_image
from .columns import captions_in
from .json_stream import json_members, json_object
from .parsed import CaptionCollector, FileCaptions, Source


def is_labels_member(name: str, value: Any) -> bool:
    return isinstance(value, (str, list)) and is_image(name)


def read_labels_json(file: Path, source: Source) -> FileCaptions:
    """Read captions by image name.

    A value may be one text, a list of lists, or an object such as {"caption": …, "tags": …}. A name that comes twice
    has the captions of both. Raises `UserError` for captions that are none of these.
    """
    collector = CaptionCollector()
    for name, value in json_members(file):
        captions = captions_in(value)
        if name is None or captions is None:
            raise UserError(f'{file}: the captions of {name} are not a list of texts; write ["caption", …].')
        collector.add(name, captions)
    return FileCaptions(by_image=collector.by_image())


def write_labels_json(samples: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    return json_object((name, list(captions)) for name, captions in samples)
