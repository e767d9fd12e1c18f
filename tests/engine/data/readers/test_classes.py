"""Class labels: folders, tables and records."""

import json

import pytest
from caption_folders import write_folder
from clips import random_clip
from image_folders import class_folder

from clip_finetune.engine import UserError, eval_zero_shot, load_dataset


def test_class_folders_give_labels_and_a_caption_to_train_on(tmp_path):
    data = load_dataset(class_folder(tmp_path / "classes"))
    assert (
        data.class_names == ("blue", "green", "red", "yellow") and data.labels == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    )
    assert data.training_captions(0) == ("a photo of a blue.",) and not data.has_captions


def test_an_image_with_several_rows_gets_the_most_frequent_class(tmp_path):
    rows = "image,label,response\na.png,red_fox,fox\na.png,red_fox,dog\na.png,wolf,wolf\nb.png,hen,hen\nb.png,hen,x\n"
    data = load_dataset(write_folder(tmp_path, {"human_responses.csv": rows}, "all/a.png all/b.png"))
    assert data.format == "labels" and data.class_names == ("hen", "red fox") and data.labels == [1, 0]
    assert data.missing() == [] and not data.has_captions and "1 images have rows that do not agree" in data.notes[0]


def test_equally_frequent_classes_are_all_correct_in_any_row_order(tmp_path):
    rows = ["a.png,cat", "a.png,dog", "a.png,hen", "a.png,dog", "a.png,cat", "bb.png,hen"]
    for number, lines in enumerate((rows, rows[::-1])):
        folder = write_folder(
            tmp_path / str(number), {"labels.csv": "\n".join(["image,label", *lines])}, "a.png bb.png"
        )
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
    folder = write_folder(tmp_path, {file: lines if file.endswith("l") else LABELLED}, "all/a.png b.png c.png")
    for place in (folder, folder / file):
        data = load_dataset(place)
        assert data.format == "labels" and data.names == ["all/a.png", "c.png"] and not data.has_captions
        assert [data.class_names[label] for label in data.labels] == ["red fox", "3"] and data.missing() == []
        assert any("1 images have rows that do not agree" in note for note in data.notes)
    assert load_dataset(folder, image_column="file_name").labels == data.labels
    with pytest.raises(UserError, match="cannot be read as metadata"):
        load_dataset(folder, "metadata")
    both = json.dumps(LABELLED[0] | {"text": "a fox"})
    data = load_dataset(write_folder(tmp_path, {file: both if file.endswith("l") else f"[{both}]"}))
    assert data.format == "metadata" and list(data.captions) == [("a fox",)]


def test_a_class_that_is_no_name_is_an_error(tmp_path):
    for value in (["x"], {"a": 1}, 1.5, True):
        record = {"file_name": "a.png", "label": "x"}
        lines = f"{json.dumps(record)}\n{json.dumps(record | {'label': value})}"
        with pytest.raises(UserError, match="metadata.jsonl: the class of a.png is not a name, but .*; write a text."):
            load_dataset(write_folder(tmp_path, {"metadata.jsonl": lines}, "a.png"))


def test_a_class_that_later_rows_agree_on_beats_the_first_rows(tmp_path):
    rows = "image,label\na.png,x\na.png,y\na.png,y\nb.png,x\nb.png,x\nb.png,x\nb.png,y\nb.png,y\n"
    data = load_dataset(write_folder(tmp_path, {"labels.csv": rows}))
    assert [data.class_names[label] for label in data.labels] == ["y", "x"]
