"""The command, as it is typed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from clips import random_clip, write_unchecked
from image_folders import class_folder, labels_folder
from safetensors.torch import load_file, save_file

from clip_finetune.engine import load_full_clip, save_full_clip, to_gmp
from clip_finetune.engine.cli import main
from clip_finetune.engine.clip.encoders import text_encoder_state_dict
from clip_finetune.engine.clip.full_clip import file_metadata
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.train.config import all_settings


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with tiny.safetensors, colours and classes in it, and the command standing there."""
    monkeypatch.chdir(tmp_path)
    save_full_clip(random_clip(), tmp_path / "tiny.safetensors")
    labels_folder(tmp_path / "colours")
    class_folder(tmp_path / "classes")
    return tmp_path


def identical(one, other):
    one, other = load_full_clip(one), load_full_clip(other)
    return all(same_bits(other.state_dict[name], tensor) for name, tensor in one.state_dict.items())


TRAIN = "train --model tiny.safetensors --data colours --batch-size 4 --learning-rate 1e-3 --precision fp32".split()


def test_train_fold_export_merge_eval_info(here, capsys):
    assert main([*TRAIN, "--gmp", "--epochs", "2", "--out", "run", "--validation-split", "0.2"]) == 0
    assert load_full_clip("run/best.safetensors").parameterization == "gmp"
    assert "run/best.safetensors" in capsys.readouterr().err
    assert main(["fold", "run/best.safetensors", "folded.safetensors"]) == 0
    assert load_full_clip("folded.safetensors").parameterization == "linear"
    assert main(["export", "run/best.safetensors", "te.safetensors"]) == 0
    exported = load_file("te.safetensors")
    assert exported["text_model.final_layer_norm.weight"].dtype == torch.float16
    assert main(["export", "folded.safetensors", "te32.safetensors", "--dtype", "fp32"]) == 0
    assert main(["merge", "--text", "te32.safetensors", "--model", "folded.safetensors", "merged.safetensors"]) == 0
    assert identical("merged.safetensors", "folded.safetensors")
    capsys.readouterr()
    arguments = ["--model", "folded.safetensors", "--baseline", "tiny.safetensors", "--json", "numbers.json"]
    assert main(["eval", *arguments, "--data", "colours"]) == 0
    assert "baseline" in capsys.readouterr().out
    models = json.loads((here / "numbers.json").read_text())["models"]
    assert [(found["name"], found["file"]) for found in models] == [
        ("model", "folded.safetensors"),
        ("baseline", "tiny.safetensors"),
    ]
    assert models[0]["images"] == 12 and models[0]["retrieval"]["captions"] == 24
    assert models[0]["retrieval"]["image_to_text"].keys() == {"r1", "r5", "r10", "median_rank"}
    assert main(["eval", *arguments, "--data", "classes", "--templates", "simple"]) == 0
    zero_shot = json.loads((here / "numbers.json").read_text())["models"][0]["zero_shot"]
    assert zero_shot.keys() == {"top1", "top5", "mean_per_class", "classes"} and zero_shot["classes"] == 4


def facts(path):
    assert main(["info", str(path), "--json", "facts.json"]) == 0
    with open("facts.json", encoding="utf-8") as file:
        return json.load(file)


def test_info_knows_models_text_encoders_data_sets_and_runs(here, capsys):
    found = facts("tiny.safetensors")
    assert found["kind"] == "full_clip" and found["parameterization"] == "linear" and found["dtype"] == "float32"
    assert found["architecture"]["text_width"] == 64 and found["problems"] == []
    save_file(text_encoder_state_dict(random_clip(), dtype="fp16"), "te.safetensors")
    found = facts("te.safetensors")
    assert found["kind"] == "text_encoder" and found["architecture"]["text_width"] == 64 and found["problems"] == []
    (here / "colours/003.png").write_bytes(b"hello")
    (here / "colours/004.png").unlink()
    found = facts("colours")
    assert {key: found[key] for key in ("kind", "format", "images", "captions", "labels", "truncated_captions")} == {
        "kind": "dataset",
        "format": "json",
        "images": 12,
        "captions": 24,
        "labels": 0,
        "truncated_captions": 0,
    }
    assert {entry["file"] for entry in found["broken"]} == {"003.png", "004.png"}
    assert facts("classes")["labels"] == 4
    assert main([*TRAIN, "--epochs", "1", "--out", "run"]) == 0
    found = facts("run")
    assert found["kind"] == "run" and found["steps"] == found["total_steps"] == 2
    assert found["settings"]["epochs"] == {"value": 1, "from": "command line"}
    assert found["groups"] and len(found["data"]["train"]["manifest"]) == 64 and "torch" in found["versions"]
    shown = capsys.readouterr().out
    assert "epochs" in shown and "command line" in shown and "text.attention" in shown and "manifest" in shown
    assert facts("run/step_2.safetensors")["kind"] == "training_state"


def test_what_was_done_on_the_way_is_no_problem_of_the_file(here):
    assert main(["fold", "tiny.safetensors", "folded.safetensors"]) == 0
    assert facts("folded.safetensors")["problems"] == []


def test_the_activation_can_be_told_where_the_file_does_not_say_it(here):
    save_file(dict(random_clip().state_dict), "bare.safetensors")
    assert "--activation gelu" in " ".join(facts("bare.safetensors")["problems"])
    assert main(["fold", "bare.safetensors", "told.safetensors", "--activation", "gelu"]) == 0
    found = facts("told.safetensors")
    assert found["architecture"]["activation"] == "gelu" and not any("QuickGELU" in p for p in found["problems"])


def test_every_setting_is_a_flag(here, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = capsys.readouterr().out
    for name in all_settings():
        flag = f"--{name.replace('_', '-')}"
        assert f"{flag} " in shown or f"{flag}," in shown, name


def _cut(here):
    data = (here / "tiny.safetensors").read_bytes()
    (here / "cut.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "line, words",
    [
        ("info nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("info cut.safetensors", "cut.safetensors is not a whole safetensors file"),
        ("info empty", "empty holds no images"),
        ("fold cut.safetensors out.safetensors", "cut.safetensors is not a whole safetensors file"),
        ("fold tiny.safetensors out.bin", "out.bin must end in .safetensors"),
        ("export te.safetensors out.safetensors", "te.safetensors: this is a text encoder only"),
        ("merge --text tiny.safetensors --model te.safetensors out.safetensors", "te.safetensors: this is a text"),
        ("merge --text nan.safetensors --model tiny.safetensors out.safetensors", "nan.safetensors"),
        ("eval --model tiny.safetensors --data empty", "empty holds no images"),
        ("train --model tiny.safetensors --data empty --out run", "empty holds no images"),
        ("train --model tiny.safetensors --data one --out run", "at least 2 are needed"),
        ("train --model no/such --data colours --out run", "no/such is neither a file nor a model"),
        ("train --model tiny.safetensors --data colours --out run --epochs 0", "epochs"),
        ("train --model tiny.safetensors --data colours --out run --batch-size 1", "batch_size"),
        ("train --model tiny.safetensors --data colours --out run --validation-split 2", "--validation-split is 2"),
        ("train --model tiny.safetensors --data colours --out run --device gpu", "The device 'gpu' cannot be used"),
        ("train --model tiny.safetensors --data colours --out run --scale-neurons 9:1=2", "blocks 0 to 1"),
        ("fold ./nowhere.safetensors out.safetensors", "./nowhere.safetensors does not exist"),
        ("fold colours out.safetensors", "colours is a folder without a model.safetensors"),
        ("fold garbage.pt out.safetensors", "garbage.pt is not a whole safetensors file, nor one of torch"),
        ("fold tiny.safetensors tiny.safetensors/out.safetensors", "tiny.safetensors/out.safetensors could not be"),
        ("eval --model whole_nan.safetensors --data colours", "values that are not numbers"),
        ("demo --out tiny.safetensors/demo", "could not be written"),
        ("info strange", "another program wrote them"),
        ("info damaged.safetensors", "damaged metadata"),
    ],
)
def test_an_error_is_one_paragraph_that_names_the_file_as_it_was_given(here, capsys, line, words):
    _cut(here)
    (here / "empty").mkdir()
    (here / "garbage.pt").write_bytes(bytes(range(256)) * 9)
    (here / "strange").mkdir()
    (here / "strange/config.json").write_text('{"settings": 3}')
    (here / "strange/metrics.jsonl").write_text("5\n")
    whole = random_clip()
    about = json.loads(file_metadata(whole)["clip_finetune"]) | {"provenance": "abc"}
    save_file(dict(whole.state_dict), "damaged.safetensors", {"clip_finetune": json.dumps(about)})
    labels_folder(here / "one", 1)
    broken = random_clip().derive({"ln_final.bias": torch.full((64,), torch.nan)}, step="broken")
    write_unchecked(broken, "whole_nan.safetensors")
    tensors = text_encoder_state_dict(random_clip(), dtype="fp32")
    save_file(tensors, "te.safetensors")
    save_file(tensors | {"text_model.final_layer_norm.bias": torch.full((64,), torch.nan)}, "nan.safetensors")
    assert main(line.split()) == 1
    said = capsys.readouterr().err.strip()
    message = said[said.index("clip-finetune ") :]
    assert words in message and "\n" not in message and "Traceback" not in said and str(here) not in message
    assert not (here / "out.safetensors").exists() and not (here / "run").exists()


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "clip_finetune.engine", *arguments], stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_run_that_is_ended_from_outside_goes_on_to_the_same_bits(here, number):
    many = [*TRAIN, "--epochs", "10", "--save-every-steps", "6"]
    assert main([*many, "--out", "whole"]) == 0
    process = command(*many, "--out", "stopped", cwd=here)
    metrics = here / "stopped/metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 8:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    said = process.stderr.read()
    status = process.wait()
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 130 and "Stopped; the state of step" in said and "Traceback" not in said
    assert not (here / "stopped/best.safetensors").exists() or number != signal.SIGKILL
    assert main([*many, "--out", "stopped", "--resume"]) == 0
    assert identical("stopped/best.safetensors", "whole/best.safetensors")
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 31))


def test_resume_without_a_state_begins_at_step_0(here):
    assert main([*TRAIN, "--epochs", "1", "--out", "run", "--resume"]) == 0
    assert (here / "run/best.safetensors").is_file()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_nothing_is_lost(here, capsys):
    disk = here / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        # The model takes 14 MB and the state of a run 41 MB.
        assert main(["export", "tiny.safetensors", "disk/te.safetensors", "--dtype", "fp32"]) == 0
        before = (disk / "te.safetensors").read_bytes()
        assert main([*TRAIN, "--epochs", "1", "--out", "disk/run"]) == 1
        said = capsys.readouterr().err
        assert "The disk is full: disk/run/" in said and "Traceback" not in said
        assert (disk / "te.safetensors").read_bytes() == before
        assert not list(disk.rglob("*.part"))
        (disk / "te.safetensors").unlink()
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        assert main([*TRAIN, "--epochs", "1", "--out", "disk/run"]) == 0
        assert (disk / "run/best.safetensors").is_file()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_gmp_file_folds_to_its_plain_form(here):
    save_full_clip(to_gmp(load_full_clip("tiny.safetensors")), "gmp.safetensors")
    assert main(["fold", "gmp.safetensors", "folded.safetensors"]) == 0
    plain, folded = load_full_clip("tiny.safetensors").state_dict, load_full_clip("folded.safetensors").state_dict
    for name, tensor in plain.items():
        torch.testing.assert_close(folded[name], tensor, rtol=2e-7, atol=0)
