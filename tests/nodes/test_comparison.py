"""Compare, plot, blend and sweep in a real ComfyUI."""

import pytest
import torch
from clips import disturbed, random_clip
from comfyui_prompts import node
from image_folders import class_folder, labels_folder

from clip_finetune.engine import (
    blend,
    load_full_clip,
    save_full_clip,
    to_gmp,
)
from clip_finetune.engine.evaluate import gmp_form


@pytest.mark.comfyui
def test_compare_plot_blend_and_sweep_in_a_graph(comfyui):
    model = random_clip()
    moved = disturbed(model, 0.1)
    models = comfyui.base / "models/full_clip"
    for name, one in (
        ("compared_old", model),
        ("compared_new", to_gmp(moved)),
        ("compared_other", random_clip(embed_dim=16)),
    ):
        save_full_clip(one, models / f"{name}.safetensors")
    labels_folder(comfyui.base / "datasets/compared", 20)
    class_folder(comfyui.base / "datasets/compared_classes")
    load = {
        "1": node("LoadFullCLIP", model="compared_new.safetensors"),
        "2": node("LoadFullCLIP", model="compared_old.safetensors"),
        "3": node("LoadCLIPDataset", folder="compared", captions="auto", validation_split=0.0, seed=0),
        "4": node("LoadCLIPDataset", folder="compared_classes", captions="auto", validation_split=0.0, seed=0),
    }
    both = dict(full_clip=["1", 0], baseline=["2", 0])
    result = comfyui.queue(
        load
        | {
            "5": node("CompareFullCLIP", dataset=["3", 0], prompts="a cat\n\na dog", **both),
            "6": node("PlotGmP", **both),
            "7": node("BlendFullCLIP", alpha=0.25, **both),
            "8": node("SaveFullCLIP", full_clip=["7", 0], filename_prefix="full_clip/blended"),
            "9": node("BlendSweep", dataset=["3", 0], general=["4", 0], steps=3, templates="simple", **both),
            "10": node("PreviewAny", source=["5", 0]),
            "11": node("PreviewAny", source=["9", 2]),
            "12": node("SaveFullCLIP", full_clip=["9", 0], filename_prefix="full_clip/best"),
        }
    )
    assert result["status"] == "success" and not result["node_errors"], result
    table, swept = (result["outputs"][number]["text"][0] for number in ("10", "11"))
    assert "effective rank of images" in table and "SDXL, SD3" in table
    assert "Rule: The highest score on compared among the blends" in swept and swept.splitlines()[-1].startswith("1 ")
    assert all(result["outputs"][number]["images"] for number in ("5", "6", "9"))
    assert "turned by" in result["texts"]["6"] and gmp_form.PLAIN in result["texts"]["6"]
    saved = load_full_clip(comfyui.base / "output/full_clip/blended_00001_.safetensors")
    expected = blend(to_gmp(moved), model, 0.25)
    assert all(torch.equal(saved.state_dict[name], tensor) for name, tensor in expected.state_dict.items())
    assert (comfyui.base / "output/full_clip/best_00001_.safetensors").is_file()
    other = {"2": node("LoadFullCLIP", model="compared_other.safetensors")}
    for number, refused in (
        ("5", node("CompareFullCLIP", dataset=["3", 0], **both)),
        ("6", node("PlotGmP", **both)),
        ("9", node("BlendSweep", dataset=["3", 0], **both)),
    ):
        result = comfyui.queue(load | other | {number: refused})
        assert result["status"] == "error" and "choose as baseline the model that the training" in str(result)
