"""From the names in a caption file to images: wherever they are in the dataset, and never outside of it."""

import json

import pytest
from caption_folders import coco, write_folder
from image_folders import plain_image
from PIL import Image

from clip_finetune.engine import UserError, load_dataset


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "..\\secret.png", "sub/../../secret.png"])
def test_a_name_never_leads_out_of_the_dataset(tmp_path, name):
    plain_image(tmp_path / "secret.png")
    folder = tmp_path / "mine"
    plain_image(folder / "a.png")
    (folder / "labels.json").write_text(json.dumps({name: ["out"], "a.png": ["in"]}))
    data = load_dataset(folder)
    assert data.missing() == [0] and not data.path(0).exists()


@pytest.mark.parametrize("place", ["train2017", "images/train2017"])
def test_cocos_images_are_found_whatever_part_of_it_is_opened(tmp_path, place):
    boxes = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}]}
    files = {
        "annotations/captions_train2017.json": coco("a.png", "b.png"),
        "annotations/instances_train2017.json": boxes,
    }
    folder = write_folder(tmp_path / "coco", files, f"{place}/a.png {place}/b.png val2017/c.png")
    whole = [folder, folder / "annotations/captions_train2017.json"]
    for chosen in whole if "/" in place else [*whole, folder / place]:
        data = load_dataset(chosen)
        assert len(data) == 2 and data.missing() == [] and data.format == "coco" and not data.notes
    with pytest.raises(UserError, match="choose the folder that both are in"):
        load_dataset(folder / "annotations")
    with pytest.raises(UserError, match="another kind than captions"):
        load_dataset(folder / "annotations/instances_train2017.json")


@pytest.mark.parametrize("place", ["Images/", "flickr30k_images/", "deep/er/"])
def test_images_in_another_folder_are_found(tmp_path, place):
    folder = write_folder(
        tmp_path, {"captions.csv": "image,caption\na.png,one\nb.png,two\n"}, f"{place}a.png {place}b.png"
    )
    assert load_dataset(folder).missing() == []
    if "/" not in place.rstrip("/"):
        assert load_dataset(folder / "captions.csv").missing() == []


def test_names_with_folders_are_found_from_a_folder_above_them(tmp_path):
    folder = write_folder(
        tmp_path, {"meta/l.json": {"s/a.png": "one", "s/b.png": "two"}}, "all/s/a.png all/s/b.png s2/a.png"
    )
    data = load_dataset(folder)
    assert data.missing() == [] and data.path(0) == folder / "all/s/a.png"


def test_a_dataset_opens_without_its_images(tmp_path):
    data = load_dataset(write_folder(tmp_path, {"l.json": {"gone.png": "one", "also/gone.png": "two"}}, ""))
    assert len(data) == 2 and data.missing() == [0, 1]


def test_names_with_spaces_unicode_backslashes_and_250_characters_work(tmp_path):
    names = ["with space.png", "ünïcödé 😀.png", "l" * 246 + ".png", "sub\\back slash.png", "%20#?&.png"]
    folder = write_folder(tmp_path, {"l.json": {name: f"caption {n}" for n, name in enumerate(names)}}, "")
    for name in names:
        file = folder / name.replace("\\", "/")
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
        file.with_suffix(".txt").write_text("beside")
    assert load_dataset(folder).missing() == []
    assert len(load_dataset(folder, "sidecar")) == 5


def test_a_folder_inside_its_own_link_is_read_once(tmp_path):
    folder = write_folder(tmp_path / "mine", {"sub/a.txt": "one", "b.txt": "two"}, "sub/a.png b.png")
    (folder / "sub/loop").symlink_to(folder, target_is_directory=True)
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    assert sorted(load_dataset(folder).names) == ["b.png", "sub/a.png"]


@pytest.mark.parametrize("kind", ["coco", "csv", "kohya", "metadata"])
@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "..\\secret.png", "sub/../../secret.png"])
def test_no_format_leads_out_of_the_dataset(tmp_path, kind, name):
    files = {
        "coco": {"l.json": coco(name, "a.png")},
        "csv": {"c.csv": f"image,caption\n{name},out\na.png,in\n"},
        "kohya": {"l.json": {name: {"caption": "out"}, "a.png": {"caption": "in"}}},
        "metadata": {"m.jsonl": "".join(json.dumps({"image": n, "text": "x"}) + "\n" for n in (name, "a.png"))},
    }[kind]
    write_folder(tmp_path, {}, "secret.png")
    data = load_dataset(write_folder(tmp_path / "mine", files, "a.png"))
    assert data.missing() == [0] and not data.path(0).exists() and data.format == kind
