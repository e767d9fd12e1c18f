"""Losses and gradients that are not finite, and fp16, where some of them are expected."""

import json
import math

import pytest
import torch
from clips import random_clip
from train_runs import Stop, identical, lines, run, stop_after

from clip_finetune.engine import UserError
from clip_finetune.engine.clip.tensor_files import read_contents
from clip_finetune.engine.train import step as step_module
from clip_finetune.engine.train.device import resolve_precision
from clip_finetune.engine.train.run.folder import STATE_KEY
from clip_finetune.engine.train.step import TrainingStep


def test_a_nan_loss_stops_at_the_first_step_and_promises_nothing(data, tmp_path):
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
