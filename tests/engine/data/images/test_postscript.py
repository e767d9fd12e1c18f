"""No file in a dataset starts another program: PostScript under an image's name is not an image."""

import io
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
from clips import random_clip
from image_folders import class_folder, labels_folder
from PIL import EpsImagePlugin, Image, UnidentifiedImageError

from clip_finetune.engine import cli, load_dataset, save_full_clip
from clip_finetune.engine.data.images.decoding import decode, decode_plain_jpeg
from clip_finetune.engine.data.images.image_files import BrokenImage, image_formats, open_image
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.data.tools.inspect import inspect_dataset, sample_images
from clip_finetune.engine.data.tools.prepare import Preparation, prepare_images

POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 32
%%EndComments
(a program) print
showpage
%%EOF
"""


def iptc(content: bytes) -> bytes:
    """An IPTC file around an image of 32 x 32, which Pillow opens as whatever format it is."""

    def field(record: int, number: int, value: bytes) -> bytes:
        return bytes([0x1C, record, number]) + struct.pack(">H", len(value)) + value

    size = struct.pack(">H", 32)
    header = field(3, 60, b"\x01\x00") + field(3, 20, size) + field(3, 30, size) + field(3, 120, b"\x05")
    return header + field(8, 10, content)


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Path:
    """The file that Ghostscript leaves if it is started."""
    folder, mark = tmp_path / "bin", tmp_path / "ghostscript-was-started"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\necho started >> {mark}\nexit 1\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it once
    return mark


@pytest.mark.skipif(os.name != "posix", reason="the program is a shell script")
@pytest.mark.parametrize("content", [POSTSCRIPT, iptc(POSTSCRIPT)], ids=["EPS", "EPS in IPTC"])
def test_pillow_starts_a_program_for_such_a_file(mark, content):
    """Otherwise the tests below prove nothing."""
    with pytest.raises(Exception), Image.open(io.BytesIO(content)) as opened:  # noqa: B017
        opened.load()
    assert mark.exists()


@pytest.mark.parametrize("content", [POSTSCRIPT, iptc(POSTSCRIPT)], ids=["EPS", "EPS in IPTC"])
def test_no_function_that_opens_images_starts_a_program(mark, tmp_path, content):
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    with pytest.raises(UnidentifiedImageError):
        open_image(file)
    for read in (decode, Transform(image_size=32).load):
        with pytest.raises(BrokenImage, match="not an image that Pillow can open"):
            read(file)
    with pytest.raises(BrokenImage):
        Transform(image_size=32, resize_backend="fast").load(file)
    assert decode_plain_jpeg(file) is None
    assert not mark.exists()


def test_formats_that_run_programs_or_are_no_images_are_not_opened():
    Image.init()
    refused = set(Image.ID) - set(image_formats())
    assert {"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"} <= refused | ({"MPEG"} - set(Image.ID))
    assert {"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "ICO", "JPEG2000"} <= set(image_formats())


def test_pillow_opens_files_in_one_place_only():
    root = Path(cli.__file__).resolve().parents[2]
    calls = [
        f"{file.relative_to(root).as_posix()}: {line.strip()}"
        for folder in ("engine", "nodes")
        for file in sorted((root / folder).rglob("*.py"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if re.search(r"Image\.open\(|read_image\(|decode_image\(|imread\(", line)
    ]
    assert calls == ["engine/data/images/image_files.py: return Image.open(_source(path), formats=image_formats())"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A model, captioned images, images in classes and images with words; one of each set is PostScript."""
    monkeypatch.chdir(tmp_path)
    save_full_clip(random_clip(), "model.safetensors")
    shutil.copy(labels_folder(tmp_path / "colours", 24) / "000.png", tmp_path / "colours/023.png")
    (tmp_path / "colours/005.png").write_bytes(POSTSCRIPT)
    class_folder(tmp_path / "classes", 6)
    (tmp_path / "classes/red/0.png").write_bytes(POSTSCRIPT)
    attacks = tmp_path / "attacks"
    attacks.mkdir()
    for index, (shows, written) in enumerate((("red", "green"), ("green", "blue"), ("blue", "red"))):
        Image.new("RGB", (32, 32), shows).save(attacks / f"label={shows}_text={written}.png")
        if index == 0:
            (attacks / f"label={shows}_text={written}.png").write_bytes(POSTSCRIPT)


COMMANDS = [
    "info colours",
    "info classes",
    "train --model model.safetensors --data colours --validation colours --batch-size 4 --epochs 1 --out run",
    "train --model model.safetensors --data colours --batch-size 4 --epochs 1 --resize-backend fast --out fast",
    "train --model model.safetensors --data colours --batch-size 4 --epochs 1 --resize-mode random_crop --out varied",
    "eval --model model.safetensors --data colours",
    "eval --model model.safetensors --data classes --typographic",
    "eval --model model.safetensors --data attacks --typographic",
    "eval --model model.safetensors --baseline model.safetensors --data colours --compare --html page.html",
    "prepare colours flipped --flip all",
    "prepare colours squares --crop centre --jitter-copies 1 --flip all",
    "convert colours converted --to coco",
    "convert colours sidecars --to sidecar",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_starts_a_program(mark, folders, command):
    assert cli.main(command.split()) == 0
    assert not mark.exists()


def test_inspecting_and_cutting_out_objects_start_no_program(mark, folders, tmp_path):
    data = load_dataset("colours")
    found = inspect_dataset(data)
    assert [item.file for item in found.broken] == ["005.png"]
    sample_images(data, 24)
    prepare_images(data, tmp_path / "objects", Preparation(crop="objects"), detector=lambda picture: [])
    assert not mark.exists()


def test_postscript_in_a_parquet_file_starts_no_program(mark, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.chdir(tmp_path)
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(stream, "PNG")
    contents = [stream.getvalue()] * 7 + [POSTSCRIPT]
    rows = {"image": pyarrow.array([{"bytes": content, "path": "a.jpg"} for content in contents])}
    parquet.write_table(pyarrow.table(rows | {"caption": [f"number {n}" for n in range(8)]}), "train.parquet")
    for command in ("info {}", "convert {} out --to json", "prepare {} flipped --flip all"):
        assert cli.main(command.format("train.parquet").split()) == 0
    assert not mark.exists()
