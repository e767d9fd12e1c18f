"""The commands and a model with NaN: `info` reports it, and no command makes a file of it; errors name the file."""

import json
import re

import pytest
from clips import broken_clip, random_clip, write_unchecked
from safetensors.torch import save_file

from clip_finetune.engine import save_full_clip, to_gmp
from clip_finetune.engine.cli import main
from clip_finetune.engine.clip.encoders import text_encoder_state_dict
from clip_finetune.engine.clip.exports import EXPORTS
from clip_finetune.engine.clip.names import is_vision_name, to_hf

# One of each tower, a projection, and a scalar.
NAMES = ["ln_final.bias", "visual.ln_post.bias", "visual.proj", "logit_scale"]
WORDS = "values that are not numbers (NaN or infinite); use a model from before"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["fold", *EXPORTS])
def test_fold_and_every_export_refuse_it_and_name_the_file_and_the_tensor(here, capsys, form, name):
    write_unchecked(broken_clip(name), "bad.safetensors")
    save_full_clip(random_clip(), "good.safetensors")
    out = "out" if form == "huggingface" else "out.safetensors"
    line = f"fold bad.safetensors {out}" if form == "fold" else f"export bad.safetensors {out} --format {form}"
    assert main((line + (" --baseline good.safetensors" if form == "lora" else "")).split()) == 1
    shown = capsys.readouterr().err
    assert f"{out} was not written: in bad.safetensors, {name} holds {WORDS}" in shown and "Traceback" not in shown
    assert not (here / out).exists()


def test_a_gmp_model_is_refused_by_the_names_in_its_file(here, capsys):
    layer = "transformer.resblocks.0.mlp.c_fc"
    write_unchecked(broken_clip(f"{layer}.theta", f"{layer}.r", model=to_gmp(random_clip())), "bad.safetensors")
    for line in ("fold bad.safetensors out.safetensors", "export bad.safetensors out.safetensors"):
        assert main(line.split()) == 1
        assert re.search(rf"in bad\.safetensors, {layer}\.(r, .*theta|theta, .*r) hold ", capsys.readouterr().err)
    assert not (here / "out.safetensors").exists()


def test_a_baseline_is_refused_by_its_own_name(here, capsys):
    write_unchecked(broken_clip("ln_final.bias"), "bad.safetensors")
    save_full_clip(random_clip(), "good.safetensors")
    line = "export good.safetensors out.safetensors --format lora --baseline bad.safetensors"
    assert main(line.split()) == 1
    assert "in bad.safetensors, ln_final.bias holds" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_merge_refuses_what_would_stay_broken_and_replaces_the_rest(here, capsys, name):
    good = random_clip(seed=1)
    save_file(text_encoder_state_dict(good), "text.safetensors")
    vision = {key: tensor for key, tensor in good.state_dict.items() if is_vision_name(key)}
    save_file(to_hf(vision), "vision.safetensors")
    write_unchecked(broken_clip(name), "bad.safetensors")
    replaced_by = {"ln_final.bias": "text", "visual.ln_post.bias": "vision"}.get(name)
    for tower in ("text", "vision"):
        out = here / f"{tower}_out.safetensors"
        status = main(f"merge --{tower} {tower}.safetensors --model bad.safetensors {out.name}".split())
        shown = capsys.readouterr().err
        if tower == replaced_by:
            assert status == 0 and out.exists()
        else:
            assert status == 1 and not out.exists()
            assert f"in bad.safetensors, {name} holds {WORDS}" in shown


def test_info_opens_it_and_reports_it(here, capsys):
    write_unchecked(broken_clip("ln_final.bias", "logit_scale"), "bad.safetensors")
    assert main(["info", "bad.safetensors", "--json", "facts.json"]) == 0
    facts = json.loads((here / "facts.json").read_text())
    assert facts["kind"] == "full_clip"
    assert [problem for problem in facts["problems"] if "2 tensors are not made of numbers only" in problem]
