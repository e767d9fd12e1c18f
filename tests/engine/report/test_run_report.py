"""The page of a run holds its numbers, fetches nothing and runs nothing."""

import json

import pytest
from clips import random_clip
from image_folders import labels_folder
from pages import EVIL, read

from clip_finetune.engine import (
    TrainConfig,
    load_dataset,
    split_dataset,
    train,
)

QUICK = dict(epochs=3, learning_rate=1e-3, batch_size=4, precision="fp32")


@pytest.fixture(scope="module")
def model():
    return random_clip()


@pytest.fixture
def data(tmp_path):
    """About twelve images to train on and six others to measure on."""
    return split_dataset(load_dataset(labels_folder(tmp_path / "colours", 18)), 1 / 3)


class Stop(BaseException):
    """As the host's interrupt: not an Exception."""


def run(model, data, folder, *, stop_at=None, **changes):
    def progress(told):
        if told.step == stop_at:
            raise Stop

    config = TrainConfig.from_flat(**(QUICK | changes))
    return train(model, data[0], data[1], config, run_folder=folder, device="cpu", on_progress=progress)


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
    assert len(found.images) == 3 + len(data[1])  # curves and validation images


def test_only_settings_that_differ_are_shown_unfolded(model, data, tmp_path):
    run(model, data, tmp_path / "run")
    settings = (tmp_path / "run" / "report.html").read_text().split("<h2>Settings</h2>")[1].split("</section>")[0]
    first, folded = settings.split("<details>")
    assert [name for name in ("epochs", "batch_size", "precision", "beta1", "towers") if f">{name}<" in first] == [
        "epochs",
        "batch_size",
        "precision",
    ]
    assert all(f">{name}<" in folded for name in ("epochs", "beta1", "towers"))


def test_a_stopped_run_has_a_report_and_the_resumed_one_rewrites_it(model, data, tmp_path):
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
    assert again.images == whole.images and "Finished: all 9 steps are done." in again.text


def test_a_run_without_validation_says_what_that_means(model, data, tmp_path):
    run(model, (data[0], None), tmp_path / "run")
    found = read(tmp_path / "run" / "report.html")
    assert "There was no validation dataset, so the last weights are the result." in found.text
    assert "training loss" in found.text and "Some of the training images" in found.text
    assert len(found.images) == 2 + 12 < 2 + len(data[0])


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
