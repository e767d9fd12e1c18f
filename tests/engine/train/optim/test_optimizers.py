"""Every optimizer: decoupled decay, skipped steps and the size of its state; AdaBelief has the bits of its library."""

import contextlib
import io

import pytest
import torch
from adabelief_pytorch import AdaBelief
from clips import TINY, random_clip

from clip_finetune.engine import build_network
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.train.optim.adabelief import ChunkedAdaBelief
from clip_finetune.engine.train.optim.factory import OPTIMIZERS, OptimizerConfig, build_optimizer, undo_steps
from clip_finetune.engine.train.optim.parameter_groups import parameter_groups, set_learning_rates


def random_parameters(dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    shapes = [(700, 900), (5,), (), (300, 7), (33, 1)]  # the first is larger than a chunk
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=rng)) for shape in shapes]


def set_gradients(parameters, seed):
    rng = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, generator=rng)


def groups_of(parameters):
    return [
        dict(params=parameters[:2], weight_decay=0.1),
        dict(params=parameters[2:4], weight_decay=0.0),
        dict(params=parameters[4:], weight_decay=0.3),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("guarded", [False, True])
def test_adabelief_has_the_librarys_bits(dtype, guarded):
    """Over 14 steps, across the start of rectification after the fifth, at changing learning rates, with a parameter
    that joins later and one that misses steps."""
    theirs, ours = random_parameters(dtype), random_parameters(dtype)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its options
        library = AdaBelief(groups_of(theirs), lr=1e-3, print_change_log=False)
    chunked = ChunkedAdaBelief(groups_of(ours), lr=1e-3)
    for step in range(14):
        for parameters, optimizer in ((theirs, library), (ours, chunked)):
            set_gradients(parameters, step)
            parameters[3].grad = None if step < 4 else parameters[3].grad
            parameters[4].grad = None if step % 3 == 1 else parameters[4].grad
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (step + 1)
        if guarded:
            chunked.found_inf = torch.zeros(())
        library.step()
        chunked.step()
    for one, other in zip(theirs, ours, strict=True):
        assert same_bits(one.data, other.data)
        for key in ("exp_avg", "exp_avg_var"):
            assert same_bits(library.state[one][key], chunked.state[other][key])


def test_building_an_optimizer_prints_nothing(capsys):
    for name in OPTIMIZERS:
        build_optimizer(OptimizerConfig(optimizer=name), 1e-3, groups_of(random_parameters()))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_weight_decay_is_decoupled(name):
    """With zero gradients a decayed weight shrinks by 1 - learning rate * decay, and nothing else moves."""
    network = build_network(random_clip())
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    config = OptimizerConfig(optimizer=name, weight_decay=0.5)
    optimizer = build_optimizer(config, 0.1, parameter_groups(network.named_parameters(), TINY, config))
    rates = set_learning_rates(optimizer, 0.1, 0.5)
    assert set(rates.values()) == {0.05} and {"text.attention", "vision.mlp", "logit_scale"} <= set(rates)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed = {name for group in optimizer.param_groups if group["weight_decay"] for name in group["names"]}
    for name, parameter in network.named_parameters():
        expected = before[name] * (1 - 0.05 * 0.5) if name in decayed else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("steps", [2, 9])
def test_a_skipped_step_changes_nothing(name, steps):
    """Before and after the start of AdaBelief's rectification. The step after it is as if it had never been."""

    def trained(skipping):
        parameters = random_parameters()
        optimizer = build_optimizer(OptimizerConfig(optimizer=name), 1e-2, groups_of(parameters))
        optimizer.found_inf = torch.zeros(())
        for step in range(steps + 1):
            if step == steps and skipping:
                for parameter in parameters:
                    parameter.grad = torch.full_like(parameter, torch.nan)
                optimizer.found_inf = torch.ones(())
                optimizer.step()
                undo_steps(optimizer, 1)
                optimizer.found_inf = torch.zeros(())
            set_gradients(parameters, step)
            optimizer.step()
        return parameters, [optimizer.state[parameter] for parameter in parameters]

    (ones, one_states), (others, other_states) = trained(True), trained(False)
    for one, other, state, other_state in zip(ones, others, one_states, other_states, strict=True):
        assert same_bits(one.data, other.data)
        for key, value in state.items():
            assert same_bits(value, other_state[key]) if isinstance(value, torch.Tensor) else value == other_state[key]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_record_knows_the_size_of_the_state(name):
    parameters = [parameter for parameter in random_parameters() if parameter.dim()]
    optimizer = build_optimizer(OptimizerConfig(optimizer=name), 1e-3, [dict(params=parameters)])
    set_gradients(parameters, 0)
    optimizer.step()
    for parameter in parameters:
        state = [
            value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor) and value.dim()
        ]
        assert OPTIMIZERS[name].state_bytes(parameter) == sum(value.nbytes for value in state)
