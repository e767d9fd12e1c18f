"""The command `eval` and the page that it writes."""

import json
import os
import subprocess
import sys

import pytest
from clips import random_clip
from image_folders import class_folder, labels_folder
from pages import read

from clip_finetune.engine import (
    eval_typographic,
    load_dataset,
    load_full_clip,
    save_full_clip,
)
from clip_finetune.engine.cli import main
from clip_finetune.engine.evaluate.typographic.examples import fooled_apart


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two models, captioned and labelled images, and the command standing there."""
    monkeypatch.chdir(tmp_path)
    save_full_clip(random_clip(), "tiny.safetensors")
    save_full_clip(random_clip(seed=1), "other.safetensors")
    labels_folder(tmp_path / "colours")
    class_folder(tmp_path / "classes")
    return tmp_path


EVAL = "eval --model other.safetensors --baseline tiny.safetensors".split()


def test_eval_writes_a_page_with_the_numbers_of_its_json(here, capsys):
    more = ["--data", "colours", "--json", "found.json", "--html", "pages/found.html", "--compare"]
    assert main([*EVAL, *more]) == 0
    found, said = read(here / "pages/found.html"), capsys.readouterr()
    numbers = json.loads((here / "found.json").read_text())
    for result in numbers["models"]:
        assert f"{result['name']} {result['file']} 12" in found.text
        for way in ("image_to_text", "text_to_image"):
            assert f"{result['retrieval'][way]['r1']:.1%} {result['retrieval'][way]['r5']:.1%}" in found.text
    (comparison,) = numbers["comparisons"]
    assert comparison["file"] == "other.safetensors" and comparison["health"] in ("sound", "doubtful", "ruined")
    assert f"{comparison['model']['effective_rank_images']:.1f}" in found.text
    for sentence in comparison["verdict"]:
        assert sentence in found.text and sentence in said.out
    assert "other.safetensors beside tiny.safetensors" in found.text
    assert len(found.images) == 1 + 1 + 12  # recall, comparison, images


def test_eval_of_classes_lists_each_class(here):
    assert main([*EVAL, "--data", "classes", "--json", "found.json", "--html", "found.html", "--typographic"]) == 0
    found, numbers = read(here / "found.html"), json.loads((here / "found.json").read_text())
    assert "comparisons" not in numbers
    shares = [
        {entry["class"]: entry["top1"] for entry in result["details"]["zero_shot"]["per_class"]}
        for result in numbers["models"]
    ]
    for name, share in shares[0].items():
        assert f"class {name} (3) {share:.1%} {shares[1][name]:.1%}" in found.text
    assert "Accuracy under attack" in found.text
    models = (load_full_clip(f"{name}.safetensors") for name in ("other", "tiny"))
    data = load_dataset("classes")
    fooled = fooled_apart(*(eval_typographic(model, data, templates="openai-80") for model in models))
    assert fooled and "Images that fool one of the models and not the other" in found.text
    for mine, other in fooled:
        told = f"{mine.shows}, with “{mine.word}” written on it. Model: {mine.answer}. Baseline: {other.answer}."
        assert told in found.text
    assert len(found.images) == 2 + len(fooled) + 12


def test_two_models_of_one_file_name_are_told_apart(here):
    for run_name, file in (("one", "tiny.safetensors"), ("two", "other.safetensors")):
        (here / run_name).mkdir()
        (here / file).rename(here / run_name / "best.safetensors")
    more = ["--model", "two/best.safetensors", "--data", "classes", "--html", "found.html"]
    assert main(["eval", "--model", "one/best.safetensors", *more]) == 0
    assert "class one/best two/best" in read(here / "found.html").text


@pytest.mark.parametrize(
    "options, words",
    [
        ("--html colours", "colours is a folder; give the name of a file"),
        ("--json colours", "colours is a folder; give the name of a file"),
        ("--json tiny.safetensors", "tiny.safetensors is also read or written by this command"),
        ("--html ./tiny.safetensors", "is also read or written by this command"),
        ("--html link.safetensors", "is also read or written by this command"),
        ("--json one --html one", "is also read or written by this command"),
        ("--json colours/labels.json", "colours/labels.json holds captions and is not replaced"),
        ("--json pipe", "pipe is not a regular file and is not replaced"),
        ("--compare --baseline other.safetensors --data single", "--compare needs a few hundred images"),
        ("--html tiny.safetensors/found.html", "tiny.safetensors/found.html cannot be written"),
        ("--compare --html found.html", "--compare needs --baseline"),
        ("--html found.html --data nowhere", "nowhere"),
        ("--html found.html --model nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("--compare --baseline wide.safetensors --html found.html", "different"),
    ],
)
def test_impossible_arguments_are_refused_in_one_sentence_before_anything_is_measured(here, capsys, options, words):
    save_full_clip(random_clip(text_layers=1), "wide.safetensors")
    labels_folder(here / "single", 1)
    if os.name != "nt":
        os.symlink("tiny.safetensors", "link.safetensors")
        os.mkfifo("pipe")
    before = {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}
    assert main(["eval", "--model", "tiny.safetensors", "--data", "colours", *options.split()]) == 1
    said = capsys.readouterr()
    assert words in said.err and "\n" not in said.err.strip() and "Traceback" not in said.err
    assert not said.out
    assert before == {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}


def test_the_notes_of_the_dataset_reader_are_shown(here, capsys):
    labels = json.loads((here / "colours/labels.json").read_text())
    labels |= dict.fromkeys(list(labels)[:3], [])
    (here / "colours/labels.json").write_text(json.dumps(labels))
    (here / "colours/004.png").unlink()
    assert main([*EVAL, "--data", "colours", "--html", "found.html"]) == 0
    said, page = capsys.readouterr().err, read(here / "found.html").text
    assert "colours: 9 images (labels.json holds captions)" in said
    for words in ("3 images have no caption", "1 of the 9 images named in colours are missing"):
        assert words in said and words in page


@pytest.mark.skipif(os.name == "nt", reason="pipes and file names are POSIX's here")
def test_files_are_written_even_if_nobody_reads_the_output(here):
    broken = os.fsdecode(b"caf\xe9")
    (here / "classes/red").rename(here / "classes" / broken)
    command = [sys.executable, "-m", "clip_finetune.engine", *EVAL, "--data", "classes", "--json", "found.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert "Traceback" not in said and process.returncode != 0
    numbers = json.loads((here / "found.json").read_text())
    assert broken in [entry["class"] for entry in numbers["models"][0]["details"]["zero_shot"]["per_class"]]


def test_a_page_that_was_not_written_is_a_failure(here, monkeypatch):
    from clip_finetune.engine import files

    monkeypatch.setattr(files, "write_text", lambda path, text: path)
    assert main([*EVAL, "--data", "colours", "--html", "found.html"]) == 1
