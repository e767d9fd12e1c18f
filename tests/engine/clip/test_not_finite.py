"""A model with NaN or infinite values: nothing makes a file or another model of it, unless it replaces them."""

import dataclasses
import functools

import pytest
import torch
from clips import CLIP_L, broken_clip, random_clip, write_unchecked

from clip_finetune.engine import (
    UserError,
    blend,
    export_lora,
    export_text_encoder,
    export_vision_encoder,
    fold_gmp,
    load_full_clip,
    merge_text_encoder,
    merge_vision_encoder,
    save_full_clip,
    save_huggingface,
    to_gmp,
    transplant_tower,
)
from clip_finetune.engine.clip.encoders import text_encoder_state_dict
from clip_finetune.engine.clip.names import is_vision_name, to_hf

# One of each tower, a projection, and a scalar.
NAMES = ["ln_final.bias", "visual.ln_post.bias", "visual.proj", "logit_scale"]
WORDS = "values that are not numbers (NaN or infinite); use a model from before"
LAYER = "transformer.resblocks.0.mlp.c_fc"
# Its vision tower is one that ComfyUI knows, as an export of it must be.
HOSTED = dataclasses.replace(
    CLIP_L, image_size=224, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16, vision_mlp_width=4096
)


def refused(make, *words):
    """Check that `make` is refused in one sentence with these words; return the sentence."""
    with pytest.raises(UserError) as error:
        make()
    message = str(error.value)
    assert all(word in message for word in (*words, WORDS)), message
    assert "\n" not in message and message.count(". ") == 0, message
    return message


def vision_of(model):
    return to_hf({name: tensor for name, tensor in model.state_dict.items() if is_vision_name(name)})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_function_makes_a_file_or_a_model_of_it(tmp_path, name, value):
    bad, good, file = broken_clip(name, value=value), random_clip(seed=1), tmp_path / "out.safetensors"
    for make in (
        lambda: save_full_clip(bad, file),
        lambda: save_full_clip(bad, file, dtype="fp16"),
        lambda: save_huggingface(bad, tmp_path / "folder"),
        lambda: export_text_encoder(bad, file),
        lambda: export_lora(bad, good, file),
        lambda: export_lora(good, bad, file),
        lambda: fold_gmp(bad),
        lambda: to_gmp(bad),
        lambda: blend(bad, good, 0.5),
        lambda: blend(good, bad, 1),
        lambda: blend(bad, good, 0),
    ):
        refused(make, name)
    assert not list(tmp_path.iterdir())


def test_the_vision_export_refuses_it(tmp_path):
    model = random_clip(HOSTED, dtype=torch.float16, text_layers=1)
    for name in NAMES:
        bad = broken_clip(name, model=model)
        refused(functools.partial(export_vision_encoder, bad, tmp_path / "out.safetensors"), name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gmp", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "text_projection"])
def test_a_merge_refuses_what_would_stay_broken_and_replaces_the_rest(name, gmp):
    bad, good = broken_clip(name, model=to_gmp(random_clip()) if gmp else None), random_clip(seed=1)
    text, vision = text_encoder_state_dict(good), vision_of(good)
    replaced_by = {"ln_final.bias": "text", "visual.ln_post.bias": "vision"}.get(name)
    for tower, merge in {
        "text": lambda: merge_text_encoder(text, bad),
        "vision": lambda: merge_vision_encoder(vision, bad),
    }.items():
        if tower == replaced_by:
            assert torch.isfinite(merge().state_dict[name]).all()
        else:
            refused(merge, name, f"cannot take the {tower} tower")


def test_a_merge_replaces_a_tower_whose_gmp_is_broken():
    good = random_clip(seed=1)
    bad = broken_clip(f"{LAYER}.theta", model=to_gmp(random_clip()))
    merged = merge_text_encoder(text_encoder_state_dict(good), bad)
    assert torch.equal(merged.state_dict[f"{LAYER}.weight"], good.state_dict[f"{LAYER}.weight"])
    refused(lambda: merge_vision_encoder(vision_of(good), bad), f"{LAYER}.theta")


@pytest.mark.parametrize("gmp", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_transplant_takes_nothing_that_is_broken_and_ignores_the_rest(name, gmp):
    bad, good = broken_clip(name, model=to_gmp(random_clip()) if gmp else None), random_clip(seed=1)
    taken, other = (good, bad) if is_vision_name(name) else (bad, good)
    refused(lambda: transplant_tower(taken, other), name)
    assert torch.isfinite(transplant_tower(other, taken).state_dict[name]).all()


def test_several_tensors_are_counted_and_the_origin_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_unchecked(broken_clip(*NAMES), "bad.safetensors")
    model = load_full_clip("bad.safetensors")
    message = refused(lambda: save_full_clip(model, tmp_path / "out.safetensors"), "and 1 more hold ")
    assert f"{tmp_path / 'out.safetensors'} was not written: in the model made from bad.safetensors, " in message


@pytest.mark.parametrize(
    "dtype, largest, words", [("bf16", 3.4e38, "bf16; choose fp32"), ("fp16", 1e5, "fp16; choose bf16 or fp32")]
)
def test_values_that_a_dtype_cannot_hold_are_refused_when_saving(tmp_path, dtype, largest, words):
    large = random_clip().derive({"ln_final.bias": torch.full((64,), largest)}, step="large")
    with pytest.raises(UserError, match=f"ln_final.bias holds values too large for {words}"):
        save_full_clip(large, tmp_path / "out.safetensors", dtype=dtype)


def test_a_fold_and_a_blend_that_overflow_are_refused():
    long = to_gmp(random_clip(dtype=torch.float16)).derive({f"{LAYER}.r": torch.full((256, 1), 1e7)}, step="long")
    with pytest.raises(UserError, match=f"not folded: {LAYER}.weight would hold values too large"):
        fold_gmp(long)
    half = random_clip(dtype=torch.float16)
    far = half.derive({"ln_final.bias": torch.full((64,), 6e4, dtype=torch.float16)}, step="far")
    with pytest.raises(UserError, match="alpha 1.5, ln_final.bias would hold values too large"):
        blend(far, half.derive({"ln_final.bias": -far.state_dict["ln_final.bias"]}, step="near"), 1.5)
