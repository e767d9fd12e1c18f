"""Every caption format, as people have it: recognised by itself, and all its captions read."""

import json
import os
import sys

import pytest
from caption_folders import FORMATS, TWO, captions_by_name, write_folder
from image_folders import plain_image

from clip_finetune.engine import UserError, load_dataset
from clip_finetune.engine.data.readers import sidecars
from clip_finetune.engine.data.readers.columns import is_caption_field
from clip_finetune.engine.data.readers.tables import prompt_captions
from clip_finetune.engine.data.tokenizer import Tokenizer


def test_each_line_of_a_text_file_beside_an_image_is_a_caption(tmp_path):
    for name in ("a.png", "b.JPG", "sub/c.webp", "d.png"):
        plain_image(tmp_path / name)
    (tmp_path / "a.txt").write_text("first\n\n  second  \n", encoding="utf-8")
    (tmp_path / "b.caption").write_text("\ufeffof b", encoding="utf-8")
    (tmp_path / "sub/c.txt").write_text("of c")
    data = load_dataset(tmp_path)
    assert data.format == "sidecar" and dict(zip(data.names, data.captions, strict=True)) == {
        "a.png": ("first", "second"),
        "b.JPG": ("of b",),
        "sub/c.webp": ("of c",),
    }
    assert data.missing() == [] and "1 images have no caption" in data.notes[0]


@pytest.mark.parametrize("place", ["", "images/", "sub/"])
def test_a_labels_json_gives_all_captions(tmp_path, place):
    for name in ("a.png", "b.png"):
        plain_image(tmp_path / place / name)
    file = tmp_path / ("sub/labels.json" if place == "sub/" else "labels.json")
    file.write_text(json.dumps({"a.png": ["one", "two", "one"], "b.png": "three"}))
    data = load_dataset(tmp_path)
    assert data.format == "json" and list(data.captions) == [("one", "two"), ("three",)] and data.missing() == []
    if place != "sub/":
        assert load_dataset(file).missing() == []


@pytest.mark.parametrize(
    "text",
    [
        'image,caption\na.png,"one, two"\na.png,three\nb.png,four\n',
        "caption;filename\none, two;a.png\nthree;a.png\nfour;b.png\n",
        "image\tcaption\r\na.png\tone, two\r\na.png\tthree\r\nb.png\tfour\r\n",
    ],
)
def test_a_csv_may_have_several_rows_per_image(tmp_path, text):
    for name in ("a.png", "b.png"):
        plain_image(tmp_path / name)
    (tmp_path / "captions.csv").write_bytes(text.encode("utf-8-sig"))
    data = load_dataset(tmp_path)
    assert list(data.captions) == [("one, two", "three"), ("four",)] and data.missing() == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_and_all_its_captions_are_read(tmp_path, name):
    kind, files = FORMATS[name]
    data = load_dataset(write_folder(tmp_path / "mine", files))
    assert data.format == kind and data.reason and data.missing() == []
    assert {data.path(index).name: captions for index, captions in enumerate(data.captions)} == TWO


@pytest.mark.parametrize("name", [name for name, (kind, files) in FORMATS.items() if kind != "sidecar"])
def test_a_caption_file_alone_gives_the_same(tmp_path, name):
    kind, files = FORMATS[name]
    folder = write_folder(tmp_path / "mine", files)
    if len(files) == 1:
        data = load_dataset(folder / next(iter(files)))
        assert data.format == kind and data.missing() == []
        assert {data.path(index).name: captions for index, captions in enumerate(data.captions)} == TWO
        assert "was chosen" in data.reason


def test_parquet_is_read_if_pyarrow_is_there(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {"file_name": ["a.png", "a.png", "b.png"], "text": ["long one", "short", "of b"], "n": [1, 2, 3]}
    )
    folder = write_folder(tmp_path / "mine", {})
    parquet.write_table(table, folder / "train.parquet")
    data = load_dataset(folder)
    assert data.format == "parquet" and captions_by_name(data) == TWO and data.missing() == []
    numbers = pyarrow.table({"image": [1], "text": ["x"]})
    parquet.write_table(numbers, folder / "train.parquet")
    with pytest.raises(UserError, match="holds neither images nor their names in its column image"):
        load_dataset(folder)
    (folder / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        load_dataset(folder)


def test_a_folder_with_text_files_beside_images_is_noticed(tmp_path, monkeypatch):
    def seen(files, images):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return sidecars.holds_captioned_images(write_folder(folder, files, images))

    assert seen({"a.txt": "x"}, "b.png a.PNG") and seen({"a.b.Caption": "x"}, "a.b.webp")
    assert not seen({"notes.txt": "x", "config.json": "{}"}, "chart.png") and not seen({"a.txt": "x"}, "")
    assert not seen({}, "a.png") and not seen({"deep/a.txt": "x"}, "deep/a.png")
    assert not sidecars.holds_captioned_images(tmp_path / "none")
    monkeypatch.setattr(sidecars, "_MOST_LISTED", 1)
    assert not seen({"a.txt": "x"}, "a.png")
    monkeypatch.undo()
    later = write_folder(tmp_path / "later", {}, "a.png")
    os.utime(later, ns=(10**18, 10**18))
    assert not sidecars.holds_captioned_images(later)
    (later / "a.txt").write_text("x")
    assert sidecars.holds_captioned_images(later)


def test_without_pyarrow_parquet_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_dataset(write_folder(tmp_path, {"train.parquet": b"PAR1"}))


def test_kohyas_folder_names_are_repeats_per_epoch(tmp_path):
    data = load_dataset(
        write_folder(tmp_path / "two", {"10_dog/a.txt": "a dog", "1_cat/b.txt": "a cat"}, "10_dog/a.png 1_cat/b.png")
    )
    assert dict(zip(data.names, data.repeats, strict=True)) == {"10_dog/a.png": 10, "1_cat/b.png": 1}
    assert any("come per epoch" in note for note in data.notes)
    assert data.subset([1]).repeats == [data.repeats[1]]


@pytest.mark.parametrize("names", ["001_dog 002_cat", "2023_trip 2024_trip", "10_dog cats", "0_dog 10_cat"])
def test_other_numbers_in_folder_names_are_only_names(tmp_path, names):
    one, two = names.split()
    files = {f"{one}/a.txt": "a dog", f"{two}/b.txt": "a cat"}
    assert list(load_dataset(write_folder(tmp_path, files, f"{one}/a.png {two}/b.png")).repeats) == []


def test_a_prompt_is_cut_to_the_context_length_but_never_to_nothing():
    assert prompt_captions("a cat,  by someone , , art") == ["a cat", "by someone", "art"]
    tokenizer = Tokenizer(77)
    many = prompt_captions(", ".join(f"style number {n} of many" for n in range(100)))
    assert 5 < len(many) < 40 and not tokenizer.truncated(", ".join(many))
    long = prompt_captions("word " * 500 + ", more")
    assert len(long) == 1 and len(long[0].split()) == 75 and not tokenizer.truncated(long[0])
    assert prompt_captions("x" * 1_000_000)[0]
    assert prompt_captions(" , ") == []


def test_columns_can_be_chosen(tmp_path):
    text = "image,caption,Bild,Deutsch,Kurz\nx.png,english,a.png,lang,kurz\nx.png,english,b.png,auch,\n"
    folder = write_folder(tmp_path, {"t.csv": text, "labels.json": {"a.png": "not this"}})
    data = load_dataset(folder, image_column="bild", caption_column="Deutsch, Kurz")
    assert captions_by_name(data) == {"a.png": ("lang", "kurz"), "b.png": ("auch",)}
    assert data.reason == "t.csv (columns Deutsch, Kurz) holds captions"
    with pytest.raises(UserError, match="begins with the line 'image,caption,Bild"):
        load_dataset(folder, "csv", caption_column="Nirgends")
    folder = write_folder(
        tmp_path / "2", {"x.jsonl": '{"key": "a.png", "alt": "one"}\n{"key": "b.png", "alt": "two"}\n'}
    )
    data = load_dataset(folder, image_column="key", caption_column="alt")
    assert captions_by_name(data) == {"a.png": ("one",), "b.png": ("two",)}


@pytest.mark.parametrize("name", "caption captions Text text_2 original_caption short_caption long description".split())
def test_caption_columns_are_recognised_by_name(name):
    assert is_caption_field(name)


@pytest.mark.parametrize("name", "caption_id text_length context image title_url comment_number texture".split())
def test_other_columns_are_not_captions(name):
    assert not is_caption_field(name)


def test_caption_files_of_other_formats_are_named_in_a_note(tmp_path):
    folder = write_folder(
        tmp_path, {"l.json": {"a.png": "one"}, "c.csv": "image,caption\nb.png,two\n", "a.txt": "three"}
    )
    data = load_dataset(folder)
    assert data.format == "json" and list(data.notes) == [
        "c.csv is not read, because json goes first; for it, choose captions: csv."
    ]
    assert captions_by_name(load_dataset(folder, "csv")) == {"b.png": ("two",)}
    assert load_dataset(folder, "sidecar").names == ["a.png"]
    with pytest.raises(UserError, match="cannot be read as coco.*choose auto"):
        load_dataset(folder, "coco")
    with pytest.raises(UserError, match="which is csv and not json"):
        load_dataset(folder / "c.csv", "json")
