"""Odd, damaged and unreadable caption files."""

import csv
import json
import random

import pytest
from caption_folders import captions_by_name, write_folder
from image_folders import plain_image

from clip_finetune.engine import UserError, load_dataset
from clip_finetune.engine.data.readers import json_stream
from clip_finetune.engine.data.readers.json_stream import json_members


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: None, "holds no images"),
        (lambda folder: plain_image(folder / "a.png"), "1 images but no captions"),
        (lambda folder: (folder / "labels.json").write_text('{"a.png": ["x"'), "not valid JSON"),
        (lambda folder: (folder / "labels.json").write_text('{"a.png": 3, "b.png": ["x"]}'), "captions of a.png"),
        (lambda folder: (folder / "labels.json").write_bytes(b'{"a.png": ["\xff\xfe"]}'), "not UTF-8"),
        (lambda folder: [plain_image(folder / "a.png"), (folder / "a.txt").write_text(" \n")], "no captions"),
    ],
)
def test_a_folder_that_cannot_be_read_gives_one_sentence(tmp_path, make, words):
    folder = tmp_path / "mine"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=words) as refusal:
        load_dataset(folder)
    assert "mine" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_dataset(tmp_path / "nowhere")


def test_json_read_in_blocks_of_any_size_equals_the_json_module(tmp_path, monkeypatch):
    rng = random.Random(0)
    letters = 'ab \\"\n\t,:{}[]ü😀\u2028é'
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(json_stream, "_BLOCK", size)
        for round_ in range(30):
            labels = {
                f"{n}{''.join(rng.choices(letters, k=3))}.png": [
                    "x" + "".join(rng.choices(letters, k=rng.randint(0, 12))) for _ in range(rng.randint(1, 3))
                ]
                for n in range(rng.randint(1, 6))
            }
            file = tmp_path / "labels.json"
            text = json.dumps(labels, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
            file.write_text(text, encoding="utf-8")
            found = dict(json_members(file))
            assert found == labels, round_
            file.write_text(text[: rng.randint(1, len(text) - 1)].rstrip("} \n"), encoding="utf-8")
            with pytest.raises(UserError, match="not valid JSON"):
                list(json_members(file))


def test_a_quotation_mark_that_is_never_closed_is_an_error(tmp_path):
    (tmp_path / "captions.csv").write_text('image,caption\n1.png,"one\n2.png,two\n')
    with pytest.raises(UserError, match="is a quotation mark missing"):
        load_dataset(tmp_path / "captions.csv")


def test_captions_of_a_million_characters_and_empty_ones_are_read(tmp_path):
    long = "letters " * 125_000
    wanted = {"a.png": (long.strip(),), "b.png": ("short",)}
    rows = [["a.png", long], ["b.png", "short"], ["b.png", ""], ["a.png", ""]]
    folder = write_folder(tmp_path / "csv", {})
    with open(folder / "c.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "caption"], *rows])
    assert captions_by_name(load_dataset(folder)) == wanted and csv.field_size_limit() == 131072
    assert (
        captions_by_name(
            load_dataset(write_folder(tmp_path / "json", {"l.json": {"a.png": long, "b.png": ["", "short"]}}))
        )
        == wanted
    )
    folder = write_folder(tmp_path / "txt", {"a.txt": long, "b.txt": "\n\nshort"})
    assert captions_by_name(load_dataset(folder)) == wanted
    lines = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)
    assert captions_by_name(load_dataset(write_folder(tmp_path / "jsonl", {"metadata.jsonl": lines}))) == wanted


def test_images_whose_captions_are_all_empty_are_left_out(tmp_path):
    data = load_dataset(write_folder(tmp_path, {"l.json": {"a.png": ["", " "], "b.png": "x"}}))
    assert data.names == ["b.png"] and "1 images have no caption" in data.notes[0]
    with pytest.raises(UserError, match="every caption there is empty"):
        load_dataset(write_folder(tmp_path / "2", {"c.csv": "image,caption\na.png,\nb.png,\n"}))


def test_a_byte_order_mark_crlf_quotes_and_duplicate_names_are_read(tmp_path):
    bom = b"\xef\xbb\xbf"
    text = bom + b'image,caption\r\na.png,"say ""one"", please"\r\nb.png,"over\r\ntwo lines"\r\na.png,two\r\n'
    wanted = {"a.png": ('say "one", please', "two"), "b.png": ("over two lines",)}
    assert captions_by_name(load_dataset(write_folder(tmp_path / "csv", {"c.csv": text}))) == wanted
    text = bom + b'{"a.png": "one", "b.png": "two", "a.png": ["three", "one"]}'
    wanted = {"a.png": ("one", "three"), "b.png": ("two",)}
    assert captions_by_name(load_dataset(write_folder(tmp_path / "json", {"l.json": text}))) == wanted
    text = bom + b'{"file_name": "a.png", "text": "one"}\r\n{"file_name": "b.png", "text": "two"}\r\n'
    assert load_dataset(write_folder(tmp_path / "lines", {"m.jsonl": text})).names == ["a.png", "b.png"]


@pytest.mark.parametrize(
    "files, words",
    [
        ({"c.csv": 'image,caption\na.png,"one\n'}, "is a quotation mark missing"),
        ({"c.csv": b"image,caption\na.png,\xff\n"}, "is not UTF-8"),
        ({"m.jsonl": '{"image": "a.png", "text": "x"}\n{"image": \n'}, "no valid JSON in line 2"),
        ({"m.jsonl": '{"image": "a.png", "text": "x"}\n[1]\n'}, r"has \[1\] in line 2"),
        ({"m.jsonl": '{"image": "a.png", "text": 7}\n'}, r"not texts, but \[7\]"),
        ({"l.json": [{"image": "a.png", "text": "x"}, 3]}, "holds 3 among its records"),
        ({"l.json": '{"a.png": "x", "b.png": ["y", }'}, "not valid JSON"),
        ({"l.json": '{"a.png": "x",}'}, "not valid JSON.*line 1"),
        ({"l.json": '{"a.png": "x"} 3'}, "more after the end"),
        ({"l.json": '[{"image": "a.png", "text": "x"}'}, "the end is missing"),
        ({"l.json": "[" * 100_000}, "nested too deep"),
        ({"l.json": {"a.png": {"caption": "x"}, "b.png": 4}}, "captions of b.png are not"),
        ({"l.json": {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]}}, "no file_name"),
        (
            {
                "l.json": {
                    "images": [{"id": 1, "file_name": "a.png"}],
                    "annotations": [{"image_id": 1, "caption": None}],
                }
            },
            "no caption in",
        ),
        ({"a.txt": b"\xff\xfe\xff"}, "not UTF-8"),
    ],
)
def test_a_damaged_file_gives_one_sentence_with_its_name(tmp_path, files, words):
    folder = write_folder(tmp_path, files)
    with pytest.raises(UserError, match=words) as refusal:
        load_dataset(folder)
    assert next(iter(files)) in str(refusal.value) and "\n" not in str(refusal.value)


def test_unreadable_sidecars_are_named_and_the_others_read(tmp_path):
    data = load_dataset(write_folder(tmp_path, {"a.txt": b"\xff\xfe\xff", "b.txt": "of b"}))
    assert data.names == ["b.png"] and "1 caption files" in data.notes[0] and "a.txt is not UTF-8" in data.notes[0]


def test_files_and_folders_without_permission_are_named(ordinary_user):
    place, rights = ordinary_user
    folder = write_folder(place / "mine", {"a.txt": "one", "sub/c.txt": "three"}, "a.png sub/c.png")
    assert load_dataset(folder).names == ["a.png", "sub/c.png"]
    (folder / "sub").chmod(0)
    try:
        with rights():
            data = load_dataset(folder)
            assert data.names == ["a.png"] and "1 folders in it may not be read" in " ".join(data.notes)
        (folder / "a.txt").chmod(0)
        with rights(), pytest.raises(UserError, match="a.txt cannot be read .Permission denied"):
            load_dataset(folder)
        folder.chmod(0)
        with rights(), pytest.raises(UserError, match="mine cannot be read .Permission denied.; check that you may"):
            load_dataset(folder)
    finally:
        folder.chmod(0o755)
        (folder / "sub").chmod(0o755)


def test_other_json_files_do_not_get_in_the_way(tmp_path):
    others = {
        "config.json": {"model_type": "x", "labels": ["a", "b"]},
        "n.json": "7",
        "s.json": '"text"',
        "e.json": {},
        "list.json": [1, 2],
        "empty.json": [],
        "package.json": {"name": "x", "tags": None},
        "x.csv": "id,value\n1,2\n",
        "notes.txt": "none",
        "d.jsonl": '{"id": 1}\n',
        "e.jsonl": "",
    }
    data = load_dataset(write_folder(tmp_path, {**others, "a.txt": "one"}))
    assert data.format == "sidecar" and captions_by_name(data) == {"a.png": ("one",)}


def test_a_mistake_early_in_a_large_json_is_reported_with_its_line(tmp_path):
    file = tmp_path / "l.json"
    file.write_text('{"a.png": ["x" "y"],' + " " * 3_000_000 + "}")
    with pytest.raises(UserError, match="line 1"):
        list(json_members(file))
