"""A model beside its baseline: the whole comparison and its verdict."""

import dataclasses
import json
import math
import shutil

import numpy
import pytest
import torch
from clips import disturbed, random_clip
from image_folders import class_folder, labels_folder

from clip_finetune.engine import (
    UserError,
    load_dataset,
    to_gmp,
)
from clip_finetune.engine.evaluate import comparison, geometry, gmp_form
from clip_finetune.engine.evaluate import encoder as encoder_module
from clip_finetune.engine.evaluate.calibration import calibrate_logit_scale
from clip_finetune.engine.evaluate.comparison import DOUBTFUL, RUINED, SOUND, compare_full_clips, judge
from clip_finetune.engine.evaluate.drift import (
    conditioning_drift,
    weight_drift,
)
from clip_finetune.engine.evaluate.encoder import BrokenModel, Encoder
from clip_finetune.engine.evaluate.sweep import blend_sweep


def test_a_model_beside_itself_has_not_moved(model, data):
    for other in (model, to_gmp(model)):
        found = compare_full_clips(other, other, data)
        assert found.weights.vision == found.weights.text == 0
        assert all(layer.drift == 0 for layer in found.weights.layers)
        for positions in found.conditioning.states.values():
            for moved in positions.values():
                assert moved.relative_l2 == 0 and moved.cosine == pytest.approx(1, abs=1e-12)
        assert found.model == found.baseline and found.calibration_model == found.calibration_baseline
        assert found.health == SOUND and found.verdict == ("The two models are the same.",)


def test_neither_batches_nor_order_nor_copies_change_a_comparison(model, moved, tmp_path, monkeypatch):
    first = compare_full_clips(moved, model, load_dataset(labels_folder(tmp_path / "a", 20)))
    monkeypatch.setattr(encoder_module, "BATCH", 7)
    shutil.copy(tmp_path / "a/000.png", tmp_path / "a/copy.png")
    labels = json.loads((tmp_path / "a/labels.json").read_text())
    labels = dict(reversed((labels | {"copy.png": labels["000.png"]}).items()))
    (tmp_path / "a/labels.json").write_text(json.dumps(labels))
    again = compare_full_clips(moved, model, load_dataset(tmp_path / "a"))
    for one, other in ((first.model, again.model), (first.baseline, again.baseline)):
        assert one.images == other.images == 20 and one.texts == other.texts == 40
        for name, value in one.as_dict().items():
            if isinstance(value, float):
                assert getattr(other, name) == pytest.approx(value, abs=2e-5 if "rank" in name else 2e-6), name
    assert again.conditioning.worst == pytest.approx(first.conditioning.worst, abs=1e-6)
    assert again.calibration_model.ece_stored == pytest.approx(first.calibration_model.ece_stored, abs=1e-5)


def test_each_model_encodes_each_image_once(model, moved, data, monkeypatch):
    seen = []
    encode = Encoder.encode_batches

    def counted(self, batches, total):
        found = encode(self, batches, total)
        seen.append(len(found[0]))
        return found

    monkeypatch.setattr(Encoder, "encode_batches", counted)
    compare_full_clips(moved, model, data)
    assert seen == [20, 20]


def test_both_models_are_drawn_on_the_baselines_axes(model, moved, data):
    found = compare_full_clips(moved, model, data)
    embedded = geometry.embed(Encoder.of(model), data)
    axes = geometry.axes_of(embedded)
    other = geometry.embed(Encoder.of(moved), data)
    assert torch.allclose(found.axes.directions, axes.directions)
    numpy.testing.assert_allclose(found.baseline.points_images, axes.project(embedded.images.features), atol=1e-6)
    numpy.testing.assert_allclose(found.model.points_texts, axes.project(other.texts), atol=1e-6)


@pytest.mark.parametrize("kind", ["captions", "classes"])
def test_a_comparison_is_shown_as_table_chart_and_json(model, moved, data, tmp_path, kind):
    chosen = data if kind == "captions" else load_dataset(class_folder(tmp_path / "classes"))
    found = compare_full_clips(moved, model, chosen, prompts=["a cat"])
    chart = found.chart()
    assert chart.mode == "RGB" and chart.width > 900
    assert all(word in found.table() for word in ("effective rank", "SDXL, SD3", "text, block 2", found.verdict[0]))
    said = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert said["conditioning"]["prompts"] == 1 and said["calibration"]["model"]["answers"] == (
        20 if kind == "captions" else 4
    )
    assert any("below 100, chance decides much" in note for note in found.notes)


def test_weights_in_bf16_and_fp16_are_compared(model, data):
    wide = compare_full_clips(disturbed(model, 0.1), model, data)
    for dtype in (torch.bfloat16, torch.float16):
        one = model.derive({name: tensor.to(dtype) for name, tensor in model.state_dict.items()}, step="half")
        found = compare_full_clips(disturbed(one, 0.1), one, data)
        assert found.model.effective_rank_texts == pytest.approx(wide.model.effective_rank_texts, rel=0.02)
        assert found.conditioning.worst == pytest.approx(wide.conditioning.worst, rel=0.05)
        assert found.health == wide.health


def test_a_model_of_nan_is_refused_by_every_comparison(model, data):
    broken = model.derive({"transformer.resblocks.0.mlp.c_fc.weight": torch.full((256, 64), math.nan)}, step="broken")
    for measure in (
        lambda: compare_full_clips(broken, model, data),
        lambda: compare_full_clips(model, broken, data),
        lambda: weight_drift(broken, model),
        lambda: conditioning_drift(broken, model),
        lambda: gmp_form.gmp_form(broken),
        lambda: geometry.eval_geometry(broken, data),
        lambda: calibrate_logit_scale(broken, data),
    ):
        with pytest.raises(BrokenModel, match="not numbers"):
            measure()
    # `blend` refuses it before anything is measured.
    with pytest.raises(UserError, match="mlp.c_fc.weight holds values that are not numbers"):
        blend_sweep(broken, model, data, steps=2)


def test_models_of_two_architectures_are_refused_in_one_sentence(model, data):
    other = random_clip(vision_layers=3, embed_dim=16)
    for measure in (
        lambda: compare_full_clips(model, other, data),
        lambda: weight_drift(model, other),
        lambda: conditioning_drift(model, other),
        lambda: blend_sweep(model, other, data),
        lambda: gmp_form.gmp_form(model, other),
    ):
        with pytest.raises(UserError, match="vision_layers 2 and 3.*choose as baseline the model that the training"):
            measure()


def test_too_little_data_is_refused(model, tmp_path):
    single = load_dataset(labels_folder(tmp_path / "a", 1))
    with pytest.raises(UserError, match="1 distinct images and 2 distinct texts"):
        compare_full_clips(model, model, single)
    with pytest.raises(UserError, match="set validation_split above 0"):
        compare_full_clips(model, model, single.subset([]))
    with pytest.raises(UserError, match="set validation_split above 0"):
        blend_sweep(model, model, single.subset([]))


def test_cancelling_works_and_progress_ends_at_its_total(model, moved, data):
    class Cancelled(BaseException):
        pass

    def cancel():
        raise Cancelled

    for measure in (
        lambda **host: compare_full_clips(moved, model, data, **host),
        lambda **host: blend_sweep(moved, model, data, steps=3, **host),
        lambda **host: gmp_form.gmp_form(moved, model, **host),
        lambda **host: conditioning_drift(moved, model, **host),
        lambda **host: weight_drift(moved, model, **host),
    ):
        with pytest.raises(Cancelled):
            measure(check_cancelled=cancel)
        counted = []
        measure(on_progress=lambda done, total, counted=counted: counted.append((done, total)))
        assert counted[-1][0] == counted[-1][1] and counted == sorted(counted)


def judged(model, data, states=0.1, vision=0.01, **changes):
    """The verdict on hand-made numbers."""
    found = compare_full_clips(model, model, data, prompts=["a cat"])
    before = dataclasses.replace(
        found.baseline, separation=2.0, effective_rank_images=100.0, effective_rank_texts=100.0
    )
    moved = {
        state: {name: one._replace(relative_l2=states) for name, one in positions.items()}
        for state, positions in found.conditioning.states.items()
    }
    return judge(
        before,
        dataclasses.replace(before, **changes),
        dataclasses.replace(found.weights, vision=vision),
        dataclasses.replace(found.conditioning, states=moved),
    )


@pytest.mark.parametrize(
    "changes, health, words",
    [
        (dict(), SOUND, "stand out from other pairs as before"),
        (dict(separation=2.5), SOUND, "stand out more"),
        (dict(separation=1.5), DOUBTFUL, "stand out less"),
        (dict(separation=0.5), RUINED, "hardly stand out"),
        (dict(effective_rank_texts=40.0), RUINED, "texts have collapsed: they use 40%"),
        (dict(states=0.0), SOUND, "will not change"),
        (dict(states=0.01), SOUND, "hardly change"),
        (dict(states=0.6), DOUBTFUL, "which is far"),
        (dict(vision=0.3), DOUBTFUL, "vision tower's weights changed by 30%"),
    ],
)
def test_the_verdict_says_what_the_numbers_say(model, data, changes, health, words):
    found, sentences = judged(model, data, **changes)
    assert found == health and words in " ".join(sentences)


def test_a_baseline_that_tells_nothing_apart_gives_no_verdict_on_embeddings(model, data):
    found = compare_full_clips(disturbed(model, 0.01), model, data)
    assert found.baseline.separation < 0.5 and "The baseline itself hardly tells" in found.verdict[1]


def test_notes_on_the_baselines_calibration_are_kept(model, moved, data, monkeypatch):
    told = iter([("Of one only.", "Of both."), ("Of both.",)])
    calibrate = comparison.calibration_of
    monkeypatch.setattr(
        comparison, "calibration_of", lambda *given: dataclasses.replace(calibrate(*given), notes=next(told))
    )
    notes = compare_full_clips(moved, model, data).notes
    assert "Baseline: Of one only." in notes and notes.count("Of both.") == 1
