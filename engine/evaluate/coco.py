"""COCO's captions as retrieval is published on them: the 5,000 test pictures of Karpathy's split.

Karpathy and Fei-Fei 2015, "Deep visual-semantic alignments for generating image descriptions" (arXiv:1412.2306).
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..data.dataset import ClipDataset
from ..data.images.folder_tree import is_image
from ..data.images.paths import files_in
from ..data.readers.parsed import Captions, caption_lines
from ..errors import UserError, one_line, shown

TEST = "test"
# Karpathy's own file of all parts, and the test part as BLIP has it: in the folder or in one of these in it.
SPLIT_FILES = ("dataset_coco.json", "coco_karpathy_test.json")
_SPLIT_FOLDERS = ("", "annotations", "karpathy")
# The test pictures are among COCO's validation pictures of 2014, which were dealt out anew in 2017.
_PICTURE_FOLDERS = ("", "val2014", "train2017", "val2017")
_NUMBER = re.compile(r"(\d{12})\.\w+$")


def karpathy_test(folder: str | os.PathLike) -> ClipDataset | None:
    """The test part of the split whose file lies in COCO's folder; None if there is none.

    Pictures are known by their numbers, so those of 2014 and of 2017 serve alike. Raises `UserError` for a file that is
    damaged or tells of no test picture.
    """
    top = Path(os.path.abspath(folder))
    places = (top / part / name for name in SPLIT_FILES for part in _SPLIT_FOLDERS)
    file = next(filter(Path.is_file, places), None)
    if file is None:
        return None
    pictures = dict(_test_pictures(file))
    if not pictures:
        raise UserError(f"{file} tells of no test picture with captions; is it Karpathy's split of COCO?")
    there = _by_number(top)
    return ClipDataset(
        name=top.name,
        folder=top,
        format="karpathy",
        reason=f"{file.name} says which pictures are for tests",
        names=[there.get(_number(name), name) for name in pictures],
        captions=Captions(list(pictures.values())),
        labels=[None] * len(pictures),
    )


def _test_pictures(file: Path) -> Iterator[tuple[str, str]]:
    """(name, a line for each caption) of {"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]} or of
    [{"image", "caption": […]}]."""
    try:
        with open(file, encoding="utf-8") as stream:
            found = json.load(stream)
        for record in found["images"] if isinstance(found, Mapping) else found:
            if not isinstance(found, Mapping):
                name, said = record["image"], record["caption"]
                if not isinstance(name, str):
                    raise TypeError(f"{shown(name)} is no picture's name")
                yield name, caption_lines([said] if isinstance(said, str) else said)
            elif record["split"] == TEST:
                name = "/".join(filter(None, (record.get("filepath"), record["filename"])))
                yield name, caption_lines([sentence["raw"] for sentence in record["sentences"]])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not Karpathy's split of COCO ({one_line(error)}); download it anew.") from error


def _by_number(top: Path) -> dict[str, str]:
    """Names, from COCO's folder, of its pictures by their numbers."""
    found: dict[str, str] = {}
    for images, part in itertools.product(("", "images"), _PICTURE_FOLDERS):
        folder = os.path.join(images, part)
        for name in sorted(filter(is_image, files_in(str(top / folder)))):
            if number := _number(name):
                found.setdefault(number, os.path.join(folder, name).replace(os.sep, "/"))
    return found


def _number(name: str) -> str:
    match = _NUMBER.search(name)
    return match[1] if match else ""
