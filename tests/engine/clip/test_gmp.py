"""GmP: conversion, fold, and training through plain autograd."""

import pytest
import torch
from clips import TINY, random_clip

from clip_finetune.engine import UserError, blend, build_network, fold_gmp, load_full_clip, save_full_clip, to_gmp
from clip_finetune.engine.clip.gmp import GmPLinear, gmp_to_weight, weight_to_gmp
from clip_finetune.engine.clip.tensor_files import same_bits


def test_weights_to_gmp_and_back_are_the_same_bits_in_fp16():
    model = random_clip(dtype=torch.float16)
    folded = fold_gmp(to_gmp(model))
    assert all(same_bits(folded.state_dict[name], tensor) for name, tensor in model.state_dict.items())


def test_the_same_bits_come_back_for_every_fp16_number_there_is():
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    weight = every[torch.isfinite(every)][torch.randperm(63488, generator=torch.Generator().manual_seed(0))]
    weight = weight.reshape(-1, 64)
    r, theta = weight_to_gmp(weight)
    back = gmp_to_weight(r, theta, torch.float16)
    # -0 has no direction of its own; it comes back as a zero.
    assert torch.equal(back, weight)


def test_in_fp32_every_element_comes_back_within_2e_7_of_itself():
    model = random_clip()
    folded = fold_gmp(to_gmp(model))
    for name, weight in model.state_dict.items():
        error = (folded.state_dict[name].double() - weight.double()).abs()
        assert bool((error <= 2e-7 * weight.double().abs()).all()), name


def test_a_zero_row_gives_r_0_and_a_unit_theta_and_folds_to_zero():
    weight = torch.randn(4, 8)
    weight[2] = 0
    r, theta = weight_to_gmp(weight)
    assert r[2] == 0 and torch.isfinite(theta).all()
    torch.testing.assert_close(theta.norm(dim=1), torch.ones(4))
    assert torch.equal(gmp_to_weight(r, theta)[2], torch.zeros(8))


def test_r_keeps_its_sign():
    theta = torch.randn(3, 5)
    r = torch.tensor([[2.0], [-2.0], [0.0]])
    weight = gmp_to_weight(r, theta)
    torch.testing.assert_close(weight[1], -2 * theta[1] / theta[1].norm())


def test_names_are_those_of_published_gmp_files():
    names = set(to_gmp(random_clip()).state_dict)
    assert "visual.transformer.resblocks.0.mlp.c_fc.r" in names
    assert "transformer.resblocks.1.mlp.c_proj.theta" in names
    assert "transformer.resblocks.1.mlp.c_proj.bias" in names
    assert not any(name.endswith(("c_fc.weight", "c_proj.weight")) for name in names)
    layers = 2 * (TINY.vision_layers + TINY.text_layers)
    assert len(names) == len(random_clip().state_dict) + layers


def test_a_gmp_network_computes_what_the_plain_one_does():
    model = random_clip()
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(0, 49406, (2, 77))
    plain, gmp = build_network(model), build_network(to_gmp(model))
    torch.testing.assert_close(gmp.encode_image(images), plain.encode_image(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gmp.encode_text(tokens), plain.encode_text(tokens), rtol=1e-5, atol=1e-5)


def test_gradients_of_r_and_theta_are_those_of_the_formula():
    """dr = <dW, u>, dtheta = r / |theta| (dW - u <dW, u>), in float64."""
    torch.manual_seed(0)
    layer = GmPLinear(6, 4, dtype=torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    inputs, upstream = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    layer(inputs).backward(upstream)
    d_weight = upstream.T @ inputs
    length = layer.theta.detach().norm(dim=1, keepdim=True)
    u = layer.theta.detach() / length
    along = (d_weight * u).sum(1, keepdim=True)
    torch.testing.assert_close(layer.r.grad, along, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer.theta.grad, layer.r.detach() / length * (d_weight - u * along), rtol=1e-12, atol=1e-12
    )


def test_a_gmp_file_opens_as_what_it_is(tmp_path):
    model = to_gmp(random_clip())
    opened = load_full_clip(save_full_clip(model, tmp_path / "gmp.safetensors"))
    assert opened.parameterization == "gmp" and opened.fingerprint == model.fingerprint


def test_folding_a_plain_model_returns_it_and_says_so():
    model = random_clip()
    folded = fold_gmp(model)
    assert all(folded.state_dict[name] is tensor for name, tensor in model.state_dict.items())
    assert "nothing to fold" in folded.notes[-1]


def test_a_blend_at_0_and_1_returns_the_inputs_bits_and_between_is_lerp():
    one, other = random_clip(seed=1), random_clip(seed=2)
    for alpha, model in ((1, one), (0, other)):
        blended = blend(one, other, alpha)
        assert all(same_bits(blended.state_dict[name], tensor) for name, tensor in model.state_dict.items())
    half = blend(to_gmp(one), other, 0.25)
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    expected = torch.lerp(other.state_dict[name], one.state_dict[name], 0.25)
    torch.testing.assert_close(half.state_dict[name], expected, rtol=1e-5, atol=1e-8)


def test_models_of_two_kinds_are_not_blended():
    with pytest.raises(UserError, match="text_layers 2 and 3"):
        blend(random_clip(), random_clip(text_layers=3), 0.5)
