"""Runs: what they learn, what they keep, and what comes of stopping them."""

import itertools
import json
import math
import os
import shutil
import time

import pytest
import torch
from clips import TINY, random_clip
from image_folders import class_folder, labels_folder
from safetensors.torch import load_file

from clip_finetune.engine import TrainConfig, UserError, load_dataset, load_full_clip, to_gmp, train
from clip_finetune.engine.clip.tensor_files import read_contents, same_bits
from clip_finetune.engine.train import master_weights
from clip_finetune.engine.train import step as step_module
from clip_finetune.engine.train.device import resolve_precision
from clip_finetune.engine.train.losses import LOSSES
from clip_finetune.engine.train.optim.gradient_norms import GradientMeter
from clip_finetune.engine.train.optim.parameter_info import parameter_info
from clip_finetune.engine.train.run.folder import STATE_KEY, RunFolder
from clip_finetune.engine.train.schedules import SCHEDULES
from clip_finetune.engine.train.step import MAX_LOGIT_SCALE, TrainingStep

QUICK = dict(epochs=3, learning_rate=1e-3, batch_size=4, precision="fp32")


@pytest.fixture(scope="module")
def model():
    return random_clip()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(labels_folder(tmp_path_factory.mktemp("data") / "colours"))


def run(
    model, data, folder, validation=None, *, device="cpu", on_existing="auto", check=None, progress=None, **changes
):
    hooks = {}
    if check:
        hooks["check_cancelled"] = check
    if progress:
        hooks["on_progress"] = progress
    config = TrainConfig.from_flat(**(QUICK | changes))
    return train(model, data, validation, config, run_folder=folder, device=device, on_existing=on_existing, **hooks)


def lines(folder, kind="step"):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def identical(one, other):
    return one.state_dict.keys() == other.state_dict.keys() and all(
        same_bits(tensor, other.state_dict[name]) for name, tensor in one.state_dict.items()
    )


def test_training_learns_its_pairs(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", epochs=20)
    losses = [line["loss"] for line in result.steps]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_the_run_folder_holds_what_it_promises(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", validation=data)
    folder = tmp_path / "run"
    assert result.run_folder == folder and result.total_steps == 9
    assert sorted(file.name for file in folder.iterdir()) == [
        "best.safetensors",
        "chart.png",
        "config.json",
        "last.json",
        "metrics.jsonl",
        "report.html",
        "step_9.safetensors",
    ]
    assert json.loads((folder / "last.json").read_text()) == {"file": "step_9.safetensors", "step": 9}
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["epochs"] == {"value": 3, "from": "given"}
    assert config["settings"]["beta1"] == {"value": 0.9, "from": "default"}
    steps = lines(folder)
    assert [line["step"] for line in steps] == list(range(1, 10))
    fields = {"epoch", "loss", "learning_rate", "grad_norm", "logit_scale", "pairs_per_second", "micro_batch"}
    assert fields <= steps[0].keys() and steps[2]["epoch"] == 1.0
    assert [line["step"] for line in lines(folder, "validation")] == [0, 3, 6, 9]
    assert {"loss", "image_to_text_r1", "text_to_image_r1"} <= lines(folder, "validation")[0].keys()
    assert load_full_clip(folder / "best.safetensors").fingerprint == result.full_clip.fingerprint


def test_the_rates_in_the_metrics_are_the_schedules(model, data, tmp_path):
    steps = run(model, data, tmp_path / "run", epochs=10, warmup=0.3).steps
    rates = [set(line["learning_rate"].values()) for line in steps]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=30, pct_start=0.3, div_factor=25, final_div_factor=4, cycle_momentum=False
    )
    for found in rates:
        assert len(found) == 1 and found.pop() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step() if theirs.last_epoch < 29 else None


# ---- stopping and going on -------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As the host's interrupt: not an Exception."""


def stop_after(step):
    def progress(progress):
        if progress.step == step:
            raise Stop

    return progress


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


def test_the_same_run_again_is_not_trained_again(model, data, tmp_path):
    first = run(model, data, tmp_path / "run")
    stamp = (tmp_path / "run" / "best.safetensors").stat().st_mtime_ns
    again = run(model, data, tmp_path / "run", save_every_minutes=1.0)
    assert again.already_finished and identical(again.full_clip, first.full_clip)
    assert (tmp_path / "run" / "best.safetensors").stat().st_mtime_ns == stamp
    assert len(lines(tmp_path / "run")) == 9


def test_other_settings_or_data_get_the_next_free_folder(model, data, tmp_path):
    first = run(model, data, tmp_path / "run")
    second = run(model, data, tmp_path / "run", seed=1)
    third = run(model, data.subset(range(10)), tmp_path / "run")
    assert [result.run_folder.name for result in (first, second, third)] == ["run", "run_2", "run_3"]
    assert any("seed was 0 and is 1" in note and "run_2" in note for note in second.notes)
    assert any("the training data changed" in note for note in third.notes)
    assert run(model, data, tmp_path / "run", seed=1).already_finished


def test_more_epochs_continue_the_same_run_and_say_so(model, data, tmp_path):
    run(model, data, tmp_path / "run")
    longer = run(model, data, tmp_path / "run", epochs=5)
    assert longer.run_folder == tmp_path / "run" and longer.total_steps == 15
    assert any("15 steps instead of 9" in note for note in longer.notes)
    steps = lines(tmp_path / "run")
    assert [line["step"] for line in steps] == list(range(1, 16))
    assert steps[9]["learning_rate"]["text.mlp"] > steps[8]["learning_rate"]["text.mlp"]


def test_the_explicit_choices(model, data, tmp_path):
    run(model, data, tmp_path / "run")
    with pytest.raises(UserError, match="already holds"):
        run(model, data, tmp_path / "run", on_existing="fail")
    with pytest.raises(UserError, match="seed was 0 and is 3"):
        run(model, data, tmp_path / "run", seed=3, on_existing="resume")
    again = run(model, data, tmp_path / "run", seed=3, on_existing="restart")
    assert again.run_folder == tmp_path / "run" and not again.already_finished
    assert run(model, data, tmp_path / "new", on_existing="resume").total_steps == 9


def test_a_folder_of_other_files_is_left_alone(model, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("mine")
    result = run(model, data, tmp_path / "run")
    assert result.run_folder.name == "run_2"
    with pytest.raises(UserError, match="nothing was deleted"):
        run(model, data, tmp_path / "run", on_existing="restart")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["diary.txt"]


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


@pytest.mark.parametrize("gmp", [False, True])
def test_the_gradients_of_a_run_do_not_depend_on_its_micro_batch(model, data, tmp_path, monkeypatch, gmp):
    """In float64, on the path of a training: from the pictures' files to the gradients that the optimizer gets."""
    monkeypatch.setattr(master_weights, "MASTER_DTYPE", torch.float64)
    measure = GradientMeter.measure
    seen = {}

    def gradients(micro_batch):
        def kept(meter):
            seen.setdefault(micro_batch, [parameter.grad.clone() for parameter, _ in meter.members])
            return measure(meter)

        monkeypatch.setattr(GradientMeter, "measure", kept)
        run(model, data, tmp_path / f"run_{micro_batch}", batch_size=12, micro_batch=micro_batch, epochs=1, gmp=gmp)
        return seen[micro_batch]

    for one, other in zip(gradients(1), gradients(12), strict=True):
        assert one.dtype == torch.float64
        assert (one - other).norm() <= 1e-10 * other.norm()


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_a_frozen_tower_and_unused_token_rows_keep_their_bits(data, tmp_path):
    model = random_clip(dtype=torch.float16)
    result = run(model, data, tmp_path / "run", towers="text", weight_decay=0.5)
    from clip_finetune.engine.data.tokenizer import Tokenizer

    used = torch.unique(Tokenizer(77, 49408)([text for texts in data.captions for text in texts]))
    unused = torch.ones(49408, dtype=torch.bool)
    unused[used] = False
    rows = result.full_clip.state_dict["token_embedding.weight"]
    assert torch.equal(rows[unused], model.state_dict["token_embedding.weight"][unused].float())
    assert not torch.equal(rows[used], model.state_dict["token_embedding.weight"][used].float())
    for name, tensor in model.state_dict.items():
        if name.startswith("visual."):
            assert same_bits(result.full_clip.state_dict[name], tensor), name


def test_a_gmp_run_gives_gmp_even_if_the_original_wins(model, data, tmp_path):
    learnt = run(model, data, tmp_path / "learnt", epochs=20).full_clip
    result = run(learnt, data, tmp_path / "run", validation=data, gmp=True, learning_rate=1.0, epochs=1)
    assert result.best_step == 0 and result.full_clip.parameterization == "gmp"
    assert any("the original comes back" in note for note in result.notes)
    assert identical(result.full_clip, to_gmp(learnt))


def test_the_best_by_validation_loss_comes_back(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", validation=data, epochs=6)
    losses = {line["step"]: line["loss"] for line in result.validations}
    assert result.best_step == min(losses, key=losses.__getitem__) > 0


def test_what_is_validated_is_what_is_saved(model, data, tmp_path):
    from clip_finetune.engine import eval_retrieval

    result = run(model, data, tmp_path / "run", validation=data, epochs=4)
    best = next(line for line in result.validations if line["step"] == result.best_step)
    measured = eval_retrieval(load_full_clip(tmp_path / "run" / "best.safetensors"), data).as_dict()
    assert measured["image_to_text"]["r1"] == best["image_to_text_r1"]
    assert measured["text_to_image"]["r1"] == best["text_to_image_r1"]


def test_class_folders_train_by_their_names(model, tmp_path):
    data = load_dataset(class_folder(tmp_path / "classes"))
    result = run(model, data, tmp_path / "run", validation=data, epochs=8)
    assert result.validations[-1]["loss"] < result.validations[0]["loss"]


def test_logit_scale_never_rises_above_one_hundred(data, tmp_path):
    model = random_clip().derive({"logit_scale": torch.tensor(4.60)}, step="made hot")
    result = run(model, data, tmp_path / "run", epochs=20, learning_rate=1e-2)
    highest = max(line["logit_scale"] for line in result.steps)
    assert highest <= 100.001 and result.full_clip.state_dict["logit_scale"] <= MAX_LOGIT_SCALE + 1e-6


def test_activation_checkpointing_changes_no_number(model, data, tmp_path):
    plain = run(model, data, tmp_path / "plain")
    saving = run(model, data, tmp_path / "saving", activation_checkpointing=True)
    assert [line["loss"] for line in plain.steps] == [line["loss"] for line in saving.steps]


def test_the_same_settings_give_the_same_weights(model, data, tmp_path):
    one, other = (run(model, data, tmp_path / name, gmp=True) for name in ("one", "other"))
    assert identical(one.full_clip, other.full_clip)
    assert not identical(one.full_clip, run(model, data, tmp_path / "third", gmp=True, seed=1).full_clip)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_learns_and_goes_on_from_a_stop_with_the_same_bits(model, data, tmp_path, loss):
    whole = run(model, data, tmp_path / "whole", loss=loss, micro_batch=2)
    with pytest.raises(Stop):
        run(model, data, tmp_path / "stopped", loss=loss, micro_batch=2, progress=stop_after(5))
    assert identical(run(model, data, tmp_path / "stopped", loss=loss, micro_batch=2).full_clip, whole.full_clip)
    losses = [line["loss"] for line in whole.steps]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_rates_in_the_metrics_are_the_schedules_of_each_group(model, data, tmp_path, schedule):
    steps = run(
        model, data, tmp_path / "run", schedule=schedule, warmup=0.3, min_lr_ratio=0.1, lr_multipliers="vision=0.5"
    ).steps
    for line in steps:
        expected = 1e-3 * SCHEDULES[schedule].multiple(line["step"] - 1, 9, 0.3, 0.1)
        rates = line["learning_rate"]
        assert rates["text.mlp"] == pytest.approx(expected) and rates["vision.mlp"] == pytest.approx(expected / 2)
    assert steps[0]["grad_norms"].keys() == {name for name in rates}


# ---- freezing --------------------------------------------------------------------------------------------------------


def changed(before, after):
    return {name for name, tensor in after.state_dict.items() if not torch.equal(tensor, before.state_dict[name])}


def test_frozen_blocks_and_embeddings_keep_their_bits_and_the_rest_trains(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", freeze_text_blocks=1, freeze_vision_blocks=2, freeze_embeddings=True)
    expected = {name for name in model.state_dict if name.startswith("transformer.resblocks.1.")}
    expected |= {"ln_final.weight", "ln_final.bias", "text_projection", "logit_scale"}
    expected |= {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}
    assert changed(model, result.full_clip) == expected
    groups = {row["group"] for row in json.loads((tmp_path / "run" / "config.json").read_text())["groups"]}
    assert "text.embeddings" not in groups and "vision.attention" not in groups and "vision.projection" in groups


def test_stages_unfreeze_from_the_top_down_and_freeze_really(model, data, tmp_path):
    """Two stages of two blocks each: until half of the steps are done, neither the lower blocks nor what is before them
    have moved, or have moments, even with weight decay."""
    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", epochs=4, unfreeze_stages=2, weight_decay=0.5, progress=stop_after(6))
    state = load_file(tmp_path / "run" / "step_6.safetensors")
    moved = {name for name, tensor in model.state_dict.items() if not torch.equal(state[f"model.{name}"], tensor)}
    lower = {name for name in model.state_dict if parameter_info(name, TINY).depth < 2 and name != "logit_scale"}
    assert moved == model.state_dict.keys() - lower
    with_moments = {name.split(".", 1)[1].rsplit(".", 1)[0] for name in state if name.startswith("optimizer.")}
    assert with_moments == moved
    stopped = run(model, data, tmp_path / "run", epochs=4, unfreeze_stages=2, weight_decay=0.5)
    whole = run(model, data, tmp_path / "whole", epochs=4, unfreeze_stages=2, weight_decay=0.5)
    assert identical(stopped.full_clip, whole.full_clip)
    assert changed(model, whole.full_clip) == model.state_dict.keys()
    assert any("Stage 2 of 2" in note for note in whole.notes)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(freeze_text_blocks=3), "freeze_text_blocks is 3, but the text tower has 2 blocks"),
        (dict(unfreeze_stages=3), "unfreeze_stages is 3"),
        (dict(scale_neurons="5:1=2"), "blocks 0 to 1"),
        (dict(lr_multipliers="up=2"), "lr_multipliers has the entry 'up=2'"),
    ],
)
def test_settings_that_the_model_does_not_fit_are_told_before_anything_is_made(model, data, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        run(model, data, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


# ---- neurons, profile, groups ----------------------------------------------------------------------------------------


def test_a_run_with_louder_neurons_saves_what_it_validated(model, data, tmp_path):
    from clip_finetune.engine import eval_retrieval

    options = dict(validation=data, epochs=4)
    result = run(model, data, tmp_path / "run", scale_neurons="1:7=50, 0:3=50", **options)
    best = next(line for line in result.validations if line["step"] == result.best_step)
    assert eval_retrieval(load_full_clip(tmp_path / "run" / "best.safetensors"), data).loss == best["loss"]
    plain = run(model, data, tmp_path / "plain", **options)
    assert result.validations[0] == plain.validations[0] and result.validations[-1] != plain.validations[-1]


def test_the_profile_tells_where_the_time_went(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", profile=True, micro_batch=2)
    table = next(note for note in result.notes if "part of a step" in note)
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[3:]}
    assert list(rows) == ["data", "forward", "loss", "backward", "optimizer", "logging", "all"]
    assert all(float(rows[part][0]) > 0 for part in ("forward", "backward", "optimizer", "all"))
    assert sum(float(ms) for ms, _ in rows.values()) == pytest.approx(2 * float(rows["all"][0]), rel=0.02, abs=0.1)
    assert identical(run(model, data, tmp_path / "plain", micro_batch=2).full_clip, result.full_clip)


def test_what_trains_and_how_fast_is_told_and_kept(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", towers="text")
    table = next(note for note in result.notes if note.startswith("What trains, and how fast:"))
    rows = json.loads((tmp_path / "run" / "config.json").read_text())["groups"]
    assert all(row["group"] in table for row in rows) and not any("vision" in row["group"] for row in rows)
    expected = sum(t.numel() for n, t in model.state_dict.items() if not n.startswith("visual."))
    assert sum(int(row["parameters"].replace(",", "")) for row in rows) == expected


# ---- files that go away ----------------------------------------------------------------------------------------------


def test_a_run_folder_that_is_deleted_meanwhile_is_written_again(model, data, tmp_path):
    whole = run(model, data, tmp_path / "whole", validation=data)

    def delete(progress):
        if progress.step == 4:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)

    result = run(model, data, tmp_path / "run", validation=data, progress=delete)
    assert any("were deleted while the training ran" in note for note in result.notes)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 10))
    assert identical(result.full_clip, whole.full_clip)
    assert run(model, data, tmp_path / "run", validation=data).already_finished


@pytest.mark.parametrize(
    "every, saved", [(dict(save_every_steps=4), [4, 8, 9]), (dict(save_every_minutes=1 / 60), None)]
)
def test_states_are_saved_every_so_many_steps_and_minutes(model, data, tmp_path, monkeypatch, every, saved):
    """By a clock that goes half a second a step: a state is due after two of them."""
    steps, save, clock = [], RunFolder.save_checkpoint, itertools.count()

    def kept(folder, checkpoint, keep):
        steps.append(checkpoint.step)
        save(folder, checkpoint, keep)

    monkeypatch.setattr(RunFolder, "save_checkpoint", kept)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) * 0.25)
    run(model, data, tmp_path / "run", **({"save_every_minutes": 0.0} | every))
    assert steps == saved if saved else len(steps) > 3 and steps[-1] == 9


def test_a_lost_state_is_told_and_an_older_one_is_used(model, data, tmp_path):
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


def test_a_run_without_any_state_left_begins_again_and_says_so(model, data, tmp_path):
    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", progress=stop_after(5))
    (tmp_path / "run" / "step_5.safetensors").unlink()
    result = run(model, data, tmp_path / "run", on_existing="resume")
    assert any("No checkpoint of this run is left" in note for note in result.notes)
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 10))


def test_a_state_that_a_crash_left_before_the_pointer_moved_does_not_stay(model, data, tmp_path):
    run(model, data, tmp_path / "run")
    orphan = (tmp_path / "run" / "step_9.safetensors").read_bytes()
    with pytest.raises(Stop):
        run(model, data, tmp_path / "other", progress=stop_after(4))
    (tmp_path / "other" / "step_9.safetensors").write_bytes(orphan)
    with pytest.raises(Stop):
        run(model, data, tmp_path / "other", progress=stop_after(6))
    assert [file.name for file in (tmp_path / "other").glob("step_*")] == ["step_6.safetensors"]
    assert json.loads((tmp_path / "other" / "last.json").read_text())["file"] == "step_6.safetensors"


def test_a_best_model_that_was_deleted_is_told(model, data, tmp_path):
    run(model, data, tmp_path / "run", validation=data)
    (tmp_path / "run" / "best.safetensors").unlink()
    result = run(model, data, tmp_path / "run", validation=data)
    assert any("was deleted" in note for note in result.notes) and result.best_step == 9


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


def test_a_validation_set_that_tells_nothing_is_not_used(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", validation=data.subset([0]))
    assert result.best_step == 9 and not result.validations
    assert any("cannot tell a better model from a worse one" in note for note in result.notes)


def test_a_name_with_signs_of_mathematics_is_no_trouble(model, data, tmp_path):
    assert run(model, data, tmp_path / r"price_$5_\vs_$6", epochs=1).total_steps == 3


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_data_set_smaller_than_the_batch_reduces_the_batch_and_says_so(model, data, tmp_path):
    result = run(model, data.subset(range(3)), tmp_path / "run")
    assert result.total_steps == 3 and any("reduced from 4 to 3" in note for note in result.notes)


def test_one_picture_is_refused(model, data, tmp_path):
    with pytest.raises(UserError, match="at least 2 are needed"):
        run(model, data.subset([0]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_pictures_are_left_out_and_named(model, tmp_path):
    folder = labels_folder(tmp_path / "colours")
    (folder / "003.png").unlink()
    result = run(model, load_dataset(folder), tmp_path / "run", batch_size=11)
    assert result.total_steps == 3 and any("1 of the 12" in note and "003.png" in note for note in result.notes)


def test_a_broken_picture_is_left_out_and_named(model, tmp_path):
    folder = labels_folder(tmp_path / "colours")
    (folder / "005.png").write_bytes((folder / "005.png").read_bytes()[:40])
    result = run(model, load_dataset(folder), tmp_path / "run")
    assert result.total_steps == 9 and any("005.png" in note for note in result.notes)


def test_a_loss_that_is_not_a_number_stops_at_the_first_step_and_promises_nothing(data, tmp_path):
    broken = random_clip().derive({"ln_final.bias": torch.full((64,), torch.nan)}, step="broken")
    with pytest.raises(UserError, match=r"step 1 because the loss became nan.*learning_rate") as told:
        run(broken, data, tmp_path / "other")
    assert "kept" not in str(told.value) and not list((tmp_path / "other").glob("*.safetensors"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["adabelief", "adamw", "adafactor"])
def test_a_loss_that_becomes_infinite_names_the_step_and_leaves_no_trace(
    model, data, tmp_path, monkeypatch, optimizer, precision
):
    """Steps 7 to 9 run before the host reads the flag of step 6; the state is that of step 5 to the last bit."""
    from clip_finetune.engine.train import losses
    from clip_finetune.engine.train.run import metrics

    monkeypatch.setattr(metrics, "SECONDS", 1e9)  # the flags are read every ten steps, however slow the machine is
    calls = []

    class Breaks(losses.InfoNCE):
        def forward(self, *arguments):
            calls.append(1)
            return super().forward(*arguments) * (math.inf if len(calls) == 6 else 1)

    monkeypatch.setitem(losses.LOSSES, "infonce", losses.LossInfo("infonce", lambda *settings: Breaks(), ""))
    with pytest.raises(UserError, match="stopped at step 6 because the loss became inf.*kept"):
        run(model, data, tmp_path / "run", optimizer=optimizer, precision=precision)
    assert len(calls) > 6
    assert json.loads((tmp_path / "run" / "last.json").read_text())["step"] == len(lines(tmp_path / "run")) == 5
    monkeypatch.undo()
    whole = run(model, data, tmp_path / "whole", optimizer=optimizer, precision=precision)
    resumed = run(model, data, tmp_path / "run", optimizer=optimizer, precision=precision)
    assert identical(resumed.full_clip, whole.full_clip)


def test_weights_that_are_not_finite_are_never_saved(model, data, tmp_path, monkeypatch):
    """Broken between two steps, by something that no gradient tells of."""
    from clip_finetune.engine.train import trainer

    made = []

    def kept(*arguments, **options):
        made.append(TrainingStep(*arguments, **options))
        return made[0]

    def breaks(progress):
        if progress.step == 4:
            made[0].weights.masters["positional_embedding"].data[0] = torch.inf
            raise Stop

    monkeypatch.setattr(trainer, "TrainingStep", kept)
    with pytest.raises(UserError, match="became infinite by step 4.*learning_rate"):
        run(model, data, tmp_path / "run", progress=breaks, save_every_steps=2)
    assert json.loads((tmp_path / "run" / "last.json").read_text())["step"] == 2


# ---- fp16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"micro_batch": 2, "gmp": True}, {"optimizer": "adamw"}, {"optimizer": "adafactor"}]
)
def test_fp16_trains_as_fp32_does(model, data, tmp_path, options):
    half = run(model, data, tmp_path / "fp16", precision="fp16", validation=data, **options)
    whole = run(model, data, tmp_path / "fp32", validation=data, **options)
    for kind in ("step", "validation"):
        ours, theirs = ([line["loss"] for line in lines(tmp_path / name, kind)] for name in ("fp16", "fp32"))
        assert ours == pytest.approx(theirs, rel=0.01)  # fp16 has 11 bits
    norms = [[line["grad_norm"] for line in result.steps] for result in (half, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)  # of the unscaled gradients


@pytest.mark.parametrize("optimizer", ["adabelief", "adamw", "adafactor"])
def test_a_stopped_fp16_run_ends_with_the_same_bits(model, data, tmp_path, monkeypatch, optimizer):
    """Its first scale is so high that steps are skipped before and after the run is stopped."""
    options = dict(precision="fp16", optimizer=optimizer, micro_batch=2)
    monkeypatch.setattr(step_module, "_FIRST_SCALE", 2.0**17)
    whole = run(model, data, tmp_path / "whole", **options)
    skipped = [line["step"] for line in lines(tmp_path / "whole") if line.get("skipped")]
    assert {1, 2, 3} <= set(skipped) and len(skipped) < 9
    for step in (2, 6):
        with pytest.raises(Stop):
            run(model, data, tmp_path / "stopped", progress=stop_after(step), **options)
        metadata = read_contents(tmp_path / "stopped" / f"step_{step}.safetensors").metadata
        scale = json.loads(metadata[STATE_KEY])["scaler"]["scale"]
        assert scale == 2.0 ** (17 - sum(number <= step for number in skipped))
    resumed = run(model, data, tmp_path / "stopped", **options)
    assert identical(resumed.full_clip, whole.full_clip)
    assert [line["step"] for line in lines(tmp_path / "stopped") if line.get("skipped")] == skipped


def test_a_step_that_fp16_skips_changes_nothing_and_is_no_reason_to_warn(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "_FIRST_SCALE", 2.0**40)
    result = run(model, data, tmp_path / "run", precision="fp16")
    assert [(line["skipped"], line["grad_norm"]) for line in result.steps] == [(True, None)] * 9
    assert identical(result.full_clip, model)
    assert not any(note.startswith("The gradient") for note in result.notes)
    assert any(note.startswith("9 of the 9 steps changed nothing") for note in result.notes)


def test_a_gradient_that_no_scale_makes_finite_stops_an_fp16_training(model, data, tmp_path, monkeypatch):
    """The scaler halves 1 fourteen times, to 0.00006, which is below the lowest scale."""
    monkeypatch.setattr(step_module, "_FIRST_SCALE", 1.0)
    unscale = torch.amp.GradScaler.unscale_

    def unscaled(scaler, optimizer):
        next(p for group in optimizer.param_groups for p in group["params"]).grad.fill_(torch.inf)
        unscale(scaler, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscaled)
    with pytest.raises(UserError, match="stopped at step 15 because the gradient became inf"):
        run(model, data, tmp_path / "run", precision="fp16", epochs=9)
    assert json.loads((tmp_path / "run" / "last.json").read_text())["step"] == 14


def test_fp16_is_refused_where_neither_cuda_nor_the_cpu_computes():
    with pytest.raises(UserError, match="works on CUDA and the CPU.*choose bf16"):
        resolve_precision("fp16", torch.device("meta"), 64)
