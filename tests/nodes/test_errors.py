"""Errors as users read them, in a real ComfyUI; and that nothing outside the listed folders is touched."""

import shutil

import pytest
import torch
from clips import CLIP_L, broken_clip, random_clip, write_unchecked
from comfyui_prompts import node, succeed, training
from image_folders import labels_folder
from safetensors.torch import save_file

from clip_finetune.engine import save_full_clip

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    """The model tiny, and the dataset colours."""
    save_full_clip(random_clip(), comfyui.base / "models/full_clip/tiny.safetensors")
    labels_folder(comfyui.base / "datasets/colours", 24)


def _empty_folder(comfyui):
    (comfyui.base / "datasets/empty").mkdir(exist_ok=True)
    return {"2": {"folder": "empty"}}, "empty holds no images"


def _captions_without_images(comfyui):
    folder = labels_folder(comfyui.base / "datasets/no_images", 6)
    for image in folder.glob("*.png"):
        image.unlink()
    return {"2": {"folder": "no_images"}}, "no_images"


def _one_image(comfyui):
    labels_folder(comfyui.base / "datasets/one", 1)
    return {"2": {"folder": "one", "validation_split": 0.0}}, "at least 2 are needed"


def _not_a_clip(comfyui):
    save_file({"weight": torch.zeros(3)}, comfyui.base / "models/full_clip/other.safetensors")
    return {"1": {"model": "other.safetensors"}}, "is not a CLIP"


def _not_a_model(comfyui):
    (comfyui.base / "models/full_clip/text.safetensors").write_text("hello")
    return {"1": {"model": "text.safetensors"}}, "is not a whole safetensors file"


def _run_outside(comfyui):
    return {"3": {"run_name": "../../escape"}}, "run_name is '../../escape'"


def _file_outside(comfyui):
    return {"4": {"filename_prefix": "../escape"}}, "filename_prefix is '../escape'"


def _a_model_with_nan(comfyui):
    broken = random_clip().derive({"ln_final.bias": torch.full((64,), torch.nan)}, step="broken")
    write_unchecked(broken, comfyui.base / "models/full_clip/nan.safetensors")
    return {"1": {"model": "nan.safetensors"}, "2": {"validation_split": 0.0}}, "step 1"


@pytest.mark.parametrize(
    "case",
    [
        _empty_folder,
        _captions_without_images,
        _one_image,
        _not_a_clip,
        _not_a_model,
        _run_outside,
        _file_outside,
        _a_model_with_nan,
    ],
)
def test_bad_input_gets_one_clear_sentence(comfyui, case):
    changes, words = case(comfyui)  # inputs by node, and words of the message
    prompt = training(case.__name__)
    for number, inputs in changes.items():
        prompt[number]["inputs"] |= inputs
    result = comfyui.queue(prompt)
    assert result["status"] == "error" and words in result["error"]
    assert "\n" not in result["error"].strip() and "Traceback" not in result["error"]
    assert not (comfyui.base / "escape").exists() and not (comfyui.base.parent / "escape").exists()


def test_no_node_makes_a_file_or_a_model_of_a_model_with_nan(comfyui):
    models = comfyui.base / "models/full_clip"
    write_unchecked(broken_clip("visual.ln_post.bias"), models / "nan_vision.safetensors")
    write_unchecked(
        broken_clip("logit_scale", model=random_clip(CLIP_L, dtype=torch.float16)), models / "nan_scale.safetensors"
    )
    saves = [
        ("nan_vision", "visual.ln_post.bias", node("SaveFullCLIP", format=form, filename_prefix="full_clip/nan"))
        for form in ("openai", "huggingface", "gmp")
    ]
    saves.append(("nan_vision", "visual.ln_post.bias", node("FoldGmP")))
    saves.append(("nan_scale", "logit_scale", node("ExportClipL", filename_prefix="clip/nan")))
    for model, tensor, save in saves:
        save["inputs"]["full_clip"] = ["1", 0]
        prompt = {"1": node("LoadFullCLIP", model=f"{model}.safetensors"), "2": save}
        if save["class_type"] == "FoldGmP":
            prompt["3"] = node("PreviewAny", source=["2", 0])
        error = comfyui.queue(prompt)["error"]
        assert f"in the model made from {model}.safetensors, {tensor} holds values that are not numbers" in error
    (models / "nan_scale.safetensors").unlink()
    assert not list((comfyui.base / "output").glob("*/nan*"))


def test_only_listed_files_and_folders_are_opened(comfyui):
    save_full_clip(random_clip(), comfyui.base / "secret.safetensors")
    for number, inputs in (("1", {"model": "../../secret.safetensors"}), ("2", {"folder": "../custom_nodes"})):
        prompt = training("listed")
        prompt[number]["inputs"] |= inputs
        assert comfyui.queue(prompt)["status"] == "rejected"


def test_a_deleted_folder_is_rejected(comfyui):
    labels_folder(comfyui.base / "datasets/going", 8)
    prompt = training("going", folder="going")
    succeed(comfyui, prompt)
    shutil.rmtree(comfyui.base / "datasets/going")
    assert comfyui.queue(prompt)["status"] == "rejected"
