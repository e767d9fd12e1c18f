"""Inspect CLIP Dataset and Prepare CLIP Images in a real ComfyUI."""

import json

import pytest
from comfyui_prompts import node, shown_image, succeed
from image_folders import captioned, noise

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    captioned(comfyui.base / "datasets/photos", {f"{n:02}": noise(n, (300, 200)) for n in range(12)})


def inspection(folder):
    return {
        "1": node("LoadCLIPDataset", folder=folder, validation_split=0.0),
        "2": node("InspectCLIPDataset", dataset=["1", 0], images=5, seed=1),
        "3": node("PreviewAny", source=["2", 0]),
        "4": node("PreviewImage", images=["2", 1]),
        "5": node("PreviewImage", images=["2", 2]),
    }


def test_a_dataset_gets_a_report_a_contact_sheet_and_charts(comfyui):
    folder = captioned(comfyui.base / "datasets/damaged", {f"{n:02}": noise(n) for n in range(12)})
    (folder / "03.png").write_bytes(b"damaged")
    (folder / "04.png").write_bytes((folder / "05.png").read_bytes())
    result = succeed(comfyui, inspection("damaged"))
    report = result["outputs"]["3"]["text"][0]
    assert "12 images" in report and "1 image is broken" in report and "04.png = 05.png" in report
    assert "1 image is broken" in result["texts"]["2"]
    sheet, chart = (shown_image(comfyui, result, number) for number in ("4", "5"))
    assert sheet.mode == chart.mode == "RGB" and sheet.width > 1000 and chart.size == (1024, 720)
    assert shown_image(comfyui, result, "2").size == sheet.size


def test_a_loader_and_the_inspection_are_enough_to_queue(comfyui):
    prompt = {"1": node("LoadCLIPDataset", folder="photos"), "2": node("InspectCLIPDataset", dataset=["1", 0])}
    text = succeed(comfyui, prompt)["texts"]["2"]
    assert (
        text.startswith("photos: ") and "not in this dataset" not in text
    )  # which is said of the other side of the split


def test_prepared_images_are_listed_and_load_and_the_originals_stay(comfyui):
    source = comfyui.base / "datasets/photos"
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    prompt = {
        "1": node("PrepareCLIPImages", folder="photos", crop="centre", jitter_copies=2, flip="safe"),
        "2": node("PreviewAny", source=["1", 0]),
    }
    result = succeed(comfyui, prompt)
    assert result["outputs"]["2"]["text"][0] == "photos_prepared"
    assert "48 images were made from 12" in result["texts"]["1"]
    assert "photos_prepared" in comfyui.choices("LoadCLIPDataset", "folder")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    labels = json.loads((comfyui.base / "datasets/photos_prepared/labels.json").read_text())
    assert labels["00_jitter1.png"] == ["caption of 00"] and len(labels) == 48
    report = succeed(comfyui, inspection("photos_prepared"))["outputs"]["3"]["text"][0]
    assert "48 images" in report and "made from 12 originals" in report and "look alike" not in report


def test_the_same_settings_reuse_the_folder_and_others_make_the_next_one(comfyui):
    prompt = {"1": node("PrepareCLIPImages", folder="photos", jitter_copies=1, name="mine")}
    succeed(comfyui, prompt)
    comfyui.forget()
    assert "was made from these images" in succeed(comfyui, prompt)["texts"]["1"]
    prompt["1"]["inputs"]["seed"] = 1
    succeed(comfyui, prompt)
    assert (comfyui.base / "datasets/mine_2").is_dir() and not (comfyui.base / "datasets/mine_3").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/../../elsewhere"])
def test_a_name_never_leads_out_of_the_datasets_folder(comfyui, name):
    succeed(comfyui, {"1": node("PrepareCLIPImages", folder="photos", crop="centre", name=name)})
    assert not list(comfyui.base.glob("*elsewhere*")) and not list(comfyui.base.parent.glob("*elsewhere*"))
    assert list((comfyui.base / "datasets").glob("*elsewhere*"))


def test_cancel_leaves_nothing_behind(comfyui):
    seen = []

    def cancel(message):
        if message["type"] == "progress_state" and not seen:
            if message["data"]["nodes"].get("1", {}).get("value", 0) >= 1:
                seen.append(comfyui.interrupt())

    captioned(comfyui.base / "datasets/many", {f"{n:03}": noise(n, (900, 700)) for n in range(150)})
    prompt = {"1": node("PrepareCLIPImages", folder="many", jitter_copies=10)}
    assert comfyui.queue(prompt, on_message=cancel)["status"] == "interrupted" and seen
    assert not (comfyui.base / "datasets/many_prepared").exists()
    assert not list((comfyui.base / "datasets").glob(".*.part"))


def test_nothing_to_do_and_an_unknown_class_are_refused(comfyui):
    for inputs, words in (
        ({}, "There is nothing to do"),
        ({"crop": "objects", "only": "unicorn"}, "does not know 'unicorn'"),
    ):
        result = comfyui.queue({"1": node("PrepareCLIPImages", folder="photos", **inputs)})
        assert result["status"] == "error" and words in result["error"], result
