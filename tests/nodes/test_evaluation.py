"""Evaluate Zero-Shot and Evaluate Retrieval in a real ComfyUI."""

import pytest
from clips import random_clip
from comfyui_prompts import node, succeed, training
from image_folders import class_folder, labels_folder

from clip_finetune.engine import save_full_clip

pytestmark = pytest.mark.comfyui


def test_zero_shot_and_retrieval_are_compared_with_the_baseline(comfyui):
    save_full_clip(random_clip(), comfyui.base / "models/full_clip/tiny.safetensors")
    labels_folder(comfyui.base / "datasets/colours", 24)
    class_folder(comfyui.base / "datasets/classes")
    prompt = training("measured", epochs=10) | {
        "5": node("LoadCLIPDataset", folder="classes", captions="auto", validation_split=0.0, seed=0),
        "6": node("EvalZeroShot", full_clip=["3", 0], dataset=["5", 0], baseline=["1", 0], templates="simple"),
        "7": node("EvalRetrieval", full_clip=["3", 0], dataset=["2", 1], baseline=["1", 0]),
        "8": node("PreviewAny", source=["6", 1]),
        "9": node("PreviewAny", source=["7", 1]),
    }
    result = succeed(comfyui, prompt)
    for number in ("8", "9"):
        heading, _, *rows = result["outputs"][number]["text"][0].split("\n\n")[0].splitlines()
        assert heading.split()[-2:] == ["baseline", "model"]
        assert all(row.count("%") == 2 for row in rows if "95 %" not in row)
    assert "Zero-shot accuracy: " in result["texts"]["6"] and "baseline" in result["texts"]["6"]


def test_zero_shot_shows_intervals_every_class_and_the_published_figure(comfyui):
    for seed in (20, 21):
        save_full_clip(random_clip(seed=seed), comfyui.base / f"models/full_clip/zero_shot_{seed}.safetensors")
    class_folder(comfyui.base / "datasets/six_per_class", per_class=6)
    prompt = {
        "1": node("LoadFullCLIP", model="zero_shot_20.safetensors"),
        "2": node("LoadFullCLIP", model="zero_shot_21.safetensors"),
        "3": node("LoadCLIPDataset", folder="six_per_class", validation_split=0.0),
        "4": node("EvalZeroShot", full_clip=["1", 0], dataset=["3", 0], baseline=["2", 0], protocol="published"),
        "5": node("PreviewAny", source=["4", 1]),
    }
    result = succeed(comfyui, prompt)
    table = result["outputs"]["5"]["text"][0]
    accuracies, classes, *mistakes = table.split("\n\n")
    rows = [*accuracies.splitlines()[2:], *classes.splitlines()[2:]]
    assert all(row.count("%") == 2 for row in rows if "95 %" not in row)
    assert "95 % interval" in accuracies and "as published; not an accuracy" in accuracies
    assert "class red (6)" in classes and all("taken for" in rows for rows in mistakes)
    assert "top 1 may differ by" in result["texts"]["4"]
