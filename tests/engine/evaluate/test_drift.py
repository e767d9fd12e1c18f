"""Drift of weights and hidden states against numpy, transformers and ComfyUI."""

import dataclasses
import json
import math

import numpy
import pytest
import torch
from clips import CLIP_L, TINY, disturbed, random_clip
from comfyui_server import in_comfyui
from safetensors.torch import load_file

from clip_finetune.engine import (
    UserError,
    export_text_encoder,
    to_gmp,
)
from clip_finetune.engine.clip.encoders import CLIP_G
from clip_finetune.engine.evaluate import gmp_form
from clip_finetune.engine.evaluate.drift import (
    MAX_PROMPTS,
    PROMPTS,
    conditioning_drift,
    hidden_states,
    host_tokens,
    read_states,
    weight_drift,
)
from clip_finetune.engine.evaluate.encoder import Encoder


def test_weight_drift_is_the_relative_frobenius_norm_of_each_layer(model, moved):
    found = weight_drift(moved, model)

    def expected(prefix):
        rows = [
            (moved.state_dict[name].double().numpy(), tensor.double().numpy())
            for name, tensor in model.state_dict.items()
            if name.startswith(prefix)
        ]
        return math.sqrt(sum(((x - y) ** 2).sum() for x, y in rows) / sum((y**2).sum() for _, y in rows))

    layers = {(layer.tower, layer.depth): layer.drift for layer in found.layers if layer.depth is not None}
    assert len(layers) == 4
    for depth in (0, 1):
        assert layers["text", depth] == pytest.approx(expected(f"transformer.resblocks.{depth}."), rel=1e-6)
        assert layers["vision", depth] == pytest.approx(expected(f"visual.transformer.resblocks.{depth}."), rel=1e-6)
    assert found.vision == pytest.approx(expected("visual."), rel=1e-6)
    tokens = next(layer for layer in found.layers if layer.layer == "token embeddings")
    assert tokens.drift == pytest.approx(expected("token_embedding"), rel=1e-6)


def test_a_gmp_model_drifts_as_it_folds(model, moved):
    plain, other = weight_drift(moved, model), weight_drift(to_gmp(moved), model)
    for ours, theirs in zip(plain.layers, other.layers, strict=True):
        assert (ours.tower, ours.layer) == (theirs.tower, theirs.layer)
        assert ours.drift == pytest.approx(theirs.drift, rel=1e-5)


def test_the_temperature_is_reported_apart_from_the_weights(model):
    hotter = model.derive({"logit_scale": torch.tensor(math.log(50.0))}, step="hotter")
    found = weight_drift(hotter, model)
    assert found.vision == found.text == 0 and found.logit_scale[1] == pytest.approx(50)


def test_the_blocks_of_a_resnet_are_known_by_depth():
    resnet = random_clip(
        vision_layers=(1, 1, 1, 1),
        patch_size=None,
        vision_mlp_width=None,
        vision_width=16,
        vision_heads=8,
        image_size=64,
    )
    found = weight_drift(disturbed(resnet, 0.1), resnet)
    assert sum(layer.tower == "vision" and layer.depth is not None for layer in found.layers) == 4
    assert {entry.tower for entry in gmp_form.gmp_form(resnet, resnet).layers} == {"text"}
    assert gmp_form.gmp_form(resnet, resnet).chart().mode == "RGB"


def by_transformers(full_clip, tokens, folder, dtype=torch.float32):
    """hidden_states and so on of Hugging Face's CLIPTextModel for a model that we exported."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    a = full_clip.architecture
    config = CLIPTextConfig(
        vocab_size=a.vocab_size,
        hidden_size=a.text_width,
        intermediate_size=a.text_mlp_width,
        num_hidden_layers=a.text_layers,
        num_attention_heads=a.text_heads,
        hidden_act=a.activation,
        max_position_embeddings=a.context_length,
        projection_dim=a.embed_dim,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    theirs = CLIPTextModelWithProjection(config).eval()
    theirs.load_state_dict(load_file(export_text_encoder(full_clip, folder / "te.safetensors", dtype="fp32")))
    theirs.to(dtype)
    with torch.no_grad():
        found = theirs(tokens, output_hidden_states=True)
        last = theirs.text_model(tokens).pooler_output
    return {
        "penultimate": found.hidden_states[-2],
        "last": found.last_hidden_state,
        "pooled": last,
        "projected": found.text_embeds,
    }


@pytest.mark.parametrize("gmp", [False, True])
def test_hidden_states_are_those_of_transformers(model, tmp_path, gmp):
    """In float64, where the two may differ only by rounding; a folded GmP weight is rounded to float32 once."""
    encoder = Encoder.of(to_gmp(model) if gmp else model, device="cpu")
    tokens = host_tokens(encoder, PROMPTS, model.architecture)
    with torch.no_grad():
        ours = hidden_states(encoder.network.double(), tokens)
    for name, theirs in by_transformers(model, tokens, tmp_path, dtype=torch.float64).items():
        assert ours[name].shape == theirs.shape
        torch.testing.assert_close(ours[name], theirs, rtol=1e-6 if gmp else 1e-10, atol=1e-5 if gmp else 1e-10)


def test_conditioning_drift_is_that_of_transformers_states_by_position(model, moved, tmp_path):
    prompts = ["", "a photo of a cat", "a very long caption about nothing at all " * 20]
    found = conditioning_drift(moved, model, prompts, device="cpu")
    tokens = host_tokens(Encoder.of(model, device="cpu"), prompts, model.architecture)
    assert (tokens[0, 1:] == 49407).all() and (tokens[1, 6:] == 49407).all() and (tokens[2] == 49407).sum() <= 3
    after, before = (by_transformers(one, tokens, tmp_path) for one in (moved, model))
    places = {"start": [], "words": [], "end": [], "padding": []}
    for row in range(3):
        end = tokens[row].tolist().index(49407)
        for column in range(77):
            what = "start" if column == 0 else "words" if column < end else "end" if column == end else "padding"
            places[what].append((row, column))
    for state, readers in (("penultimate", "SDXL, SD3"), ("last", "SD1.5")):
        assert found.readers[state] == readers
        for position, where in places.items():
            x = torch.stack([after[state][at] for at in where]).double().numpy()
            y = torch.stack([before[state][at] for at in where]).double().numpy()
            lengths = numpy.linalg.norm(x, axis=1) * numpy.linalg.norm(y, axis=1)
            ours = found.states[state][position]
            assert ours.positions == len(where)
            assert ours.cosine == pytest.approx(((x * y).sum(1) / lengths).mean(), abs=1e-6)
            distance = (numpy.linalg.norm(x - y, axis=1) / numpy.linalg.norm(y, axis=1)).mean()
            assert ours.relative_l2 == pytest.approx(distance, abs=1e-6) and ours.relative_l2 > 0.01
    x, y = after["pooled"].double().numpy(), before["pooled"].double().numpy()
    distance = (numpy.linalg.norm(x - y, axis=1) / numpy.linalg.norm(y, axis=1)).mean()
    assert set(found.states["pooled"]) == {"end"}
    assert found.states["pooled"]["end"].relative_l2 == pytest.approx(distance, abs=1e-6)
    json.dumps(found.as_dict(), allow_nan=False)


def test_sdxl_does_not_see_what_changes_in_the_last_block(model):
    changed = {
        name: tensor + 0.1
        for name, tensor in model.state_dict.items()
        if name.startswith(("transformer.resblocks.1.", "ln_final", "text_projection"))
    }
    found = conditioning_drift(model.derive(changed, step="last block"), model)
    assert all(moved.relative_l2 == 0 for moved in found.states["penultimate"].values())
    assert found.states["last"]["words"].relative_l2 > 0.1 and found.states["pooled"]["end"].relative_l2 > 0.1


def test_a_clip_g_is_padded_with_zeros_and_read_projected():
    width, layers, mlp, heads = CLIP_G
    architecture = dataclasses.replace(
        TINY, text_width=width, text_layers=layers, text_mlp_width=mlp, text_heads=heads, activation="gelu"
    )
    encoder = Encoder.of(random_clip(), device="cpu")  # for its tokenizer
    tokens = host_tokens(encoder, ["a cat"], architecture)
    assert tokens[0].tolist() == [49406, 320, 2368, 49407] + 73 * [0]
    assert host_tokens(encoder, ["a cat"], CLIP_L)[0].tolist() == [49406, 320, 2368] + 74 * [49407]


HOST = """
import comfy.sd1_clip, comfy.sdxl_clip
from types import SimpleNamespace
from comfy.text_encoders import flux, sd3_clip
file, out, *prompts = arguments
half = torch.float32
models = {
    "SD1.5": comfy.sd1_clip.SD1ClipModel(dtype=half).clip_l,
    "SDXL": comfy.sdxl_clip.SDXLClipModel(dtype=half).clip_l,
    "SD3": sd3_clip.SD3ClipModel(clip_l=True, clip_g=False, t5=False, dtype=half).clip_l,
}
flux_l = comfy.sd1_clip.SDClipModel(dtype=half, return_projected_pooled=False)  # as FluxClipModel makes it
models["Flux"] = flux_l
tokenizer = comfy.sd1_clip.SDTokenizer()
found = {}
for name, model in models.items():
    model.load_sd(load_file(file))
    with torch.no_grad():
        rows = [tokenizer.tokenize_with_weights(prompt)[0] for prompt in prompts]
        found["tokens"] = torch.tensor([[token for token, _ in row] for row in rows])
        hidden, pooled = zip(*(model.encode_token_weights([row]) for row in rows))
    found[f"{name} hidden"], found[f"{name} pooled"] = torch.cat(hidden), torch.cat(pooled)
save_file(found, out)
"""


@pytest.mark.comfyui
def test_the_states_are_those_that_comfyui_gives_to_each_image_model(tmp_path):
    model = random_clip(CLIP_L)
    file = export_text_encoder(model, tmp_path / "clip_l.safetensors", dtype="fp32")
    in_comfyui(HOST, file, tmp_path / "found.safetensors", *PROMPTS)
    found = load_file(tmp_path / "found.safetensors")
    encoder = Encoder.of(model, device="cpu")
    assert torch.equal(host_tokens(encoder, PROMPTS, model.architecture), found["tokens"])
    ours = read_states(encoder, PROMPTS, model.architecture).states
    for theirs, name in (
        ("SD1.5 hidden", "last"),
        ("SDXL hidden", "penultimate"),
        ("SD3 hidden", "penultimate"),
        ("SD3 pooled", "pooled"),
        ("Flux pooled", "pooled"),
    ):
        torch.testing.assert_close(ours[name], found[theirs], rtol=1e-5, atol=1e-5)


def test_a_long_list_of_prompts_is_cut_and_none_is_refused(model):
    found = conditioning_drift(model, model, ["a cat"] * (MAX_PROMPTS + 1))
    assert found.prompts == MAX_PROMPTS and "the first 256" in found.notes[0]
    with pytest.raises(UserError, match="no prompt"):
        conditioning_drift(model, model, [])
