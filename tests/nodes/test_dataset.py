"""Datasets in a real ComfyUI: formats, columns, combining, images from other nodes, converted captions."""

import json
import shutil

import pytest
from clips import random_clip
from comfyui_prompts import metrics, node, succeed
from image_folders import class_folder, labels_folder
from PIL import Image

from clip_finetune.engine import load_dataset, save_full_clip

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    """The datasets joined_a, joined_b, joined_classes, and the model sets_tiny."""
    save_full_clip(random_clip(), comfyui.base / "models/full_clip/sets_tiny.safetensors")
    labels_folder(comfyui.base / "datasets/joined_a", 12)
    labels_folder(comfyui.base / "datasets/joined_b", 8)
    class_folder(comfyui.base / "datasets/joined_classes")


def loaded(folder, **widgets):
    return node("LoadCLIPDataset", **({"folder": folder, "validation_split": 0.0} | widgets))


def trained_on(dataset, run_name):
    """Return nodes 7 to 9, which train a tiny model on a dataset for one epoch."""
    return {
        "7": node("CLIPTrainCheckpoints"),
        "8": node("LoadFullCLIP", model="sets_tiny.safetensors"),
        "9": node(
            "TrainCLIP",
            full_clip=["8", 0],
            train=dataset,
            options=["7", 0],
            run_name=run_name,
            epochs=1,
            batch_size=4,
        ),
    }


def test_the_columns_of_a_table_can_be_named(comfyui):
    folder = comfyui.base / "datasets/own_columns"
    labels_folder(folder, 8)
    (folder / "labels.json").unlink()
    rows = "".join(f"{n},{n:03}.png,number {n}\n" for n in range(8))
    (folder / "t.csv").write_text("n,bild,worte\n" + rows, encoding="utf-8")
    prompt = {
        "1": loaded("own_columns", image_column="bild", caption_column="worte"),
        **trained_on(["1", 0], "columns"),
    }
    result = succeed(comfyui, prompt)
    assert "8 images for training" in result["texts"]["1"] and "t.csv holds captions" in result["texts"]["1"]
    del prompt["1"]["inputs"]["caption_column"], prompt["1"]["inputs"]["image_column"]
    failed = comfyui.queue(prompt)
    assert failed["status"] == "error" and "begins with the line 'n,bild,worte'" in failed["error"]


def test_a_change_of_cocos_caption_file_is_noticed(comfyui):
    for name in ("train2017", "val2017"):
        labels_folder(comfyui.base / "datasets/coco" / name, 8)
        (comfyui.base / "datasets/coco" / name / "labels.json").unlink()
    file = comfyui.base / "datasets/coco/annotations/captions_train2017.json"
    file.parent.mkdir()
    images = [{"id": n, "file_name": f"{n:03}.png"} for n in range(8)]
    for count in (5, 6):
        annotations = [{"image_id": n, "caption": f"caption {n}"} for n in range(count)]
        file.write_text(json.dumps({"images": images, "annotations": annotations}))
        prompt = {"1": loaded("coco/train2017"), **trained_on(["1", 0], "coco")}
        text = succeed(comfyui, prompt)["texts"]["1"]
        assert f"{count} images for training" in text and "../annotations/captions_train2017.json" in text


def test_combined_datasets_are_drawn_by_weight(comfyui):
    prompt = {
        "1": loaded("joined_a"),
        "2": loaded("joined_b"),
        "3": loaded("joined_classes"),
        "4": node(
            "CombineCLIPDatasets",
            weights="2, 1 1",
            **{"datasets.dataset_1": ["1", 0], "datasets.dataset_2": ["2", 0], "datasets.dataset_3": ["3", 0]},
        ),
        **trained_on(["4", 0], "joined"),
    }
    result = succeed(comfyui, prompt)
    assert "32 images; 44 per epoch" in result["texts"]["4"]
    assert len(metrics(comfyui, "joined")) == 11
    prompt["4"]["inputs"]["weights"] = "2, one"
    failed = comfyui.queue(prompt)
    assert failed["status"] == "error" and "give one number for each dataset" in failed["error"]


def test_images_and_captions_of_other_nodes_are_the_same_dataset_after_a_restart(comfyui):
    folder = comfyui.base / "input/from_core"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (20 + number, 24), (30 * number, 90, 200 - 20 * number)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}\nor {number}")
    prompt = {
        "1": node("LoadImageTextDataSetFromFolder", folder="from_core"),
        "2": node("CLIPDatasetFromImages", images=["1", 0], captions=["1", 1]),
        **trained_on(["2", 0], "from_images"),
    }
    assert "8 images with captions" in succeed(comfyui, prompt)["texts"]["2"]
    folder = comfyui.base / "temp/clip_finetune_images"
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(before) == 8
    # As after a restart: the temp folder is empty and nothing is remembered.
    shutil.rmtree(folder)
    comfyui.forget()
    prompt["7"]["inputs"]["save_every_minutes"] = 3.0
    result = succeed(comfyui, prompt)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    assert "9" in result["executed"] and not (comfyui.base / "output/clip_finetune/from_images_2").exists()


def test_captioned_images_in_the_output_folder_are_listed_and_load(comfyui):
    labels_folder(comfyui.base / "datasets/taken", 8)
    for name in ("made", "sets/taken", "taken"):
        prompt = {
            "1": node("EmptyImage", width=16, height=16, batch_size=1, color=255),
            "2": node("StringConcatenate", string_a="a", string_b="picture", delimiter=" "),
            "3": node(
                "SaveImageTextDataSetToFolder",
                images=["1", 0],
                texts=["2", 0],
                folder_name=name,
                filename_prefix="image",
                mode="increment",
            ),
        }
        succeed(comfyui, prompt)
    for name in ("clip_finetune/a_run", "clip_finetune/captioned", "uncaptioned"):
        folder = comfyui.base / "output" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "chart.png")
        (folder / "config.json").write_text("{}")
    (folder.parent / "clip_finetune/captioned/chart.txt").write_text("a chart")
    choices = comfyui.choices("LoadCLIPDataset", "folder")
    assert {"made", "sets/taken", "taken", "output/taken"} <= set(choices)
    assert not {"sets", "clip_finetune", "clip_finetune/a_run", "clip_finetune/captioned", "uncaptioned"} & set(choices)
    for name in ("made", "output/taken"):
        prompt = {"1": loaded(name), "2": node("InspectCLIPDataset", dataset=["1", 0])}
        result = succeed(comfyui, prompt)
        assert "1 images for training" in result["texts"]["1"], result["texts"]
    assert (
        "8 images for training"
        in succeed(comfyui, {"1": loaded("taken"), "2": node("InspectCLIPDataset", dataset=["1", 0])})["texts"]["1"]
    )
    for file in (comfyui.base / "output/made").glob("*.txt"):
        file.unlink()
    prompt["1"]["inputs"]["folder"] = "made"
    assert comfyui.queue(prompt)["status"] == "rejected"


def test_a_batch_shares_one_text(comfyui):
    prompt = {
        "1": node("EmptyImage", width=16, height=16, batch_size=3, color=0),
        "2": node("StringConcatenate", string_a="a", string_b="b", delimiter=" "),
        "3": node("CLIPDatasetFromImages", images=["1", 0], captions=["2", 0]),
        **trained_on(["3", 0], "refused"),
    }
    # Its images are all the same here, so they become one, and one is too few to train on.
    failed = comfyui.queue(prompt)
    assert failed["status"] == "error" and "1 images with captions" in failed["texts"]["3"]


def test_converted_captions_are_listed_as_a_new_dataset(comfyui):
    prompt = {
        "1": node("ConvertCLIPCaptions", folder="joined_a", to="metadata"),
        "2": node("PreviewAny", source=["1", 0]),
    }
    result = succeed(comfyui, prompt)
    assert result["outputs"]["2"]["text"] == ["joined_a_metadata"] and "hard links" in result["texts"]["1"]
    assert "joined_a_metadata" in comfyui.choices("LoadCLIPDataset", "folder")
    old, new = (load_dataset(comfyui.base / "datasets" / name) for name in ("joined_a", "joined_a_metadata"))
    assert (new.format, new.names, list(new.captions)) == ("metadata", old.names, list(old.captions))
    assert "1" in succeed(comfyui, prompt)["cached"]
    prompt["1"]["inputs"]["to"] = "sidecar"
    succeed(comfyui, prompt)
    prompt["1"]["inputs"]["folder"] = "../joined_a"
    assert comfyui.queue(prompt)["status"] == "rejected"
