"""Full CLIPs that other programs made: names, folders, several files, the hub, dtypes, and the cost of opening."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from clips import VIT_L_14, identical, random_clip
from safetensors.torch import load_file, save_file

from clip_finetune.engine import UserError, load_full_clip, save_full_clip, to_gmp
from clip_finetune.engine.bench.contenders import open_clip_network
from clip_finetune.engine.clip import names
from clip_finetune.engine.clip.network import random_full_clip
from clip_finetune.engine.clip.tensor_files import same_bits


@pytest.fixture(scope="module")
def model():
    return random_clip()


def in_open_clip(model):
    """The model in open_clip's class."""
    return open_clip_network(model).eval()


# ---- names -----------------------------------------------------------------------------------------------------------


def split_attention(state):
    parts = {}
    for name, tensor in state.items():
        if ".attn.in_proj_" in name:
            stem, kind = name.rsplit("in_proj_", 1)
            parts |= {
                f"{stem}{letter}_proj.{kind}": part.clone() for letter, part in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            parts[name] = tensor
    return parts


@pytest.mark.parametrize(
    "rename",
    [
        split_attention,
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        lambda state: {
            name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": tensor
            for name, tensor in state.items()
        },
        lambda state: {**state, "input_resolution": torch.tensor(32), "context_length": torch.tensor(77)},
        lambda state: {**state, "logit_scale": state["logit_scale"].reshape(1)},
        lambda state: {
            **{name: tensor for name, tensor in state.items() if name != "text_projection"},
            "text_projection.weight": state["text_projection"].t().contiguous(),
        },
        names.to_hf,
        lambda state: names.to_hf(state) | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    ],
    ids=[
        "split q, k, v",
        "module.",
        "compiled",
        "open_clip's text.",
        "buffers",
        "scale of one",
        "linear",
        "hf",
        "position_ids",
    ],
)
def test_every_naming_gives_the_same_tensors(model, tmp_path, rename):
    save_file(rename(dict(model.state_dict)), tmp_path / "m.safetensors")
    assert identical(load_full_clip(tmp_path / "m.safetensors"), model)


def test_one_in_32_safetensors_files_begins_like_a_pickle_and_opens(tmp_path):
    small = random_clip(vocab_size=64)
    for filler in range(400):
        save_file(dict(small.state_dict), tmp_path / "m.safetensors", {"filler": "x" * filler})
        if (tmp_path / "m.safetensors").read_bytes()[:1] == b"\x80":
            break
    assert (tmp_path / "m.safetensors").read_bytes()[:1] == b"\x80"
    assert identical(load_full_clip(tmp_path / "m.safetensors"), small)


# ---- folders, several files, the hub ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_transformers():
    from transformers import CLIPConfig, CLIPModel

    text = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    vision = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    config = CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 8}, projection_dim=32)
    torch.manual_seed(0)
    return CLIPModel(config).eval()


def test_a_model_in_several_files_opens_by_its_folder_its_index_or_any_of_them(by_transformers, tmp_path):
    by_transformers.save_pretrained(tmp_path / "whole")
    by_transformers.save_pretrained(tmp_path / "parts", max_shard_size="4MB")
    index, parts = tmp_path / "parts/model.safetensors.index.json", sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(parts) > 1
    expected = load_full_clip(tmp_path / "whole")
    for source in (tmp_path / "parts", index, parts[1]):
        opened = load_full_clip(source)
        assert identical(opened, expected) and opened.architecture == expected.architecture and not opened.notes
    parts[1].unlink()
    with pytest.raises(UserError, match=f"{re.escape(parts[1].name)} is missing"):
        load_full_clip(tmp_path / "parts")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_a_folder_opens_by_the_names_that_programs_give_a_model(tmp_path, name):
    model = random_clip(activation="gelu", text_heads=4)
    save = torch.save if name.endswith(".bin") else save_file
    save(dict(model.state_dict), tmp_path / name)
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    opened = load_full_clip(tmp_path)
    assert identical(opened, model) and opened.architecture == model.architecture and not opened.notes


def test_a_config_of_another_model_in_the_same_folder_is_not_believed(by_transformers, model, tmp_path):
    """models/full_clip is one folder for all."""
    by_transformers.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 128, "hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(dict(model.state_dict), tmp_path / "mine.safetensors")
    opened = load_full_clip(tmp_path / "mine.safetensors")
    assert (opened.architecture.text_heads, opened.architecture.activation) == (1, "quick_gelu")
    assert any("config.json in its folder is that of another model" in note for note in opened.notes)


def test_a_config_with_two_activations_is_refused_unless_one_is_chosen(by_transformers, tmp_path):
    by_transformers.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="compute 'gelu' and 'quick_gelu'"):
        load_full_clip(tmp_path)
    assert load_full_clip(tmp_path, activation="gelu").architecture.activation == "gelu"


def test_sections_under_the_older_names_of_a_config_take_precedence(by_transformers, tmp_path):
    by_transformers.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"text_config_dict": config.pop("text_config"), "vision_config_dict": config.pop("vision_config")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    architecture = load_full_clip(tmp_path).architecture
    assert (architecture.vision_heads, architecture.text_heads) == (2, 4)


def test_a_run_folder_opens_as_its_best_model_and_a_pipeline_says_where_its_encoder_is(model, tmp_path):
    save_full_clip(model, tmp_path / "run/best.safetensors")
    save_full_clip(model, tmp_path / "run/step_4.safetensors")
    assert identical(load_full_clip(tmp_path / "run"), model)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe/model_index.json").write_text("{}")
    with pytest.raises(UserError, match="is a diffusers pipeline; give the text encoder in it: .*text_encoder"):
        load_full_clip(tmp_path / "pipe")


def test_a_name_on_the_hub_opens_from_the_cache_without_a_network(by_transformers, tmp_path, monkeypatch):
    import huggingface_hub

    snapshot = tmp_path / "models--someone--a-clip/snapshots" / ("0" * 40)
    by_transformers.save_pretrained(snapshot)
    (tmp_path / "models--someone--a-clip/refs").mkdir()
    (tmp_path / "models--someone--a-clip/refs/main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert identical(load_full_clip("hf-hub:someone/a-clip"), load_full_clip(snapshot))
    with pytest.raises(UserError, match="hf-hub:someone/else could not be downloaded"):
        load_full_clip("hf-hub:someone/else")
    for name in ("hf-hub:", "hf-hub:not a name", "ViT-L-14/none"):
        with pytest.raises(UserError, match=re.escape(name)):
            load_full_clip(name)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def test_the_mixed_layout_is_openais(model, tmp_path):
    """open_clip's own conversion, written after OpenAI's convert_weights."""
    from open_clip import convert_weights_to_fp16

    network = in_open_clip(model)
    convert_weights_to_fp16(network)
    theirs = network.state_dict()
    ours = load_file(save_full_clip(model, tmp_path / "mixed.safetensors", dtype="mixed"))
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    assert all(same_bits(ours[name], tensor) for name, tensor in theirs.items())
    assert identical(load_full_clip(tmp_path / "mixed.safetensors"), dataclasses.replace(model, state_dict=ours))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_widened_exactly_with_a_note(model, tmp_path, dtype):
    eight = {name: tensor.to(dtype) if tensor.ndim == 2 else tensor for name, tensor in model.state_dict.items()}
    save_file(eight, tmp_path / "fp8.safetensors")
    opened = load_full_clip(tmp_path / "fp8.safetensors")
    assert any("fp8" in note for note in opened.notes)
    for name, tensor in eight.items():
        assert opened.state_dict[name].dtype == (torch.float16 if tensor.ndim == 2 else torch.float32)
        assert torch.equal(opened.state_dict[name].double(), tensor.double())


def test_fp8_weights_that_need_a_scale_are_refused(model, tmp_path):
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    eight = dict(model.state_dict) | {name: model.state_dict[name].to(torch.float8_e4m3fn)}
    save_file(eight | {name.replace("weight", "scale_weight"): torch.ones(1)}, tmp_path / "scaled.safetensors")
    with pytest.raises(UserError, match="scaled fp8"):
        load_full_clip(tmp_path / "scaled.safetensors")


# ---- what it costs ---------------------------------------------------------------------------------------------------

COST = """
import re, sys, time
from clip_finetune.engine import load_full_clip
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
before, began = anonymous(), time.perf_counter()
opened = load_full_clip(sys.argv[1])
print(time.perf_counter() - began, anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_vit_l_14_is_memory_mapped(tmp_path):
    model = random_full_clip(VIT_L_14, seed=0)
    for name, tensors, at_most in (
        ("OpenAI's names", dict(model.state_dict), 20),
        # Query, key and value are three tensors there: those of 36 blocks are made one each, 387 MB in fp32.
        ("Hugging Face's names", names.to_hf(model.state_dict), 420),
    ):
        save_file(tensors, tmp_path / "l14.safetensors")
        command = [sys.executable, "-c", COST, tmp_path / "l14.safetensors"]
        seconds, more = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        print(f"{name}: opened in {seconds:.2f} s, with {more:.0f} MB of anonymous memory")
        assert more < at_most


GRAPH = """
import re, sys, threading, time
from clip_finetune.engine import export_text_encoder, fold_gmp, load_full_clip, save_full_clip
from clip_finetune.engine.clip.tensor_files import same_bits
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
before, peak, going = anonymous(), 0, True
def watch():
    global peak
    while going:
        peak = max(peak, anonymous())
        time.sleep(0.01)
watcher = threading.Thread(target=watch)
watcher.start()
model = load_full_clip(sys.argv[1])
plain = fold_gmp(model)
export_text_encoder(plain, sys.argv[2] + "/te.safetensors")
again = load_full_clip(save_full_clip(plain, sys.argv[2] + "/folded.safetensors"))
assert all(same_bits(again.state_dict[name], tensor) for name, tensor in plain.state_dict.items())
going = False
watcher.join()
print(sum(tensor.nbytes for tensor in plain.state_dict.values()) / 1e6, peak - before)
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_folding_exporting_and_comparing_a_vit_l_14_takes_at_most_two_copies_of_memory(tmp_path):
    path = save_full_clip(to_gmp(random_full_clip(VIT_L_14, seed=0)), tmp_path / "gmp.safetensors")
    command = [sys.executable, "-c", GRAPH, path, tmp_path]
    weights, peak = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    print(f"{weights:.0f} MB of weights, at most {peak:.0f} MB of anonymous memory")
    assert peak < 2 * weights
