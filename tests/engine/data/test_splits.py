"""Training and validation split by original image."""

import os
import random

import pytest
from caption_folders import write_folder
from image_folders import labels_folder

from clip_finetune.engine import ClipDataset, UserError, load_dataset, split_dataset
from clip_finetune.engine.data.splits import original_paths


def test_adding_images_moves_none_to_the_other_side(tmp_path):
    before = split_dataset(load_dataset(labels_folder(tmp_path / "a", 40)), 0.3, seed=5)
    after = split_dataset(load_dataset(labels_folder(tmp_path / "a", 60)), 0.3, seed=5)
    assert set(before[0].names) <= set(after[0].names) and set(before[1].names) <= set(after[1].names)
    assert len(after[0]) + len(after[1]) == 60 and 6 <= len(after[1]) <= 30


def test_a_split_takes_at_least_one_image_and_leaves_one(tmp_path):
    data = load_dataset(labels_folder(tmp_path / "a", 4))
    assert [len(part) for part in split_dataset(data, 1e-9)] == [3, 1]
    assert [len(part) for part in split_dataset(data, 0.999)] == [1, 3]
    assert [len(part) for part in split_dataset(data, 0)] == [4, 0]
    with pytest.raises(UserError, match="a share from 0"):
        split_dataset(data, 1.0)


def test_a_split_depends_on_the_path_of_each_image_whatever_its_name(tmp_path):
    """Compares with the definition, one image at a time."""
    rng, top = random.Random(4), tmp_path / "top"
    parts = ["a.jpg", "b.png", "ü.jpg", ".", "..", "", "deep", "er", "top", str(top), "no\0name"]
    names = [rng.choice("/\\").join(rng.choices(parts, k=rng.randint(1, 4))) for _ in range(3000)]
    origins = [str(rng.choice([top, top / "deep", tmp_path / "other"])) for _ in names]
    for roots in ((), (str(top),), (str(top), str(tmp_path / "other"))):
        dataset = ClipDataset(
            name="odd",
            folder=top,
            format="",
            reason="",
            names=names,
            captions=[("x",)] * len(names),
            labels=[None] * len(names),
            origins=origins,
            roots=roots,
        )
        expected = []
        for origin, name in zip(origins, names, strict=True):
            place = os.path.normpath(os.path.join(origin, name.replace("\\", "/")))
            tops = [root for root in roots if place.startswith(os.path.join(root, ""))]
            expected.append(os.path.relpath(place, tops[0] if tops else top))
        found = original_paths(dataset)
        # A name that means a folder above it names no image.
        wrong = [pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1] and pair[1].strip("./")]
        assert len(set(expected)) > 100 and not wrong


def test_an_original_need_not_be_there_for_its_copies_to_stay_together(tmp_path):
    lines = "picture\toriginal\nx/a1.png\t../old/a.png\nx/a2.png\tx/a1.png\nb.png\tc.png\n"
    names = ["x/a1.png", "x/a2.png", "b.png", "c.png"]
    folder = write_folder(
        tmp_path / "new", {"originals.tsv": lines, "l.json": dict.fromkeys(names, "x")}, " ".join(names)
    )
    data = load_dataset(folder)
    old = str(tmp_path / "old/a.png")
    assert [data.original(index) for index in range(4)] == [old, old, str(folder / "c.png"), str(folder / "c.png")]
    for seed in range(20):
        parts = [set(part.names) for part in split_dataset(data, 0.5, seed)]
        assert {"x/a1.png", "x/a2.png"} in [part - {"b.png", "c.png"} for part in parts]
        assert {"b.png", "c.png"} in [part & {"b.png", "c.png"} for part in parts]
    assert load_dataset(folder / "l.json").original(0) == old


@pytest.mark.parametrize("text", ["image\toriginal\n", "picture\toriginal\nno tab\n", "picture,original\na,b\n"])
def test_a_damaged_list_of_originals_is_an_error(tmp_path, text):
    folder = write_folder(tmp_path, {"originals.tsv": text, "l.json": {"a.png": "x"}})
    with pytest.raises(UserError, match=r"originals.tsv has .* in line \d"):
        load_dataset(folder)
