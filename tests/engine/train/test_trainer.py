"""What a training learns and gives."""

import json

import pytest
import torch
from clips import random_clip
from image_folders import class_folder
from train_runs import Stop, identical, lines, run, stop_after

from clip_finetune.engine import load_dataset, load_full_clip, to_gmp
from clip_finetune.engine.train import master_weights
from clip_finetune.engine.train.losses import LOSSES
from clip_finetune.engine.train.optim.gradient_norms import GradientMeter
from clip_finetune.engine.train.schedules import SCHEDULES
from clip_finetune.engine.train.step import MAX_LOGIT_SCALE


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


def test_the_learning_rates_in_the_metrics_are_those_of_torchs_one_cycle(model, data, tmp_path):
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


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_the_learning_rates_of_each_group_follow_the_schedule(model, data, tmp_path, schedule):
    steps = run(
        model, data, tmp_path / "run", schedule=schedule, warmup=0.3, min_lr_ratio=0.1, lr_multipliers="vision=0.5"
    ).steps
    for line in steps:
        expected = 1e-3 * SCHEDULES[schedule].multiple(line["step"] - 1, 9, 0.3, 0.1)
        rates = line["learning_rate"]
        assert rates["text.mlp"] == pytest.approx(expected) and rates["vision.mlp"] == pytest.approx(expected / 2)
    assert steps[0]["grad_norms"].keys() == {name for name in rates}


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_learns_and_resumes_with_the_same_bits(model, data, tmp_path, loss):
    whole = run(model, data, tmp_path / "whole", loss=loss, micro_batch=2)
    with pytest.raises(Stop):
        run(model, data, tmp_path / "stopped", loss=loss, micro_batch=2, progress=stop_after(5))
    assert identical(run(model, data, tmp_path / "stopped", loss=loss, micro_batch=2).full_clip, whole.full_clip)
    losses = [line["loss"] for line in whole.steps]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_the_same_settings_give_the_same_weights(model, data, tmp_path):
    one, other = (run(model, data, tmp_path / name, gmp=True) for name in ("one", "other"))
    assert identical(one.full_clip, other.full_clip)
    assert not identical(one.full_clip, run(model, data, tmp_path / "third", gmp=True, seed=1).full_clip)


def test_activation_checkpointing_changes_no_number(model, data, tmp_path):
    plain = run(model, data, tmp_path / "plain")
    saving = run(model, data, tmp_path / "saving", activation_checkpointing=True)
    assert [line["loss"] for line in plain.steps] == [line["loss"] for line in saving.steps]


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


def test_logit_scale_never_rises_above_one_hundred(data, tmp_path):
    model = random_clip().derive({"logit_scale": torch.tensor(4.60)}, step="made hot")
    result = run(model, data, tmp_path / "run", epochs=20, learning_rate=1e-2)
    highest = max(line["logit_scale"] for line in result.steps)
    assert highest <= 100.001 and result.full_clip.state_dict["logit_scale"] <= MAX_LOGIT_SCALE + 1e-6


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


def test_a_run_with_scaled_neurons_saves_what_it_validated(model, data, tmp_path):
    from clip_finetune.engine import eval_retrieval

    options = dict(validation=data, epochs=4)
    result = run(model, data, tmp_path / "run", scale_neurons="1:7=50, 0:3=50", **options)
    best = next(line for line in result.validations if line["step"] == result.best_step)
    assert eval_retrieval(load_full_clip(tmp_path / "run" / "best.safetensors"), data).loss == best["loss"]
    plain = run(model, data, tmp_path / "plain", **options)
    assert result.validations[0] == plain.validations[0] and result.validations[-1] != plain.validations[-1]


def test_the_profile_shows_where_the_time_goes(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", profile=True, micro_batch=2)
    table = next(note for note in result.notes if "part of a step" in note)
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[3:]}
    assert list(rows) == ["data", "forward", "loss", "backward", "optimizer", "logging", "all"]
    assert all(float(rows[part][0]) > 0 for part in ("forward", "backward", "optimizer", "all"))
    assert sum(float(ms) for ms, _ in rows.values()) == pytest.approx(2 * float(rows["all"][0]), rel=0.02, abs=0.1)
    assert identical(run(model, data, tmp_path / "plain", micro_batch=2).full_clip, result.full_clip)


def test_the_trained_groups_are_noted_and_in_config_json(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", towers="text")
    table = next(note for note in result.notes if note.startswith("What trains, and how fast:"))
    rows = json.loads((tmp_path / "run" / "config.json").read_text())["groups"]
    assert all(row["group"] in table for row in rows) and not any("vision" in row["group"] for row in rows)
    expected = sum(t.numel() for n, t in model.state_dict.items() if not n.startswith("visual."))
    assert sum(int(row["parameters"].replace(",", "")) for row in rows) == expected
