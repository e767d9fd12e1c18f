"""Towers put into full CLIPs: from checkpoints, from ComfyUI's vision files, from other full CLIPs."""

import dataclasses
import json

import pytest
import torch
from clips import random_clip
from safetensors.torch import save_file

from clip_finetune.engine import UserError, load_full_clip, merge_text_encoder, save_full_clip, to_gmp
from clip_finetune.engine.cli.info import describe
from clip_finetune.engine.clip.encoders import mix_text_encoders, text_encoder_state_dict
from clip_finetune.engine.clip.health import BROKEN_MERGE
from clip_finetune.engine.clip.merge import merge_vision_encoder, transplant_tower
from clip_finetune.engine.clip.names import to_hf, to_openai
from clip_finetune.engine.clip.tensor_files import same_bits


def vision_of(model):
    return {name: tensor for name, tensor in to_hf(model.state_dict).items() if name.startswith(("vision_", "visual_"))}


# ---- the map of names, by hand ---------------------------------------------------------------------------------------


def test_every_tensor_gets_its_hugging_face_name():
    """Written out here once more, so that a slip in the tables shows."""
    model = random_clip(embed_dim=64)  # square projections, where a missing transpose would go unseen
    hf, state = to_hf(model.state_dict), model.state_dict
    for hf_tower, tower in (("text_model", ""), ("vision_model", "visual.")):
        for layer in range(2):
            block, theirs = f"{tower}transformer.resblocks.{layer}", f"{hf_tower}.encoder.layers.{layer}"
            for kind in ("weight", "bias"):
                q, k, v = (hf.pop(f"{theirs}.self_attn.{letter}_proj.{kind}") for letter in "qkv")
                assert torch.equal(torch.cat([q, k, v]), state[f"{block}.attn.in_proj_{kind}"])
                for theirs_name, ours in (
                    ("self_attn.out_proj", "attn.out_proj"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                ):
                    assert torch.equal(hf.pop(f"{theirs}.{theirs_name}.{kind}"), state[f"{block}.{ours}.{kind}"])
    assert torch.equal(hf.pop("text_projection.weight"), state["text_projection"].t())
    assert torch.equal(hf.pop("visual_projection.weight"), state["visual.proj"].t())
    for theirs, ours in (
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        ("text_model.final_layer_norm.weight", "ln_final.weight"),
        ("text_model.final_layer_norm.bias", "ln_final.bias"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.pre_layrnorm.weight", "visual.ln_pre.weight"),
        ("vision_model.pre_layrnorm.bias", "visual.ln_pre.bias"),
        ("vision_model.post_layernorm.weight", "visual.ln_post.weight"),
        ("vision_model.post_layernorm.bias", "visual.ln_post.bias"),
        ("logit_scale", "logit_scale"),
    ):
        assert torch.equal(hf.pop(theirs), state[ours]), ours
    assert not hf


def test_renaming_there_and_back_keeps_every_bit_and_drops_position_ids():
    model = random_clip(dtype=torch.float16)
    hf = to_hf(model.state_dict) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    back = to_openai(hf)
    assert back.keys() == model.state_dict.keys()
    assert all(same_bits(back[name], tensor) for name, tensor in model.state_dict.items())


# ---- text encoders out of checkpoints --------------------------------------------------------------------------------


def sdxl(clip_l, clip_g):
    """A checkpoint as SDXL's: CLIP-L under Hugging Face's names, CLIP-G under OpenAI's."""
    first = text_encoder_state_dict(clip_l)
    del first["text_projection.weight"]
    second = {n: t for n, t in clip_g.state_dict.items() if not n.startswith("visual.")}
    return (
        {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in first.items()}
        | {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
        | {
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
            "model.diffusion_model.out.0.weight": torch.zeros(3),
            "first_stage_model.x": torch.zeros(3),
        }
    )


def test_of_sdxls_two_text_encoders_the_one_that_fits_is_taken(tmp_path):
    clip_l, clip_g = random_clip(seed=1), random_clip(seed=2, text_width=128)
    save_file(sdxl(clip_l, clip_g), tmp_path / "sdxl.safetensors")
    for base, source in ((random_clip(seed=3), clip_l), (random_clip(seed=3, text_width=128), clip_g)):
        merged = merge_text_encoder(tmp_path / "sdxl.safetensors", base)
        for name, tensor in merged.state_dict.items():
            own = name.startswith("visual.") or name in ("text_projection", "logit_scale")
            assert same_bits(tensor, (base if own else source).state_dict[name]), name
    with pytest.raises(
        UserError, match="does not fit this full CLIP: its text tower is 64 wide with 2 layers, the full CLIP's 192"
    ):
        merge_text_encoder(tmp_path / "sdxl.safetensors", random_clip(text_width=192))


def test_a_checkpoint_opened_as_a_clip_is_refused_as_an_image_model(tmp_path):
    save_file(sdxl(random_clip(), random_clip(text_width=128)), tmp_path / "sdxl.safetensors")
    with pytest.raises(UserError, match="an image model, not a CLIP; take the text encoder out of it"):
        load_full_clip(tmp_path / "sdxl.safetensors")
    facts = describe(tmp_path / "sdxl.safetensors")
    assert facts["kind"] == "checkpoint" and facts["problems"] == []
    assert [line.split(": ")[1] for line in facts["text_encoders"]] == ["64 wide", "128 wide"]


def test_a_text_encoder_with_more_positions_is_refused_with_how_to_make_room():
    long = text_encoder_state_dict(random_clip(context_length=248))
    with pytest.raises(
        UserError, match="it reads 248 tokens, the full CLIP 77. Open the full CLIP with the context length 248"
    ):
        merge_text_encoder(long, random_clip())


def test_a_long_clips_two_tables_are_merged_with_it():
    long = random_clip(seed=1, context_length=248)
    second = torch.randn(248, 64)
    tensors = text_encoder_state_dict(long)
    tensors["text_model.embeddings.position_embedding_res.weight"] = second
    merged = merge_text_encoder(tensors, random_clip(seed=2, context_length=248))
    expected = torch.cat([long.state_dict["positional_embedding"][:20], second[20:]])
    assert same_bits(merged.state_dict["positional_embedding"], expected)


@pytest.mark.parametrize(
    "change, words", [({"activation": "gelu"}, "gelu as activation"), ({"text_heads": 4}, "4 attention heads")]
)
def test_a_tower_with_other_heads_or_activation_is_refused_if_its_file_says_so(tmp_path, change, words):
    save_full_clip(random_clip(seed=1, **change), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=words):
        merge_text_encoder(tmp_path / "other.safetensors", random_clip())


@pytest.mark.parametrize("kind, refused", [("clip_text_model", True), ("clip_vision_model", False)])
def test_only_a_config_of_the_same_tower_is_believed(tmp_path, kind, refused):
    save_file(text_encoder_state_dict(random_clip(seed=1)), tmp_path / "te.safetensors")
    config = {
        "model_type": kind,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 256,
        "hidden_act": "gelu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    if refused:
        with pytest.raises(UserError, match="gelu as activation"):
            merge_text_encoder(tmp_path / "te.safetensors", random_clip())
    else:
        merge_text_encoder(tmp_path / "te.safetensors", random_clip())


def test_a_tower_of_another_size_is_refused_by_its_size():
    text = text_encoder_state_dict(random_clip(text_layers=3))
    with pytest.raises(UserError, match="its text tower is 64 wide with 3 layers, the full CLIP's 64 with 2"):
        merge_text_encoder(text, random_clip())
    short = text_encoder_state_dict(random_clip())
    with pytest.raises(UserError, match="reads 77 tokens, the full CLIP 248. Open the full CLIP without stretching it"):
        merge_text_encoder(short, random_clip(context_length=248))


def test_a_vision_tower_in_gmp_form_says_how_to_fold_it(tmp_path):
    save_full_clip(to_gmp(random_clip()), tmp_path / "gmp.safetensors")
    with pytest.raises(UserError, match="is in GmP form .*fold it first"):
        merge_vision_encoder(tmp_path / "gmp.safetensors", random_clip())


# ---- the broken merge ------------------------------------------------------------------------------------------------


def as_the_broken_script_does(text, base):
    """What that script makes of a text encoder: v_proj ends up in out_proj, and the projection is not transposed."""
    merged = dict(to_openai(text))
    merged["text_projection"] = text["text_projection.weight"]
    for name in [name for name in merged if name.endswith("attn.in_proj_weight")]:
        merged[name.replace("in_proj_weight", "out_proj.weight")] = merged[name].chunk(3)[2].clone()
    return {**base.state_dict, **merged}


def test_a_full_clip_of_the_broken_merge_is_recognised_and_ours_is_not_one(tmp_path):
    source, base = random_clip(seed=1, embed_dim=64), random_clip(seed=2, embed_dim=64)
    text = text_encoder_state_dict(source)
    save_file(as_the_broken_script_does(text, base), tmp_path / "broken.safetensors")
    assert any(BROKEN_MERGE in note for note in load_full_clip(tmp_path / "broken.safetensors").notes)
    assert any(BROKEN_MERGE in problem for problem in describe(tmp_path / "broken.safetensors")["problems"])
    with pytest.raises(UserError, match="broken merge script"):
        merge_text_encoder(tmp_path / "broken.safetensors", base)

    ours = merge_text_encoder(text, base)
    assert same_bits(ours.state_dict["text_projection"], base.state_dict["text_projection"])
    for layer in range(2):
        name = f"transformer.resblocks.{layer}.attn.out_proj.weight"
        assert same_bits(ours.state_dict[name], source.state_dict[name])
    opened = load_full_clip(save_full_clip(ours, tmp_path / "ours.safetensors"))
    assert not any(BROKEN_MERGE in note for note in opened.notes)


# ---- vision towers ---------------------------------------------------------------------------------------------------


def test_a_vision_file_brings_its_tower_and_its_own_projection_if_it_is_of_the_same_model(tmp_path):
    base = random_clip(seed=1)
    nearby = {name: tensor + 0.1 * tensor.std(correction=0) for name, tensor in base.state_dict.items()}
    trained = dataclasses.replace(base, state_dict=nearby)
    save_file(vision_of(trained), tmp_path / "vision.safetensors")
    merged = merge_vision_encoder(tmp_path / "vision.safetensors", base)
    for name, tensor in merged.state_dict.items():
        assert same_bits(tensor, (trained if name.startswith("visual.") else base).state_dict[name]), name
    assert merged.notes == ()


@pytest.mark.parametrize("projection", ["none", "another model's", "not numbers"])
def test_a_missing_or_useless_projection_is_the_full_clips(projection):
    base, other = random_clip(seed=1), random_clip(seed=2)
    vision = vision_of(other)
    if projection == "none":
        del vision["visual_projection.weight"]
    elif projection == "not numbers":
        vision["visual_projection.weight"] = torch.full((32, 64), torch.nan)
    merged = merge_vision_encoder(vision, base)
    assert same_bits(merged.state_dict["visual.proj"], base.state_dict["visual.proj"])
    assert same_bits(merged.state_dict["visual.conv1.weight"], other.state_dict["visual.conv1.weight"])
    assert len(merged.notes) == (projection != "none")


@pytest.mark.parametrize(
    "vision, words",
    [
        (
            lambda: vision_of(random_clip(vision_layers=1)),
            "does not fit this full CLIP: its vision tower is 64 wide with 1 layers",
        ),
        (lambda: vision_of(random_clip(vision_width=128)), "does not fit this full CLIP: its vision tower is 128 wide"),
        (lambda: {n: t * torch.nan for n, t in vision_of(random_clip()).items()}, "holds values that are not numbers"),
        (lambda: text_encoder_state_dict(random_clip()), "holds no CLIP vision encoder"),
        (lambda: {}, "holds no CLIP vision encoder"),
    ],
)
def test_anything_but_a_vision_tower_of_that_shape_is_refused(vision, words):
    with pytest.raises(UserError, match=words):
        merge_vision_encoder(vision(), random_clip())


def test_a_text_encoder_and_a_vision_encoder_and_a_full_clip_for_the_rest_make_a_full_clip(tmp_path):
    """ComfyUI's pieces: a text encoder file and a clip_vision file."""
    one, base = random_clip(seed=1), random_clip(seed=2)
    save_file(text_encoder_state_dict(one), tmp_path / "te.safetensors")
    save_file({n: t for n, t in vision_of(one).items() if "projection" not in n}, tmp_path / "vision.safetensors")
    merged = merge_vision_encoder(
        tmp_path / "vision.safetensors", merge_text_encoder(tmp_path / "te.safetensors", base)
    )
    for name, tensor in merged.state_dict.items():
        rest = name in ("text_projection", "visual.proj", "logit_scale")
        assert same_bits(tensor, (base if rest else one).state_dict[name]), name


# ---- one tower of each -----------------------------------------------------------------------------------------------


def test_a_transplant_has_each_tower_of_its_own_model():
    text, vision = random_clip(seed=1, text_layers=3), random_clip(seed=2, vision_width=128, image_size=48)
    both = transplant_tower(text, vision)
    assert both.architecture == dataclasses.replace(vision.architecture, text_layers=3)
    for name, tensor in both.state_dict.items():
        assert same_bits(tensor, (vision if name.startswith("visual.") else text).state_dict[name]), name


def test_a_transplant_stays_in_gmp_form_if_both_are_and_is_plain_otherwise():
    text, vision = random_clip(seed=1), random_clip(seed=2)
    assert transplant_tower(to_gmp(text), to_gmp(vision)).parameterization == "gmp"
    half = transplant_tower(to_gmp(text), vision)
    assert half.parameterization == "linear" and any("folded" in note for note in half.notes)


@pytest.mark.parametrize(
    "change, words", [({"embed_dim": 64}, "32 channels .* 64 channels"), ({"activation": "gelu"}, "gelu")]
)
def test_towers_that_do_not_fit_are_not_transplanted(change, words):
    with pytest.raises(UserError, match=f"The towers do not fit: .*{words}"):
        transplant_tower(random_clip(), random_clip(**change))


def test_a_mix_of_clip_gs_mixes_the_projection_too():
    original, trained = (text_encoder_state_dict(random_clip(seed=seed)) for seed in (1, 2))
    mixed = mix_text_encoders(original, trained, 0.5, projection=True)["text_projection.weight"]
    torch.testing.assert_close(mixed, (original["text_projection.weight"] + trained["text_projection.weight"]) / 2)
