"""Full CLIPs from files and into files."""

import json
import re

import pytest
import torch
from clips import TINY, VIT_L_14, random_clip
from safetensors.torch import load_file, save_file

from clip_finetune.engine import UserError, build_network, load_full_clip, save_full_clip
from clip_finetune.engine.clip.architecture import architecture_from_shapes
from clip_finetune.engine.clip.full_clip import METADATA_KEY
from clip_finetune.engine.clip.tensor_files import same_bits


@pytest.fixture(scope="module")
def model():
    return random_clip()


def test_a_saved_model_opens_with_the_same_bits_and_architecture(model, tmp_path):
    opened = load_full_clip(save_full_clip(model, tmp_path / "m.safetensors"))
    assert opened.architecture == model.architecture and opened.fingerprint == model.fingerprint
    assert not opened.notes


def test_the_file_says_what_it_is(model, tmp_path):
    from safetensors import safe_open

    path = save_full_clip(model, tmp_path / "m.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata[METADATA_KEY])
    assert metadata["format"] == "pt"
    assert about["architecture"]["text_layers"] == 2 and about["activation"] == "quick_gelu"
    assert about["parameterization"] == "linear"


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_bare_state_dict_opens_with_a_note_on_the_assumed_activation(model, tmp_path, suffix):
    path = tmp_path / f"bare.{suffix}"
    if suffix == "pt":
        torch.save(dict(model.state_dict), path)
    else:
        save_file(dict(model.state_dict), path)
    opened = load_full_clip(path)
    assert opened.architecture.activation == "quick_gelu" and any("QuickGELU" in note for note in opened.notes)
    assert all(same_bits(opened.state_dict[name], tensor) for name, tensor in model.state_dict.items())
    chosen = load_full_clip(path, activation="gelu")
    assert chosen.architecture.activation == "gelu" and not any("QuickGELU" in note for note in chosen.notes)


def test_the_head_counts_of_known_models_come_from_open_clips_list():
    import dataclasses

    arch, notes = architecture_from_shapes(VIT_L_14.shapes(), activation="quick_gelu")
    assert arch == VIT_L_14 and notes == ()
    at_336 = dataclasses.replace(VIT_L_14, image_size=336)
    assert architecture_from_shapes(at_336.shapes(), activation="quick_gelu") == (at_336, ())
    big_g = dataclasses.replace(
        VIT_L_14,
        embed_dim=1280,
        vision_width=1664,
        vision_layers=48,
        vision_heads=16,
        vision_mlp_width=8192,
        text_width=1280,
        text_layers=32,
        text_heads=20,
        text_mlp_width=5120,
        activation="gelu",
    )
    assert architecture_from_shapes(big_g.shapes(), activation="gelu") == (big_g, ())


def test_assumed_head_counts_get_a_note():
    arch, notes = architecture_from_shapes(TINY.shapes(), activation="quick_gelu")
    assert (arch.vision_heads, arch.text_heads) == (1, 1)
    assert "heads is not in the file" in notes[0]


def test_a_hugging_face_model_opens_with_equal_features(model, tmp_path):
    """transformers' own CLIPModel, saved by itself: names, activation and heads are understood."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config=dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_act="gelu",
            eos_token_id=49407,
            bos_token_id=49406,
            pad_token_id=0,
        ),
        vision_config=dict(
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            hidden_act="gelu",
        ),
        projection_dim=48,
    )
    torch.manual_seed(0)
    theirs = CLIPModel(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_full_clip(tmp_path)
    assert not ours.notes
    assert (ours.architecture.text_heads, ours.architecture.vision_heads, ours.architecture.activation) == (
        4,
        2,
        "gelu",
    )
    network = build_network(ours)
    images, tokens = torch.randn(3, 3, 32, 32), torch.randint(1, 49405, (3, 77))
    tokens[:, 20], tokens[:, 21:] = 49407, 0
    with torch.no_grad():
        image_features = theirs.visual_projection(theirs.vision_model(images).pooler_output)
        text_features = theirs.text_projection(theirs.text_model(tokens).pooler_output)
        torch.testing.assert_close(network.encode_image(images), image_features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network.encode_text(tokens), text_features, rtol=1e-4, atol=1e-5)


def test_open_clip_opens_our_file_of_a_vit_l_14(tmp_path):
    import open_clip

    model = random_clip(VIT_L_14, dtype=torch.float16)
    path = save_full_clip(model, tmp_path / "l14.safetensors")
    theirs = open_clip.create_model("ViT-L-14-quickgelu", pretrained=str(path))
    found = theirs.state_dict()
    assert found.keys() == model.state_dict.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in model.state_dict.items())


def test_the_network_has_copies_of_the_weights(model):
    before = model.fingerprint
    network = build_network(model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert {**model.__dict__} and load_again(model) == before


def load_again(model):
    """Return the fingerprint computed anew; the property is cached."""
    model.__dict__.pop("fingerprint", None)
    return model.fingerprint


def test_a_state_dict_cannot_be_changed(model):
    with pytest.raises(TypeError):
        model.state_dict["logit_scale"] = torch.tensor(1.0)


# ---- bad files ------------------------------------------------------------------------------------------------------


def refused(path, words):
    with pytest.raises(UserError) as error:
        load_full_clip(path)
    text = str(error.value)
    assert str(path) in text and re.search(words, text), text
    assert "\n" not in text


def test_bad_files_are_refused_in_one_sentence(model, tmp_path):
    tensors = dict(model.state_dict)
    refused(tmp_path / "none.safetensors", "does not exist")
    (tmp_path / "text.safetensors").write_text("not weights at all")
    refused(tmp_path / "text.safetensors", "not a whole safetensors file")
    whole = save_full_clip(model, tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.safetensors", "not a whole safetensors file")
    missing = {name: tensor for name, tensor in tensors.items() if name != "ln_final.bias"}
    save_file(missing, tmp_path / "missing.safetensors")
    refused(tmp_path / "missing.safetensors", "ln_final.bias")
    save_file(tensors | {"logit_bias": torch.zeros(1)}, tmp_path / "extra.safetensors")
    refused(tmp_path / "extra.safetensors", "logit_bias")
    save_file(tensors | {"ln_final.bias": torch.zeros(65)}, tmp_path / "shape.safetensors")
    refused(tmp_path / "shape.safetensors", r"ln_final.bias has the shape \(65,\)")
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "not a CLIP")
    save_file({"visual.layer1.0.conv1.weight": torch.zeros(1), **tensors}, tmp_path / "resnet.safetensors")
    refused(tmp_path / "resnet.safetensors", "ResNet")
    text = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual.")}
    save_file(text, tmp_path / "te.safetensors")
    refused(tmp_path / "te.safetensors", "text encoder only")


def test_a_pickle_is_never_run(tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            import os

            return os.mkdir, (str(ran),)

    torch.save({"visual.proj": torch.zeros(1), "bomb": Bomb()}, tmp_path / "bomb.pt")
    refused(tmp_path / "bomb.pt", "nothing else in it is ever run")
    scripted = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    scripted.save(tmp_path / "script.pt")
    refused(tmp_path / "script.pt", "is not a CLIP")  # its tensors were read, its code was not
    assert not ran.exists()


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    import safetensors.torch

    path = save_full_clip(model, tmp_path / "m.safetensors")
    before = path.read_bytes()

    def full_disk(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        save_full_clip(random_clip(seed=5), path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_values_too_large_for_fp16_are_refused(model, tmp_path):
    large = model.derive({"ln_final.bias": torch.full((64,), 1e6)}, step="made large")
    with pytest.raises(UserError, match="ln_final.bias holds values too large for fp16"):
        save_full_clip(large, tmp_path / "m.safetensors", dtype="fp16")
    bf16 = save_full_clip(large, tmp_path / "m.safetensors", dtype="bf16")
    assert load_file(bf16)["ln_final.bias"].dtype == torch.bfloat16


def test_a_saved_file_has_the_mode_that_the_umask_gives(model, tmp_path):
    (tmp_path / "plain").write_text("")
    saved = save_full_clip(model, tmp_path / "model.safetensors")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_without_read_permission_is_refused_by_name(model, ordinary_user):
    folder, rights = ordinary_user
    save_full_clip(model, folder / "a.safetensors")
    load_full_clip(folder / "a.safetensors")
    (folder / "a.safetensors").chmod(0)
    with rights(), pytest.raises(UserError, match=r"a\.safetensors .*Permission denied"):
        load_full_clip(folder / "a.safetensors")
