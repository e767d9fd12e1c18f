"""Text encoders out of full CLIPs and into them."""

import pytest
import torch
from clips import VIT_L_14, identical, random_clip
from safetensors.torch import load_file, save_file

from clip_finetune.engine import UserError, build_network, export_text_encoder, merge_text_encoder, to_gmp
from clip_finetune.engine.clip.encoders import CLIP_L, mix_text_encoders, require_text_tower, text_encoder_state_dict
from clip_finetune.engine.clip.health import describe_text_encoder
from clip_finetune.engine.clip.tensor_files import same_bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_exported_and_merged_back_every_tensor_has_the_same_bits(tmp_path, dtype):
    model = random_clip(dtype=dtype)
    file = export_text_encoder(model, tmp_path / "te.safetensors", dtype=None)
    merged = merge_text_encoder(file, model)
    assert identical(model, merged) and merged.notes == ()


def test_transformers_loads_our_text_encoder_with_equal_features(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = random_clip(text_heads=4)
    file = export_text_encoder(to_gmp(model), tmp_path / "te.safetensors", dtype="fp32")
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        eos_token_id=49407,
        bos_token_id=49406,
        pad_token_id=0,
    )
    theirs = CLIPTextModelWithProjection(config).eval()
    loaded = theirs.load_state_dict(load_file(file), strict=False)
    assert not loaded.unexpected_keys and all("position_ids" in key for key in loaded.missing_keys)
    tokens = torch.randint(1, 49405, (3, 77))
    tokens[:, 9], tokens[:, 10:] = 49407, 0
    with torch.no_grad():
        expected = theirs(tokens).text_embeds
        torch.testing.assert_close(build_network(model).encode_text(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "prefix", ["conditioner.embedders.0.transformer.", "cond_stage_model.transformer.", "clip_l.transformer.", ""]
)
def test_a_text_encoder_is_found_under_every_known_prefix(tmp_path, prefix):
    base, other = random_clip(seed=1), random_clip(seed=2)
    tensors = text_encoder_state_dict(other)
    del tensors["text_projection.weight"]
    checkpoint = {prefix + name: tensor for name, tensor in tensors.items()}
    checkpoint[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(77)[None]
    checkpoint["model.diffusion_model.out.weight"] = torch.zeros(2)
    save_file(checkpoint, tmp_path / "checkpoint.safetensors")
    merged = merge_text_encoder(tmp_path / "checkpoint.safetensors", base)
    for name, tensor in merged.state_dict.items():
        own = name.startswith("visual.") or name in ("text_projection", "logit_scale")
        assert same_bits(tensor, (base if own else other).state_dict[name]), name


@pytest.mark.parametrize("projection", ["identity", "foreign", "nan"])
def test_projection_and_logit_scale_are_always_the_full_clips(projection):
    base = random_clip(embed_dim=64)
    tensors = text_encoder_state_dict(base)
    other = {"identity": torch.eye(64), "foreign": torch.randn(64, 64), "nan": torch.full((64, 64), torch.nan)}
    tensors["text_projection.weight"] = other[projection]
    tensors["logit_scale"] = torch.tensor(1.0)
    merged = merge_text_encoder(tensors, base)
    assert same_bits(merged.state_dict["text_projection"], base.state_dict["text_projection"])
    assert same_bits(merged.state_dict["logit_scale"], base.state_dict["logit_scale"])
    assert "was ignored" in merged.notes[-1]


def test_a_projection_that_is_the_bases_transpose_is_warned_of():
    base = random_clip(embed_dim=64)
    tensors = text_encoder_state_dict(base)
    tensors["text_projection.weight"] = base.state_dict["text_projection"].clone()
    assert "transpose" in merge_text_encoder(tensors, base).notes[-1]


def test_swapped_query_and_value_are_warned_of():
    base = random_clip()
    tensors = text_encoder_state_dict(base)
    for kind in ("weight", "bias"):
        q, v = (f"text_model.encoder.layers.1.self_attn.{letter}_proj.{kind}" for letter in "qv")
        tensors[q], tensors[v] = tensors[v], tensors[q]
    assert "swapped" in merge_text_encoder(tensors, base).notes[-1]


def test_a_tower_that_has_nothing_in_common_with_the_base_is_not_called_swapped():
    tensors = text_encoder_state_dict(random_clip(seed=2))
    assert not any("swapped" in note for note in merge_text_encoder(tensors, random_clip(seed=1)).notes)


def damaged(change):
    tensors = text_encoder_state_dict(random_clip())
    change(tensors)
    return tensors


def _gmp(tensors):
    tensors["text_model.encoder.layers.0.mlp.fc1.r"] = torch.zeros(256, 1)


def _nan(tensors):
    tensors["text_model.final_layer_norm.bias"] = torch.full((64,), torch.nan)


def _misshapen(tensors):
    tensors["text_model.final_layer_norm.bias"] = torch.zeros(63)


def _broken_merge(tensors):
    for layer in range(2):
        attention = f"text_model.encoder.layers.{layer}.self_attn."
        tensors[f"{attention}out_proj.weight"] = tensors[f"{attention}v_proj.weight"].clone()


@pytest.mark.parametrize(
    "change, words",
    [
        (_gmp, "GmP form"),
        (_nan, "not numbers"),
        (_misshapen, "ln_final.bias"),
        (lambda t: t.pop("text_model.final_layer_norm.bias"), "ln_final.bias"),
        (lambda t: t.pop("text_model.encoder.layers.1.self_attn.k_proj.weight"), "k_proj.weight is missing"),
        (_broken_merge, "out_proj equals v_proj"),
        (lambda t: t.clear(), "holds no CLIP text encoder"),
    ],
)
def test_a_damaged_text_encoder_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        merge_text_encoder(damaged(change), random_clip())


def test_an_export_folds_gmp_and_says_so():
    model = random_clip(dtype=torch.float16)
    notes = []
    expected = text_encoder_state_dict(model, on_note=notes.append)
    assert notes == []
    tensors = text_encoder_state_dict(to_gmp(model), on_note=notes.append)
    assert "folded" in notes[0]
    assert tensors.keys() == expected.keys() and "logit_scale" not in tensors
    assert all(same_bits(tensors[name], tensor) for name, tensor in expected.items())


def test_weights_that_are_not_numbers_are_not_exported(tmp_path):
    model = random_clip().derive({"ln_final.bias": torch.full((64,), torch.inf)}, step="broken")
    with pytest.raises(UserError, match="ln_final.bias"):
        export_text_encoder(model, tmp_path / "te.safetensors")
    assert not list(tmp_path.iterdir())


def test_only_a_clip_l_with_quickgelu_passes_for_clip_l():
    require_text_tower(random_clip(VIT_L_14, vision_layers=1), CLIP_L)
    with pytest.raises(UserError, match="64 wide with 2 layers"):
        require_text_tower(random_clip(), CLIP_L)
    with pytest.raises(UserError, match="quick_gelu"):
        require_text_tower(random_clip(VIT_L_14, vision_layers=1, activation="gelu"), CLIP_L)


# ---- mixing, and what is wrong with a file ---------------------------------------------------------------------------


def text_of(seed, dtype="fp32"):
    return text_encoder_state_dict(random_clip(seed=seed), dtype=dtype)


def test_a_mix_is_the_line_through_both_and_keeps_the_trained_projection():
    original, trained = text_of(1), text_of(2)
    for strength in (0.0, 0.3, 1.0, 1.5):
        mixed = mix_text_encoders(original, trained, strength)
        assert list(mixed) == list(trained)
        assert torch.equal(mixed["text_projection.weight"], trained["text_projection.weight"])
        name = "text_model.encoder.layers.1.mlp.fc1.weight"
        expected = original[name] * (1 - strength) + trained[name] * strength
        torch.testing.assert_close(mixed[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_mix_with_values_that_are_not_numbers_is_refused(bad):
    original = text_of(1) | {"text_model.final_layer_norm.bias": torch.full((64,), bad)}
    with pytest.raises(UserError, match="final_layer_norm.bias would hold values that are not numbers"):
        mix_text_encoders(original, text_of(2), 0.5)


def test_a_mix_that_fp16_cannot_hold_is_refused():
    far = {name: torch.full_like(tensor, -60000) for name, tensor in text_of(1).items()}
    trained = {name: torch.full_like(tensor, 60000).half() for name, tensor in text_of(2).items()}
    with pytest.raises(UserError, match="Lower strength"):
        mix_text_encoders(far, trained, 1.5)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: {k: v for k, v in d.items() if "layers.1.self_attn.k_proj.weight" not in k}, "1 tensor is missing"),
        (lambda d: {f"text_encoder.{k}": v for k, v in d.items()}, "begin with 'text_encoder.'"),
        (lambda d: d | {"text_model.final_layer_norm.bias": torch.full((64,), torch.nan)}, "NaN or infinite"),
        (lambda d: d | {"text_model.final_layer_norm.bias": torch.zeros(63)}, "of another shape"),
        (lambda d: {k: d[k.replace("out_proj.w", "v_proj.w")] for k in d}, "out_proj equals v_proj"),
        (lambda d: d | {"text_model.encoder.layers.0.mlp.fc1.theta": torch.zeros(1)}, "GmP form"),
    ],
)
def test_info_reports_what_is_wrong_with_a_text_encoder(damage, words):
    assert describe_text_encoder(text_of(1))["problems"] == []
    assert any(words in problem for problem in describe_text_encoder(damage(text_of(1)))["problems"])
