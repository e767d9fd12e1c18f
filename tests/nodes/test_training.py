"""Train CLIP and Train CLIP (GmP) in a real ComfyUI: chart, presets, cancel, resume, run folders."""

import threading
import time

import pytest
import torch
from clips import VIT_L_14, random_clip
from comfyui_prompts import (
    clip_l_by_transformers,
    conditioning,
    encoded,
    metrics,
    node,
    run_settings,
    succeed,
    training,
)
from image_folders import labels_folder

from clip_finetune.engine import load_full_clip, save_full_clip
from clip_finetune.engine.clip.tensor_files import same_bits

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    """The model tiny, and the dataset colours."""
    save_full_clip(random_clip(), comfyui.base / "models/full_clip/tiny.safetensors")
    labels_folder(comfyui.base / "datasets/colours", 24)


def test_a_training_shows_its_chart_and_saves_the_model_it_returns(comfyui):
    result = succeed(comfyui, training("shown", epochs=20))
    assert len(result["previews"]) >= 2 and result["previews"][0] != result["previews"][-1]
    assert all(preview[:2] == b"\xff\xd8" for preview in result["previews"])  # JPEG, so never an alpha channel
    assert "Done: the model of step" in result["texts"]["3"]
    assert "clip_finetune/shown/report.html in the output folder." in result["texts"]["3"]
    folder = comfyui.base / "output/clip_finetune/shown"
    assert (folder / "report.html").is_file()
    saved = load_full_clip(comfyui.base / "output/full_clip/shown_00001_.safetensors")
    best = load_full_clip(folder / "best.safetensors")
    assert all(same_bits(saved.state_dict[name], tensor) for name, tensor in best.state_dict.items())
    assert "clip_finetune/shown/best.safetensors" in comfyui.choices("LoadFullCLIP", "model")


def test_a_finished_training_is_not_run_again(comfyui):
    prompt = training("twice")
    succeed(comfyui, prompt)
    before = metrics(comfyui, "twice")
    again = succeed(comfyui, prompt)
    assert set(again["cached"]) >= {"1", "2", "3"} and "3" not in again["executed"]
    # Nor where ComfyUI forgot the result and where a setting changed that does not matter for it.
    comfyui.forget()
    prompt["5"] = node("CLIPTrainCheckpoints", options=["0", 0], save_every_minutes=3.0)
    prompt["3"]["inputs"]["options"] = ["5", 0]
    result = succeed(comfyui, prompt)
    assert "3" in result["executed"] and metrics(comfyui, "twice") == before


def test_a_cancelled_training_stops_within_a_step_and_continues_to_the_same_bits(comfyui):
    whole, stopped = training("whole", gmp=True, epochs=8), training("stopped", gmp=True, epochs=8)
    succeed(comfyui, whole)
    seen = []

    def cancel(message):
        if message["type"] == "progress_state" and message["data"]["nodes"].get("3", {}).get("value", 0) >= 3:
            if not seen:
                threading.Thread(target=comfyui.interrupt).start()
            seen.append(message["data"]["nodes"]["3"]["value"])

    assert comfyui.queue(stopped, on_message=cancel)["status"] == "interrupted"
    done = len(metrics(comfyui, "stopped"))
    assert 3 <= done < 40 and done - seen[0] <= 3  # a few steps of milliseconds each pass before the message arrives
    succeed(comfyui, stopped)
    assert [line["step"] for line in metrics(comfyui, "stopped")] == list(range(1, 41))
    bests = [comfyui.base / f"output/clip_finetune/{name}/best.safetensors" for name in ("whole", "stopped")]
    one, other = (load_full_clip(file) for file in bests)
    assert all(same_bits(other.state_dict[name], tensor) for name, tensor in one.state_dict.items())


def test_what_an_api_prompt_leaves_out_comes_from_the_preset(comfyui):
    prompt = training("preset")
    for name in ("epochs", "learning_rate", "batch_size"):
        del prompt["3"]["inputs"][name]
    prompt["3"]["inputs"] |= {"preset": "text encoder only", "epochs": 1}
    succeed(comfyui, prompt)
    settings = run_settings(comfyui, "preset")
    assert settings["epochs"] == {"value": 1, "from": "widget"}
    assert settings["towers"] == {"value": "text", "from": "preset text encoder only"}
    assert settings["precision"] == {"value": "fp32", "from": "option node"}
    assert settings["weight_decay"] == {"value": 0.01, "from": "default"}


def test_a_changed_dataset_gets_a_new_run_folder(comfyui):
    labels_folder(comfyui.base / "datasets/growing", 12)
    prompt = training("grown", folder="growing", epochs=1)
    succeed(comfyui, prompt)
    labels_folder(comfyui.base / "datasets/growing", 16)
    result = succeed(comfyui, prompt)
    assert "grown is left as it is (the training data changed" in result["texts"]["3"]
    assert (comfyui.base / "output/clip_finetune/grown_2/best.safetensors").is_file()


@pytest.mark.soak
def test_a_vit_l_14_is_trained_cancelled_resumed_folded_and_exported(comfyui):
    """With random weights; at the end ComfyUI's own loader opens the export."""
    save_full_clip(random_clip(VIT_L_14, dtype=torch.float16), comfyui.base / "models/full_clip/vit_l_14.safetensors")
    labels_folder(comfyui.base / "datasets/few", 6, size=224)
    prompt = training("large", "vit_l_14.safetensors", True, "few", epochs=6, learning_rate=1e-5, batch_size=4)
    prompt["0"]["inputs"]["micro_batch"] = 2
    prompt["4"] = node("FoldGmP", full_clip=["3", 0])
    prompt["5"] = node("ExportClipL", full_clip=["4", 0], filename_prefix="clip/large")
    prompt |= encoded(["5", 0], "large_socket")

    def cancel(message):
        if message["type"] == "progress_state" and message["data"]["nodes"].get("3", {}).get("value", 0) >= 2:
            comfyui.interrupt()

    began = time.monotonic()
    assert comfyui.queue(prompt, on_message=cancel, timeout=1800)["status"] == "interrupted"
    done = metrics(comfyui, "large")
    print(f"cancelled after step {done[-1]['step']}, {time.monotonic() - began:.0f} s after it was queued")
    assert done[-1]["step"] in (2, 3)
    result = succeed(comfyui, prompt, timeout=1800)
    assert f"resumes from step {done[-1]['step']} of 6" in result["texts"]["3"]
    assert [line["step"] for line in metrics(comfyui, "large")] == list(range(1, 7))
    loaded = {
        "1": node("CLIPLoader", clip_name="large_00001_.safetensors", type="stable_diffusion"),
        **encoded(["1", 0], "large_loaded"),
    }
    succeed(comfyui, loaded)
    socket, file = conditioning(comfyui, "large_socket"), conditioning(comfyui, "large_loaded")
    expected = clip_l_by_transformers(comfyui.base / "output/clip/large_00001_.safetensors")
    print(f"largest difference to transformers: {(file['hidden'] - expected).abs().max():.2e}")
    assert torch.equal(socket["hidden"], file["hidden"])
    torch.testing.assert_close(file["hidden"], expected, rtol=1e-4, atol=1e-4)
