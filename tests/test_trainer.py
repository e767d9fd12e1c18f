"""Runs: what they learn, what they keep, and what comes of stopping them."""

import functools
import json
import math

import pytest
import torch
from clips import random_clip
from pictures import class_folder, labels_folder

from clip_finetune.engine import TrainConfig, UserError, load_dataset, load_full_clip, to_gmp, train
from clip_finetune.engine.clip.files import same_bits
from clip_finetune.engine.train.compute import choose_micro_batch
from clip_finetune.engine.train.trainer import MAX_LOGIT_SCALE

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
    config = TrainConfig(**(QUICK | changes))
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
        "best.safetensors", "chart.png", "config.json", "last.json", "metrics.jsonl", "step_9.safetensors",
    ]  # fmt: skip
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


@pytest.mark.parametrize("optimizer, gmp", [("adabelief", True), ("adamw", False)])
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
    (tmp_path / "run" / ".step_8.safetensors.abc.part").write_bytes(b"half")
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
            model, data, None, TrainConfig(**QUICK), run_folder=tmp_path / "run", device="cpu", on_note=told.append,
            on_progress=stop_after(2),
        )  # fmt: skip
    assert told[-1] == "Stopped; the state of step 2 is saved, and the same run goes on from it."


@pytest.mark.parametrize("gmp", [False, True])
def test_the_gradients_of_a_run_do_not_depend_on_its_micro_batch(model, data, tmp_path, monkeypatch, gmp):
    """In float64, on the path of a training: from the pictures' files to the gradients that the optimizer gets."""
    from clip_finetune.engine.train import trainer

    monkeypatch.setattr(trainer, "build_network", functools.partial(trainer.build_network, dtype=torch.float64))
    measure = trainer.GradientMeter.measure
    seen = {}

    def gradients(micro_batch):
        def kept(meter):
            seen.setdefault(micro_batch, [parameter.grad.clone() for parameter, _ in meter.members])
            return measure(meter)

        monkeypatch.setattr(trainer.GradientMeter, "measure", kept)
        run(model, data, tmp_path / f"run_{micro_batch}", batch_size=12, micro_batch=micro_batch, epochs=1, gmp=gmp)
        return seen[micro_batch]

    for one, other in zip(gradients(1), gradients(12), strict=True):
        assert one.dtype == torch.float64
        assert (one - other).norm() <= 1e-10 * other.norm()


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_a_frozen_tower_and_unused_token_rows_keep_their_bits(data, tmp_path):
    model = random_clip(dtype=torch.float16)
    result = run(model, data, tmp_path / "run", towers="text", weight_decay=0.5)
    from clip_finetune.engine.data.tokens import Tokenizer

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


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_good_state(data, tmp_path):
    model = random_clip()

    def poison(progress):
        if progress.step == 4:
            raise Stop

    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", progress=poison)
    state = tmp_path / "run" / "step_4.safetensors"
    before = state.read_bytes()
    broken = model.derive({"ln_final.bias": torch.full((64,), torch.nan)}, step="broken")
    with pytest.raises(UserError, match=r"step 1 because the loss became nan.*learning_rate"):
        run(broken, data, tmp_path / "other")
    assert not (tmp_path / "other" / "last.json").exists() and state.read_bytes() == before


def test_a_loss_that_becomes_infinite_names_the_step(model, data, tmp_path, monkeypatch):
    from clip_finetune.engine.train import losses

    calls = []

    class Breaks(losses.InfoNCE):
        def forward(self, *arguments):
            calls.append(1)
            return super().forward(*arguments) * (math.inf if len(calls) == 6 else 1)

    monkeypatch.setitem(losses.LOSSES, "infonce", losses.LossChoice(lambda *settings: Breaks(), ""))
    with pytest.raises(UserError, match="stopped at step 6 because the loss became inf"):
        run(model, data, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "last.json").read_text())["step"] == 5
    monkeypatch.undo()
    whole = run(model, data, tmp_path / "whole")
    assert identical(run(model, data, tmp_path / "run").full_clip, whole.full_clip)


def test_fp16_without_a_graphics_card_is_refused(model, data, tmp_path):
    with pytest.raises(UserError, match="needs a CUDA graphics card"):
        run(model, data, tmp_path / "run", precision="fp16")


def test_the_micro_batch_shrinks_with_the_model():
    from clips import TINY, VIT_L_14

    cpu = torch.device("cpu")
    assert choose_micro_batch(TINY, 64, "fp32", cpu, False) == 64
    # 566 MB a pair in fp32, of a budget of 4 GB.
    assert choose_micro_batch(VIT_L_14, 64, "fp32", cpu, False) == 7
