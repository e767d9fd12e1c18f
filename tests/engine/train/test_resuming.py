"""A run that was stopped, crashed or lost files ends as if nothing had happened."""

import itertools
import json
import os
import shutil
import time

import pytest
from train_runs import QUICK, Stop, identical, lines, run, stop_after

from clip_finetune.engine import TrainConfig, train
from clip_finetune.engine.train.run.folder import RunFolder


@pytest.mark.parametrize("optimizer, gmp", [("adabelief", True), ("adamw", False), ("adafactor", True)])
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(model, data, tmp_path, optimizer, gmp):
    options = dict(optimizer=optimizer, gmp=gmp, micro_batch=2, validation=data)
    whole = run(model, data, tmp_path / "whole", **options)
    for step in (1, 4, 8):
        with pytest.raises(Stop):
            run(model, data, tmp_path / "stopped", progress=stop_after(step), **options)
        assert json.loads((tmp_path / "stopped" / "last.json").read_text())["step"] == step
    resumed = run(model, data, tmp_path / "stopped", **options)
    assert identical(resumed.full_clip, whole.full_clip) and resumed.best_step == whole.best_step
    for kind in ("step", "validation"):
        ours, theirs = lines(tmp_path / "stopped", kind), lines(tmp_path / "whole", kind)
        for line in (*ours, *theirs):
            line.pop("pairs_per_second", None)
        assert ours == theirs


def test_a_cancel_between_micro_batches_keeps_the_step_before(model, data, tmp_path):
    asked = []

    def check():
        asked.append(1)
        if len(asked) == 20:
            raise Stop

    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", check=check, micro_batch=1)
    saved = json.loads((tmp_path / "run" / "last.json").read_text())["step"]
    assert saved == len(lines(tmp_path / "run")) == 1  # a step of 4 pairs asks 1 + 8 + 8 times


def test_a_stopped_run_says_that_its_state_is_saved(model, data, tmp_path):
    told = []
    with pytest.raises(Stop):
        train(
            model,
            data,
            None,
            TrainConfig.from_flat(**QUICK),
            run_folder=tmp_path / "run",
            device="cpu",
            on_note=told.append,
            on_progress=stop_after(2),
        )
    assert told[-1] == "Stopped; the state of step 2 is saved, and the same run resumes from it."


def test_a_crash_after_a_periodic_save_loses_only_what_came_later(model, data, tmp_path):
    """What a killed process leaves: the state of step 4, later metrics, and half-written files."""
    whole = run(model, data, tmp_path / "whole")
    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", progress=stop_after(4))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "step", "step": 5, "loss": 1.0}) + '\n{"kind": "st')
    part = tmp_path / "run" / ".step_8.safetensors.abc.part"
    part.mkdir()
    (part / "step_8.safetensors").write_bytes(b"half")
    resumed = run(model, data, tmp_path / "run")
    assert identical(resumed.full_clip, whole.full_clip)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 10))
    assert not list((tmp_path / "run").glob(".*"))


@pytest.mark.parametrize("validated", [False, True])
def test_a_crash_between_any_two_files_is_healed(model, data, tmp_path, monkeypatch, validated, soak):
    """A stopped run goes on and dies before the n-th of its files is put into place; then it goes on to the same
    bits, for every n (every fourth, unless it is a soak test)."""
    options = dict(validation=data if validated else None, epochs=2, save_every_steps=2)
    whole = run(model, data, tmp_path / "whole", **options)
    with pytest.raises(Stop):
        run(model, data, tmp_path / "stopped", progress=stop_after(3), **options)
    replace = os.replace

    def dies_at(moment):
        count = iter(range(moment))

        def dies(*names):
            if next(count, None) is None:
                raise Stop
            replace(*names)

        return dies

    died, moment = True, 0
    while died:
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "stopped", folder)
        monkeypatch.setattr(os, "replace", dies_at(moment))
        try:
            run(model, data, folder, **options)
            died = False
        except Stop:
            moment += 1 if soak else 4
        monkeypatch.setattr(os, "replace", replace)
        result = run(model, data, folder, **options)
        assert identical(result.full_clip, whole.full_clip) and result.best_step == whole.best_step
        for kind in ("step", "validation"):
            ours, theirs = lines(folder, kind), lines(tmp_path / "whole", kind)
            assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        assert "Finished: all 6 steps are done." in (folder / "report.html").read_text()
    assert moment > 8


def test_the_same_run_again_is_not_trained_again(model, data, tmp_path):
    first = run(model, data, tmp_path / "run")
    stamp = (tmp_path / "run" / "best.safetensors").stat().st_mtime_ns
    again = run(model, data, tmp_path / "run", save_every_minutes=1.0)
    assert again.already_finished and identical(again.full_clip, first.full_clip)
    assert (tmp_path / "run" / "best.safetensors").stat().st_mtime_ns == stamp
    assert len(lines(tmp_path / "run")) == 9


def test_more_epochs_continue_the_same_run_and_say_so(model, data, tmp_path):
    run(model, data, tmp_path / "run")
    longer = run(model, data, tmp_path / "run", epochs=5)
    assert longer.run_folder == tmp_path / "run" and longer.total_steps == 15
    assert any("15 steps instead of 9" in note for note in longer.notes)
    steps = lines(tmp_path / "run")
    assert [line["step"] for line in steps] == list(range(1, 16))
    assert steps[9]["learning_rate"]["text.mlp"] > steps[8]["learning_rate"]["text.mlp"]


@pytest.mark.parametrize(
    "every, saved", [(dict(save_every_steps=4), [4, 8, 9]), (dict(save_every_minutes=1 / 60), None)]
)
def test_checkpoints_are_saved_every_so_many_steps_or_minutes(model, data, tmp_path, monkeypatch, every, saved):
    """By a clock that goes half a second a step: a state is due after two of them."""
    steps, save, clock = [], RunFolder.save_checkpoint, itertools.count()

    def kept(folder, checkpoint, keep):
        steps.append(checkpoint.step)
        save(folder, checkpoint, keep)

    monkeypatch.setattr(RunFolder, "save_checkpoint", kept)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) * 0.25)
    run(model, data, tmp_path / "run", **({"save_every_minutes": 0.0} | every))
    assert steps == saved if saved else len(steps) > 3 and steps[-1] == 9


def test_a_lost_checkpoint_is_noted_and_an_older_one_is_used(model, data, tmp_path):
    whole = run(model, data, tmp_path / "whole")
    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", progress=stop_after(7), save_every_steps=3, keep_checkpoints=3)
    assert {file.name for file in (tmp_path / "run").glob("step_*")} == {f"step_{n}.safetensors" for n in (3, 6, 7)}
    (tmp_path / "run" / "step_7.safetensors").unlink()
    (tmp_path / "run" / "step_6.safetensors").write_bytes(b"half a file")
    result = run(model, data, tmp_path / "run", keep_checkpoints=3)
    assert any("step_6.safetensors cannot be used" in note for note in result.notes)
    assert any("resumes from step 3" in note for note in result.notes)
    assert identical(result.full_clip, whole.full_clip)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 10))


def test_a_run_without_any_checkpoint_left_starts_again_and_says_so(model, data, tmp_path):
    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", progress=stop_after(5))
    (tmp_path / "run" / "step_5.safetensors").unlink()
    result = run(model, data, tmp_path / "run", on_existing="resume")
    assert any("No checkpoint of this run is left" in note for note in result.notes)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 10))


def test_a_checkpoint_that_a_crash_left_before_the_pointer_moved_is_removed(model, data, tmp_path):
    run(model, data, tmp_path / "run")
    orphan = (tmp_path / "run" / "step_9.safetensors").read_bytes()
    with pytest.raises(Stop):
        run(model, data, tmp_path / "other", progress=stop_after(4))
    (tmp_path / "other" / "step_9.safetensors").write_bytes(orphan)
    with pytest.raises(Stop):
        run(model, data, tmp_path / "other", progress=stop_after(6))
    assert [file.name for file in (tmp_path / "other").glob("step_*")] == ["step_6.safetensors"]
    assert json.loads((tmp_path / "other" / "last.json").read_text())["file"] == "step_6.safetensors"
