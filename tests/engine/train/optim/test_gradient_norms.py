"""Gradient norms, clipping and warnings, compared with torch's own functions."""

import pytest
import torch
from clips import TINY, random_clip

from clip_finetune.engine import build_network
from clip_finetune.engine.train.optim.factory import OptimizerConfig
from clip_finetune.engine.train.optim.gradient_norms import GradientMeter
from clip_finetune.engine.train.optim.parameter_groups import parameter_groups


def metered():
    network = build_network(random_clip())
    rng = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    return network, GradientMeter(parameter_groups(network.named_parameters(), TINY, OptimizerConfig()), TINY)


def by_layer(meter):
    return meter.measure().by_layer.tolist()


def total_norm(parameters):
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])


def test_norms_equal_torchs_by_group_and_layer():
    network, meter = metered()
    norms = meter.measure()
    torch.testing.assert_close(norms.total, total_norm(network.parameters()), rtol=1e-5, atol=0)
    by_group = dict(zip(meter.groups, norms.by_group, strict=True))
    blocks = [network.transformer.resblocks, network.visual.transformer.resblocks]
    attention = [p for p in (*blocks[0].parameters(),) if p.ndim == 2 and p.shape[1] == 64 and p.shape[0] < 256]
    torch.testing.assert_close(by_group["text.attention"], total_norm(attention), rtol=1e-5, atol=0)
    layer_norms = dict(zip(meter.layers, norms.by_layer, strict=True))
    torch.testing.assert_close(layer_norms[("vision", 1)], total_norm(blocks[1][0].parameters()), rtol=1e-5, atol=0)
    torch.testing.assert_close(norms.by_layer.norm(), norms.total, rtol=1e-5, atol=0)


def test_only_the_parameters_that_have_a_gradient_count():
    network, meter = metered()
    meter.measure()
    for parameter in network.visual.parameters():
        parameter.grad = None
    norms = meter.measure()
    with_gradient = [parameter for parameter in network.parameters() if parameter.grad is not None]
    torch.testing.assert_close(norms.total, total_norm(with_gradient), rtol=1e-5, atol=0)
    zero = [layer for layer, norm in zip(meter.layers, norms.by_layer, strict=True) if norm == 0]
    assert zero == [layer for layer in meter.layers if layer[0] == "vision"]


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_equals_torchs(limit):
    (one, meter), (other, _) = metered(), metered()
    meter.clip(meter.measure(), limit)
    torch.nn.utils.clip_grad_norm_(other.parameters(), limit)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=0)


def test_a_layer_whose_gradient_explodes_or_vanishes_is_named_once():
    network, meter = metered()
    assert meter.warnings(by_layer(meter)) == []
    for parameter in network.visual.transformer.resblocks[1].parameters():
        parameter.grad *= 1e4
    for parameter in network.transformer.resblocks[0].parameters():
        parameter.grad *= 1e-9
    vanishes, explodes = meter.warnings(by_layer(meter))
    assert "explodes in block 1 of the vision tower" in explodes and "learning_rate" in explodes
    assert "vanishes in block 0 of the text tower" in vanishes and "precision" in vanishes
    assert meter.warnings(by_layer(meter)) == []


def test_the_layer_of_a_gradient_that_is_not_finite_is_named():
    network, meter = metered()
    network.transformer.resblocks[1].mlp.c_fc.bias.grad[3] = torch.inf
    assert meter.nonfinite_layers(by_layer(meter)) == "first in block 1 of the text tower"
