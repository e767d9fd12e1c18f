"""Load, save, merge and transplant full CLIPs in a real ComfyUI."""

import dataclasses

import pytest
import torch
from clips import CLIP_L, VIT_L_14, random_clip
from comfyui_prompts import conditioning, encoded, node, saved, succeed
from safetensors.torch import save_file

from clip_finetune.engine import load_full_clip, save_full_clip
from clip_finetune.engine.clip.encoders import text_encoder_state_dict
from clip_finetune.engine.clip.tensor_files import cast, same_bits

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    """The models tiny and clip_l."""
    models = comfyui.base / "models/full_clip"
    save_full_clip(random_clip(), models / "tiny.safetensors")
    save_full_clip(random_clip(CLIP_L, dtype=torch.float16), models / "clip_l.safetensors")


def test_a_saved_hugging_face_folder_is_listed_and_loads_again(comfyui):
    succeed(
        comfyui,
        {
            "1": node("LoadFullCLIP", model="tiny.safetensors"),
            "2": node("SaveFullCLIP", full_clip=["1", 0], filename_prefix="full_clip/hf", format="huggingface"),
        },
    )
    name = "hf_00001_/model.safetensors"
    assert name in comfyui.choices("LoadFullCLIP", "model")
    succeed(
        comfyui,
        {
            "1": node("LoadFullCLIP", model=name),
            "2": node(
                "SaveFullCLIP", full_clip=["1", 0], filename_prefix="full_clip/back", format="openai", dtype="mixed"
            ),
        },
    )
    found, expected = (
        saved(comfyui, "back_00001_.safetensors"),
        load_full_clip(comfyui.base / "models/full_clip/tiny.safetensors"),
    )
    assert found.architecture == expected.architecture
    for name, tensor in cast(expected.state_dict, "mixed", "").items():
        assert same_bits(found.state_dict[name], tensor), name


def test_a_model_for_77_tokens_is_stretched_on_request(comfyui):
    prompt = {
        "1": node("LoadFullCLIP", model="clip_l.safetensors", context_length="248"),
        "2": node("ExportClipL", full_clip=["1", 0], filename_prefix="clip/long", dtype="fp16"),
        "3": node("CLIPLoader", clip_name="short.safetensors", type="stable_diffusion"),
        "4": node("ExportClipL", full_clip=["1", 0], clip=["3", 0], save=False),
        **encoded(["2", 0], "long"),
        **encoded(["4", 0], "long_swapped"),
        **encoded(["3", 0], "short"),
    }
    short = random_clip(CLIP_L, seed=7)
    save_file(text_encoder_state_dict(short, dtype="fp16"), comfyui.base / "models/text_encoders/short.safetensors")
    succeed(comfyui, prompt)
    assert conditioning(comfyui, "long")["hidden"].shape == (1, 248, 768)
    assert conditioning(comfyui, "short")["hidden"].shape == (1, 77, 768)
    assert torch.equal(conditioning(comfyui, "long")["hidden"], conditioning(comfyui, "long_swapped")["hidden"])


def test_each_tower_comes_from_its_own_model(comfyui):
    other = random_clip(seed=8, vision_layers=3)
    save_full_clip(other, comfyui.base / "models/full_clip/other_tiny.safetensors")
    succeed(
        comfyui,
        {
            "1": node("LoadFullCLIP", model="tiny.safetensors"),
            "2": node("LoadFullCLIP", model="other_tiny.safetensors"),
            "3": node("TransplantTower", text_from=["1", 0], vision_from=["2", 0]),
            "4": node(
                "SaveFullCLIP", full_clip=["3", 0], filename_prefix="full_clip/both", format="openai", dtype="fp32"
            ),
        },
    )
    found, text = (
        saved(comfyui, "both_00001_.safetensors"),
        load_full_clip(comfyui.base / "models/full_clip/tiny.safetensors"),
    )
    assert found.architecture == dataclasses.replace(text.architecture, vision_layers=3)
    for name, tensor in found.state_dict.items():
        assert same_bits(tensor, (other if name.startswith("visual.") else text).state_dict[name]), name


def test_loras_on_the_clip_are_merged_into_the_full_clip(comfyui):
    base = random_clip(CLIP_L, seed=6)
    tower = text_encoder_state_dict(base, dtype="fp32")
    save_file(tower, comfyui.base / "models/text_encoders/base.safetensors")
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(768, 4, generator=generator) * 0.1, torch.randn(4, 3072, generator=generator) * 0.1
    key = "lora_te_text_model_encoder_layers_3_mlp_fc2"
    lora = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(4.0)}
    save_file(lora, comfyui.base / "models/loras/te.safetensors")
    prompt = {
        "1": node("CLIPLoader", clip_name="base.safetensors", type="stable_diffusion"),
        "2": node("ProbeLora", clip=["1", 0], lora_name="te.safetensors", strength=0.5),
        "3": node("LoadFullCLIP", model="clip_l.safetensors"),
        "4": node("MergeTEWithVision", clip=["2", 0], full_clip=["3", 0]),
        "5": node("SaveFullCLIP", full_clip=["4", 0], filename_prefix="full_clip/lora", format="openai", dtype="fp32"),
    }
    succeed(comfyui, prompt)
    merged = load_full_clip(comfyui.base / "output/full_clip/lora_00001_.safetensors").state_dict
    plain = load_full_clip(comfyui.base / "models/full_clip/clip_l.safetensors").state_dict
    name = "transformer.resblocks.3.mlp.c_proj.weight"
    expected = base.state_dict[name].double() + 0.5 * up.double() @ down.double()
    # ComfyUI keeps text encoders in fp16.
    torch.testing.assert_close(merged[name].double(), expected, rtol=2e-3, atol=1e-4)
    assert (merged[name].double() - base.state_dict[name].double()).abs().max() > 0.01
    for name in ("text_projection", "logit_scale", "visual.conv1.weight"):
        assert torch.equal(merged[name], plain[name].float())


def test_comfyui_lists_a_saved_vision_tower_and_it_merges_back(comfyui):
    """With real shapes, because ComfyUI recognises vision towers by them."""
    one, other = (random_clip(VIT_L_14, seed=seed, dtype=torch.float16) for seed in (1, 2))
    save_full_clip(one, comfyui.base / "models/full_clip/one_l14.safetensors")
    save_full_clip(other, comfyui.base / "models/full_clip/other_l14.safetensors")
    text = text_encoder_state_dict(one, dtype="fp16")
    save_file(text, comfyui.base / "models/text_encoders/one_te.safetensors")
    succeed(
        comfyui,
        {
            "1": node("LoadFullCLIP", model="one_l14.safetensors"),
            "2": node(
                "SaveFullCLIP", full_clip=["1", 0], filename_prefix="clip_vision/one", format="vision", dtype="fp16"
            ),
        },
    )
    assert "one_00001_.safetensors" in comfyui.choices("CLIPVisionLoader", "clip_name")
    result = succeed(
        comfyui,
        {
            "1": node("CLIPVisionLoader", clip_name="one_00001_.safetensors"),
            "2": node("CLIPLoader", clip_name="one_te.safetensors", type="stable_diffusion"),
            "3": node("LoadFullCLIP", model="other_l14.safetensors"),
            "4": node("MergeTEWithVision", clip=["2", 0], full_clip=["3", 0], clip_vision=["1", 0]),
            "5": node("SaveFullCLIP", full_clip=["4", 0], filename_prefix="full_clip/merged", dtype="fp16"),
        },
    )
    assert "own projection is another one; it was ignored" in result["texts"]["4"]
    for name, tensor in saved(comfyui, "merged_00001_.safetensors").state_dict.items():
        kept = name in ("visual.proj", "text_projection", "logit_scale")
        assert same_bits(tensor, (other if kept else one).state_dict[name]), name
