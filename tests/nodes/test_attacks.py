"""Evaluate Typographic Attack and Rank Captions in a real ComfyUI."""

import json

import pytest
from clips import random_clip
from comfyui_prompts import node, shown_image, succeed
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


def attack(folder, **columns):
    return {
        "1": node("LoadFullCLIP", model="attack_20.safetensors"),
        "2": node("LoadFullCLIP", model="attack_21.safetensors"),
        "3": node("LoadCLIPDataset", folder=folder, validation_split=0.0, **columns),
        "4": node("EvalTypographic", full_clip=["1", 0], dataset=["3", 0], baseline=["2", 0], seed=3),
        "5": node("PreviewAny", source=["4", 1]),
        "6": node("PreviewAny", source=["4", 0]),
    }


def test_an_attack_with_drawn_words_is_compared_with_the_baseline(comfyui):
    result = succeed(comfyui, attack("attacked"))
    accuracies, kinds = result["outputs"]["5"]["text"][0].split("\n\n")
    assert [row.split("  ")[0] for row in accuracies.splitlines()[2:]] == ["clean", "under attack", "word wins"]
    heading, _, *rows = kinds.splitlines()
    assert heading.split()[-2:] == ["baseline", "model"] and all(row.count("%") == 2 for row in rows)
    assert [row.split(":")[0] for row in rows] == ["clean (24)"] * 2 + ["drawn (24)"] * 3
    assert 0 <= float(result["outputs"]["6"]["text"][0]) <= 1
    assert "Accuracy under attack: " in result["texts"]["4"]
    chart = shown_image(comfyui, result, "4")
    assert chart.mode == "RGB" and chart.width == 892


def test_photographed_attacks_of_scam_are_measured(comfyui):
    result = succeed(comfyui, attack("scam", caption_column="object_label"))
    table = result["outputs"]["5"]["text"][0]
    assert all(f"{kind} (6): object over its word" in table for kind in ("clean", "hand-written", "synthetic"))


def test_the_baseline_is_optional(comfyui):
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


def test_both_models_rank_the_texts_of_an_image(comfyui):
    result = succeed(comfyui, ranking("a red square\na blue circle\n\na red square", baseline=["2", 0]))
    heading, _, *rows = result["outputs"]["5"]["text"][0].splitlines()
    assert "model share" in heading and "baseline cosine" in heading and len(rows) == 2
    assert {row.split("  ")[0] for row in rows} == {"a red square", "a blue circle"}
    assert "Nearest: “a " in result["texts"]["4"] and "the baseline says" in result["texts"]["4"]
    assert shown_image(comfyui, result, "4").mode == "RGB"
    assert "baseline" not in succeed(comfyui, ranking("one"))["outputs"]["5"]["text"][0]


def test_a_ranking_without_texts_is_refused_in_one_sentence(comfyui):
    result = comfyui.queue(ranking(" \n"))
    assert result["status"] == "error" and "There is no text to rank; write one per line" in json.dumps(result)
