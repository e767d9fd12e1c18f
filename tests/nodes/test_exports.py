"""Export CLIP-L, CLIP-G and LoRA in a real ComfyUI: what its loaders and text encoders make of the files."""

import pytest
import torch
from clips import CLIP_L, random_clip
from comfyui_prompts import clip_g_by_transformers, clip_l_by_transformers, conditioning, encoded, node, saved, succeed
from safetensors.torch import load_file, save_file

from clip_finetune.engine import load_full_clip, save_full_clip
from clip_finetune.engine.clip.encoders import text_encoder_state_dict
from clip_finetune.engine.clip.tensor_files import same_bits

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    """The models tiny and clip_l."""
    models = comfyui.base / "models/full_clip"
    save_full_clip(random_clip(), models / "tiny.safetensors")
    save_full_clip(random_clip(CLIP_L, dtype=torch.float16), models / "clip_l.safetensors")


def test_the_saved_text_encoder_equals_the_clip_output_and_transformers_agrees(comfyui):
    prompt = {
        "1": node("LoadFullCLIP", model="clip_l.safetensors"),
        "2": node("ExportClipL", full_clip=["1", 0], filename_prefix="clip/te", dtype="fp16", save=True, strength=1.0),
        **encoded(["2", 0], "socket"),
    }
    succeed(comfyui, prompt)
    assert "te_00001_.safetensors" in comfyui.choices("CLIPLoader", "clip_name")
    loaded = {
        "1": node("CLIPLoader", clip_name="te_00001_.safetensors", type="stable_diffusion"),
        **encoded(["1", 0], "loaded"),
    }
    succeed(comfyui, loaded)
    socket, file = conditioning(comfyui, "socket"), conditioning(comfyui, "loaded")
    assert torch.equal(socket["hidden"], file["hidden"]) and torch.equal(socket["pooled"], file["pooled"])
    expected = clip_l_by_transformers(comfyui.base / "output/clip/te_00001_.safetensors")
    torch.testing.assert_close(file["hidden"], expected, rtol=1e-4, atol=1e-4)
    assert "clip missing" not in comfyui.log.read_text()


def test_the_export_folds_a_gmp_model_and_says_so(comfyui):
    prompt = {
        "1": node("LoadFullCLIP", model="clip_l.safetensors"),
        "2": node("SaveFullCLIP", full_clip=["1", 0], filename_prefix="full_clip/gmp", format="gmp", dtype="fp32"),
    }
    succeed(comfyui, prompt)
    prompt = {
        "1": node("LoadFullCLIP", model="gmp_00001_.safetensors"),
        "2": node("ExportClipL", full_clip=["1", 0], filename_prefix="clip/folded", dtype="fp16"),
    }
    result = succeed(comfyui, prompt)
    assert "was folded" in result["texts"]["2"]
    folded = load_file(comfyui.base / "output/clip/folded_00001_.safetensors")
    plain = load_full_clip(comfyui.base / "models/full_clip/clip_l.safetensors")
    for name, tensor in text_encoder_state_dict(plain, dtype="fp16").items():
        assert same_bits(folded[name], tensor), name


def test_replacing_the_clip_l_changes_a_clone_and_not_the_original(comfyui):
    other = random_clip(CLIP_L, seed=5)
    save_file(text_encoder_state_dict(other, dtype="fp32"), comfyui.base / "models/text_encoders/other.safetensors")
    prompt = {
        "1": node("CLIPLoader", clip_name="other.safetensors", type="stable_diffusion"),
        "2": node("LoadFullCLIP", model="clip_l.safetensors"),
        "3": node("ExportClipL", full_clip=["2", 0], clip=["1", 0], filename_prefix="clip/swap", dtype="fp16"),
        "4": node("ExportClipL", full_clip=["2", 0], clip=["1", 0], save=False, dtype="fp32", strength=0.0),
        "5": node("ExportClipL", full_clip=["2", 0], save=False, dtype="fp16"),
        "6": node("CLIPLoader", clip_name="other.safetensors", type="stable_diffusion", device="cpu"),
        **encoded(["3", 0], "swapped"),
        **encoded(["4", 0], "zero"),
        **encoded(["5", 0], "alone"),
        **encoded(["1", 0], "original"),
        **encoded(["6", 0], "fresh"),
    }
    succeed(comfyui, prompt)
    states = {name: conditioning(comfyui, name) for name in ("swapped", "zero", "alone", "original", "fresh")}
    assert torch.equal(states["original"]["hidden"], states["fresh"]["hidden"])
    assert torch.equal(states["swapped"]["hidden"], states["alone"]["hidden"])
    torch.testing.assert_close(states["zero"]["hidden"], states["original"]["hidden"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(states["swapped"]["hidden"], states["original"]["hidden"], atol=1e-2)


def test_comfyui_lists_the_lora_of_a_training_and_applies_it(comfyui):
    base = load_full_clip(comfyui.base / "models/full_clip/clip_l.safetensors")
    name = "transformer.resblocks.3.mlp.c_proj.weight"
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(768, 2, generator=generator) @ torch.randn(2, 3072, generator=generator) * 0.02
    changed = base.derive({name: (base.state_dict[name].float() + change).half()}, step="trained")
    save_full_clip(changed, comfyui.base / "models/full_clip/changed.safetensors")
    text = text_encoder_state_dict(base, dtype="fp32")
    save_file(text, comfyui.base / "models/text_encoders/plain.safetensors")
    result = succeed(
        comfyui,
        {
            "1": node("LoadFullCLIP", model="changed.safetensors"),
            "2": node("LoadFullCLIP", model="clip_l.safetensors"),
            "3": node("ExportClipLoRA", full_clip=["1", 0], baseline=["2", 0], rank=4, filename_prefix="loras/change"),
        },
    )
    assert "Rank 4 keeps 100.0%" in result["texts"]["3"], result["texts"]
    assert "change_00001_.safetensors" in comfyui.choices("LoraLoader", "lora_name")
    succeed(
        comfyui,
        {
            "1": node("CLIPLoader", clip_name="plain.safetensors", type="stable_diffusion"),
            "2": node("ProbeLora", clip=["1", 0], lora_name="change_00001_.safetensors", strength=1.0),
            "3": node("LoadFullCLIP", model="clip_l.safetensors"),
            "4": node("MergeTEWithVision", clip=["2", 0], full_clip=["3", 0]),
            "5": node("SaveFullCLIP", full_clip=["4", 0], filename_prefix="full_clip/with_lora", dtype="fp32"),
        },
    )
    weight = saved(comfyui, "with_lora_00001_.safetensors").state_dict[name].double()
    torch.testing.assert_close(weight, changed.state_dict[name].double(), rtol=2e-3, atol=2e-4)  # held in fp16
    assert (weight - base.state_dict[name].double()).abs().max() > 0.05


@pytest.mark.soak
def test_the_clip_g_of_an_sdxl_clip_is_replaced(comfyui):
    """With a text tower of ViT-bigG/14's size; SDXL's CLIP computes with it what transformers computes."""
    sizes = dict(embed_dim=1280, text_width=1280, text_layers=32, text_heads=20, text_mlp_width=5120, activation="gelu")
    one, other = (random_clip(CLIP_L, seed=seed, dtype=torch.float16, **sizes) for seed in (1, 2))
    save_full_clip(one, comfyui.base / "models/full_clip/big_g.safetensors")
    encoders = comfyui.base / "models/text_encoders"
    save_file(text_encoder_state_dict(other, dtype="fp16"), encoders / "other_g.safetensors")
    plain = load_full_clip(comfyui.base / "models/full_clip/clip_l.safetensors")
    save_file(text_encoder_state_dict(plain, dtype="fp16"), encoders / "plain_l.safetensors")
    prompt = {
        "1": node("DualCLIPLoader", clip_name1="plain_l.safetensors", clip_name2="other_g.safetensors", type="sdxl"),
        "2": node("LoadFullCLIP", model="big_g.safetensors"),
        "3": node("ExportClipG", full_clip=["2", 0], clip=["1", 0], filename_prefix="clip/g", dtype="fp16"),
        "4": node("ExportClipG", full_clip=["2", 0], clip=["1", 0], save=False, dtype="fp16", strength=0.0),
        **encoded(["1", 0], "sdxl"),
        **encoded(["3", 0], "sdxl_swapped"),
        **encoded(["4", 0], "sdxl_zero"),
    }
    succeed(comfyui, prompt, timeout=1800)
    succeed(
        comfyui,
        {
            "1": node(
                "DualCLIPLoader", clip_name1="plain_l.safetensors", clip_name2="g_00001_.safetensors", type="sdxl"
            ),
            **encoded(["1", 0], "sdxl_loaded"),
        },
        timeout=1800,
    )
    names = ("sdxl", "sdxl_swapped", "sdxl_zero", "sdxl_loaded")
    states = {name: conditioning(comfyui, name) for name in names}
    for what in ("hidden", "pooled"):
        assert torch.equal(states["sdxl_swapped"][what], states["sdxl_loaded"][what])
        torch.testing.assert_close(states["sdxl_zero"][what], states["sdxl"][what], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(states["sdxl_swapped"][what], states["sdxl"][what], atol=1e-2)
    assert torch.equal(states["sdxl_swapped"]["hidden"][..., :768], states["sdxl"]["hidden"][..., :768])  # the CLIP-L
    hidden, pooled = clip_g_by_transformers(comfyui.base / "output/clip/g_00001_.safetensors")
    print(f"largest difference to transformers: {(states['sdxl_loaded']['pooled'] - pooled).abs().max():.1e}")
    torch.testing.assert_close(states["sdxl_loaded"]["hidden"][..., 768:], hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states["sdxl_loaded"]["pooled"], pooled, rtol=1e-4, atol=1e-4)


def test_a_text_tower_that_is_not_clip_l_is_refused_with_its_sizes(comfyui):
    prompt = {
        "1": node("LoadFullCLIP", model="tiny.safetensors"),
        "2": node("ExportClipL", full_clip=["1", 0], filename_prefix="clip/tiny"),
    }
    result = comfyui.queue(prompt)
    assert result["status"] == "error" and "64 wide with 2 layers" in result["error"] and "768" in result["error"]
    assert not list((comfyui.base / "output").glob("clip/tiny*"))
