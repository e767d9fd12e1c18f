"""Data sets: what people have in their folders, and what the training gets of it."""

import collections
import csv
import dataclasses
import json
import os
import random
import shutil

import pytest
import torch
from image_folders import class_folder, labels_folder
from PIL import Image

from clip_finetune.engine import ClipDataset, UserError, load_dataset, split_dataset
from clip_finetune.engine.cli.info import describe_dataset
from clip_finetune.engine.data import fingerprint
from clip_finetune.engine.data.images.decoding import BrokenImage, load_image, normalize
from clip_finetune.engine.data.images.folder_tree import image_suffixes
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.data.loader import LoaderOptions, TrainLoader
from clip_finetune.engine.data.readers import json_stream
from clip_finetune.engine.data.readers.labels_json import read_by_name
from clip_finetune.engine.data.readers.parsed import caption_lines
from clip_finetune.engine.data.sampler import CaptionsConfig, epoch_order
from clip_finetune.engine.data.splits import original_paths
from clip_finetune.engine.data.tokenizer import Tokenizer


def picture(file, size=(40, 30), colour=(200, 30, 30), mode="RGB"):
    file.parent.mkdir(parents=True, exist_ok=True)
    plain = Image.new("RGB", size, colour)
    (plain.quantize(8) if mode == "P" else plain.convert(mode)).save(file)
    return file


# ---- formats ---------------------------------------------------------------------------------------------------------


def test_text_files_beside_pictures_give_a_caption_a_line(tmp_path):
    for name in ("a.png", "b.JPG", "sub/c.webp", "d.png"):
        picture(tmp_path / name)
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
        picture(tmp_path / place / name)
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
def test_a_csv_may_have_several_rows_a_picture(tmp_path, text):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    (tmp_path / "captions.csv").write_bytes(text.encode("utf-8-sig"))
    data = load_dataset(tmp_path)
    assert list(data.captions) == [("one, two", "three"), ("four",)] and data.missing() == []


def test_class_folders_give_labels_and_a_sentence_to_train_on(tmp_path):
    data = load_dataset(class_folder(tmp_path / "classes"))
    assert (
        data.class_names == ("blue", "green", "red", "yellow") and data.labels == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    )
    assert data.training_captions(0) == ("a photo of a blue.",) and not data.has_captions


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda folder: None, "holds no images"),
        (lambda folder: picture(folder / "a.png"), "1 images but no captions"),
        (lambda folder: (folder / "labels.json").write_text('{"a.png": ["x"'), "not valid JSON"),
        (lambda folder: (folder / "labels.json").write_text('{"a.png": 3, "b.png": ["x"]}'), "captions of a.png"),
        (lambda folder: (folder / "labels.json").write_bytes(b'{"a.png": ["\xff\xfe"]}'), "not UTF-8"),
        (lambda folder: [picture(folder / "a.png"), (folder / "a.txt").write_text(" \n")], "no captions"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_sentence(tmp_path, make, words):
    folder = tmp_path / "mine"
    folder.mkdir()
    make(folder)
    with pytest.raises(UserError, match=words) as refusal:
        load_dataset(folder)
    assert "mine" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "..\\secret.png", "sub/../../secret.png"])
def test_a_name_never_leads_out_of_the_data_set(tmp_path, name):
    picture(tmp_path / "secret.png")
    folder = tmp_path / "mine"
    picture(folder / "a.png")
    (folder / "labels.json").write_text(json.dumps({name: ["out"], "a.png": ["in"]}))
    data = load_dataset(folder)
    assert data.missing() == [0] and not data.path(0).exists()


def test_reading_a_labels_json_in_pieces_gives_what_json_gives(tmp_path, monkeypatch):
    chance = random.Random(0)
    letters = 'ab \\"\n\t,:{}[]ü😀\u2028é'
    for size in (1, 2, 3, 7, 64):
        monkeypatch.setattr(json_stream, "_BLOCK", size)
        for round_ in range(30):
            labels = {
                f"{n}{''.join(chance.choices(letters, k=3))}.png": [
                    "x" + "".join(chance.choices(letters, k=chance.randint(0, 12))) for _ in range(chance.randint(1, 3))
                ]
                for n in range(chance.randint(1, 6))
            }
            file = tmp_path / "labels.json"
            text = json.dumps(labels, indent=chance.choice([None, 1]), ensure_ascii=chance.random() < 0.5)
            file.write_text(text, encoding="utf-8")
            found = read_by_name(file)
            assert found == {name: caption_lines(captions) for name, captions in labels.items()}, round_
            file.write_text(text[: chance.randint(1, len(text) - 1)].rstrip("} \n"), encoding="utf-8")
            with pytest.raises(UserError, match="not valid JSON"):
                read_by_name(file)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (77, 61), (224, 224), (1000, 31)])
def test_the_pixels_are_those_of_open_clips_transform(tmp_path, size):
    import open_clip

    noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "a.png")
    theirs = open_clip.image_transform(64, is_train=False)(Image.open(tmp_path / "a.png"))
    ours = normalize(load_image(tmp_path / "a.png", 64)[None])[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "I;16", "LA", "RGBA", "F"])
def test_pictures_of_every_mode_become_rgb(tmp_path, mode):
    file = tmp_path / {"CMYK": "a.jpg", "F": "a.tiff"}.get(mode, "a.png")
    if mode == "I;16":
        Image.new("I;16", (40, 40), 50_000).save(file)
    else:
        picture(file, (40, 40), (200, 200, 200), mode)
    found = load_image(file, 32)
    assert found.shape == (3, 32, 32) and found.dtype == torch.uint8
    expected = 50_000 / 256 if mode == "I;16" else 255 if mode == "1" else 200
    if mode not in ("1",):
        assert (found.float() - expected).abs().max() <= 8


def test_alpha_lies_over_white_and_exif_turns_the_picture(tmp_path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png", 32).min() == 255
    upright = Image.new("RGB", (32, 64), "red")
    upright.paste("blue", (0, 32, 32, 64))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright.save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png", 32)
    assert turned[2, 4, 16] > 200 and turned[0, -4, 16] > 200


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "gone"])
def test_a_broken_picture_says_what_is_wrong(tmp_path, damage):
    file = picture(tmp_path / "a.jpg", (200, 200))
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": file.read_bytes()[:400], "text": b"hello" * 50}[damage])
    with pytest.raises(BrokenImage) as refusal:
        load_image(file, 32)
    assert str(refusal.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BrokenImage, match="too large"):
        load_image(picture(tmp_path / "a.png", (100, 100)), 32)


# ---- captions --------------------------------------------------------------------------------------------------------


def test_the_tokens_are_open_clips():
    import open_clip

    texts = ["a photo of a cat", "", "Ünïcödé & <html> 😀", "word " * 200, "one\ntwo"]
    assert torch.equal(Tokenizer(77)(texts), open_clip.SimpleTokenizer(context_length=77)(texts))


def test_a_long_caption_is_cut_and_counted(tmp_path):
    folder = labels_folder(tmp_path / "colours", 2, captions=1)
    (folder / "labels.json").write_text(json.dumps({"000.png": ["word " * 75, "word " * 76], "001.png": ["short"]}))
    facts = describe_dataset(load_dataset(folder))
    assert facts["truncated_captions"] == 1 and facts["captions"] == 3 and facts["broken"] == []


def test_every_caption_comes_and_one_an_epoch(tmp_path):
    data = load_dataset(labels_folder(tmp_path / "colours", 10, captions=3))
    loader = TrainLoader(data, Tokenizer(77), Transform(image_size=32), CaptionsConfig(), LoaderOptions(batch_size=3))
    drawn = collections.defaultdict(set)
    batches = loader.iterate()
    for epoch in range(30):
        seen = []
        for _ in range(3):
            step, batch = next(batches)
            assert step == epoch * 3 + len(seen) // 3
            seen += batch.indices
            for index, tokens in zip(batch.indices, batch.tokens, strict=True):
                drawn[index].add(tuple(tokens.tolist()))
        assert len(set(seen)) == 9  # floor(10 / 3) steps; one picture is left over
    loader.close()
    for index, captions in enumerate(data.captions):
        assert drawn[index] == {tuple(row.tolist()) for row in Tokenizer(77)(captions)}


def test_the_order_is_a_function_of_seed_and_step(tmp_path):
    data = load_dataset(labels_folder(tmp_path / "colours", 10))

    def batches(start, count, seed=0):
        options = LoaderOptions(batch_size=4, seed=seed)
        loader = TrainLoader(data, Tokenizer(77), Transform(image_size=32), CaptionsConfig(), options)
        found = [
            (step, batch.indices, batch.tokens.tolist())
            for _, (step, batch) in zip(range(count), loader.iterate(start), strict=False)
        ]
        loader.close()
        return found

    assert batches(0, 9)[5:] == batches(5, 4) and batches(0, 9) != batches(0, 9, seed=1)
    assert sorted(epoch_order(10, 0, 0).tolist()) == list(range(10))
    assert epoch_order(100, 0, 0).tolist() != epoch_order(100, 0, 1).tolist() != epoch_order(100, 1, 0).tolist()


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_adding_pictures_moves_none_to_the_other_side(tmp_path):
    before = split_dataset(load_dataset(labels_folder(tmp_path / "a", 40)), 0.3, seed=5)
    after = split_dataset(load_dataset(labels_folder(tmp_path / "a", 60)), 0.3, seed=5)
    assert set(before[0].names) <= set(after[0].names) and set(before[1].names) <= set(after[1].names)
    assert len(after[0]) + len(after[1]) == 60 and 6 <= len(after[1]) <= 30


def test_a_split_takes_one_at_least_and_leaves_one(tmp_path):
    data = load_dataset(labels_folder(tmp_path / "a", 4))
    assert [len(part) for part in split_dataset(data, 1e-9)] == [3, 1]
    assert [len(part) for part in split_dataset(data, 0.999)] == [1, 3]
    assert [len(part) for part in split_dataset(data, 0)] == [4, 0]
    with pytest.raises(UserError, match="a share from 0"):
        split_dataset(data, 1.0)


# ---- real ones -------------------------------------------------------------------------------------------------------


def test_real_data_sets_open(shared_data):
    flickr = load_dataset(shared_data / "flickr8k")
    with open(shared_data / "flickr8k/captions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert flickr.format == "csv" and set(flickr.names) == {row["image"] for row in rows}
    assert {len(found) for found in flickr.captions} <= {4, 5}  # five, of which a few are the same sentence
    assert flickr.missing() == [] and load_image(flickr.path(0), 224).shape == (3, 224, 224)
    cifar = load_dataset(shared_data / "cifar10-sample/train")
    assert len(cifar) == 2000 and len(cifar.class_names) == 10
    emoji = describe_dataset(load_dataset(shared_data / "twemoji"))
    assert emoji["images"] == 1559 and emoji["broken"] == [] and emoji["truncated_captions"] == 0
    with pytest.raises(UserError, match="COCO"):
        load_dataset(shared_data / "coco-mini/annotations")


# ---- odd files -------------------------------------------------------------------------------------------------------


def test_sixteen_bits_of_grey_stay_grey(tmp_path):
    """A PGM of 16 bits, written by hand: 0x7600 of 0xffff is 118 of 255."""
    (tmp_path / "a.pgm").write_bytes(b"P5 40 40 65535\n" + b"\x76\x00" * 1600)
    assert set(load_image(tmp_path / "a.pgm", 32).flatten().tolist()) == {118}


def test_a_picture_as_long_as_a_rope_costs_no_memory(tmp_path):
    Image.new("RGB", (1, 20000), (9, 90, 200)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 32)
    assert image.shape == (3, 32, 32) and image[:, 16, 16].tolist() == [9, 90, 200]


def test_postscript_is_no_picture_because_reading_it_runs_a_program():
    assert not {".eps", ".ps"} & image_suffixes() and ".png" in image_suffixes()


def test_a_quotation_mark_that_is_never_closed_is_told(tmp_path):
    (tmp_path / "captions.csv").write_text('image,caption\n1.png,"one\n2.png,two\n')
    with pytest.raises(UserError, match="is a quotation mark missing"):
        load_dataset(tmp_path / "captions.csv")


# ---- a million names -------------------------------------------------------------------------------------------------


def missing_by_definition(dataset):
    """A picture is there if any of the places that it may be at is a file."""
    return [index for index in range(len(dataset)) if not any(map(os.path.isfile, dataset.locations.candidates(index)))]


def test_missing_pictures_are_those_that_no_place_has_whatever_their_names(tmp_path):
    chance = random.Random(3)
    top, beside = tmp_path / "top", tmp_path / "images"
    files = ["a.jpg", "b c.png", "ü.jpg", "deep/a.jpg", "deep/er/x.jpg", "images/y.jpg", "images/deep/z.jpg", "..jpg"]
    for file in files:
        (top / file).parent.mkdir(parents=True, exist_ok=True)
        (top / file).touch()
    (beside / "deep").mkdir(parents=True)
    (beside / "only.jpg").touch()
    (tmp_path / "outside.jpg").touch()
    parts = [
        "a.jpg",
        "b c.png",
        "ü.jpg",
        "x.jpg",
        "y.jpg",
        "only.jpg",
        "outside.jpg",
        "..jpg",
        ".",
        "..",
        "",
        "deep",
        "er",
        "images",
        "top",
        "no\0name",
        str(tmp_path),
        str(top),
        "none.jpg",
        "\udce4",
    ]
    names = files + [chance.choice("/\\").join(chance.choices(parts, k=chance.randint(1, 4))) for _ in range(4000)]
    origins = [str(chance.choice([top, top / "deep", top / "deep/er"])) for _ in names]
    for roots in ((), (str(top),), (str(top), str(beside))):
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
        expected = missing_by_definition(dataset)
        assert 0 < len(expected) < len(names) and dataset.missing() == expected


def test_a_split_goes_by_the_place_of_each_picture_whatever_its_name(tmp_path):
    """The definition, a picture at a time."""
    chance, top = random.Random(4), tmp_path / "top"
    parts = ["a.jpg", "b.png", "ü.jpg", ".", "..", "", "deep", "er", "top", str(top), "no\0name"]
    names = [chance.choice("/\\").join(chance.choices(parts, k=chance.randint(1, 4))) for _ in range(3000)]
    origins = [str(chance.choice([top, top / "deep", tmp_path / "other"])) for _ in names]
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
        # A name that means a folder above it names no picture.
        wrong = [pair for pair in zip(found, expected, strict=True) if pair[0] != pair[1] and pair[1].strip("./")]
        assert len(set(expected)) > 100 and not wrong


def test_the_fingerprint_is_what_runs_on_the_disk_have(tmp_path):
    """A number of its own: with another one, no run that began before would go on."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"0123456789")
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    (tmp_path / "labels.json").write_text('{"a.png": ["one", "two"], "b.png": "three", "gone.png": "four"}')
    plain = load_dataset(tmp_path)
    more = dataclasses.replace(
        plain, labels=[0, None, 1], class_names=("x", "y"), originals=["", "a.png", ""], repeats=[1, 2, 3]
    )
    assert plain.fingerprint() == "f9d00d995b83d2ffb7eb9c54f848e345b8e811addbd1e9fce758ad771a791199"
    assert more.fingerprint() == "92f39bbed06e8974618c0ce2accb23206d324616b2100fe1b39e0ce00f830494"


def test_a_large_data_sets_fingerprint_notices_what_its_columns_and_folders_hold(tmp_path, monkeypatch):
    def fresh(**changes):
        return dataclasses.replace(load_dataset(folder), **changes).fingerprint()

    folder = labels_folder(tmp_path / "colours", 12)
    os.utime(folder, ns=(10**18, 10**18))  # so that what changes later has another time, however fast it comes
    exact = fresh()
    monkeypatch.setattr(fingerprint, "MOST_STATTED", 11)
    rough, data = fresh(), load_dataset(folder)
    assert rough != exact and fresh() == rough
    names, captions = list(data.names), [data.captions[index] for index in range(12)]
    different = {
        rough,
        fresh(names=[names[1], names[0], *names[2:]]),
        fresh(names=[names[0] + names[1][:1], names[1][1:], *names[2:]]),
        fresh(captions=[("another",), *captions[1:]]),
        fresh(repeats=[2] + [1] * 11),
        fresh(originals=[names[1]] + [""] * 11),
        fresh(labels=[0] + [None] * 11, class_names=("a",)),
        fresh(labels=[0] + [None] * 11, class_names=("b",)),
    }
    assert len(different) == 8
    os.utime(data.path(3), ns=(0, 0))
    assert fresh() == rough  # as the docstring says
    os.rename(folder, tmp_path / "moved")
    assert load_dataset(tmp_path / "moved").fingerprint() == rough
    os.rename(tmp_path / "moved", folder)
    os.replace(shutil.copy(data.path(3), folder / "copy"), data.path(3))
    assert fresh() not in different
