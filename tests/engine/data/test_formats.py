"""Every format that captions come in, as people have them: recognised by itself, written, and read back."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from clips import random_clip
from image_folders import class_folder, labels_folder
from PIL import Image

from clip_finetune.engine import UserError, combine_datasets, eval_zero_shot, load_dataset, split_dataset
from clip_finetune.engine.cli import main
from clip_finetune.engine.data.from_images import dataset_from_images
from clip_finetune.engine.data.readers import sidecars
from clip_finetune.engine.data.readers.columns import is_caption_field
from clip_finetune.engine.data.readers.json_stream import json_members
from clip_finetune.engine.data.readers.registry import WRITABLE_FORMATS
from clip_finetune.engine.data.readers.tables import prompt_captions
from clip_finetune.engine.data.tokenizer import Tokenizer
from clip_finetune.engine.data.tools.convert import convert_captions


def folder_of(folder: Path, files: dict[str, object], pictures: str = "a.png b.png") -> Path:
    """A folder with these plain pictures, and these files: a text as it is, bytes too, all else as JSON."""
    for name in pictures.split():
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


def found_in(data) -> dict[str, tuple[str, ...]]:
    return dict(zip(data.names, data.captions, strict=True))


# ---- one format each -------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_and_all_its_captions_are_read(tmp_path, name):
    kind, files = FORMATS[name]
    data = load_dataset(folder_of(tmp_path / "mine", files))
    assert data.format == kind and data.reason and data.missing() == []
    assert {data.path(index).name: captions for index, captions in enumerate(data.captions)} == TWO


@pytest.mark.parametrize("name", [name for name, (kind, files) in FORMATS.items() if kind != "sidecar"])
def test_a_caption_file_alone_gives_the_same(tmp_path, name):
    kind, files = FORMATS[name]
    folder = folder_of(tmp_path / "mine", files)
    if len(files) == 1:
        data = load_dataset(folder / next(iter(files)))
        assert data.format == kind and data.missing() == []
        assert {data.path(index).name: captions for index, captions in enumerate(data.captions)} == TWO
        assert "was chosen" in data.reason


def test_a_csv_of_classes_gives_one_sample_a_picture_and_what_most_rows_say(tmp_path):
    rows = "image,label,response\na.png,red_fox,fox\na.png,red_fox,dog\na.png,wolf,wolf\nb.png,hen,hen\nb.png,hen,x\n"
    data = load_dataset(folder_of(tmp_path, {"human_responses.csv": rows}, "all/a.png all/b.png"))
    assert data.format == "labels" and data.class_names == ("hen", "red fox") and data.labels == [1, 0]
    assert data.missing() == [] and not data.has_captions and "1 images have rows that do not agree" in data.notes[0]


def test_where_as_many_rows_say_one_class_as_another_both_are_right_in_any_order(tmp_path):
    rows = ["a.png,cat", "a.png,dog", "a.png,hen", "a.png,dog", "a.png,cat", "bb.png,hen"]
    for number, lines in enumerate((rows, rows[::-1])):
        folder = folder_of(tmp_path / str(number), {"labels.csv": "\n".join(["image,label", *lines])}, "a.png bb.png")
        data = load_dataset(folder)
        found = sorted((name, data.class_names[label]) for name, label in zip(data.names, data.labels, strict=True))
        assert found == [("a.png", "cat"), ("a.png", "dog"), ("bb.png", "hen")] and data.missing() == []
        assert "each of those that as many say" in data.notes[0]
        found = eval_zero_shot(random_clip(), data, templates="none")
        assert found.images == 2 and found.per_class_images == {"cat": 1, "dog": 1, "hen": 1}


LABELLED = [
    {"file_name": "all/a.png", "id": 7, "object_label": "red_fox"},
    {"file_name": "b.png"},
    {"file_name": "all/a.png", "object_label": "wolf"},
    {"file_name": "all/a.png", "object_label": "red fox"},
    {"file_name": "c.png", "object_label": 3},
]


@pytest.mark.parametrize("file", ["metadata.jsonl", "records.json"])
def test_records_with_a_class_and_no_caption_are_classes(tmp_path, file):
    lines = "\n".join(map(json.dumps, LABELLED))
    folder = folder_of(tmp_path, {file: lines if file.endswith("l") else LABELLED}, "all/a.png b.png c.png")
    for place in (folder, folder / file):
        data = load_dataset(place)
        assert data.format == "labels" and data.names == ["all/a.png", "c.png"] and not data.has_captions
        assert [data.class_names[label] for label in data.labels] == ["red fox", "3"] and data.missing() == []
        assert any("1 images have rows that do not agree" in note for note in data.notes)
    assert load_dataset(folder, image_column="file_name").labels == data.labels
    with pytest.raises(UserError, match="cannot be read as metadata"):
        load_dataset(folder, "metadata")
    both = json.dumps(LABELLED[0] | {"text": "a fox"})
    data = load_dataset(folder_of(tmp_path, {file: both if file.endswith("l") else f"[{both}]"}))
    assert data.format == "metadata" and list(data.captions) == [("a fox",)]


def test_a_class_that_is_no_name_is_told(tmp_path):
    for value in (["x"], {"a": 1}, 1.5, True):
        record = {"file_name": "a.png", "label": "x"}
        lines = f"{json.dumps(record)}\n{json.dumps(record | {'label': value})}"
        with pytest.raises(UserError, match="metadata.jsonl: the class of a.png is not a name, but .*; write a text."):
            load_dataset(folder_of(tmp_path, {"metadata.jsonl": lines}, "a.png"))


def test_a_class_that_later_rows_agree_on_beats_the_first(tmp_path):
    rows = "image,label\na.png,x\na.png,y\na.png,y\nb.png,x\nb.png,x\nb.png,x\nb.png,y\nb.png,y\n"
    data = load_dataset(folder_of(tmp_path, {"labels.csv": rows}))
    assert [data.class_names[label] for label in data.labels] == ["y", "x"]


def test_parquet_is_read_if_pyarrow_is_there(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {"file_name": ["a.png", "a.png", "b.png"], "text": ["long one", "short", "of b"], "n": [1, 2, 3]}
    )
    folder = folder_of(tmp_path / "mine", {})
    parquet.write_table(table, folder / "train.parquet")
    data = load_dataset(folder)
    assert data.format == "parquet" and found_in(data) == TWO and data.missing() == []
    numbers = pyarrow.table({"image": [1], "text": ["x"]})
    parquet.write_table(numbers, folder / "train.parquet")
    with pytest.raises(UserError, match="holds neither images nor their names in its column image"):
        load_dataset(folder)
    (folder / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        load_dataset(folder)


def test_a_folder_whose_pictures_have_texts_beside_them_is_seen(tmp_path, monkeypatch):
    def seen(files, pictures):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return sidecars.holds_captioned_images(folder_of(folder, files, pictures))

    assert seen({"a.txt": "x"}, "b.png a.PNG") and seen({"a.b.Caption": "x"}, "a.b.webp")
    assert not seen({"notes.txt": "x", "config.json": "{}"}, "chart.png") and not seen({"a.txt": "x"}, "")
    assert not seen({}, "a.png") and not seen({"deep/a.txt": "x"}, "deep/a.png")
    assert not sidecars.holds_captioned_images(tmp_path / "none")
    monkeypatch.setattr(sidecars, "_MOST_LISTED", 1)
    assert not seen({"a.txt": "x"}, "a.png")
    monkeypatch.undo()
    later = folder_of(tmp_path / "later", {}, "a.png")
    os.utime(later, ns=(10**18, 10**18))
    assert not sidecars.holds_captioned_images(later)
    (later / "a.txt").write_text("x")
    assert sidecars.holds_captioned_images(later)


def test_without_pyarrow_parquet_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        load_dataset(folder_of(tmp_path, {"train.parquet": b"PAR1"}))


def test_kohyas_folder_names_say_how_often_a_picture_comes(tmp_path):
    data = load_dataset(
        folder_of(tmp_path / "two", {"10_dog/a.txt": "a dog", "1_cat/b.txt": "a cat"}, "10_dog/a.png 1_cat/b.png")
    )
    assert dict(zip(data.names, data.repeats, strict=True)) == {"10_dog/a.png": 10, "1_cat/b.png": 1}
    assert any("come per epoch" in note for note in data.notes)
    assert data.subset([1]).repeats == [data.repeats[1]]


@pytest.mark.parametrize("names", ["001_dog 002_cat", "2023_trip 2024_trip", "10_dog cats", "0_dog 10_cat"])
def test_other_numbers_in_folder_names_are_only_names(tmp_path, names):
    one, two = names.split()
    files = {f"{one}/a.txt": "a dog", f"{two}/b.txt": "a cat"}
    assert list(load_dataset(folder_of(tmp_path, files, f"{one}/a.png {two}/b.png")).repeats) == []


def test_a_prompt_is_cut_by_tokens_and_never_to_nothing():
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
    folder = folder_of(tmp_path, {"t.csv": text, "labels.json": {"a.png": "not this"}})
    data = load_dataset(folder, image_column="bild", caption_column="Deutsch, Kurz")
    assert found_in(data) == {"a.png": ("lang", "kurz"), "b.png": ("auch",)}
    assert data.reason == "t.csv (columns Deutsch, Kurz) holds captions"
    with pytest.raises(UserError, match="begins with the line 'image,caption,Bild"):
        load_dataset(folder, "csv", caption_column="Nirgends")
    folder = folder_of(tmp_path / "2", {"x.jsonl": '{"key": "a.png", "alt": "one"}\n{"key": "b.png", "alt": "two"}\n'})
    data = load_dataset(folder, image_column="key", caption_column="alt")
    assert found_in(data) == {"a.png": ("one",), "b.png": ("two",)}


@pytest.mark.parametrize("name", "caption captions Text text_2 original_caption short_caption long description".split())
def test_columns_of_captions_are_known_by_their_names(name):
    assert is_caption_field(name)


@pytest.mark.parametrize("name", "caption_id text_length context image title_url comment_number texture".split())
def test_other_columns_are_not(name):
    assert not is_caption_field(name)


def test_the_format_that_goes_first_is_told_from_those_that_are_not_read(tmp_path):
    folder = folder_of(tmp_path, {"l.json": {"a.png": "one"}, "c.csv": "image,caption\nb.png,two\n", "a.txt": "three"})
    data = load_dataset(folder)
    assert data.format == "json" and list(data.notes) == [
        "c.csv is not read, because json goes first; for it, choose captions: csv."
    ]
    assert found_in(load_dataset(folder, "csv")) == {"b.png": ("two",)}
    assert load_dataset(folder, "sidecar").names == ["a.png"]
    with pytest.raises(UserError, match="cannot be read as coco.*choose auto"):
        load_dataset(folder, "coco")
    with pytest.raises(UserError, match="which is csv and not json"):
        load_dataset(folder / "c.csv", "json")


# ---- where pictures are ----------------------------------------------------------------------------------------------


def coco(*names):
    return {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [{"image_id": number, "caption": f"of {name}"} for number, name in enumerate(names)],
    }


@pytest.mark.parametrize("place", ["train2017", "images/train2017"])
def test_cocos_folders_are_found_from_everywhere(tmp_path, place):
    boxes = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
    files = {
        "annotations/captions_train2017.json": coco("a.png", "b.png"),
        "annotations/instances_train2017.json": boxes,
    }
    folder = folder_of(tmp_path / "coco", files, f"{place}/a.png {place}/b.png val2017/c.png")
    whole = [folder, folder / "annotations/captions_train2017.json"]
    for chosen in whole if "/" in place else [*whole, folder / place]:
        data = load_dataset(chosen)
        assert len(data) == 2 and data.missing() == [] and data.format == "coco" and not data.notes
    with pytest.raises(UserError, match="choose the folder that both are in"):
        load_dataset(folder / "annotations")
    with pytest.raises(UserError, match="another kind than captions"):
        load_dataset(folder / "annotations/instances_train2017.json")


@pytest.mark.parametrize("place", ["Images/", "flickr30k_images/", "deep/er/"])
def test_pictures_in_another_folder_are_found(tmp_path, place):
    folder = folder_of(
        tmp_path, {"captions.csv": "image,caption\na.png,one\nb.png,two\n"}, f"{place}a.png {place}b.png"
    )
    assert load_dataset(folder).missing() == []
    if "/" not in place.rstrip("/"):
        assert load_dataset(folder / "captions.csv").missing() == []


def test_names_with_folders_are_found_from_a_folder_above_them(tmp_path):
    folder = folder_of(
        tmp_path, {"meta/l.json": {"s/a.png": "one", "s/b.png": "two"}}, "all/s/a.png all/s/b.png s2/a.png"
    )
    data = load_dataset(folder)
    assert data.missing() == [] and data.path(0) == folder / "all/s/a.png"


def test_opening_does_not_need_the_pictures(tmp_path):
    data = load_dataset(folder_of(tmp_path, {"l.json": {"gone.png": "one", "also/gone.png": "two"}}, ""))
    assert len(data) == 2 and data.missing() == [0, 1]


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_copies_are_copies_of_pictures_that_need_not_be_there(tmp_path):
    lines = "picture\toriginal\nx/a1.png\t../old/a.png\nx/a2.png\tx/a1.png\nb.png\tc.png\n"
    names = ["x/a1.png", "x/a2.png", "b.png", "c.png"]
    folder = folder_of(tmp_path / "new", {"originals.tsv": lines, "l.json": dict.fromkeys(names, "x")}, " ".join(names))
    data = load_dataset(folder)
    old = str(tmp_path / "old/a.png")
    assert [data.original(index) for index in range(4)] == [old, old, str(folder / "c.png"), str(folder / "c.png")]
    for seed in range(20):
        parts = [set(part.names) for part in split_dataset(data, 0.5, seed)]
        assert {"x/a1.png", "x/a2.png"} in [part - {"b.png", "c.png"} for part in parts]
        assert {"b.png", "c.png"} in [part & {"b.png", "c.png"} for part in parts]
    assert load_dataset(folder / "l.json").original(0) == old


@pytest.mark.parametrize("text", ["image\toriginal\n", "picture\toriginal\nno tab\n", "picture,original\na,b\n"])
def test_a_damaged_list_of_originals_is_told(tmp_path, text):
    folder = folder_of(tmp_path, {"originals.tsv": text, "l.json": {"a.png": "x"}})
    with pytest.raises(UserError, match=r"originals.tsv has .* in line \d"):
        load_dataset(folder)


# ---- several together ------------------------------------------------------------------------------------------------


def test_data_sets_are_joined_by_weights(tmp_path):
    labels = load_dataset(labels_folder(tmp_path / "labels", 4))
    classes = load_dataset(class_folder(tmp_path / "classes", 2))
    both = combine_datasets([labels, classes, labels.subset([0])], [3, 1.5, 0])
    assert len(both) == 12 and list(both.repeats) == [2] * 4 + [1] * 8
    assert [both.path(index) for index in range(12)] == [*map(labels.path, range(4)), *map(classes.path, range(8))]
    assert both.captions[0] == labels.captions[0] and both.training_captions(4) == ("a photo of a blue.",)
    assert both.labels[:4] == [None] * 4 and both.class_names == classes.class_names and both.missing() == []
    assert list(combine_datasets([labels, classes]).repeats) == []
    twice = combine_datasets([both, classes], [1, 2])
    assert list(twice.repeats) == [2] * 4 + [1] * 8 + [2] * 8
    assert both.fingerprint() != combine_datasets([labels, classes], [1, 1]).fingerprint()


def test_classes_of_one_name_are_one(tmp_path):
    one = load_dataset(folder_of(tmp_path / "1", {"l.csv": "image,label\na.png,cat\nb.png,dog\n"}))
    two = load_dataset(folder_of(tmp_path / "2", {"l.csv": "image,label\na.png,cat\nb.png,ant\n"}))
    both = combine_datasets([one, two])
    assert [both.class_names[label] for label in both.labels] == ["cat", "dog", "cat", "ant"]


def test_a_copy_in_one_set_stays_on_the_side_of_its_original_in_another(tmp_path):
    old = load_dataset(labels_folder(tmp_path / "old", 12))
    lines = "picture\toriginal\n" + "".join(f"{name}\t../old/{name}\n" for name in old.names)
    new = load_dataset(labels_folder(folder_of(tmp_path / "new", {"originals.tsv": lines}, ""), 12))
    both = combine_datasets([old, new])
    assert [both.original(index) for index in range(12)] == [both.original(index) for index in range(12, 24)]
    for seed in range(5):
        sides = [sorted(part.names) for part in split_dataset(both, 0.4, seed)]
        assert all(names[::2] == names[1::2] for names in sides)
        # Joining moves no picture of the first set to the other side.
        assert sides[0][::2] == sorted(split_dataset(old, 0.4, seed)[0].names)


@pytest.mark.parametrize(
    "weights, words",
    [([1], "1 weights for 2"), ([0, 0], "above 0"), ([-1, 1], "from 0"), ([float("nan"), 1], "from 0")],
)
def test_weights_that_make_no_sense_are_told(tmp_path, weights, words):
    data = load_dataset(labels_folder(tmp_path / "a", 2))
    with pytest.raises(UserError, match=words):
        combine_datasets([data, data], weights)


def test_a_name_in_one_set_does_not_lead_to_a_picture_of_another(tmp_path):
    one = load_dataset(folder_of(tmp_path / "x/one", {"l.json": {"only_in_two.png": "out"}}, ""))
    two = load_dataset(folder_of(tmp_path / "x/two", {"l.json": {"only_in_two.png": "in"}}, "only_in_two.png"))
    assert combine_datasets([one, two]).missing() == [0]


# ---- pictures that are held in memory --------------------------------------------------------------------------------


def test_the_same_images_are_the_same_files_also_when_they_were_deleted(tmp_path):
    pictures = [numpy.full((6, 5, channels), 40 * channels, numpy.uint8) for channels in (1, 3, 4)]
    data = dataset_from_images(iter(pictures), ["grey", "red\nof three", "clear"], tmp_path / "t")
    assert list(data.captions) == [("grey",), ("red", "of three"), ("clear",)] and data.missing() == []
    for index, picture in enumerate(pictures):
        assert numpy.array_equal(numpy.asarray(Image.open(data.path(index))).reshape(picture.shape), picture)
    before = data.fingerprint()
    for file in (tmp_path / "t").iterdir():
        file.unlink()
    again = dataset_from_images(pictures, ["grey", "red\nof three", "clear"], tmp_path / "t")
    assert again.fingerprint() == before and again.names == data.names


def test_a_picture_that_comes_twice_is_one_sample(tmp_path):
    picture = numpy.zeros((4, 4, 3), numpy.uint8)
    data = dataset_from_images([picture, picture + 1, picture], ["one", "", "two"], tmp_path)
    assert list(data.captions) == [("one", "two")] and "1 images have no caption" in data.notes[0]
    with pytest.raises(UserError, match="2 images and 1 captions"):
        dataset_from_images([picture, picture], ["one"], tmp_path)
    with pytest.raises(UserError, match="None of the images has a caption"):
        dataset_from_images([picture], [" "], tmp_path)


# ---- converting ------------------------------------------------------------------------------------------------------

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
    folder_of(folder, {"captions.json": ODD}, "a.png labels.png")
    for name in ODD:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / name)
    return folder


@pytest.mark.parametrize("to", WRITABLE_FORMATS)
def test_captions_go_through_every_format_and_back(tmp_path, to):
    source = odd_folder(tmp_path / "source")
    before = state(source)
    said = convert_captions(load_dataset(source), to, tmp_path / "new")
    assert "4 pictures" in said[0] and "4 pictures are hard links" in said[1]
    there = load_dataset(tmp_path / "new")
    assert there.format == to and found_in(there) == ODD and there.missing() == []
    back = convert_captions(there, "json", tmp_path / "back")
    assert "hard links" in back[1] and found_in(load_dataset(tmp_path / "back")) == ODD
    assert state(source) == before
    assert sorted(os.listdir(tmp_path)) == ["back", "new", "source"]


@pytest.mark.parametrize("source", FORMATS)
def test_every_format_can_be_written_as_sidecars(tmp_path, source):
    folder = folder_of(tmp_path / "mine", FORMATS[source][1])
    assert main(["convert", str(folder), "--to", "sidecar", str(tmp_path / "out")]) == 0
    assert found_in(load_dataset(tmp_path / "out")) == TWO


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
    assert "Its names start from" in elsewhere[1]
    assert found_in(load_dataset(tmp_path / "else/where" / name)) == ODD


def test_pictures_are_copied_where_they_cannot_be_linked(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    said = convert_captions(load_dataset(odd_folder(tmp_path / "source")), "csv", tmp_path / "new")
    assert "4 pictures were copied." in said and load_dataset(tmp_path / "new").missing() == []


def test_copies_repeats_classes_and_same_stems_are_carried_over(tmp_path):
    lines = "picture\toriginal\n10_x/a.png\t10_x/b.png\n10_x/b.png\t../old/b.png\n"
    files = {"originals.tsv": lines, "10_x/a.txt": "one", "10_x/b.txt": "two"}
    source = load_dataset(folder_of(tmp_path / "source", files, "10_x/a.png 10_x/b.png"))
    convert_captions(source, "sidecar", tmp_path / "deep/er/new")
    data = load_dataset(tmp_path / "deep/er/new")
    assert list(data.repeats) == [10, 10] and data.original(0) == data.original(1) == str(tmp_path / "old/b.png")
    assert "not kept" in " ".join(convert_captions(source, "json", tmp_path / "json"))

    said = convert_captions(load_dataset(class_folder(tmp_path / "classes")), "metadata", tmp_path / "sentences")
    assert "Classes are written as captions, such as 'a photo of a blue.'." in said

    same = load_dataset(folder_of(tmp_path / "same", {"l.json": {"a.png": "one", "a.jpg": "two"}}, "a.png a.jpg"))
    convert_captions(same, "sidecar", tmp_path / "apart")
    assert found_in(load_dataset(tmp_path / "apart")) == {"a.png": ("one",), "a_2.jpg": ("two",)}


def test_what_cannot_be_converted_is_told_in_one_sentence(tmp_path, capsys):
    source = odd_folder(tmp_path / "source")
    data, before = load_dataset(source), state(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    for to, out, words in [
        ("json", source / "new", "is inside the data set"),
        ("json", tmp_path / "full", "is already there"),
        ("json", source, "is already there"),
        ("yaml", tmp_path / "new", "choose json, kohya"),
    ]:
        with pytest.raises(UserError, match=words) as refusal:
            convert_captions(data, to, out)
        assert "\n" not in str(refusal.value)
    gone = load_dataset(folder_of(tmp_path / "gone", {"l.json": {"x.png": "one"}}, ""))
    with pytest.raises(UserError, match="none of the pictures"):
        convert_captions(gone, "json", tmp_path / "new")
    assert main(["convert", str(tmp_path / "nowhere"), "--to", "json", str(tmp_path / "new")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert {name for name in state(tmp_path) if not name.startswith(("full", "gone"))} == set(before)


def test_missing_pictures_are_left_out_and_counted(tmp_path):
    source = folder_of(tmp_path / "source", {"l.json": {"a.png": "one", "gone.png": "two"}})
    assert "1 pictures are not there and are left out." in convert_captions(
        load_dataset(source), "csv", tmp_path / "new"
    )
    assert found_in(load_dataset(tmp_path / "new")) == {"a.png": ("one",)}


# ---- odd files -------------------------------------------------------------------------------------------------------


def test_a_million_letters_and_none_are_captions(tmp_path):
    long = "letters " * 125_000
    wanted = {"a.png": (long.strip(),), "b.png": ("short",)}
    rows = [["a.png", long], ["b.png", "short"], ["b.png", ""], ["a.png", ""]]
    folder = folder_of(tmp_path / "csv", {})
    with open(folder / "c.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "caption"], *rows])
    assert found_in(load_dataset(folder)) == wanted and csv.field_size_limit() == 131072
    assert (
        found_in(load_dataset(folder_of(tmp_path / "json", {"l.json": {"a.png": long, "b.png": ["", "short"]}})))
        == wanted
    )
    folder = folder_of(tmp_path / "txt", {"a.txt": long, "b.txt": "\n\nshort"})
    assert found_in(load_dataset(folder)) == wanted
    lines = "".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)
    assert found_in(load_dataset(folder_of(tmp_path / "jsonl", {"metadata.jsonl": lines}))) == wanted


def test_pictures_whose_captions_are_all_empty_are_left_out(tmp_path):
    data = load_dataset(folder_of(tmp_path, {"l.json": {"a.png": ["", " "], "b.png": "x"}}))
    assert data.names == ["b.png"] and "1 images have no caption" in data.notes[0]
    with pytest.raises(UserError, match="every caption there is empty"):
        load_dataset(folder_of(tmp_path / "2", {"c.csv": "image,caption\na.png,\nb.png,\n"}))


def test_a_bom_crlf_quotes_and_duplicate_names(tmp_path):
    bom = b"\xef\xbb\xbf"
    text = bom + b'image,caption\r\na.png,"say ""one"", please"\r\nb.png,"over\r\ntwo lines"\r\na.png,two\r\n'
    wanted = {"a.png": ('say "one", please', "two"), "b.png": ("over two lines",)}
    assert found_in(load_dataset(folder_of(tmp_path / "csv", {"c.csv": text}))) == wanted
    text = bom + b'{"a.png": "one", "b.png": "two", "a.png": ["three", "one"]}'
    wanted = {"a.png": ("one", "three"), "b.png": ("two",)}
    assert found_in(load_dataset(folder_of(tmp_path / "json", {"l.json": text}))) == wanted
    text = bom + b'{"file_name": "a.png", "text": "one"}\r\n{"file_name": "b.png", "text": "two"}\r\n'
    assert load_dataset(folder_of(tmp_path / "lines", {"m.jsonl": text})).names == ["a.png", "b.png"]


def test_names_with_spaces_unicode_backslashes_and_250_letters(tmp_path):
    names = ["with space.png", "ünïcödé 😀.png", "l" * 246 + ".png", "sub\\back slash.png", "%20#?&.png"]
    folder = folder_of(tmp_path, {"l.json": {name: f"caption {n}" for n, name in enumerate(names)}}, "")
    for name in names:
        file = folder / name.replace("\\", "/")
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
        file.with_suffix(".txt").write_text("beside")
    assert load_dataset(folder).missing() == []
    assert len(load_dataset(folder, "sidecar")) == 5


def test_a_folder_inside_its_own_link_is_read_once(tmp_path):
    folder = folder_of(tmp_path / "mine", {"sub/a.txt": "one", "b.txt": "two"}, "sub/a.png b.png")
    (folder / "sub/loop").symlink_to(folder, target_is_directory=True)
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    assert sorted(load_dataset(folder).names) == ["b.png", "sub/a.png"]


@pytest.mark.parametrize("kind", ["coco", "csv", "kohya", "metadata"])
@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "..\\secret.png", "sub/../../secret.png"])
def test_no_format_leads_out_of_the_folder(tmp_path, kind, name):
    files = {
        "coco": {"l.json": coco(name, "a.png")},
        "csv": {"c.csv": f"image,caption\n{name},out\na.png,in\n"},
        "kohya": {"l.json": {name: {"caption": "out"}, "a.png": {"caption": "in"}}},
        "metadata": {"m.jsonl": "".join(json.dumps({"image": n, "text": "x"}) + "\n" for n in (name, "a.png"))},
    }[kind]
    folder_of(tmp_path, {}, "secret.png")
    data = load_dataset(folder_of(tmp_path / "mine", files, "a.png"))
    assert data.missing() == [0] and not data.path(0).exists() and data.format == kind


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
def test_damaged_files_are_told_in_one_sentence_with_their_name(tmp_path, files, words):
    folder = folder_of(tmp_path, files)
    with pytest.raises(UserError, match=words) as refusal:
        load_dataset(folder)
    assert next(iter(files)) in str(refusal.value) and "\n" not in str(refusal.value)


def test_some_sidecars_that_cannot_be_read_are_named_and_the_others_read(tmp_path):
    data = load_dataset(folder_of(tmp_path, {"a.txt": b"\xff\xfe\xff", "b.txt": "of b"}))
    assert data.names == ["b.png"] and "1 caption files" in data.notes[0] and "a.txt is not UTF-8" in data.notes[0]


def test_what_may_not_be_read_is_told(ordinary_user):
    place, rights = ordinary_user
    folder = folder_of(place / "mine", {"a.txt": "one", "sub/c.txt": "three"}, "a.png sub/c.png")
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
    data = load_dataset(folder_of(tmp_path, {**others, "a.txt": "one"}))
    assert data.format == "sidecar" and found_in(data) == {"a.png": ("one",)}


def test_a_mistake_early_in_a_large_json_is_told_without_reading_it_all(tmp_path):
    file = tmp_path / "l.json"
    file.write_text('{"a.png": ["x" "y"],' + " " * 3_000_000 + "}")
    with pytest.raises(UserError, match="line 1"):
        list(json_members(file))


# ---- many ------------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys, time
from clip_finetune.engine import load_dataset
def memory(field):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))
before, start = memory("VmRSS"), time.process_time()
data = load_dataset(sys.argv[1])
took, grown = time.process_time() - start, memory("VmHWM") - before
print(len(data), sum(map(len, data.captions)), took, grown)
"""


def write_many(folder: Path, kind: str, count: int) -> None:
    """A caption file for `count` pictures with a caption each; for COCO, a fifth as many with five each."""
    folder.mkdir()
    names = [f"{n // 1000:04}/{n:07}.jpg" for n in range(count)]
    texts = [f"a photo, number {n}, of a thing on a table beside a window in the evening" for n in range(count)]
    if kind == "json":
        lines = (f"{',' if n else '{'}\n {json.dumps(names[n])}: {json.dumps([texts[n]])}" for n in range(count))
        end = "}"
    elif kind == "metadata":
        lines, end = (json.dumps({"file_name": names[n], "text": texts[n]}) + "\n" for n in range(count)), ""
    elif kind == "csv":
        lines, end = itertools.chain(["image,caption\n"], (f'{names[n]},"{texts[n]}"\n' for n in range(count))), ""
    else:
        images = [{"id": n, "file_name": name, "height": 8, "width": 8} for n, name in enumerate(names[: count // 5])]
        annotations = ({"image_id": n % (count // 5), "id": n, "caption": text} for n, text in enumerate(texts))
        lines = itertools.chain(
            ['{"images": ', json.dumps(images), ', "annotations": ['],
            (f"{',' if n else ''}{json.dumps(value)}" for n, value in enumerate(annotations)),
        )
        end = "]}"
    with open(folder / {"metadata": "metadata.jsonl", "csv": "c.csv"}.get(kind, "l.json"), "w") as file:
        file.writelines(lines)
        file.write(end)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize("kind", ["json", "metadata", "csv", "coco"])
def test_a_million_captions_open_quickly_in_little_memory(tmp_path, kind, soak):
    """Ten seconds of a processor and 500 MB for a million; without -m soak a tenth of them, and twice the time."""
    count, seconds, megabytes = (1_000_000, 10, 500) if soak else (100_000, 2, 60)
    write_many(tmp_path / "many", kind, count)
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path / "many")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples, captions, took, grown = map(float, done.stdout.split())
    print(f"{kind}: {captions:.0f} captions of {samples:.0f} pictures in {took:.1f} s and {grown:.0f} MB")
    assert (samples, captions) == (count // 5 if kind == "coco" else count, count)
    assert took < seconds and grown < megabytes


# ---- real ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, kind, per_picture",
    [
        ("flickr8k", "csv", 5),
        ("coco-mini", "coco", 5),
        ("coco-mini/train2017", "coco", 5),
        ("coco-mini/val2017", "coco", 5),
        ("twemoji", "csv", 1),
        ("cifar10-sample/train", "folders", 0),
        ("cifar10-sample/test", "folders", 0),
        ("coco-mini/annotations/captions_val2017.json", "coco", 5),
    ],
)
def test_real_sets_are_recognised_with_the_right_counts(shared_data, place, kind, per_picture):
    """The counts are those of the files: of flickr8k, parts of different sizes are about."""
    data, folder = load_dataset(shared_data / place), shared_data / place
    if folder.is_file():
        folder = shared_data / "coco-mini/val2017"
    pictures = sum(name.endswith((".jpg", ".png")) for _, _, names in os.walk(folder) for name in names)
    assert (len(data), data.format) == (pictures, kind) and data.missing() == []
    assert {len(captions) for captions in data.captions} == {per_picture}
    known = {
        "coco-mini/train2017": 80,
        "coco-mini/val2017": 79,
        "coco-mini": 159,
        "twemoji": 1559,
        "cifar10-sample/train": 2000,
        "cifar10-sample/test": 1000,
    }
    assert len(data) == known.get(place, len(data))
    assert len(data.class_names) == (10 if kind == "folders" else 0)
