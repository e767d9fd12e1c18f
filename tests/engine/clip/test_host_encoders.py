"""ComfyUI's own encoders and ours give the same features for the same files, in fp32."""

import dataclasses
import shutil

import pytest
import torch
from clips import CLIP_L, VIT_L_14, random_clip
from comfyui_server import in_comfyui
from safetensors.torch import load_file, save_file

from clip_finetune.engine import build_network, export_text_encoder, to_gmp
from clip_finetune.engine.clip.exports import export_vision_encoder

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
images = torch.rand(2, 300, 250, 3, generator=torch.Generator().manual_seed(0))
found = encoder.encode_image(images)
pixels = comfy.clip_vision.clip_preprocess(images, size=encoder.image_size)
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


# ---- the CLIP-L in every kind of CLIP --------------------------------------------------------------------------------

# Their other text encoders are made as ComfyUI makes them, of memory that nobody touches, and without tokenizers.
KINDS = """
from types import SimpleNamespace
import comfy.sd, comfy.lora, comfy.sd1_clip, comfy.sdxl_clip, comfy.utils
from comfy.text_encoders import flux, hunyuan_video, sd3_clip
from clip_finetune.engine.errors import UserError
from clip_finetune.nodes.host import clips as host
encoder, lora, other, out = arguments
half = torch.float16
def made(model):
    target = SimpleNamespace(clip=model, tokenizer=lambda **_: SimpleNamespace(state_dict=dict), params={})
    return comfy.sd.CLIP(target, model_options={"dtype": half})
kinds = {
    "SD1.5": comfy.sd1_clip.SD1ClipModel,
    "SDXL": comfy.sdxl_clip.SDXLClipModel,
    "SD3": sd3_clip.sd3_clip(clip_l=True, clip_g=True, t5=True, dtype_t5=half),
    "Flux": flux.flux_clip(dtype_t5=half),
    "HunyuanVideo": hunyuan_video.hunyuan_video_clip(dtype_llama=half),
}
for kind, model in kinds.items():
    clip = made(model)
    clip.load_sd(load_file(encoder))
    patched = comfy.sd.load_lora_for_models(None, clip, comfy.utils.load_torch_file(lora), 0, 0.5)[1]
    read = host.text_encoder_tensors(patched, host.CLIP_L)
    swapped = host.replace_text_encoder(patched, host.CLIP_L, load_file(other))
    found = {"read": read, "swapped": host.text_encoder_tensors(swapped, host.CLIP_L),
             "original": host.text_encoder_tensors(patched, host.CLIP_L)}
    named = {f"{what}|{name}": tensor for what, tensors in found.items() for name, tensor in tensors.items()}
    save_file(named, f"{out}/{kind}.safetensors")
    del clip, patched, swapped
refiner = made(comfy.sdxl_clip.SDXLRefinerClipModel)
for ask in (host.text_encoder_tensors, lambda *where: host.replace_text_encoder(*where, load_file(other))):
    try:
        ask(refiner, host.CLIP_L)
    except UserError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """(folder with what was found, the text encoder, the one swapped in, what the LoRA adds, the output)."""
    folder = tmp_path_factory.mktemp("kinds")
    one, other = (random_clip(CLIP_L, seed=seed, dtype=torch.float16) for seed in (1, 2))
    encoder = export_text_encoder(one, folder / "one.safetensors")
    swap = export_text_encoder(other, folder / "other.safetensors")
    up, down = torch.randn(768, 4) * 0.1, torch.randn(4, 3072) * 0.1
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(4.0)}
    layer = "lora_te1_text_model_encoder_layers_3_mlp_fc2"
    save_file({f"{layer}.{name}": tensor for name, tensor in tensors.items()}, folder / "lora.safetensors")
    output, _ = in_comfyui(KINDS, encoder, folder / "lora.safetensors", swap, folder)
    yield folder, load_file(encoder), load_file(swap), 0.5 * up @ down, output
    shutil.rmtree(folder)  # 4 GB


@pytest.mark.parametrize("kind", ["SD1.5", "SDXL", "SD3", "Flux", "HunyuanVideo"])
def test_the_clip_l_of_every_clip_is_read_with_its_loras_and_replaced_in_a_clone(kinds, kind):
    folder, encoder, other, change, _ = kinds
    found = load_file(folder / f"{kind}.safetensors")
    for name, tensor in encoder.items():
        patched = name == "text_model.encoder.layers.3.mlp.fc2.weight"
        for what in ("read", "original"):
            if patched:  # in fp16
                expected = tensor.float() + change
                torch.testing.assert_close(found[f"{what}|{name}"].float(), expected, rtol=2e-3, atol=1e-4)
            else:
                assert torch.equal(found[f"{what}|{name}"], tensor), name
        assert torch.equal(found[f"swapped|{name}"], other[name]), name


def test_a_clip_without_a_clip_l_is_refused(kinds):
    assert kinds[-1].count("holds no CLIP-L; connect that of an SD1.5, SDXL, SD3 or Flux model.") == 2
