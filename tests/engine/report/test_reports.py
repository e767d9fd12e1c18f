"""The pages that runs and evaluations write: they hold the numbers, fetch nothing, and run nothing."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy
import pytest
from clips import random_clip
from image_folders import class_folder, labels_folder
from PIL import Image

from clip_finetune.engine import (
    TrainConfig,
    eval_typographic,
    load_dataset,
    load_full_clip,
    save_full_clip,
    split_dataset,
    train,
)
from clip_finetune.engine.cli import main
from clip_finetune.engine.evaluate.typographic.attack import fooled_apart
from clip_finetune.engine.report import html
from clip_finetune.engine.report.html import MOST_BYTES, Page, escaped, fold, html_table, paragraph

EVIL = "<script>alert('caught')</script> & \"<img src=x onerror=alert(1)>"
QUICK = dict(epochs=3, learning_rate=1e-3, batch_size=4, precision="fp32")
VOID = {"meta", "img", "br"}
MAY_STAND = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "section",
    "p",
    "pre",
    "div",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "details",
    "summary",
    "figure",
    "figcaption",
    "img",
    "footer",
}


class Read(HTMLParser):
    """What a browser would see: the text, the pictures; anything that is not ours fails."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.words, self.pictures, self.style = [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag in MAY_STAND, tag
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("href", "style"), name
            if name == "src":
                assert value.startswith("data:image/")
                self.pictures.append(base64.b64decode(value.split(",", 1)[1], validate=True))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(file) -> Read:
    page = file.read_text(encoding="utf-8")
    assert len(page.encode("utf-8")) <= MOST_BYTES
    bare = re.sub(r'src="data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+"', "", page)
    assert "://" not in bare and "<script" not in bare.lower() and "@import" not in bare and "url(" not in bare
    found = Read(page)
    assert "prefers-color-scheme: dark" in found.style
    for picture in found.pictures:
        Image.open(io.BytesIO(picture)).load()
    return found


@pytest.fixture(scope="module")
def model():
    return random_clip()


@pytest.fixture
def data(tmp_path):
    """About twelve pictures to train on and six others to measure on."""
    return split_dataset(load_dataset(labels_folder(tmp_path / "colours", 18)), 1 / 3)


class Stop(BaseException):
    """As the host's interrupt: not an Exception."""


def run(model, data, folder, *, stop_at=None, **changes):
    def progress(told):
        if told.step == stop_at:
            raise Stop

    config = TrainConfig.from_flat(**(QUICK | changes))
    return train(model, data[0], data[1], config, run_folder=folder, device="cpu", on_progress=progress)


# ---- of a run --------------------------------------------------------------------------------------------------------


def test_the_report_of_a_run_holds_the_numbers_of_its_metrics(model, data, tmp_path):
    result = run(model, data, tmp_path / "run")
    found = read(tmp_path / "run" / "report.html")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if line["kind"] == "step"]) == 9
    for line in lines:
        assert f" {line['step']} " in found.text and f"{line['loss']:.4f}" in found.text
        for key in ("image_to_text_r1", "text_to_image_r1"):
            assert key not in line or f"{line[key]:.1%}" in found.text
    assert f"before (step 0) best (step {result.best_step})" in found.text
    before, best = (next(line for line in result.validations if line["step"] == step) for step in (0, result.best_step))
    assert f"{best['loss'] - before['loss']:+.4f}" in found.text
    assert "Finished: all 9 steps are done." in found.text and "text.attention" in found.text
    for words, part in zip(("trained", "measured"), data, strict=True):
        assert f"{words} on colours {len(part)} {2 * len(part)}" in found.text
    assert "epochs 3 10 given" in found.text  # setting, value, default, from
    assert len(found.pictures) == 3 + len(data[1])  # curves and validation pictures


def test_only_settings_that_differ_stand_outside_of_the_fold(model, data, tmp_path):
    run(model, data, tmp_path / "run")
    settings = (tmp_path / "run" / "report.html").read_text().split("<h2>Settings</h2>")[1].split("</section>")[0]
    first, folded = settings.split("<details>")
    assert [name for name in ("epochs", "batch_size", "precision", "beta1", "towers") if f">{name}<" in first] == [
        "epochs",
        "batch_size",
        "precision",
    ]
    assert all(f">{name}<" in folded for name in ("epochs", "beta1", "towers"))


def test_a_stopped_run_has_a_report_and_the_resumed_one_writes_it_anew(model, data, tmp_path):
    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", stop_at=4)
    stopped = read(tmp_path / "run" / "report.html")
    assert "Stopped after step 4 of 9" in stopped.text and "step_4" not in stopped.text
    run(model, data, tmp_path / "run")
    finished = read(tmp_path / "run" / "report.html")
    assert "Finished: all 9 steps are done." in finished.text and "Stopped after" not in finished.text
    assert "The run resumes from step 4 of 9." in finished.text


def test_a_finished_run_without_a_report_gets_one(model, data, tmp_path):
    run(model, data, tmp_path / "run")
    whole = read(tmp_path / "run" / "report.html")
    (tmp_path / "run" / "report.html").unlink()
    assert run(model, data, tmp_path / "run").already_finished
    again = read(tmp_path / "run" / "report.html")
    assert again.pictures == whole.pictures and "Finished: all 9 steps are done." in again.text


def test_a_run_without_validation_says_what_that_means(model, data, tmp_path):
    run(model, (data[0], None), tmp_path / "run")
    found = read(tmp_path / "run" / "report.html")
    assert "There was no validation set, so the last weights are the result." in found.text
    assert "training loss" in found.text and "Some of the training pictures" in found.text
    assert len(found.pictures) == 2 + 12 < 2 + len(data[0])


def test_a_report_that_cannot_be_written_loses_nothing(model, data, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", stop_at=2)
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / "report.html").mkdir()  # nothing can be moved there
    result = run(model, data, tmp_path / "run")
    assert any(note.startswith("The report of the run could not be written") for note in result.notes)
    assert json.loads((tmp_path / "run" / "last.json").read_text())["step"] == 9
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_restarting_a_run_clears_its_report(model, data, tmp_path, monkeypatch):
    from clip_finetune.engine.train.run.folder import RunFolder

    run(model, data, tmp_path / "run")
    RunFolder(tmp_path / "run").clear()
    assert not list((tmp_path / "run").iterdir())


def test_names_and_captions_are_text_and_never_markup(model, tmp_path):
    folder = labels_folder(tmp_path / "a<b>&c", 12)
    labels = {
        name: [EVIL, f"{number} {EVIL}"] for number, name in enumerate(json.loads((folder / "labels.json").read_text()))
    }
    (folder / "labels.json").write_text(json.dumps(labels))
    dataset = load_dataset(folder)
    run(model, (dataset, dataset), tmp_path / "run <i>", label_template="{} <b>")
    found = read(tmp_path / "run <i>" / "report.html")
    assert EVIL in found.text and "Training: run <i>" in found.text and "a<b>&c" in found.text
    assert "{} <b>" in found.text


# ---- of an evaluation ------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two models, captioned and labelled pictures, and the command standing there."""
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
    assert len(found.pictures) == 1 + 1 + 12  # recall, comparison, pictures


def test_eval_of_classes_tells_each_class(here):
    assert main([*EVAL, "--data", "classes", "--json", "found.json", "--html", "found.html", "--typographic"]) == 0
    found, numbers = read(here / "found.html"), json.loads((here / "found.json").read_text())
    assert "comparisons" not in numbers
    shares = [
        {entry["class"]: entry["top1"] for entry in result["details"]["zero_shot"]["per_class"]}
        for result in numbers["models"]
    ]
    for name, share in shares[0].items():
        assert f"{name} 3 {share:.1%} {shares[1][name]:.1%}" in found.text
    assert "Accuracy under attack" in found.text
    models = (load_full_clip(f"{name}.safetensors") for name in ("other", "tiny"))
    data = load_dataset("classes")
    fooled = fooled_apart(*(eval_typographic(model, data, templates="openai-80") for model in models))
    assert fooled and "Pictures that fool one of the models and not the other" in found.text
    for mine, other in fooled:
        told = f"{mine.shows}, “{mine.word}” is written. Model: {mine.answer}. Baseline: {other.answer}."
        assert told in found.text
    assert len(found.pictures) == 2 + len(fooled) + 12


def test_two_models_of_one_file_name_are_told_apart(here):
    for run_name, file in (("one", "tiny.safetensors"), ("two", "other.safetensors")):
        (here / run_name).mkdir()
        (here / file).rename(here / run_name / "best.safetensors")
    more = ["--model", "two/best.safetensors", "--data", "classes", "--html", "found.html"]
    assert main(["eval", "--model", "one/best.safetensors", *more]) == 0
    assert "class pictures one/best two/best" in read(here / "found.html").text


@pytest.mark.parametrize(
    "options, words",
    [
        ("--html colours", "colours is a folder; give the name of a file"),
        ("--json colours", "colours is a folder; give the name of a file"),
        ("--json tiny.safetensors", "tiny.safetensors would take the place of what is read"),
        ("--html ./tiny.safetensors", "would take the place of what is read"),
        ("--html link.safetensors", "would take the place of what is read"),
        ("--json one --html one", "would take the place of what is read or written besides"),
        ("--json colours/labels.json", "colours/labels.json holds captions, and they are not replaced"),
        ("--json pipe", "pipe is no ordinary file, and it is not replaced"),
        ("--compare --baseline other.safetensors --data single", "--compare needs some hundred pictures"),
        ("--html tiny.safetensors/found.html", "tiny.safetensors/found.html cannot be written"),
        ("--compare --html found.html", "--compare needs --baseline"),
        ("--html found.html --data nowhere", "nowhere"),
        ("--html found.html --model nowhere.safetensors", "nowhere.safetensors does not exist"),
        ("--compare --baseline wide.safetensors --html found.html", "different"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_before_anything_is_measured(here, capsys, options, words):
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


def test_what_the_reader_of_a_data_set_said_is_told(here, capsys):
    labels = json.loads((here / "colours/labels.json").read_text())
    labels |= dict.fromkeys(list(labels)[:3], [])
    (here / "colours/labels.json").write_text(json.dumps(labels))
    (here / "colours/004.png").unlink()
    assert main([*EVAL, "--data", "colours", "--html", "found.html"]) == 0
    said, page = capsys.readouterr().err, read(here / "found.html").text
    assert "colours: 9 pictures (labels.json holds captions)" in said
    for words in ("3 pictures have no caption", "1 of the 9 pictures named in colours are not there"):
        assert words in said and words in page


@pytest.mark.skipif(os.name == "nt", reason="pipes and file names are POSIX's here")
def test_files_are_written_whoever_reads_what_is_printed(here):
    broken = os.fsdecode(b"caf\xe9")
    (here / "classes/red").rename(here / "classes" / broken)
    command = [sys.executable, "-m", "clip_finetune.engine", *EVAL, "--data", "classes", "--json", "found.json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert "Traceback" not in said and process.returncode != 0
    numbers = json.loads((here / "found.json").read_text())
    assert broken in [entry["class"] for entry in numbers["models"][0]["details"]["zero_shot"]["per_class"]]


def test_a_page_that_is_not_there_in_the_end_is_a_failure(here, monkeypatch):
    from clip_finetune.engine import files

    monkeypatch.setattr(files, "write_text", lambda path, text: path)
    assert main([*EVAL, "--data", "colours", "--html", "found.html"]) == 1


# ---- the pieces ------------------------------------------------------------------------------------------------------


def test_everything_that_is_put_into_a_page_is_escaped():
    page = Page(EVIL)
    page.add(EVIL, EVIL, paragraph(EVIL), paragraph(f"two\n{EVIL}"), html_table([{EVIL: EVIL}]), fold(EVIL, EVIL))
    page.add("pictures", page.sheet([(Image.new("RGB", (8, 8)), EVIL)]), page.charts([(EVIL, Image.new("L", (8, 8)))]))
    found = Read(page.text())
    assert found.text.count(EVIL) == 2 + 8 + 1 and len(found.pictures) == 2


def test_damaged_names_and_long_texts_do_not_break_a_page(tmp_path):
    page = Page("\udcff.png")
    page.add("long", paragraph("x" * 100_000), html_table([{"row": number} for number in range(10_000)]))
    (tmp_path / "page.html").write_text(page.text(), encoding="utf-8")
    found = read(tmp_path / "page.html")
    assert "The first 500 of 10000 rows." in found.text and len(page.text()) < 50_000 and "?.png" in found.text


def test_pictures_that_cannot_be_compressed_are_left_out_before_the_page_is_too_large(tmp_path):
    noise = numpy.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=numpy.uint8)
    page, picture = Page("noise"), Image.fromarray(noise)
    page.add("charts", page.charts([("noise", picture)] * 20))
    page.add("sheet", page.sheet([(picture, "noise")] * 200))
    (tmp_path / "page.html").write_text(page.text(), encoding="utf-8")
    found = read(tmp_path / "page.html")
    assert "(No room for this picture.)" in found.text and found.pictures


def test_markup_of_our_own_is_not_escaped_twice():
    assert escaped(paragraph("a & b")) == "<p>a &amp; b</p>" and isinstance(html.fold("x", ""), html.Html)
    assert html.fold("nothing in it", "") == ""
