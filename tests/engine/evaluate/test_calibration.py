"""Calibration against scipy and the definition of Guo et al."""

import json
import math

import numpy
import pytest
import torch
from torch.nn import functional as F

from clip_finetune.engine.evaluate.calibration import HIGHEST, best_scale, calibrate_logit_scale, calibration_error


def answers(scale, seed=0, count=4000, classes=5):
    """(cosines, right answers drawn with the probabilities that this scale gives them)."""
    generator = torch.Generator().manual_seed(seed)
    cosines = 0.3 * torch.rand(count, classes, generator=generator, dtype=torch.float64)
    drawn = torch.multinomial((cosines * scale).softmax(1), 1, generator=generator)
    return cosines, F.one_hot(drawn[:, 0], classes).bool()


def test_the_best_scale_is_that_of_the_least_cross_entropy():
    from scipy.optimize import minimize_scalar

    cosines, right = answers(12.0)

    def loss(scale):
        logits = cosines.numpy() * scale
        return (numpy.log(numpy.exp(logits).sum(1)) - (logits * right.numpy()).sum(1)).mean()

    theirs = minimize_scalar(loss, bounds=(0.1, 100), method="bounded", options={"xatol": 1e-9}).x
    assert best_scale(cosines, right) == pytest.approx(theirs, rel=1e-6) and theirs == pytest.approx(12, rel=0.1)


def test_the_calibration_error_is_guos():
    cosines, right = answers(12.0)
    for scale in (3.0, 12.0, 60.0):
        shares = (cosines * scale).softmax(1).numpy()
        confidence, correct = shares.max(1), right.numpy()[numpy.arange(4000), shares.argmax(1)]
        expected = 0.0
        for number in range(15):
            inside = (confidence > number / 15) & (confidence <= (number + 1) / 15)
            if inside.any():
                expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
        assert calibration_error(cosines * scale, right) == pytest.approx(expected, abs=1e-9)
    assert calibration_error(cosines * 12, right) < 0.03 < calibration_error(cosines * 60, right)


def test_answers_that_are_all_right_have_no_best_scale():
    cosines = torch.eye(4, dtype=torch.float64)
    assert best_scale(cosines, torch.eye(4, dtype=torch.bool)) == HIGHEST


def test_a_model_is_calibrated_on_classes_and_on_pairs(planted, data):
    baseline, _, classes = planted
    found = calibrate_logit_scale(baseline, classes)
    assert found.images == 80 and found.answers == len(classes.class_names)
    assert found.stored == pytest.approx(baseline.state_dict["logit_scale"].exp().item())
    # With its best temperature stored, a model stays as it is.
    again = calibrate_logit_scale(
        baseline.derive({"logit_scale": torch.tensor(math.log(found.best))}, step="calibrated"), classes
    )
    assert again.stored == pytest.approx(again.best, rel=1e-4) and again.ece_stored == pytest.approx(found.ece_best)
    pairs = calibrate_logit_scale(baseline, data)
    assert pairs.images == pairs.answers == 20
    json.dumps(pairs.as_dict(), allow_nan=False)
