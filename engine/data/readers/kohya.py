"""kohya's scripts: `{"image": {"caption": …, "tags": …}}`, with names that may lack the extension or be full paths."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..images.folder_tree import Tree, is_image
from .coco import COCO_LISTS
from .columns import captions_in
from .json_stream import json_object
from .labels_json import read_labels_json
from .parsed import FileCaptions, Source

_FIELDS = {"caption", "tags"}


def is_kohya_member(name: str, value: Any) -> bool:
    if not isinstance(value, Mapping) or name in COCO_LISTS:
        return False
    return bool(_FIELDS & set(value)) or (is_image(name) and captions_in(value) is not None)


def read_kohya(file: Path, source: Source) -> FileCaptions:
    """Read the captions, and find the images that are named without extension or by a path of another machine."""
    by_image = read_labels_json(file, source).by_image
    if not all(is_image(name) and not os.path.isabs(name) for name in by_image):
        tree = Tree.of(file.parent) if source.single else source.tree
        by_image = {_relative_name(name, tree, file): lines for name, lines in by_image.items()}
    return FileCaptions(by_image=by_image)


def _relative_name(name: str, tree: Tree, file: Path) -> str:
    """The image's path relative to the caption file; the name itself if no image has its stem."""
    path = name.replace("\\", "/")
    stem = os.path.splitext(path)[0] if is_image(path) else path
    candidates = tree.stems.get(stem.rpartition("/")[2], [])
    if not candidates:
        return name
    ending = f"/{stem.lstrip('/')}"
    matching = [image for image in candidates if f"/{os.path.splitext(image)[0]}".endswith(ending)]
    return os.path.relpath(tree.top / (matching or candidates)[0], file.parent).replace(os.sep, "/")


def write_kohya(samples: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """kohya's scripts draw one of the lines of a caption (enable_wildcard)."""
    return json_object((name, {"caption": "\n".join(captions)}) for name, captions in samples)
