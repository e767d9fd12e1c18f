"""Blends between a baseline and its fine-tune: ends, rule, and a planted optimum."""

import json

import pytest
import torch

from clip_finetune.engine import (
    UserError,
    blend,
    to_gmp,
)
from clip_finetune.engine.clip.gmp import fold_gmp
from clip_finetune.engine.evaluate import sweep
from clip_finetune.engine.evaluate.sweep import Point, blend_sweep, choose
from clip_finetune.engine.evaluate.zero_shot import eval_zero_shot


def test_a_blend_at_its_ends_is_the_input_bit_by_bit(model, moved):
    for one in (moved, to_gmp(moved)):
        plain = fold_gmp(one)
        assert all(
            torch.equal(blend(one, model, 1).state_dict[name], tensor) for name, tensor in plain.state_dict.items()
        )
        assert all(
            torch.equal(blend(one, model, 0).state_dict[name], tensor) for name, tensor in model.state_dict.items()
        )


def numbers(*rows):
    return [Point(alpha, *scores) for alpha, *scores in rows]


def test_the_rule_on_hand_made_numbers():
    assert choose(numbers((0, 0.5), (0.5, 0.7), (1, 0.6))) == 0.5
    assert choose(numbers((0, 0.5), (0.25, 0.7), (0.5, 0.7), (1, 0.6))) == 0.25, "a tie goes to the smaller alpha"
    # 0.5 is better, but loses more than a point in general; 0.25 loses a point exactly.
    assert choose(numbers((0, 0.5, 0.80), (0.25, 0.6, 0.79), (0.5, 0.7, 0.7899), (1, 0.9, 0.5))) == 0.25
    assert choose(numbers((0, 0.5, 0.80), (0.5, 0.45, 0.85), (1, 0.9, 0.5))) == 0, "the baseline is always allowed"
    assert choose(numbers((0, 0.5, 0.30), (0.5, 0.6, 0.85), (1, 0.9, 0.95))) == 1


def test_the_sweep_finds_a_planted_optimum(planted, data):
    baseline, end, classes = planted
    found = blend_sweep(end, baseline, classes, steps=11, templates="simple")
    scores = {point.alpha: point.score for point in found.points}
    assert list(scores) == [step / 10 for step in range(11)]
    assert scores[0.5] == 1.0 and scores[0] < 1 and scores[1] < 1
    assert found.alpha == min(alpha for alpha, score in scores.items() if score == 1.0) and 0 < found.alpha <= 0.5
    assert scores[1] == eval_zero_shot(end, classes, templates="simple").top1
    expected = blend(end, baseline, found.alpha)
    assert all(torch.equal(found.best.state_dict[name], tensor) for name, tensor in expected.state_dict.items())
    both = blend_sweep(end, baseline, data, classes, steps=3, templates="simple")
    assert both.measure == sweep.RETRIEVAL and both.general_measure == sweep.ZERO_SHOT
    assert [point.general for point in both.points] == [scores[0], scores[0.5], scores[1]]
    for one in (found, both):
        assert one.chart().mode == "RGB" and one.table().count("best") == 1 + one.table().lower().count("the best")
        json.dumps(one.as_dict(), allow_nan=False)


def test_a_sweep_of_a_model_with_itself_stays_at_the_baseline(model, data):
    found = blend_sweep(model, model, data, data, steps=2)
    assert found.alpha == 0 and "Best at alpha 0, the baseline" in found.sentence
    assert found.chart().mode == "RGB"
    with pytest.raises(UserError, match="give at least 2"):
        blend_sweep(model, model, data, steps=1)
