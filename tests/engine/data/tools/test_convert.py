"""Captions written in every format, and read back."""

import os
from pathlib import Path

import pytest
from caption_folders import FORMATS, TWO, captions_by_name, write_folder
from image_folders import class_folder
from PIL import Image

from clip_finetune.engine import UserError, load_dataset
from clip_finetune.engine.cli import main
from clip_finetune.engine.data.readers.registry import WRITERS
from clip_finetune.engine.data.tools.convert import convert_captions

ODD = {
    "a.png": ("one", 'two, "quoted"; with\ttabs'.replace("\t", " ")),
    "sub/b c.png": ("ünïcödé 😀",),
    "sub/" + "n" * 100 + ".png": ("x" * 200_000, "short"),
    "labels.png": ("a picture of labels",),
}


def state(folder: Path) -> dict[str, tuple]:
    """Every file below a folder, with all that a program can change of it but how many links it has."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns, file.stat().st_mode)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def odd_folder(folder: Path) -> Path:
    write_folder(folder, {"captions.json": ODD}, "a.png labels.png")
    for name in ODD:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


@pytest.mark.parametrize("to", WRITERS)
def test_captions_go_through_every_format_and_back(tmp_path, to):
    source = odd_folder(tmp_path / "source")
    before = state(source)
    said = convert_captions(load_dataset(source), to, tmp_path / "new")
    assert "4 images" in said[0] and "4 images are hard links" in said[1]
    there = load_dataset(tmp_path / "new")
    assert there.format == to and captions_by_name(there) == ODD and there.missing() == []
    back = convert_captions(there, "json", tmp_path / "back")
    assert "hard links" in back[1] and captions_by_name(load_dataset(tmp_path / "back")) == ODD
    assert state(source) == before
    assert sorted(os.listdir(tmp_path)) == ["back", "new", "source"]


@pytest.mark.parametrize("source", FORMATS)
def test_every_format_can_be_written_as_sidecars(tmp_path, source):
    folder = write_folder(tmp_path / "mine", FORMATS[source][1])
    assert main(["convert", str(folder), "--to", "sidecar", str(tmp_path / "out")]) == 0
    assert captions_by_name(load_dataset(tmp_path / "out")) == TWO


@pytest.mark.parametrize(
    "to, name", [("json", "l.json"), ("kohya", "l.json"), ("metadata", "l.jsonl"), ("csv", "l.csv")]
)
def test_a_file_gets_the_captions_alone(tmp_path, to, name):
    source = odd_folder(tmp_path / "source")
    said = convert_captions(load_dataset(source), to, tmp_path / name)
    assert len(said) == 1 and os.listdir(tmp_path) and sorted(os.listdir(tmp_path)) == sorted([name, "source"])
    data = load_dataset(tmp_path / name)
    assert data.missing() == [] and {Path(name).name for name in data.names} == {Path(name).name for name in ODD}
    elsewhere = convert_captions(load_dataset(source), to, tmp_path / "else/where" / name)
    assert "Its image names are relative to" in elsewhere[1]
    assert captions_by_name(load_dataset(tmp_path / "else/where" / name)) == ODD


def test_images_are_copied_where_they_cannot_be_linked(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    said = convert_captions(load_dataset(odd_folder(tmp_path / "source")), "csv", tmp_path / "new")
    assert "4 images were copied." in said and load_dataset(tmp_path / "new").missing() == []


def test_copies_repeats_classes_and_same_stems_are_carried_over(tmp_path):
    lines = "picture\toriginal\n10_x/a.png\t10_x/b.png\n10_x/b.png\t../old/b.png\n"
    files = {"originals.tsv": lines, "10_x/a.txt": "one", "10_x/b.txt": "two"}
    source = load_dataset(write_folder(tmp_path / "source", files, "10_x/a.png 10_x/b.png"))
    convert_captions(source, "sidecar", tmp_path / "deep/er/new")
    data = load_dataset(tmp_path / "deep/er/new")
    assert list(data.repeats) == [10, 10] and data.original(0) == data.original(1) == str(tmp_path / "old/b.png")
    assert "repeats of images are lost" in " ".join(convert_captions(source, "json", tmp_path / "json"))

    said = convert_captions(load_dataset(class_folder(tmp_path / "classes")), "metadata", tmp_path / "sentences")
    assert "Classes are written as captions, such as 'a photo of a blue.'." in said

    same = load_dataset(write_folder(tmp_path / "same", {"l.json": {"a.png": "one", "a.jpg": "two"}}, "a.png a.jpg"))
    convert_captions(same, "sidecar", tmp_path / "apart")
    assert captions_by_name(load_dataset(tmp_path / "apart")) == {"a.png": ("one",), "a_2.jpg": ("two",)}


def test_what_cannot_be_converted_gives_one_sentence(tmp_path, capsys):
    source = odd_folder(tmp_path / "source")
    data, before = load_dataset(source), state(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    for to, out, words in [
        ("json", source / "new", "is inside"),
        ("json", tmp_path / "full", "is already there"),
        ("json", source, "is already there"),
        ("yaml", tmp_path / "new", "choose json, kohya"),
    ]:
        with pytest.raises(UserError, match=words) as refusal:
            convert_captions(data, to, out)
        assert "\n" not in str(refusal.value)
    gone = load_dataset(write_folder(tmp_path / "gone", {"l.json": {"x.png": "one"}}, ""))
    with pytest.raises(UserError, match="All images .* are missing"):
        convert_captions(gone, "json", tmp_path / "new")
    assert main(["convert", str(tmp_path / "nowhere"), "--to", "json", str(tmp_path / "new")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert {name for name in state(tmp_path) if not name.startswith(("full", "gone"))} == set(before)


def test_missing_images_are_left_out_and_counted(tmp_path):
    source = write_folder(tmp_path / "source", {"l.json": {"a.png": "one", "gone.png": "two"}})
    assert "1 images are missing and are left out." in convert_captions(load_dataset(source), "csv", tmp_path / "new")
    assert captions_by_name(load_dataset(tmp_path / "new")) == {"a.png": ("one",)}
