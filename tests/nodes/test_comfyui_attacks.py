"""Evaluate Typographic Attack, Rank Captions and the evaluations' shared features in a real ComfyUI."""

import json
import re

import pytest
from clips import random_clip
from image_folders import class_folder, scam_folder
from PIL import Image

from clip_finetune.engine import save_full_clip

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    for seed in (20, 21):
        save_full_clip(random_clip(seed=seed), comfyui.base / f"models/full_clip/attack_{seed}.safetensors")
    class_folder(comfyui.base / "datasets/attacked", per_class=6)
    scam_folder(comfyui.base / "datasets/scam")
    Image.new("RGBA", (80, 50), (200, 30, 30, 255)).save(comfyui.base / "input/attacked_image.png")


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def succeed(comfyui, prompt, **options):
    result = comfyui.queue(prompt, **options)
    assert result["status"] == "success" and not result["node_errors"], result
    return result


def shown(comfyui, result, number):
    found = result["outputs"][number]["images"][0]
    return Image.open(comfyui.base / found["type"] / found["subfolder"] / found["filename"])


def attack(folder, **columns):
    return {
        "1": node("LoadFullCLIP", model="attack_20.safetensors"),
        "2": node("LoadFullCLIP", model="attack_21.safetensors"),
        "3": node("LoadCLIPDataset", folder=folder, validation_split=0.0, **columns),
        "4": node("EvalTypographic", full_clip=["1", 0], dataset=["3", 0], baseline=["2", 0], seed=3),
        "5": node("PreviewAny", source=["4", 1]),
        "6": node("PreviewAny", source=["4", 0]),
    }


def test_words_are_drawn_and_measured_against_the_baseline(comfyui):
    result = succeed(comfyui, attack("attacked"))
    accuracies, kinds = result["outputs"]["5"]["text"][0].split("\n\n")
    assert [row.split("  ")[0] for row in accuracies.splitlines()[2:]] == ["clean", "under attack", "word wins"]
    heading, _, *rows = kinds.splitlines()
    assert heading.split()[-2:] == ["baseline", "model"] and all(row.count("%") == 2 for row in rows)
    assert [row.split(":")[0] for row in rows] == ["clean (24)"] * 2 + ["drawn (24)"] * 3
    assert 0 <= float(result["outputs"]["6"]["text"][0]) <= 1
    assert "Accuracy under attack: " in result["texts"]["4"]
    chart = shown(comfyui, result, "4")
    assert chart.mode == "RGB" and chart.width == 892


def test_the_words_on_scams_pictures_are_measured(comfyui):
    result = succeed(comfyui, attack("scam", caption_column="object_label"))
    table = result["outputs"]["5"]["text"][0]
    assert all(f"{kind} (6): object over its word" in table for kind in ("clean", "hand-written", "synthetic"))


def test_an_attack_without_a_baseline_is_enough(comfyui):
    prompt = attack("attacked")
    del prompt["2"], prompt["4"]["inputs"]["baseline"], prompt["4"]["inputs"]["seed"]
    assert "baseline" not in succeed(comfyui, prompt)["outputs"]["5"]["text"][0]


def ranking(texts, **more):
    return {
        "1": node("LoadFullCLIP", model="attack_20.safetensors"),
        "2": node("LoadFullCLIP", model="attack_21.safetensors"),
        "3": node("LoadImage", image="attacked_image.png"),
        "4": node("RankCaptions", full_clip=["1", 0], image=["3", 0], texts=texts, **more),
        "5": node("PreviewAny", source=["4", 1]),
    }


def test_texts_are_ranked_for_a_picture_by_both_models(comfyui):
    result = succeed(comfyui, ranking("a red square\na blue circle\n\na red square", baseline=["2", 0]))
    heading, _, *rows = result["outputs"]["5"]["text"][0].splitlines()
    assert "model share" in heading and "baseline cosine" in heading and len(rows) == 2
    assert {row.split("  ")[0] for row in rows} == {"a red square", "a blue circle"}
    assert "Nearest: “a " in result["texts"]["4"] and "the baseline finds" in result["texts"]["4"]
    assert shown(comfyui, result, "4").mode == "RGB"
    assert "baseline" not in succeed(comfyui, ranking("one"))["outputs"]["5"]["text"][0]


def test_no_text_is_told_in_a_sentence(comfyui):
    result = comfyui.queue(ranking(" \n"))
    assert result["status"] == "error" and "There is no text to rank; write one per line" in json.dumps(result)


def test_zero_shot_tells_intervals_classes_and_the_published_figure(comfyui):
    prompt = attack("attacked")
    prompt["4"] = node("EvalZeroShot", full_clip=["1", 0], dataset=["3", 0], baseline=["2", 0], protocol="published")
    result = succeed(comfyui, prompt)
    table = result["outputs"]["5"]["text"][0]
    accuracies, classes, *mistakes = table.split("\n\n")
    for row in (*accuracies.splitlines()[2:], *classes.splitlines()[2:]):
        assert len(re.findall(r"\d%", row)) == 2, row
    assert "95 % interval" in accuracies and "as published; not an accuracy" in accuracies
    assert "class red (6)" in classes and all("taken for" in table for table in mistakes)
    assert "top 1 may differ by" in result["texts"]["4"]
