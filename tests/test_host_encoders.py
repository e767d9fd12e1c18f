"""ComfyUI's own encoders and ours give the same features for the same files, in fp32."""

import dataclasses

import pytest
import torch
from clips import CLIP_L, VIT_L_14, random_clip
from comfyui_server import in_comfyui
from safetensors.torch import load_file

from clip_finetune.engine import build_network, export_text_encoder, to_gmp
from clip_finetune.engine.clip.export import export_vision_encoder

pytestmark = pytest.mark.comfyui

PROMPTS = ["", "a photo of a cat", "Ünïcödé, 猫 & (weights:1.2)!", "a very long caption about nothing at all " * 20]

TEXT = """
import comfy.sd
file, out, *prompts = arguments
clip = comfy.sd.load_clip([file], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION, model_options={"dtype": torch.float32})
rows = [[token for token, _ in clip.tokenize(prompt)["l"][0]] for prompt in prompts]
tokens = torch.tensor(rows)
with torch.no_grad():
    last, before, projected, pooled = clip.cond_stage_model.clip_l.transformer(
        tokens, intermediate_output=-2, final_layer_norm_intermediate=False, dtype=torch.float32)
save_file({"tokens": tokens, "last": last, "before": before, "projected": projected}, out)
"""


def hidden_states(network, tokens):
    """(the last hidden state after ln_final, the one before the last block) of open_clip's text tower."""
    states = network.token_embedding(tokens) + network.positional_embedding[: tokens.shape[1]]
    for block in network.transformer.resblocks:
        before, states = states, block(states, attn_mask=network.attn_mask[: tokens.shape[1], : tokens.shape[1]])
    return network.ln_final(states), before


@pytest.mark.parametrize("context_length", [77, 248])
def test_comfyuis_text_encoder_gives_our_features_for_its_own_tokens_and_padding(tmp_path, context_length):
    model = random_clip(CLIP_L, context_length=context_length)
    file = export_text_encoder(to_gmp(model), tmp_path / "clip_l.safetensors", dtype="fp32")
    _, log = in_comfyui(TEXT, file, tmp_path / "found.safetensors", *PROMPTS)
    assert "missing" not in log.lower() and "unexpected" not in log.lower()
    found, network = load_file(tmp_path / "found.safetensors"), build_network(model).eval()
    assert found["tokens"].shape == (4, context_length) and (found["tokens"][1, 7:] == 49407).all()
    with torch.no_grad():
        last, before = hidden_states(network, found["tokens"])
        projected = network.encode_text(found["tokens"])
    for name, ours in (("last", last), ("before", before), ("projected", projected)):
        print(f"{name}: largest difference {(found[name] - ours).abs().max():.1e}")
        torch.testing.assert_close(found[name], ours, rtol=1e-5, atol=1e-5)


VISION = """
import comfy.clip_vision
file, out = arguments
encoder = comfy.clip_vision.load(file)
pictures = torch.rand(2, 300, 250, 3, generator=torch.Generator().manual_seed(0))
found = encoder.encode_image(pictures)
pixels = comfy.clip_vision.clip_preprocess(pictures, size=encoder.image_size)
save_file({"pixels": pixels.contiguous(), "features": found["image_embeds"]}, out)
"""


def test_comfyuis_vision_encoder_gives_our_features(tmp_path):
    model = random_clip(
        dataclasses.replace(VIT_L_14, text_width=64, text_layers=1, text_heads=1, text_mlp_width=256, vocab_size=64)
    )
    file = export_vision_encoder(model, tmp_path / "vision.safetensors", dtype="fp32")
    _, log = in_comfyui(VISION, file, tmp_path / "found.safetensors", flags="--cpu --fp32-text-enc")
    assert "missing" not in log.lower()
    found = load_file(tmp_path / "found.safetensors")
    with torch.no_grad():
        ours = build_network(model).eval().encode_image(found["pixels"])
    print(f"largest difference {(found['features'] - ours).abs().max():.1e}")
    torch.testing.assert_close(found["features"], ours, rtol=1e-5, atol=1e-5)
