"""Class names: ImageNet folders, files beside them, and captions that are class names."""

import json
import shutil

import pytest
from image_folders import COLOURS, class_folder, labels_folder
from PIL import Image

from clip_finetune.engine import (
    UserError,
    combine_datasets,
    eval_zero_shot,
    load_dataset,
)
from clip_finetune.engine.evaluate import sweep
from clip_finetune.engine.evaluate.calibration import calibrate_logit_scale
from clip_finetune.engine.evaluate.class_names import scored_by_classes, with_classes
from clip_finetune.engine.evaluate.comparison import compare_full_clips
from clip_finetune.engine.evaluate.suite import Candidate, evaluate
from clip_finetune.engine.evaluate.sweep import blend_sweep


def test_a_labels_json_of_class_names_is_classified(model, tmp_path):
    folder = class_folder(tmp_path / "classes", per_class=3)
    plain = eval_zero_shot(model, load_dataset(folder))
    labels = {f"{name}/{n}.png": [name, "something longer"] for name in COLOURS for n in range(3)}
    (folder / "labels.json").write_text(json.dumps(labels))
    data = load_dataset(folder)
    found = eval_zero_shot(model, data)
    assert not data.has_labels and found.per_class == plain.per_class
    assert "the first caption of each image is used as its class" in found.notes[0]
    (result,) = evaluate([Candidate("model", None, model)], data)
    measured = result.as_dict()
    assert measured["zero_shot"] == plain.as_dict() and measured["retrieval"]["captions"] == 5
    with pytest.raises(UserError, match="no classes"):
        eval_zero_shot(model, load_dataset(labels_folder(tmp_path / "captions")))


def wnid_folder(folder, wnids):
    for number, wnid in enumerate(wnids):
        (folder / wnid).mkdir(parents=True)
        Image.new("RGB", (32, 32), (9 * number % 256, 50, 50)).save(folder / wnid / "1.png")
    return folder


def test_imagenets_folder_names_become_class_names(model, tmp_path):
    import open_clip

    data = load_dataset(wnid_folder(tmp_path / "few", ["n02123045", "n01440764", "n15075141"]))
    named, notes = with_classes(data)
    assert named.class_names == ("tench", "tabby cat", "toilet paper") and "ImageNet's" in notes[0]
    assert set(named.class_names) <= set(open_clip.IMAGENET_CLASSNAMES)
    found = eval_zero_shot(model, data, templates="none")
    assert set(found.per_class) == set(named.class_names) and notes[0] in found.notes
    # n02084071 is dog, which is none of the 1,000; both words for sunglasses are.
    odd = load_dataset(wnid_folder(tmp_path / "odd", ["n02084071", "n04355933", "n04356056"]))
    named, notes = with_classes(odd)
    assert named.class_names == ("dog", "sunglasses", "sunglasses")
    assert "none of ImageNet's 1,000" in notes[1] and "No model can tell these classes apart" in notes[2]
    found = eval_zero_shot(model, odd, templates="none")
    assert set(found.per_class) == {"dog", "sunglasses (1)", "sunglasses (2)"}
    assert found.per_class["sunglasses (1)"] == found.per_class["sunglasses (2)"] == 0


def test_all_of_imagenets_names_are_in_open_clips_order(tmp_path):
    import open_clip
    from timm.data import ImageNetInfo

    data = load_dataset(wnid_folder(tmp_path / "all", ImageNetInfo("imagenet-1k").label_names()))
    assert with_classes(data)[0].class_names == tuple(open_clip.IMAGENET_CLASSNAMES)


def test_a_file_beside_the_folders_gives_the_class_names(tmp_path):
    folder = wnid_folder(tmp_path / "val", ["n00000001", "n01440764"])
    with pytest.raises(UserError, match="n00000001 is not a known one; put a file LOC_synset_mapping.txt"):
        with_classes(load_dataset(folder))
    (tmp_path / "classes.txt").write_text("n00000001\tmy thing\nn01440764\tfish, and more\nnonsense\n")
    named, notes = with_classes(load_dataset(folder))
    assert named.class_names == ("my thing", "fish") and "from classes.txt" in notes[0]
    (folder / "LOC_synset_mapping.txt").write_text("n00000001 nearer, it is\n")
    assert with_classes(load_dataset(folder))[0].class_names == ("nearer", "tench")


def test_a_dataset_is_scored_by_classes_only_if_all_samples_have_one(model, moved, data, tmp_path):
    classes = load_dataset(class_folder(tmp_path / "classes"))
    names = {f"{name}/{n}.png": [name] for name in classes.class_names for n in range(3)}
    shutil.copytree(tmp_path / "classes", tmp_path / "named")
    (tmp_path / "named/labels.json").write_text(json.dumps(names))
    named, mixed = load_dataset(tmp_path / "named"), combine_datasets([data, classes])
    assert not named.has_labels and mixed.has_labels
    both = combine_datasets([named, classes])
    assert [scored_by_classes(found) for found in (classes, named, data, mixed, both)] == [True, True] + [False] * 3
    assert sweep.measure_of(mixed) == sweep.RETRIEVAL
    assert calibrate_logit_scale(model, mixed).answers == 20 + 4
    assert calibrate_logit_scale(model, named).best == calibrate_logit_scale(model, classes).best
    found, plain = (blend_sweep(moved, model, chosen, steps=2, templates="simple") for chosen in (named, classes))
    assert found.measure == plain.measure == sweep.ZERO_SHOT and found.points == plain.points
    assert any("the first caption of each image is used as its class" in note for note in found.notes)
    (tmp_path / "one").mkdir()
    shutil.copytree(tmp_path / "classes/red", tmp_path / "one/red")
    with pytest.raises(UserError, match="a single class"):
        blend_sweep(moved, model, load_dataset(tmp_path / "one"), steps=2)
    with pytest.raises(UserError, match="too few images with different texts"):
        calibrate_logit_scale(model, load_dataset(tmp_path / "one"))


def test_classes_called_by_wordnet_ids_are_compared_by_their_names(model, moved, tmp_path, monkeypatch):
    for number, (wnid, name) in enumerate([("n01440764", "tench"), ("n02123045", "tabby cat")]):
        for folder in (f"numbers/{wnid}", f"names/{name}"):
            (tmp_path / folder).mkdir(parents=True)
            Image.new("RGB", (32, 32), (200 * number, 50, 50)).save(tmp_path / folder / "1.png")
    found, plain = (compare_full_clips(moved, model, load_dataset(tmp_path / name)) for name in ("numbers", "names"))
    # Rounding depends on the order in which the classes go through the model.
    assert found.model.separation == pytest.approx(plain.model.separation, rel=1e-5)
    assert found.calibration_model.best == pytest.approx(plain.calibration_model.best, rel=1e-5)
    assert sum("named by WordNet IDs" in note for note in found.notes) == 1
