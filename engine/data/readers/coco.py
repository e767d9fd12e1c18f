"""COCO's caption annotations: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ...errors import UserError, shown
from ..images.folder_tree import Tree
from .json_stream import json_members, json_object
from .parsed import CaptionCollector, FileCaptions, ParsedCaptions, Source

T = TypeVar("T")

COCO_LISTS = frozenset(("images", "annotations"))


def is_coco_member(name: str, value: Any) -> bool:
    """Whether this is an element of one of COCO's lists."""
    if name not in COCO_LISTS or not isinstance(value, Mapping):
        return False
    return "file_name" in value or {"image_id", "caption"} <= value.keys()


def read_coco(file: Path, source: Source) -> FileCaptions | str:
    """Read the captions; for other annotations, return what they are. Raises `UserError`."""
    names: dict[object, str] = {}
    captions: dict[object, list[str]] = {}
    for name, value in json_members(file, COCO_LISTS):
        if name == "images":
            names[_field(file, value, "id", int, str)] = _field(file, value, "file_name", str)
        elif name == "annotations":
            if "caption" not in value:
                return "holds COCO annotations of another kind than captions"
            image_id = _field(file, value, "image_id", int, str)
            captions.setdefault(image_id, []).append(_field(file, value, "caption", str))
    collector = CaptionCollector()
    for id, name in names.items():
        collector.add(name, captions.get(id, [""]))
    return FileCaptions(by_image=collector.by_image(), image_folders=_image_folders(file))


def _field(file: Path, value: Any, name: str, *kinds: type[T]) -> T:
    if isinstance(value, Mapping) and isinstance(value.get(name), kinds):
        return value[name]
    raise UserError(f"{file}: there is no {name} in {shown(value)}; mend it, or move the file elsewhere.")


def _image_folders(file: Path) -> tuple[str, ...]:
    """The images of annotations/captions_train2017.json are in train2017 or images/train2017."""
    subset, top = file.stem.removeprefix("captions_"), file.absolute().parent.parent
    return tuple(str(folder) for folder in (top / subset, top / "images" / subset) if folder.is_dir())


def coco_file_beside(folder: Path) -> Path:
    """Where COCO keeps the captions of the images in a folder; it need not exist."""
    return folder.absolute().parent / "annotations" / f"captions_{folder.absolute().name}.json"


def read_coco_beside(tree: Tree) -> ParsedCaptions | str:
    """Read the captions of a folder of images that was opened without the folder `annotations` beside it."""
    file = coco_file_beside(tree.top)
    if not file.is_file() or not tree.images:
        return ""
    captions = read_coco(file, Source(tree))
    if isinstance(captions, str):
        return f"../annotations/{file.name} {captions}"
    return ParsedCaptions(
        format="coco",
        reason=f"../annotations/{file.name} holds COCO captions",
        names=list(captions.by_image),
        captions=list(captions.by_image.values()),
        origins=[str(tree.top)] * len(captions.by_image),
    )


def write_coco(samples: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    pairs = [(number, caption) for number, (_, captions) in enumerate(samples) for caption in captions]
    images = [{"id": number, "file_name": name} for number, (name, _) in enumerate(samples)]
    annotations = [{"id": id, "image_id": number, "caption": caption} for id, (number, caption) in enumerate(pairs)]
    return json_object([("images", images), ("annotations", annotations)])
