"""The setting scale_neurons, compared with the same scaling written into the weights."""

import pytest
import torch
from clips import TINY, random_clip

from clip_finetune.engine import UserError, build_network
from clip_finetune.engine.train.neuron_scaling import parse_neurons, scale_neurons


def test_named_units_are_scaled_in_training_and_only_there():
    """Scaling c_fc's weight row and bias scales the unit's output before the activation."""
    network = build_network(random_clip())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = network.eval().encode_image(images)
        network.train()
        scale_neurons(network, parse_neurons("1:7=100, 0:3=-2.5, 1:200=3", TINY))
        scaled, validated = network.encode_image(images), network.eval().encode_image(images)
        by_weights = build_network(random_clip())
        for block, unit, factor in ((1, 7, 100), (0, 3, -2.5), (1, 200, 3)):
            layer = by_weights.visual.transformer.resblocks[block].mlp.c_fc
            layer.weight[unit] *= factor
            layer.bias[unit] *= factor
        torch.testing.assert_close(scaled, by_weights.encode_image(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(validated, plain) and not torch.allclose(scaled, plain, atol=1e-3)


@pytest.mark.parametrize("number, factor", [("2", 2.0), ("-2.5", -2.5), ("+.5", 0.5), ("3.", 3.0), ("1e-3", 0.001)])
def test_factors_are_written_as_usual(number, factor):
    assert parse_neurons(f" 1 : 7 = {number} ,", TINY) == {1: {7: factor}}


@pytest.mark.parametrize(
    "text, words",
    [
        ("2:0=1", "blocks 0 to 1"),
        ("0:256=1", "units 0 to 255"),
        *((t, "entry") for t in ("0=1", "0:1=", "0:1=1e", "0:1=x")),
    ],
)
def test_an_entry_that_the_tower_does_not_have_is_refused(text, words):
    with pytest.raises(UserError, match=words):
        parse_neurons(text, TINY)
