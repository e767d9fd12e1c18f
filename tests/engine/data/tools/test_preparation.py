"""A new data set out of another: what is in it, where it came from, and that the old one stays as it is."""

import csv
import errno
import json
import urllib.error
from pathlib import Path

import numpy
import pytest
import torch
from image_folders import captioned, class_folder, labels_folder, noise, turned
from PIL import Image

from clip_finetune.engine import UserError, combine_datasets, load_dataset, split_dataset
from clip_finetune.engine.cli import main
from clip_finetune.engine.data.tools import detection, prepare
from clip_finetune.engine.data.tools.detection import (
    Box,
    TorchvisionDetector,
    coco_classes,
    parse_classes,
)
from clip_finetune.engine.data.tools.prepare import Preparation, prepare_images
from clip_finetune.engine.data.tools.variants import square_around, squares_around


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def captions_of(dataset):
    return dict(zip(dataset.names, dataset.captions, strict=True))


def finding(*boxes):
    """A detector that finds these boxes in every picture."""
    return lambda picture: list(boxes)


@pytest.fixture
def source(tmp_path):
    folder = captioned(tmp_path / "set", {name: noise(n, (300, 200)) for n, name in enumerate("abcd")})
    (folder / "sub").mkdir()
    noise(9, (200, 300)).save(folder / "sub/e.jpg")
    labels = json.loads((folder / "labels.json").read_text()) | {"sub/e.jpg": ["one", "two"]}
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


# ---- what is made ----------------------------------------------------------------------------------------------------


def test_copies_carry_the_captions_and_their_origin_and_the_source_stays(source, tmp_path):
    before = contents(source)
    prepared = prepare_images(load_dataset(source), tmp_path / "new", Preparation(jitter_copies=2))
    assert contents(source) == before and prepared.images == 15 and prepared.originals == 5
    made = load_dataset(tmp_path / "new")
    assert captions_of(made)["a_jitter2.png"] == ("caption of a",)
    assert captions_of(made)["sub/e_jitter1.jpg"] == ("one", "two")
    assert {made.original(index) for index in range(15)} == {
        str(source / name) for name in ("a.png", "b.png", "c.png", "d.png", "sub/e.jpg")
    }
    with open(tmp_path / "new/originals.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert {"picture": "sub/e_jitter1.jpg", "original": "../set/sub/e.jpg"} in rows and len(rows) == 15
    # Whole pictures are the same files, to the byte.
    assert (tmp_path / "new/sub/e.jpg").read_bytes() == before["sub/e.jpg"]
    assert Image.open(tmp_path / "new/a_jitter1.png").size == (300, 200)
    assert not list(tmp_path.glob(".*.part"))


def test_jitter_is_torchvisions_and_depends_on_seed_and_name_alone(source, tmp_path, monkeypatch):
    dataset = load_dataset(source)
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        prepare_images(dataset, tmp_path / name, Preparation(jitter_copies=1, seed=seed))
    one, same, other = (contents(tmp_path / name) for name in ("one", "same", "other"))
    assert all(one[name] == same[name] for name in one if name.endswith(".png"))
    assert one["a_jitter1.png"] != other["a_jitter1.png"] and one["a_jitter1.png"] != one["a.png"]
    # The changes, their ranges and their order are those of ColorJitter.
    from torchvision.transforms import ColorJitter

    theirs = ColorJitter(0.5, 0.5, 0.5, 0.1)
    seen = []
    monkeypatch.setattr("torchvision.transforms.functional.adjust_hue", lambda p, x: seen.append(("hue", x)) or p)
    monkeypatch.setattr("torchvision.transforms.functional.adjust_contrast", lambda p, x: seen.append(("c", x)) or p)
    prepare_images(dataset, tmp_path / "many", Preparation(jitter_copies=20))
    for name, (low, high) in (("hue", theirs.hue), ("c", theirs.contrast)):
        values = [x for found, x in seen if found == name]
        assert low <= min(values) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(values) <= high
    assert len({found for found, _ in seen[::2]}) == 2  # now this first, now that


def test_centre_squares_are_what_clip_sees(source, tmp_path):
    prepare_images(load_dataset(source), tmp_path / "new", Preparation(crop="centre"))
    square = Image.open(tmp_path / "new/a.png")
    whole = Image.open(source / "a.png")
    assert square.size == (200, 200) and square.tobytes() == whole.crop((50, 0, 250, 200)).tobytes()
    assert Image.open(tmp_path / "new/sub/e.jpg").size == (200, 200)
    assert load_dataset(tmp_path / "new").missing() == []


def test_a_mirrored_copy_gets_no_caption_that_names_a_side(tmp_path):
    folder = captioned(tmp_path / "set", {name: noise(n) for n, name in enumerate("abc")})
    labels = {
        "a.png": ["a dog", "a dog on the left", "Left-handed"],
        "b.png": ["turn it clockwise"],
        "c.png": ["bright"],
    }
    (folder / "labels.json").write_text(json.dumps(labels))
    safe = prepare_images(load_dataset(folder), tmp_path / "safe", Preparation(flip="safe"))
    made = captions_of(load_dataset(tmp_path / "safe"))
    assert made["a_mirrored.png"] == ("a dog",) and "b_mirrored.png" not in made and "c_mirrored.png" in made
    assert "3 captions mention a side" in safe.notes[1]
    everything = prepare_images(load_dataset(folder), tmp_path / "all", Preparation(flip="all"))
    assert captions_of(load_dataset(tmp_path / "all"))["b_mirrored.png"] == ("turn it clockwise",)
    assert (
        "3 captions mention a side and are wrong" in everything.notes[1]
        and "'a dog on the left'" in everything.notes[1]
    )
    mirrored = Image.open(tmp_path / "all/c_mirrored.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert mirrored.tobytes() == Image.open(folder / "c.png").tobytes()


def test_class_folders_stay_class_folders(tmp_path):
    source = class_folder(tmp_path / "set")
    prepare_images(load_dataset(source), tmp_path / "new", Preparation(jitter_copies=1))
    made = load_dataset(tmp_path / "new")
    assert made.format == "folders" and len(made) == 24 and made.class_names == ("blue", "green", "red", "yellow")
    assert not (tmp_path / "new/labels.json").exists()


def test_what_lies_on_its_side_is_turned_and_odd_formats_become_png(tmp_path):
    folder = captioned(tmp_path / "set", {"a": noise(0, (64, 48))})
    noise(1, (64, 48)).save(folder / "turned.JPG", exif=turned(6))
    noise(2).convert("RGBA").save(folder / "clear.webp", lossless=True)
    noise(3).save(folder / "a.jpg")  # beside a.png
    noise(4).save(folder / ("n" * 246 + ".png"))
    names = ("a.png", "turned.JPG", "clear.webp", "a.jpg", "n" * 246 + ".png")
    (folder / "labels.json").write_text(json.dumps({name: [name] for name in names}))
    prepared = prepare_images(load_dataset(folder), tmp_path / "new", Preparation(jitter_copies=1))
    assert prepared.images == 10 and prepared.left_out == ()
    made = captions_of(load_dataset(tmp_path / "new"))
    assert made["turned.jpg"] == ("turned.JPG",) and made["clear.webp"] == made["clear_jitter1.png"] == ("clear.webp",)
    assert made["a_jitter1.png"] == ("a.png",) and made["a_jitter1.jpg"] == ("a.jpg",)
    assert Image.open(tmp_path / "new/turned.jpg").size == (48, 64)
    assert load_dataset(tmp_path / "new").missing() == []


def test_broken_pictures_are_left_out_and_named(source, tmp_path):
    (source / "b.png").write_bytes(b"damaged")
    (source / "c.png").unlink()
    prepared = prepare_images(load_dataset(source), tmp_path / "new", Preparation(crop="centre"))
    assert [name for name, _ in prepared.left_out] == ["b.png", "c.png"] and prepared.images == 3
    assert "2 images were left out" in " ".join(prepared.notes)


def test_names_that_lead_out_or_collide_are_made_safe(tmp_path):
    """A name is a text out of a file: it must not choose where is written."""
    folder = tmp_path / "set"
    captioned(folder, {"a": noise(0), "A": noise(1), "tab\there": noise(2)})
    prepared = prepare_images(load_dataset(folder), tmp_path / "new", Preparation(crop="centre"))
    assert [name for name, _ in prepared.left_out] == ["tab\there.png"]
    assert len({name.casefold() for name in load_dataset(tmp_path / "new").names}) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "set"]


# ---- objects ---------------------------------------------------------------------------------------------------------

DOG = Box("dog", 0.9, 20, 20, 140, 150)
PERSON = Box("person", 0.95, 150, 10, 290, 190)


def test_squares_hold_their_box_and_stay_inside():
    for left, top, right, bottom in ((0, 0, 10, 10), (280, 190, 300, 200), (0, 50, 300, 60), (100, 0, 120, 200)):
        box = Box("dog", 1.0, left, top, right, bottom)
        square = square_around(box, (300, 200), 0.1)
        assert square[2] - square[0] == square[3] - square[1] <= 200
        assert square[0] >= 0 and square[1] >= 0 and square[2] <= 300 and square[3] <= 200
        if max(right - left, bottom - top) * 1.2 <= 200:
            assert square[0] <= left and square[1] <= top and square[2] >= right and square[3] >= bottom


def test_small_and_like_squares_are_left_out_and_the_surest_come_first():
    boxes = [PERSON, DOG, Box("cat", 0.8, 21, 22, 141, 149), Box("bird", 0.7, 0, 0, 9, 9)]
    found = squares_around(boxes, (300, 200), minimum=30, most=5)
    assert [box.name for box, _ in found] == ["person", "dog"]
    assert len(squares_around(boxes, (300, 200), minimum=30, most=1)) == 1


def test_every_object_is_a_picture_of_its_own(source, tmp_path):
    settings = Preparation(crop="objects", minimum_size=50, jitter_copies=1)
    prepared = prepare_images(load_dataset(source), tmp_path / "new", settings, detector=finding(PERSON, DOG))
    made = captions_of(load_dataset(tmp_path / "new"))
    assert {"a_1_person.png", "a_1_person_jitter1.png", "a_2_dog.png", "a_2_dog_jitter1.png"} <= set(made)
    assert prepared.images == 20 and made["a_2_dog.png"] == ("caption of a",)
    assert len(set(Image.open(tmp_path / "new/a_2_dog.png").size)) == 1


def test_dogs_not_people(source, tmp_path):
    dataset, detector = load_dataset(source), finding(PERSON, DOG)
    for name, settings in {
        "only": Preparation(crop="objects", only="dogs", minimum_size=50),
        "never": Preparation(crop="objects", never="people", minimum_size=50),
    }.items():
        prepare_images(dataset, tmp_path / name, settings, detector=detector)
        assert all("_1_dog" in found for found in load_dataset(tmp_path / name).names)


def test_where_nothing_is_found_the_middle_is_taken_or_nothing(source, tmp_path):
    dataset = load_dataset(source)
    prepare_images(dataset, tmp_path / "centre", Preparation(crop="objects"), detector=finding())
    assert Image.open(tmp_path / "centre/a.png").size == (200, 200)
    unsure = finding(Box("dog", 0.5, 0, 0, 200, 200))
    with pytest.raises(UserError, match="no object was found"):
        prepare_images(
            dataset, tmp_path / "none", Preparation(crop="objects", without_object="leave_out"), detector=unsure
        )
    assert not (tmp_path / "none").exists() and not list(tmp_path.glob(".*.part"))


def test_classes_are_cocos_and_plurals_will_do():
    assert len(coco_classes()) == 80
    assert parse_classes(" Dogs, people ,hot dog, buses,") == {"dog", "person", "hot dog", "bus"}
    assert parse_classes("") == frozenset()
    with pytest.raises(UserError, match="does not know 'dgo'; it knows dog"):
        parse_classes("dgo")
    with pytest.raises(UserError, match="also in never"):
        prepare._wanted(Preparation(crop="objects", only="dog", never="dogs"))


def test_a_torchvision_detector_gives_boxes_in_the_pictures_own_pixels():
    """A real detector's code with random weights, and one whose answer is known."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.manual_seed(0)
    categories = ("__background__", *coco_classes(), *["N/A"] * 10)
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91, score_thresh=0.0)
    for box in TorchvisionDetector(model, categories)(noise(0, (640, 480)))[:50]:
        assert 0 <= box.left <= box.right <= 640 and 0 <= box.top <= box.bottom <= 480 and box.name != "N/A"

    class Known(torch.nn.Module):
        def forward(self, pictures):
            assert pictures[0].shape == (3, 667, 1333) and pictures[0].max() <= 1
            return [
                {
                    "labels": torch.tensor([18, 1]),
                    "scores": torch.tensor([0.6, 0.9]),
                    "boxes": torch.tensor([[0.0, 0.0, 100.0, 50.0], [10.0, 10.0, 20.0, 20.0]]),
                }
            ]

    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_V2_Weights as Weights

    person, dog = TorchvisionDetector(Known(), Weights.DEFAULT.meta["categories"])(noise(0, (4000, 2000)))
    assert (person.name, dog.name) == ("person", "dog") and person.score > dog.score
    assert dog.right == pytest.approx(300, rel=0.01) and dog.bottom == pytest.approx(150, rel=0.01)


@pytest.mark.parametrize("error", [urllib.error.URLError("no network"), RuntimeError("invalid hash value\nmore")])
def test_a_detector_that_cannot_be_downloaded_is_told_before_and_after(source, tmp_path, monkeypatch, error):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def fail(*arguments, weights_only, check_hash, **more):
        assert weights_only and check_hash
        raise error

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    notes = []
    with pytest.raises(UserError, match="could not be downloaded") as refusal:
        prepare_images(
            load_dataset(source), tmp_path / "new", Preparation(crop="objects", detector="small"), on_note=notes.append
        )
    assert "13 MB" in notes[0] and str(tmp_path / "hub") in notes[0] and "ssdlite320" in notes[0]
    assert "\n" not in str(refusal.value) and "put" in str(refusal.value) and not (tmp_path / "new").exists()


def test_weights_that_are_there_are_used_without_a_network(tmp_path, monkeypatch):
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=91)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **more: model.state_dict())
    detector = detection.load_detector("small")
    for name, tensor in detector.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    with pytest.raises(UserError, match="choose small or medium or large"):
        detection.load_detector("huge")


# ---- whole or not at all ---------------------------------------------------------------------------------------------


def test_what_is_there_is_refused_and_so_is_a_place_inside_the_source(source, tmp_path):
    (tmp_path / "there").mkdir()
    for target, words in ((tmp_path / "there", "already there"), (source / "new", "is inside")):
        with pytest.raises(UserError, match=words):
            prepare_images(load_dataset(source), target, Preparation(crop="centre"))
    assert not (source / "new").exists()


def test_the_next_free_name_is_taken_and_the_same_again_is_not_made_twice(source, tmp_path):
    dataset, target = load_dataset(source), tmp_path / "new"
    (tmp_path / "new").mkdir()
    one = prepare_images(dataset, target, Preparation(crop="centre"), number_if_taken=True)
    again = prepare_images(dataset, target, Preparation(crop="centre"), number_if_taken=True)
    other = prepare_images(dataset, target, Preparation(crop="centre", jitter_copies=1), number_if_taken=True)
    assert [made.folder.name for made in (one, again, other)] == ["new_2", "new_2", "new_3"]
    assert again.made_before and not one.made_before
    noise(77).save(source / "a.png")
    changed = prepare_images(load_dataset(source), target, Preparation(crop="centre"), number_if_taken=True)
    assert changed.folder.name == "new_4"


def test_cancel_leaves_nothing(source, tmp_path):
    def cancel():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_images(load_dataset(source), tmp_path / "new", Preparation(jitter_copies=5), check_cancelled=cancel)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(source, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="The disk is full") as refusal:
        prepare_images(load_dataset(source), tmp_path / "new", Preparation(jitter_copies=1))
    assert "\n" not in str(refusal.value) and [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "There is nothing to do"),
        ({"crop": "round"}, "choose none or centre or objects"),
        ({"hue": 0.6}, "between 0.0 and 0.5"),
        ({"jitter_copies": -1}, "between 0 and 20"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        Preparation(**settings)


# ---- with others -----------------------------------------------------------------------------------------------------


def test_a_copy_of_a_copy_is_one_of_the_first(source, tmp_path):
    prepare_images(load_dataset(source), tmp_path / "new", Preparation(jitter_copies=1))
    prepare_images(load_dataset(tmp_path / "new"), tmp_path / "newer", Preparation(crop="centre"))
    made = load_dataset(tmp_path / "newer")
    assert {made.original(index) for index in range(len(made))} == {
        str(source / name) for name in load_dataset(source).names
    }


def test_joined_with_the_source_copies_stay_on_its_side(tmp_path):
    source = captioned(tmp_path / "set", {f"{n:02}": noise(n) for n in range(20)})
    prepare_images(load_dataset(source), tmp_path / "new", Preparation(jitter_copies=1, crop="centre"))
    joined = combine_datasets([load_dataset(source), load_dataset(tmp_path / "new")])
    assert len(joined) == 60
    train, validation = split_dataset(joined, 0.4, seed=1)
    sides = [{part.original(index) for index in range(len(part))} for part in (train, validation)]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20


def test_the_command_makes_a_data_set_and_info_reads_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labels_folder(tmp_path / "colours", 6)
    assert main(["prepare", "colours", "new", "--jitter-copies", "2", "--flip", "safe", "--seed", "4"]) == 0
    said = capsys.readouterr().err
    assert "24 images were made from 6" in said and "Wrote new." in said
    assert main(["info", "new", "--json", "new.json"]) == 0
    facts = json.loads(Path("new.json").read_text())
    assert facts["images"] == 24 and facts["originals"] == 6 and facts["broken"] == []
    assert main(["prepare", "colours", "new", "--crop", "centre"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("clip-finetune prepare: new is already there")
    assert main(["prepare", "colours", "newer"]) == 1
    assert "There is nothing to do" in capsys.readouterr().err


def test_real_photographs_are_prepared(shared_data, tmp_path):
    dataset = load_dataset(shared_data / "flickr8k").subset(range(40))
    boxes = finding(Box("dog", 0.9, 10, 10, 200, 150))
    settings = Preparation(crop="objects", jitter_copies=1, flip="safe")
    prepared = prepare_images(dataset, tmp_path / "new", settings, detector=boxes)
    made = load_dataset(tmp_path / "new")
    assert prepared.left_out == () and made.missing() == [] and len(made) == prepared.images >= 115
    for index in range(0, len(made), 10):
        picture = numpy.asarray(Image.open(made.path(index)))
        assert picture.shape[0] == picture.shape[1] and picture.std() > 5
