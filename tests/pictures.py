"""Small captioned picture folders for the tests."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "yellow": (240, 220, 40)}


def labels_folder(folder: Path, count: int = 12, *, size: int = 32, captions: int = 2) -> Path:
    """`count` plain pictures in distinct shades, with `captions` distinct captions each in labels.json."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = {}
    for index in range(count):
        name, colour = list(COLOURS.items())[index % len(COLOURS)]
        shade = tuple(max(0, value - 12 * (index // len(COLOURS))) for value in colour)
        Image.new("RGB", (size, size), shade).save(folder / f"{index:03}.png")
        labels[f"{index:03}.png"] = [f"{name} number {index} said in way {way}" for way in range(captions)]
    (folder / "labels.json").write_text(json.dumps(labels), encoding="utf-8")
    return folder


def class_folder(folder: Path, per_class: int = 3, *, size: int = 32) -> Path:
    """A folder for each colour with `per_class` pictures in shades of it."""
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            shade = tuple(max(0, value - 20 * index) for value in colour)
            Image.new("RGB", (size, size), shade).save(folder / name / f"{index}.png")
    return folder
