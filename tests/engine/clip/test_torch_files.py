"""Files that torch wrote: whatever their kind, the same tensors, and what their classes say."""

import io
import sys
import types

import numpy
import pytest
import torch
from clips import identical, random_clip
from safetensors.torch import save_file

from clip_finetune.engine import UserError, load_full_clip, merge_text_encoder, to_gmp
from clip_finetune.engine.bench.contenders import open_clip_network
from clip_finetune.engine.clip.encoders import text_encoder_state_dict
from clip_finetune.engine.clip.tensor_files import same_bits


@pytest.fixture(scope="module")
def model():
    return random_clip()


def in_open_clip(model):
    """The model in open_clip's class."""
    return open_clip_network(model).eval()


def pickled(model, package, *, heads=(2, 2), activation="QuickGELU"):
    """The bytes of torch.save(network), its classes being those of `package`, which does not exist any more."""
    classes = {
        name: type(name, (torch.nn.Module,), {"__module__": package})
        for name in ("CLIP", "Part", "LayerNorm", "GeometricLinear", activation)
    }
    module = types.ModuleType(package)
    vars(module).update(classes)

    def build(tensors, kind="CLIP", prefix=""):
        made = classes[kind]()
        for name, tensor in tensors.items():
            if "." not in name:
                made.register_parameter(name, torch.nn.Parameter(tensor))
        for child in dict.fromkeys(name.split(".")[0] for name in tensors if "." in name):
            below = {name.removeprefix(f"{child}."): t for name, t in tensors.items() if name.startswith(f"{child}.")}
            kind = "LayerNorm" if "ln_" in child else "GeometricLinear" if "theta" in below else "Part"
            made.add_module(child, build(below, kind, f"{prefix}{child}."))
        if prefix.endswith("attn."):
            made.num_heads = heads[0] if prefix.startswith("visual.") else heads[1]
            made.attn_mask = torch.zeros(77, 77)  # an attribute that is no weight, as in OpenAI's blocks
        if prefix.endswith("mlp."):
            made.add_module("gelu", classes[activation]())
        return made

    held = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        for part in range(1, package.count(".") + 2):
            patch.setitem(sys.modules, package.rsplit(".", package.count(".") + 1 - part)[0], module)
        torch.save(build(dict(model.state_dict)), held)
    return held.getvalue()


@pytest.mark.parametrize("package", ["clip.model", "orgclip.modeloriginal", "orgclipnosha.model", "open_clip.model"])
def test_a_pickled_model_opens_without_its_classes_with_the_heads_and_activation_that_they_have(
    model, tmp_path, package
):
    (tmp_path / "whole.pt").write_bytes(pickled(model, package))
    opened = load_full_clip(tmp_path / "whole.pt")
    assert identical(opened, model) and opened.architecture == model.architecture and opened.notes == ()


def test_a_pickled_model_in_gmp_form_opens_as_one(model, tmp_path):
    (tmp_path / "gmp.pt").write_bytes(pickled(to_gmp(model), "gmpclip.model"))
    opened = load_full_clip(tmp_path / "gmp.pt")
    assert opened.parameterization == "gmp" and identical(opened, to_gmp(model)) and opened.notes == ()


def test_the_heads_and_gelu_of_a_pickled_model_are_found(model, tmp_path):
    (tmp_path / "gelu.pt").write_bytes(pickled(model, "open_clip.model", heads=(4, 8), activation="GELU"))
    found = load_full_clip(tmp_path / "gelu.pt").architecture
    assert (found.vision_heads, found.text_heads, found.activation) == (4, 8, "gelu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("how", ["pickled", "traced", "scripted"])
def test_open_clips_own_model_opens_however_it_was_saved(tmp_path, how, activation):
    model = random_clip(activation=activation)
    network, path = in_open_clip(model), tmp_path / "model.pt"
    if how == "pickled":
        torch.save(network, path)
    elif how == "scripted":
        torch.jit.script(network).save(path)
    else:
        example = (torch.zeros(1, 3, 32, 32), torch.zeros(1, 77, dtype=torch.long))
        torch.jit.trace(network, example, check_trace=False).save(path)
    opened = load_full_clip(path)
    assert identical(opened, model) and opened.architecture.activation == activation
    assert not any("activation" in note for note in opened.notes)


@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts_of_new_and_old_torch_open(model, tmp_path, zipped):
    torch.save(dict(model.state_dict), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    assert identical(load_full_clip(tmp_path / "m.pt", activation="quick_gelu"), model)


def test_a_whole_model_of_old_torch_is_refused_because_it_brings_its_code(model, tmp_path):
    torch.save(in_open_clip(model), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="old.pt is a whole model in the format .* before version 1.6"):
        load_full_clip(tmp_path / "old.pt")


def test_the_weights_in_a_training_checkpoint_open(model, tmp_path):
    network = in_open_clip(model)
    checkpoint = {
        "epoch": 3,
        "args": {"lr": 1e-5},
        "optimizer": torch.optim.AdamW(network.parameters()).state_dict(),
        "state_dict": {f"module.{name}": tensor for name, tensor in network.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    assert identical(load_full_clip(tmp_path / "epoch_3.pt", activation="quick_gelu"), model)


def test_a_checkpoint_of_lightning_with_a_class_as_a_key_gives_its_weights(model, tmp_path, monkeypatch):
    """As the first checkpoints of Stable Diffusion were written."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    state = {f"cond_stage_model.transformer.{n}": t for n, t in text_encoder_state_dict(model).items()}
    callbacks = {module.ModelCheckpoint: {"best_model_score": numpy.float64(0.5), "monitor": "val/loss"}}
    torch.save({"state_dict": state, "callbacks": callbacks, "global_step": numpy.int64(3)}, tmp_path / "sd15.ckpt")
    monkeypatch.undo()
    merged = merge_text_encoder(tmp_path / "sd15.ckpt", random_clip(seed=1))
    assert same_bits(merged.state_dict["token_embedding.weight"], model.state_dict["token_embedding.weight"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_model_that_is_in_memory_does_not_depend_on_its_file(model, tmp_path, zipped):
    for name, save in (
        ("m.safetensors", save_file),
        ("m.pt", lambda s, p: torch.save(s, p, _use_new_zipfile_serialization=zipped)),
    ):
        save(dict(model.state_dict), tmp_path / name)
        opened = load_full_clip(tmp_path / name, in_memory=True, activation="quick_gelu")
        with open(tmp_path / name, "r+b") as file:
            file.truncate(10)
        assert identical(opened, model)
