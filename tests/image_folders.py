"""Small captioned picture folders for the tests."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy
from PIL import Image

from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.evaluate.typographic.photographed import CLEAN, HAND_WRITTEN, SYNTHETIC

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "yellow": (240, 220, 40)}


def load_image(path: Path, size: int):
    """The image as CLIP sees it, uint8 [3, size, size]."""
    return Transform(image_size=size).load(path)


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


def plain_image(file, size=(40, 30), colour=(200, 30, 30), mode="RGB"):
    """Write an image of one colour, and return its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = Image.new("RGB", size, colour)
    (plain.quantize(8) if mode == "P" else plain.convert(mode)).save(file)
    return file


def class_folder(folder: Path, per_class: int = 3, *, size: int = 32) -> Path:
    """A folder for each colour with `per_class` pictures in shades of it."""
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            shade = tuple(max(0, value - 20 * index) for value in colour)
            Image.new("RGB", (size, size), shade).save(folder / name / f"{index}.png")
    return folder


def labelled_and_captioned(folder: Path, per_class: int = 3) -> Path:
    """A `class_folder` whose images are also captioned by their colour in labels.json."""
    class_folder(folder, per_class=per_class)
    rows = [f"{name}/{n}.png,{name}" for name in COLOURS for n in range(per_class)]
    (folder / "labels.json").write_text(json.dumps({row.split(",")[0]: [row.split(",")[1]] for row in rows}))
    return folder


def noise(seed, size=(64, 48)):
    """A picture with something on it, another for each seed."""
    small = numpy.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=numpy.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def captioned(folder, pictures, suffix=".png"):
    """A labels JSON with a caption of its own for each picture (name without extension: PIL)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / f"{name}{suffix}")
    labels = {f"{name}{suffix}": [f"caption of {name}"] for name in pictures}
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


SCAM = {"NoSCAM": CLEAN, "SCAM": HAND_WRITTEN, "SynthSCAM": SYNTHETIC}


def scam_folder(folder, table="metadata.jsonl"):
    """Six objects as SCAM has them: clean, hand-written and synthetic."""
    folder.mkdir(parents=True)
    rows = []
    for kind in SCAM:
        for number in range(6):
            name = f"{kind}_{number}.png"
            Image.new("RGB", (32, 32), (40 * number, 40 * len(kind) % 256, 200 - 30 * number)).save(folder / name)
            rows.append(
                {
                    "file_name": name,
                    "id": f"{kind}_{number}",
                    "type": kind,
                    "object_label": f"object_{number % 3}",
                    "attack_word": f"word {number}",
                }
            )
    if table.endswith("jsonl"):
        (folder / table).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    else:
        with open(folder / table, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return folder
