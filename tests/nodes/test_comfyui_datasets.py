"""Data sets in a real ComfyUI: formats and columns, several joined, images from the graph, captions converted."""

import json
import shutil

import pytest
from clips import random_clip
from image_folders import class_folder, labels_folder
from PIL import Image

from clip_finetune.engine import load_dataset, save_full_clip

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    """Data sets joined_a, joined_b, joined_classes, and the model sets_tiny."""
    save_full_clip(random_clip(), comfyui.base / "models/full_clip/sets_tiny.safetensors")
    labels_folder(comfyui.base / "datasets/joined_a", 12)
    labels_folder(comfyui.base / "datasets/joined_b", 8)
    class_folder(comfyui.base / "datasets/joined_classes")


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def loaded(folder, **widgets):
    return node("LoadCLIPDataset", **({"folder": folder, "validation_split": 0.0} | widgets))


def trained_on(dataset, run_name):
    """Train a tiny model on a link, for one epoch: nodes 8 and 9."""
    return {
        "8": node("LoadFullCLIP", model="sets_tiny.safetensors"),
        "9": node(
            "TrainCLIP", full_clip=["8", 0], train=dataset, run_name=run_name, epochs=1, batch_size=4, precision="fp32"
        ),
    }


def steps(comfyui, run_name):
    lines = (comfyui.base / "output/clip_finetune" / run_name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "step"]


def succeed(comfyui, prompt):
    result = comfyui.queue(prompt)
    assert result["status"] == "success" and not result["node_errors"], result
    return result


def test_a_table_with_columns_of_ones_own_is_read(comfyui):
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
    assert "8 pictures to train on" in result["texts"]["1"] and "t.csv holds captions" in result["texts"]["1"]
    del prompt["1"]["inputs"]["caption_column"], prompt["1"]["inputs"]["image_column"]
    failed = comfyui.queue(prompt)
    assert failed["status"] == "error" and "begins with the line 'n,bild,worte'" in failed["error"]


def test_the_captions_of_coco_are_noticed_when_they_change(comfyui):
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
        assert f"{count} pictures to train on" in text and "../annotations/captions_train2017.json" in text


def test_data_sets_are_joined_and_an_epoch_draws_by_weight(comfyui):
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
    assert "32 pictures; an epoch draws 44" in result["texts"]["4"]
    assert len(steps(comfyui, "joined")) == 11
    prompt["4"]["inputs"]["weights"] = "2, one"
    failed = comfyui.queue(prompt)
    assert failed["status"] == "error" and "give a number for each data set" in failed["error"]


def test_images_and_texts_of_other_nodes_are_a_data_set_and_stay_the_same_one(comfyui):
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
    assert "8 pictures with captions" in succeed(comfyui, prompt)["texts"]["2"]
    kept = comfyui.base / "temp/clip_finetune_pictures"
    before = {file.name: file.stat().st_mtime_ns for file in kept.iterdir()}
    assert len(before) == 8
    # As after a restart: the temp folder is empty and nothing is remembered.
    shutil.rmtree(kept)
    comfyui.forget()
    prompt["9"]["inputs"]["save_every_minutes"] = 3.0
    result = succeed(comfyui, prompt)
    assert {file.name: file.stat().st_mtime_ns for file in kept.iterdir()} == before
    assert "9" in result["executed"] and not (comfyui.base / "output/clip_finetune/from_images_2").exists()


def test_what_core_saves_into_the_output_folder_is_listed_and_read(comfyui):
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
    for name in ("clip_finetune/a_run", "clip_finetune/captioned", "pictures"):
        folder = comfyui.base / "output" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "chart.png")
        (folder / "config.json").write_text("{}")
    (folder.parent / "clip_finetune/captioned/chart.txt").write_text("a chart")
    choices = comfyui.choices("LoadCLIPDataset", "folder")
    assert {"made", "sets/taken", "taken", "output/taken"} <= set(choices)
    assert not {"sets", "clip_finetune", "clip_finetune/a_run", "clip_finetune/captioned", "pictures"} & set(choices)
    for name in ("made", "output/taken"):
        prompt = {"1": loaded(name), "2": node("InspectCLIPDataset", dataset=["1", 0])}
        result = succeed(comfyui, prompt)
        assert "1 pictures to train on" in result["texts"]["1"], result["texts"]
    assert (
        "8 pictures to train on"
        in succeed(comfyui, {"1": loaded("taken"), "2": node("InspectCLIPDataset", dataset=["1", 0])})["texts"]["1"]
    )
    for file in (comfyui.base / "output/made").glob("*.txt"):
        file.unlink()
    prompt["1"]["inputs"]["folder"] = "made"
    assert comfyui.queue(prompt)["status"] == "rejected"


def test_images_without_a_text_each_are_refused(comfyui):
    prompt = {
        "1": node("EmptyImage", width=16, height=16, batch_size=3, color=0),
        "2": node("StringConcatenate", string_a="a", string_b="b", delimiter=" "),
        "3": node("CLIPDatasetFromImages", images=["1", 0], captions=["2", 0]),
        **trained_on(["3", 0], "refused"),
    }
    # One text for a batch is that of all its pictures, which are one and the same here.
    failed = comfyui.queue(prompt)
    assert failed["status"] == "error" and "1 pictures with captions" in failed["texts"]["3"]


def test_converted_captions_are_a_new_data_set_that_is_listed(comfyui):
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
