"""ClipDataset: missing images and the fingerprint."""

import dataclasses
import os
import random
import shutil

from image_folders import labels_folder

from clip_finetune.engine import ClipDataset, load_dataset
from clip_finetune.engine.data import fingerprint


def missing_by_definition(dataset):
    """An image is there if any of its candidate paths is a file."""
    return [index for index in range(len(dataset)) if not any(map(os.path.isfile, dataset.locations.candidates(index)))]


def test_missing_images_are_those_without_a_file_at_any_candidate_path(tmp_path):
    rng = random.Random(3)
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
    names = files + [rng.choice("/\\").join(rng.choices(parts, k=rng.randint(1, 4))) for _ in range(4000)]
    origins = [str(rng.choice([top, top / "deep", top / "deep/er"])) for _ in names]
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


def test_the_fingerprint_does_not_change_between_versions(tmp_path):
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


def test_a_large_datasets_fingerprint_notices_changed_columns_and_folders(tmp_path, monkeypatch):
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
