"""The registry of export formats: one call for each, the same for the command and the nodes."""

import pytest
import torch
from clips import VIT_L_14, identical, random_clip
from safetensors.torch import load_file

from clip_finetune.engine import UserError, fold_gmp, load_full_clip, to_gmp
from clip_finetune.engine.clip.exports import EXPORTS, check_export, export
from clip_finetune.engine.clip.gmp import FOLDED


@pytest.fixture(scope="module")
def model():
    return random_clip()


def exported(model, folder, name, **options):
    """Export in one format; return the path and the notes."""
    notes = []
    path = folder / ("out" if EXPORTS[name].folder else "out.safetensors")
    assert export(model, path, format=name, on_note=notes.append, **options) == path
    return path, notes


def dtypes(path):
    return {str(tensor.dtype).removeprefix("torch.") for tensor in load_file(path).values()}


@pytest.mark.parametrize("name, folds", [("openai", True), ("huggingface", True), ("gmp", False)])
def test_a_full_clip_comes_back_from_every_format_that_holds_one(model, tmp_path, name, folds):
    gmp = to_gmp(model)
    path, notes = exported(gmp, tmp_path, name)
    assert identical(load_full_clip(path), fold_gmp(gmp) if folds else gmp)
    assert notes == ([FOLDED] if folds else [])


def test_a_plain_model_is_exported_in_gmp_form_as_gmp(model, tmp_path):
    path, notes = exported(model, tmp_path, "gmp")
    assert load_full_clip(path).parameterization == "gmp" and notes == []


def test_a_text_encoder_is_fp16_by_default_and_folded_with_a_note(model, tmp_path):
    path, notes = exported(to_gmp(model), tmp_path, "text")
    assert dtypes(path) == {"float16"} and notes == [FOLDED]
    assert all(name.startswith("text_") for name in load_file(path))
    assert dtypes(exported(model, tmp_path, "text", dtype="bf16")[0]) == {"bfloat16"}


def test_a_vision_encoder_is_exported_for_towers_that_comfyui_knows(model, tmp_path):
    small_text = dict(text_width=64, text_layers=1, text_heads=1, text_mlp_width=256, vocab_size=64)
    path, _ = exported(random_clip(VIT_L_14, dtype=torch.float16, **small_text), tmp_path, "vision")
    assert dtypes(path) == {"float16"} and all(name.startswith("vis") for name in load_file(path))
    with pytest.raises(UserError, match="does not know this vision tower"):
        exported(model, tmp_path, "vision")


def test_a_lora_reports_how_much_it_keeps(model, tmp_path):
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    trained = model.derive({name: model.state_dict[name] + torch.randn(256, 64)}, step="trained")
    path, notes = exported(trained, tmp_path, "lora", baseline=model, rank=4)
    assert len(load_file(path)["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"]) == 4
    assert notes[-1].startswith("Rank 4 keeps ")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(format="onnx"), "'onnx' is not known; choose one of text, openai"),
        (dict(format="text", dtype="mixed"), "mixed is only for the formats openai and gmp; for text choose fp16"),
        (dict(format="lora"), "lora needs a baseline"),
        (dict(format="openai", with_baseline=True), "openai takes no baseline"),
        (dict(format="gmp", path="out.bin"), "out.bin must end in .safetensors"),
    ],
)
def test_arguments_that_no_export_can_use_are_refused_before_a_model_is_opened(options, words):
    with pytest.raises(UserError, match=words):
        check_export(**{"path": "out.safetensors", "dtype": None, "with_baseline": False} | options)


def test_only_folders_need_no_file_name():
    assert [name for name, chosen in EXPORTS.items() if chosen.folder] == ["huggingface"]
    check_export("some/folder", format="huggingface", dtype=None, with_baseline=False)
