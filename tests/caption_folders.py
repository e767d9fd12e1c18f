"""Small folders of captioned images in every caption format."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


def write_folder(folder: Path, files: dict[str, object], images: str = "a.png b.png") -> Path:
    """A folder with these plain images, and these files: a text as it is, bytes too, all else as JSON."""
    for name in images.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name) * 9 % 256, 80, 90)).save(folder / name)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def captions_by_name(data) -> dict[str, tuple[str, ...]]:
    return dict(zip(data.names, data.captions, strict=True))


def coco(*names):
    return {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"image_id": number, "caption": f"of {name}"} for number, name in enumerate(names)],
    }


TWO = {"a.png": ("long one", "short"), "b.png": ("of b",)}


FORMATS = {
    "SPRIGHT's pairs": ("json", {"labels.json": {"a.png": ["long one", "short"], "b.png": ["of b"]}}),
    "lists in lists": ("json", {"labels.json": {"a.png": [["long one"], ["short"]], "b.png": [["of b"]]}}),
    "objects": ("kohya", {"l.json": {"a.png": {"long": "long one", "short": "short"}, "b.png": {"long": "of b"}}}),
    "kohya": (
        "kohya",
        {
            "meta_cap.json": {
                "a.png": {"caption": "long one", "tags": "short", "train_resolution": [8, 8]},
                "b.png": {"caption": "of b"},
            }
        },
    ),
    "kohya without extensions": (
        "kohya",
        {"meta_cap.json": {"a": {"caption": "long one\nshort"}, "b": {"caption": "of b"}}},
    ),
    "kohya with whole paths": (
        "kohya",
        {
            "meta_cap.json": {
                "/home/me/x/a.png": {"caption": "long one", "tags": "short"},
                "D:\\x\\b.png": {"caption": "of b"},
            }
        },
    ),
    "metadata.jsonl": (
        "metadata",
        {
            "metadata.jsonl": '{"file_name": "a.png", "text": "long one"}\n\n'
            '{"file_name": "a.png", "text": "short"}\n{"file_name": "b.png", "text": "of b"}'
        },
    ),
    "metadata.jsonl, more columns": (
        "metadata",
        {
            "metadata.jsonl": '{"file_name": "a.png", "caption": "long one", "short_caption": "short", "width": 8}\n'
            '{"file_name": "b.png", "caption": "of b", "short_caption": null, "width": 8}\n'
        },
    ),
    "metadata.jsonl with lists": (
        "metadata",
        {
            "metadata.jsonl": '{"file_name": "a.png", "captions": ["long one", "short"]}\n'
            '{"file_name": "b.png", "captions": ["of b"]}\n'
        },
    ),
    "metadata.csv": ("metadata", {"metadata.csv": "file_name,text,text_2\na.png,long one,short\nb.png,of b,\n"}),
    "records in a list": (
        "metadata",
        {"train.json": [{"image": "a.png", "caption": ["long one", "short"]}, {"image": "b.png", "caption": "of b"}]},
    ),
    "COCO": (
        "coco",
        {
            "captions.json": {
                "info": {"description": "x"},
                "licenses": [{"url": "u", "id": 1, "name": "n"}],
                "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
                "annotations": [
                    {"id": 1, "image_id": 7, "caption": "long one"},
                    {"id": 2, "image_id": 8, "caption": "of b"},
                    {"id": 3, "image_id": 7, "caption": "short"},
                ],
            }
        },
    ),
    "COCO, annotations first": (
        "coco",
        {
            "captions.json": {
                "annotations": [
                    {"id": 1, "image_id": "x", "caption": "long one"},
                    {"image_id": "y", "caption": "of b"},
                    {"id": 3, "image_id": "x", "caption": "short"},
                ],
                "images": [{"id": "x", "file_name": "a.png"}, {"id": "y", "file_name": "b.png"}],
            }
        },
    ),
    "a table with bars": (
        "csv",
        {"results.csv": "image_name| comment_number| comment\na.png| 0| long one\na.png| 1| short\nb.png| 0| of b\n"},
    ),
    "captions.txt": ("csv", {"captions.txt": "image,caption\na.png,long one\na.png,short\nb.png,of b\n"}),
    "img2dataset's JSON": (
        "sidecar",
        {
            "a.json": {"caption": "long one", "url": "u", "short_caption": "short"},
            "b.json": {"caption": "of b", "width": 3},
        },
    ),
    "SPRIGHT's JSON": (
        "sidecar",
        {"a.json": {"spatial_caption": "long one", "original_caption": "short"}, "b.json": {"spatial_caption": "of b"}},
    ),
    "sidecars": ("sidecar", {"a.txt": "long one\n\nshort\n", "b.caption": b"\xef\xbb\xbfof b\r\n"}),
    "several files": ("json", {"1.json": {"a.png": "long one"}, "2.json": {"a.png": ["short"], "b.png": "of b"}}),
    "CLIP Interrogator": ("interrogator", {"desc.csv": 'image,prompt\na.png,"long one, short"\nb.png,of b\n'}),
}
