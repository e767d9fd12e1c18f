"""The difference between two text towers as a LoRA."""

import dataclasses
import json

import numpy
import pytest
import torch
from clips import CLIP_L, TINY, VIT_L_14, random_clip
from comfyui_server import in_comfyui
from safetensors import safe_open
from safetensors.torch import load_file

from clip_finetune.engine import UserError, export_text_encoder, to_gmp
from clip_finetune.engine.clip.encoders import text_encoder_state_dict
from clip_finetune.engine.clip.lora import (
    CARRIED,
    LOST,
    export_lora,
    lora_metadata,
    lora_name,
    lora_prefix,
    lora_state_dict,
    low_rank,
)

CLIP_G = dataclasses.replace(VIT_L_14, text_width=1280, text_layers=32, text_mlp_width=5120, text_heads=20)
BLOCK = "transformer.resblocks.1."


def trained(baseline, *, scale=0.002, only="", seed=5):
    """The baseline after a training of the text tower, as far as shapes go: noise on the tensors with `only` in them.

    Matrices get a strong part of rank 4 besides, as real fine-tunes have.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = {}
    for name, tensor in baseline.state_dict.items():
        if name.startswith("visual.") or only not in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.startswith("transformer.") and tensor.ndim == 2:
            thin = torch.randn(len(tensor), 4, generator=generator)
            noise += 4 * thin @ torch.randn(4, tensor.shape[1], generator=generator)
        changed[name] = (tensor.float() + scale * noise).to(tensor.dtype)
    return baseline.derive(changed, step="trained")


@pytest.fixture(scope="module")
def pair():
    baseline = random_clip(seed=1, embed_dim=64)
    return trained(baseline), baseline


def text(model):
    """The text tower as numpy float64 under Hugging Face's names, without the projection."""
    tensors = text_encoder_state_dict(model)
    return {name: t.double().numpy() for name, t in tensors.items() if name != "text_projection.weight"}


def applied(tensors, name):
    """What the LoRA adds to the tensor of this Hugging Face name, in numpy float64, as the format defines it."""
    stem, _, kind = name.rpartition(".")
    layer = "lora_te1_" + stem.replace(".", "_")
    if kind == "bias" or f"{layer}.lora_up.weight" not in tensors:
        return 0
    up, down = (tensors[f"{layer}.lora_{side}.weight"].double().numpy() for side in ("up", "down"))
    return up @ down * (tensors[f"{layer}.alpha"].item() / len(down))


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_at_full_rank_the_lora_gives_every_matrix_to_fp32_rounding(pair):
    model, baseline = pair
    tensors, report = lora_state_dict(model, baseline, rank=64, dtype="fp32")
    new, old = text(model), text(baseline)
    layers = [name for name in new if ".encoder.layers." in name and name.endswith(".weight") and "norm" not in name]
    assert len(layers) == 2 * 6
    for name in layers:
        numpy.testing.assert_allclose(old[name] + applied(tensors, name), new[name], rtol=6e-8, atol=6e-8)
    for kind in CARRIED:
        assert report.parts[kind].kept == pytest.approx(report.parts[kind].share, rel=1e-9)


@pytest.mark.parametrize("dtype, rank", [("fp32", 1), ("fp16", 8), ("bf16", 3)])
def test_the_reported_shares_are_those_of_the_written_tensors_in_float64(pair, tmp_path, dtype, rank):
    model, baseline = pair
    report = export_lora(model, baseline, tmp_path / "lora.safetensors", rank=rank, dtype=dtype)
    tensors, new, old = load_file(tmp_path / "lora.safetensors"), text(model), text(baseline)
    kinds = {
        "token_embedding": "token embeddings",
        "position": "positions",
        "norm": "layer norms",
        ".bias": "biases",
        "self_attn": "attention",
        "mlp": "MLP",
    }
    energy, kept = dict.fromkeys(kinds.values(), 0.0), dict.fromkeys(kinds.values(), 0.0)
    for name in new:
        kind = next(kind for part, kind in kinds.items() if part in name)
        difference = new[name] - old[name]
        energy[kind] += (difference**2).sum()
        if kind in CARRIED:
            kept[kind] += (difference**2).sum() - ((difference - applied(tensors, name)) ** 2).sum()
    whole = sum(energy.values())
    assert set(report.parts) == set(energy) == {*CARRIED, *LOST}
    for kind, part in report.parts.items():
        assert part.share == pytest.approx(energy[kind] / whole, rel=1e-9)
        assert part.kept == pytest.approx(kept[kind] / whole, rel=1e-9, abs=1e-12)
    assert report.kept == pytest.approx(sum(kept.values()) / whole, rel=1e-9)
    assert sum(part.share for part in report.parts.values()) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (40, 96)])
@pytest.mark.parametrize("rank", [1, 7, 40])
def test_no_matrix_of_that_rank_is_nearer_than_the_loras(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(rank)) * 1e-4
    matrix[:, 0] *= 1e4  # far from even singular values
    up, down = low_rank(matrix, rank)
    values = numpy.linalg.svd(matrix.double().numpy(), compute_uv=False)
    missed = torch.linalg.norm(matrix.double() - up @ down).item() ** 2
    assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
    assert missed == pytest.approx((values[rank:] ** 2).sum(), rel=1e-6, abs=1e-13 * (values**2).sum())
    for factor, dim in ((up, 0), (down, 1)):  # each singular value in even parts
        numpy.testing.assert_allclose(torch.linalg.norm(factor, dim=dim) ** 2, values[:rank], rtol=1e-6)


def test_a_difference_of_lower_rank_gets_no_more_rows_than_it_has():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-4, 5, shape, generator=generator).float() for shape in ((64, 3), (3, 64)))
    name = f"{BLOCK}attn.out_proj.weight"
    baseline = random_clip(seed=1).derive({name: torch.ones(64, 64)}, step="no rounding")
    model = baseline.derive({name: torch.ones(64, 64) + left @ right}, step="changed")
    tensors, report = lora_state_dict(model, baseline, rank=32, dtype="fp32")
    layer = "lora_te1_text_model_encoder_layers_1_self_attn_out_proj"
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"{layer}.lora_up.weight": (64, 3),
        f"{layer}.lora_down.weight": (3, 64),
        f"{layer}.alpha": (),
    }
    assert tensors[f"{layer}.alpha"].item() == 3
    assert report.rank == 32 and report.kept == pytest.approx(1)


def test_unchanged_tensors_are_left_out():
    baseline = random_clip(seed=1)
    tensors, report = lora_state_dict(trained(baseline, only="resblocks.1.mlp.c_fc"), baseline)
    layer = "lora_te1_text_model_encoder_layers_1_mlp_fc1"
    assert set(tensors) == {f"{layer}.{end}" for end in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert report.parts["attention"].share == report.parts["token embeddings"].share == 0
    assert report.parts["biases"].share > 0 and report.parts["biases"].kept == 0


def test_gmp_is_folded_on_either_side_and_its_rounding_is_no_difference(pair):
    model, baseline = pair
    expected, _ = lora_state_dict(model, baseline, rank=64, dtype="fp32")
    for one, other in ((to_gmp(model), baseline), (model, to_gmp(baseline)), (to_gmp(model), to_gmp(baseline))):
        tensors, report = lora_state_dict(one, other, rank=64, dtype="fp32")
        assert tensors.keys() == expected.keys()
        name = "text_model.encoder.layers.1.mlp.fc2.weight"
        numpy.testing.assert_allclose(applied(tensors, name), applied(expected, name), atol=1e-7)
        assert any("folded" in note for note in report.notes) == (one.parameterization == "gmp")
    with pytest.raises(UserError, match="are the same"):
        lora_state_dict(to_gmp(baseline), baseline)


def test_the_vision_towers_and_the_projections_may_differ(pair):
    model, baseline = pair
    other = random_clip(seed=7, vision_layers=1, embed_dim=48)
    other = other.derive(
        {name: t for name, t in baseline.state_dict.items() if name.startswith(("transf", "token", "posit", "ln_"))},
        step="the baseline's text tower",
    )
    (tensors, report), (expected, same) = lora_state_dict(model, other), lora_state_dict(model, baseline)
    assert report.kept == same.kept
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_factors_are_in_the_chosen_dtype_and_alpha_is_exact_in_fp32(pair):
    for dtype, expected in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        tensors, _ = lora_state_dict(*pair, rank=5, dtype=dtype)
        for name, tensor in tensors.items():
            assert tensor.dtype == (torch.float32 if name.endswith(".alpha") else expected)
        assert {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")} == {5.0}


def test_progress_is_reported_and_a_cancel_stops_it(pair):
    reported = []
    lora_state_dict(*pair, on_progress=lambda done, total: reported.append((done, total)))
    assert reported[0] == (0, reported[-1][1]) and reported[-1][0] == reported[-1][1] == len(reported) - 1

    def cancel():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        lora_state_dict(*pair, check_cancelled=cancel)


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_report_says_what_is_kept_and_what_a_lora_cannot_carry():
    baseline = random_clip(seed=1)
    model = trained(trained(baseline, only="resblocks"), only="token_embedding", scale=2e-4)
    report = lora_state_dict(model, baseline, rank=16)[1]
    lost = report.parts["token embeddings"].share
    assert report.sentence.startswith(
        f"Rank 16 keeps {report.kept:.1%} of the difference between the two text encoders; {lost:.1%} is in token "
    )
    assert 0.5 < report.kept < 1 - lost and report.sentence.endswith("which a LoRA cannot carry.")


def test_less_than_half_kept_suggests_what_helps():
    baseline = random_clip(seed=1)
    flat = baseline.derive(
        {f"{BLOCK}mlp.c_fc.weight": baseline.state_dict[f"{BLOCK}mlp.c_fc.weight"] + 0.01 * torch.randn(256, 64)},
        step="every direction alike",
    )
    sentence = lora_state_dict(flat, baseline, rank=2)[1].sentence
    assert "less than half" in sentence and "a higher rank, or export the whole text encoder" in sentence
    words = trained(trained(baseline), only="token_embedding", scale=0.02)
    sentence = lora_state_dict(words, baseline, rank=64)[1].sentence
    assert "token embeddings" in sentence and "less than half: export the whole text encoder" in sentence


def test_a_rank_above_the_highest_is_lowered_with_a_note(pair):
    _, report = lora_state_dict(*pair, rank=1000)
    assert report.rank == 64 and "Rank 1000" in report.notes[0] and "64 was used" in report.notes[0]
    assert lora_state_dict(*pair, rank=64)[1].notes == ()


def test_a_model_saved_with_fewer_digits_than_its_baseline_gets_a_note():
    baseline = random_clip(seed=1)
    half = baseline.derive({name: t.half() for name, t in baseline.state_dict.items()}, step="saved as fp16")
    assert "float16" in lora_state_dict(half, baseline)[1].notes[0]
    assert lora_state_dict(trained(baseline), half)[1].notes == ()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_the_same_text_encoder_is_refused():
    baseline = random_clip(seed=1)
    vision = baseline.derive({"visual.ln_post.bias": torch.ones(64), "text_projection": torch.eye(64, 32)}, step="eye")
    for same in (baseline, vision):
        with pytest.raises(UserError, match="are the same"):
            lora_state_dict(same, baseline)


def test_a_difference_that_a_lora_cannot_carry_at_all_is_refused(tmp_path):
    baseline = random_clip(seed=1)
    model = trained(trained(baseline, only="token_embedding"), only="ln_1")
    with pytest.raises(UserError, match="only in token embeddings and layer norms, which a LoRA cannot carry"):
        export_lora(model, baseline, tmp_path / "lora.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, words",
    [
        ({"text_width": 128}, "text_width 64 and 128"),
        ({"text_layers": 3}, "text_layers 2 and 3"),
        ({"text_heads": 4}, "text_heads 2 and 4"),
        ({"activation": "gelu"}, "activation quick_gelu and gelu"),
    ],
)
def test_different_text_towers_are_refused_with_what_differs(pair, change, words):
    with pytest.raises(UserError, match=words):
        lora_state_dict(pair[0], random_clip(**change))


def test_weights_that_are_not_numbers_are_refused_on_either_side(pair):
    model, baseline = pair
    broken = {"ln_final.bias": torch.full((64,), torch.nan)}
    with pytest.raises(UserError, match="ln_final.bias|final_layer_norm.bias"):
        lora_state_dict(model.derive(broken, step="broken"), baseline)
    with pytest.raises(UserError, match="^baseline: "):
        lora_state_dict(model, baseline.derive(broken, step="broken"))


def test_a_difference_that_fp16_cannot_hold_is_refused(pair):
    model, baseline = pair
    far = model.derive({f"{BLOCK}mlp.c_fc.weight": torch.full((256, 64), 1e13)}, step="far")
    with pytest.raises(UserError, match="The LoRA was not written: lora_te1_.*fc1.lora_.* choose bf16 or fp32"):
        lora_state_dict(far, baseline)
    lora_state_dict(far, baseline, dtype="bf16")


def test_settings_that_make_no_sense_are_refused(pair, tmp_path):
    with pytest.raises(UserError, match="rank is 0"):
        lora_state_dict(*pair, rank=0)
    with pytest.raises(UserError, match="'fp8' is not known for a LoRA"):
        lora_state_dict(*pair, dtype="fp8")
    with pytest.raises(UserError, match="must end in .safetensors"):
        export_lora(*pair, tmp_path / "lora.pt")


# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_clip_g_gets_the_names_of_sdxls_second_text_encoder():
    name = "text_model.encoder.layers.31.self_attn.q_proj.weight"
    assert lora_name(lora_prefix(CLIP_G), name) == "lora_te2_text_model_encoder_layers_31_self_attn_q_proj"
    assert lora_prefix(VIT_L_14) == lora_prefix(TINY) == "lora_te1_"
    assert lora_metadata(CLIP_G) == {"ss_base_model_version": "sdxl_base_v1-0"} and lora_metadata(VIT_L_14) == {}


def test_a_clip_ls_file_has_no_metadata(pair, tmp_path):
    export_lora(*pair, tmp_path / "lora.safetensors", rank=1)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert not file.metadata()


# ---- in ComfyUI's code -----------------------------------------------------------------------------------------------

# Applies a LoRA at several strengths as LoraLoader does, to a CLIP as CLIPLoader (stable_diffusion) opens it, and
# writes the weights as CLIPSave does.
APPLY = """
import comfy.sd, comfy.utils, comfy.model_management
encoder, lora, sizes, out, *strengths = arguments
options = {"dtype": torch.float32, "model_config": json.loads(sizes)}
plain = comfy.sd.load_clip([encoder], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION, model_options=options)
for strength in strengths:
    clip = comfy.sd.load_lora_for_models(None, plain, comfy.utils.load_torch_file(lora), 0, float(strength))[1]
    comfy.model_management.load_models_gpu([clip.load_model()], force_patch_weights=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in clip.state_dict_for_saving().items()}
    save_file(tensors, f"{out}/{strength}.safetensors")
"""

# The LoRA names that each kind of CLIP knows, with the weights that they lead to; nothing is allocated.
NAMES = """
import comfy.lora, comfy.sd1_clip, comfy.sdxl_clip
from comfy.text_encoders import flux, sd3_clip
models = {"SD1.5": comfy.sd1_clip.SD1ClipModel, "SDXL": comfy.sdxl_clip.SDXLClipModel,
          "Flux": flux.FluxClipModel, "SD3": sd3_clip.SD3ClipModel}
sizes = {"Flux": {"dtype_t5": torch.float16}, "SD3": {"dtype_t5": torch.float16}}
print(json.dumps({name: comfy.lora.model_lora_keys_clip(kind(device="meta", dtype=torch.float16, **sizes.get(name, {})),
                                                        {}) for name, kind in models.items()}))
"""


def test_comfyui_applies_it_to_a_clip_and_gets_our_weights(pair, tmp_path):
    model, baseline = pair
    encoder = export_text_encoder(baseline, tmp_path / "encoder.safetensors", dtype="fp32")
    export_lora(model, baseline, tmp_path / "lora.safetensors", rank=8)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    _, log = in_comfyui(APPLY, encoder, tmp_path / "lora.safetensors", json.dumps(sizes), tmp_path, "1.0", "0.5")
    assert "not loaded" not in log.lower(), log
    tensors = load_file(tmp_path / "lora.safetensors")
    for strength in (1.0, 0.5):
        patched = load_file(tmp_path / f"{strength}.safetensors")
        for name, old in text(baseline).items():
            carried = ".encoder.layers." in name and name.endswith(".weight") and "norm" not in name
            expected = old + strength * applied(tensors, name) if carried else old
            found = patched[f"clip_l.transformer.{name}"].double().numpy()
            numpy.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=name)
            assert carried == (not numpy.array_equal(found, old)), name


def test_comfyui_knows_our_names_in_every_clip_that_has_such_a_text_encoder():
    known = json.loads(in_comfyui(NAMES)[0].splitlines()[-1])
    layers = [
        f"text_model.encoder.layers.{{}}.{part}"
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            "mlp.fc1",
            "mlp.fc2",
        )
    ]
    for architecture, host, wrappers in (
        (CLIP_L, "clip_l", ("SD1.5", "SDXL", "SD3", "Flux")),
        (CLIP_G, "clip_g", ("SDXL", "SD3")),
    ):
        prefix = lora_prefix(architecture)
        for layer in (layer.format(number) for layer in layers for number in range(architecture.text_layers)):
            for wrapper in wrappers:
                assert known[wrapper][lora_name(prefix, f"{layer}.weight")] == f"{host}.transformer.{layer}.weight"
