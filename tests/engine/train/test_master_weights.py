"""Master weights and the network that computes with them, compared with autograd through `GmPLinear` in float64."""

import pytest
import torch
from clips import TINY, random_clip
from torch.nn import functional as F

from clip_finetune.engine import build_network, fold_gmp, to_gmp
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.data.tokenizer import Tokenizer
from clip_finetune.engine.train import master_weights
from clip_finetune.engine.train.master_weights import MasterWeights

CPU = torch.device("cpu")
CAPTIONS = ["a red square", "a blue circle on the table", "nothing", "two dogs", "a very long street"]


def trained(model, dtype=torch.float32, trains=lambda name: True):
    return MasterWeights(model, trains, device=CPU, dtype=dtype)


def backward(network, micro_batches=1, dtype=torch.float64):
    """Backpropagate a function of the features that is a sum over pairs, in this many micro-batches."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, 32, 32, generator=rng).to(dtype)
    goals = torch.randn(5, 32, generator=rng, dtype=torch.float64)
    tokens = Tokenizer(TINY.context_length)(CAPTIONS)
    for rows in torch.arange(5).tensor_split(micro_batches):
        features = network.encode_image(images[rows]), network.encode_text(tokens[rows])
        units = [F.normalize(each.double(), dim=1) for each in features]
        (sum((unit * goals[rows]).sum() for unit in units) * network.logit_scale.exp()).backward()


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_of_r_and_theta_equal_autograds(monkeypatch, micro_batches):
    """In float64, with thetas that are not unit vectors, negative r, and rows in several blocks."""
    monkeypatch.setattr(master_weights, "MASTER_DTYPE", torch.float64)
    monkeypatch.setattr(master_weights, "_BLOCK", 1000)
    model = to_gmp(random_clip(dtype=torch.float64))
    layer = "transformer.resblocks.1.mlp.c_fc"
    stretched = model.state_dict[f"{layer}.theta"] * torch.linspace(0.5, 2, 256, dtype=torch.float64)[:, None]
    turned = -model.state_dict[f"{layer}.r"]
    model = model.derive({f"{layer}.theta": stretched, f"{layer}.r": turned}, step="test")
    reference = build_network(model, dtype=torch.float64)
    backward(reference)
    weights = trained(model)
    backward(weights.network, micro_batches)
    weights.finish_gradients()
    expected = dict(reference.named_parameters())
    assert weights.masters.keys() == expected.keys()
    for name, master in weights.masters.items():
        assert expected[name].grad.any(), name
        torch.testing.assert_close(master.grad, expected[name].grad, rtol=1e-10, atol=1e-13)


def test_the_network_holds_the_folded_weights_before_and_after_a_step(monkeypatch):
    monkeypatch.setattr(master_weights, "MASTER_DTYPE", torch.float64)
    model = to_gmp(random_clip(dtype=torch.float64))
    weights = trained(model)

    def folded():
        return fold_gmp(model.derive({name: m.detach().clone() for name, m in weights.masters.items()}, step="test"))

    for _ in range(2):
        state = weights.network.state_dict()
        for name, tensor in folded().state_dict.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            for master in weights.masters.values():
                master += 0.01 * torch.randn_like(master)
        weights.refresh()


def test_in_fp32_a_plain_model_has_no_second_copy_and_a_gmp_model_only_that_of_its_mlps():
    plain = trained(random_clip())
    own = {parameter.data_ptr() for parameter in plain.network.parameters()}
    assert own == {master.data_ptr() for master in plain.masters.values()}
    model = to_gmp(random_clip())
    gmp = trained(model)
    masters = {master.data_ptr() for master in gmp.masters.values()}
    copied = [name for name, p in gmp.network.named_parameters() if p.data_ptr() not in masters]
    assert copied and all(".mlp.c_" in name and name.endswith(".weight") for name in copied)


@pytest.mark.parametrize("gmp", [False, True])
def test_in_bf16_gradients_are_summed_in_fp32(gmp):
    """Over 300 micro-batches: sums in bf16 would lose most of them."""
    model = to_gmp(random_clip()) if gmp else random_clip()
    weights = trained(model, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for name, p in weights.network.named_parameters() if name != "logit_scale")
    assert weights.network.logit_scale is weights.masters["logit_scale"]
    assert all(master.dtype == torch.float32 for master in weights.masters.values())
    backward(weights.network, dtype=torch.bfloat16)
    single = {name: master.grad.clone() for name, master in weights.masters.items() if master.grad is not None}
    assert not any(p.grad is not None for p in weights.network.parameters() if p is not weights.network.logit_scale)
    for _ in range(299):
        backward(weights.network, dtype=torch.bfloat16)
    assert single.keys() == {name for name in weights.masters if not name.endswith(".r")}
    for name, gradient in single.items():
        assert (weights.masters[name].grad - 300 * gradient).norm() < 1e-4 * 300 * gradient.norm(), name


@pytest.mark.parametrize("gmp", [False, True])
def test_gradients_in_bf16_point_where_those_in_fp32_do(gmp):
    model = to_gmp(random_clip()) if gmp else random_clip()
    exact, rough = trained(model), trained(model, torch.bfloat16)
    for weights, dtype in ((exact, torch.float32), (rough, torch.bfloat16)):
        backward(weights.network, dtype=dtype)
        weights.finish_gradients()
    for name, master in exact.masters.items():
        if master.numel() > 1:
            cosine = F.cosine_similarity(master.grad.flatten(), rough.masters[name].grad.flatten(), dim=0)
            assert cosine > 0.97, (name, cosine)


def test_what_does_not_train_has_no_master_weight_and_keeps_its_bits():
    model = to_gmp(random_clip(dtype=torch.float16))
    weights = trained(model, torch.bfloat16, lambda name: not name.startswith("visual."))
    backward(weights.network, dtype=torch.bfloat16)
    assert not any(name.startswith("visual.") for name in weights.masters)
    assert not any(p.requires_grad for name, p in weights.network.named_parameters() if name.startswith("visual."))
    tensors = weights.tensors()
    assert tensors.keys() == model.state_dict.keys()
    assert all(same_bits(tensors[name], model.state_dict[name]) for name in tensors if name.startswith("visual."))


def test_only_what_a_stage_chooses_gets_gradients():
    weights = trained(to_gmp(random_clip()), torch.bfloat16)
    weights.choose(lambda name: ".resblocks.1." in name)
    backward(weights.network, dtype=torch.bfloat16)
    weights.finish_gradients()
    with_gradient = {name for name, master in weights.masters.items() if master.grad is not None}
    assert with_gradient == {name for name in weights.masters if ".resblocks.1." in name}
