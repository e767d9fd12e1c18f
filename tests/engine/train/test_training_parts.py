"""The parts of a training step, each against something that was not written here."""

import math

import pytest
import torch
from clips import TINY, random_clip

from clip_finetune.engine import UserError, build_network, to_gmp
from clip_finetune.engine.files import same_bits
from clip_finetune.engine.train.config import DEFAULT_PRESET, GMP_PRESETS, PRESETS, TrainConfig
from clip_finetune.engine.train.grad_cache import Side, batch_gradients
from clip_finetune.engine.train.losses import InfoNCE
from clip_finetune.engine.train.neuron_scaling import parse_neurons, scale_neurons
from clip_finetune.engine.train.optim.factory import (
    OptimizerConfig,
    build_optimizer,
    group_table,
    parameter_groups,
    set_learning_rates,
    undo_steps,
)
from clip_finetune.engine.train.optim.gradient_norms import GradientMeter
from clip_finetune.engine.train.schedules import SCHEDULES, START, one_cycle

# ---- large batches ---------------------------------------------------------------------------------------------------


def test_a_frozen_side_gets_no_gradient_and_the_other_the_same():
    model = random_clip()
    images, tokens = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.randint(1, 49405, (6, 77))
    found = []
    for size in (6, 2):
        network = build_network(model, dtype=torch.float64)
        network.visual.requires_grad_(False)
        sides = (Side(network.encode_image, images, False), Side(network.encode_text, tokens, True))
        batch_gradients(
            sides,
            lambda i, t, n=network: InfoNCE()(i, t, n.logit_scale, torch.eye(6, dtype=torch.bool)),
            micro_batch=size,
        )
        assert all(parameter.grad is None for parameter in network.visual.parameters())
        found.append(network.text_projection.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


# ---- schedules -------------------------------------------------------------------------------------------------------


def torchs_rates(build, total):
    """The rates of a torch scheduler over `total` steps."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0, betas=(0.8, 0.9))
    scheduler, rates = build(optimizer), []
    for step in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < total - 1:
            scheduler.step()
    return rates


@pytest.mark.parametrize("total, warmup, floor", [(20, 0.3, 0.01), (100, 0.1, 0.001), (333, 0.5, 0.02)])
def test_one_cycle_is_torchs(total, warmup, floor):
    theirs = torchs_rates(
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=1.0,
            total_steps=total,
            pct_start=warmup,
            div_factor=25,
            final_div_factor=1 / (25 * floor),
            cycle_momentum=False,
        ),
        total,
    )
    assert [one_cycle(step, total, warmup, floor) for step in range(total)] == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total, rising, floor", [(20, 5, 0.01), (101, 10, 0.1), (50, 0, 0.0)])
def test_the_other_schedules_are_torchs(name, total, rising, floor):
    from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, SequentialLR

    rest = total - 1 - rising
    fall = {
        "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=rest, eta_min=floor),
        "linear": lambda optimizer: LinearLR(optimizer, 1.0, floor, total_iters=rest),
        "constant": lambda optimizer: ConstantLR(optimizer, 1.0, total_iters=rest),
    }[name]

    def build(optimizer):
        if not rising:
            return fall(optimizer)
        rise = LinearLR(optimizer, START, 1.0, total_iters=rising)
        return SequentialLR(optimizer, [rise, fall(optimizer)], [rising])

    ours = [SCHEDULES[name](step, total, rising / total, floor) for step in range(total)]
    assert ours == pytest.approx(torchs_rates(build, total), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("total", [1, 2, 3, 5, 10, 1000])
def test_a_schedule_ends_at_its_floor_and_never_rises_above_the_peak(name, total):
    rates = [SCHEDULES[name](step, total, 0.1, 0.01) for step in range(total)]
    assert max(rates) <= 1 and min(rates) > 0
    if name != "constant" and total > 1:
        assert rates[-1] == pytest.approx(0.01)
    if name == "one_cycle" and total > 1:
        assert rates[0] == pytest.approx(1 / 25)
    if total > 2:
        assert max(rates) > 0.5


# ---- optimizer groups ------------------------------------------------------------------------------------------------


def trainable(network):
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("gmp", [False, True])
def test_every_trainable_parameter_is_in_exactly_one_group(gmp):
    network = build_network(to_gmp(random_clip()) if gmp else random_clip())
    network.visual.ln_post.requires_grad_(False)
    groups = parameter_groups(trainable(network), TINY, OptimizerConfig())
    found = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    assert sorted(found) == sorted(wanted)


def test_weight_decay_skips_embeddings_norms_biases_gmp_and_logit_scale():
    network = build_network(to_gmp(random_clip()))
    decayed = {
        name
        for group in parameter_groups(trainable(network), TINY, OptimizerConfig())
        if group["weight_decay"]
        for name in group["names"]
    }
    for name, parameter in network.named_parameters():
        skipped = parameter.ndim < 2 or "embedding" in name or name.endswith((".r", ".theta"))
        assert (name in decayed) != skipped, name
    assert "text_projection" in decayed and "visual.conv1.weight" in decayed


@pytest.mark.parametrize("optimizer", ["adabelief", "adamw", "adafactor"])
def test_decay_is_decoupled(optimizer):
    """Without a gradient a decayed weight shrinks by 1 − rate · decay, and nothing else moves."""
    network = build_network(random_clip())
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    config = OptimizerConfig(optimizer=optimizer, weight_decay=0.5)
    built = build_optimizer(config, 0.1, parameter_groups(trainable(network), TINY, config))
    rates = set_learning_rates(built, 0.1, 0.5)
    assert set(rates.values()) == {0.05} and {"text.attention", "vision.mlp", "logit_scale"} <= set(rates)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    decayed = {name for group in built.param_groups if group["weight_decay"] for name in group["names"]}
    for name, parameter in network.named_parameters():
        expected = before[name] * (1 - 0.05 * 0.5) if name in decayed else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


def groups_of(network, **settings):
    return {group["name"]: group for group in parameter_groups(trainable(network), TINY, OptimizerConfig(**settings))}


def test_groups_are_by_tower_and_kind():
    network = build_network(to_gmp(random_clip()))
    kinds = ("attention", "biases", "embeddings", "norms", "projection", "r", "theta")
    expected = {f"{tower}.{kind}" for tower in ("text", "vision") for kind in kinds}
    assert groups_of(network).keys() == expected | {"vision.patches", "logit_scale"}


def test_rate_factors_multiply_and_the_fastest_group_has_the_learning_rate():
    network = build_network(random_clip())
    groups = groups_of(network, lr_multipliers="vision=0.5, embeddings = 0.1, text.mlp=4")
    expected = {"text.mlp": 1.0, "text.attention": 0.25, "vision.attention": 0.125, "vision.embeddings": 0.0125}
    assert {name: groups[name]["factor"] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("entry", ["left=1", "vision", "text=0", "text=-1", "text=nan", "text=fast"])
def test_a_rate_factor_that_means_nothing_is_told(entry):
    with pytest.raises(UserError, match="lr_multipliers has the entry"):
        groups_of(build_network(random_clip()), lr_multipliers=entry)


def test_with_layer_decay_each_layer_learns_slower_than_the_one_above():
    """0.5 for each layer below the top: two blocks, what is before them, and what is after them, which has depth 3."""
    groups = groups_of(build_network(random_clip()), layer_decay=0.5)
    factors = {name: group["factor"] for name, group in groups.items() if name.startswith("text.")}
    expected = {"text.projection.3": 1.0, "text.mlp.2": 0.5, "text.mlp.1": 0.25, "text.embeddings.0": 0.125}
    assert {name: factors[name] for name in expected} == expected
    assert groups["logit_scale"]["factor"] == 1.0


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_a_schedule_keeps_the_ratios_of_the_groups_and_the_betas(schedule):
    network = build_network(random_clip())
    config = OptimizerConfig(lr_multipliers="vision=0.5")
    optimizer = build_optimizer(config, 0.3, parameter_groups(trainable(network), TINY, config))
    betas = [group["betas"] for group in optimizer.param_groups]
    for step in range(10):
        rates = set_learning_rates(optimizer, 0.3, SCHEDULES[schedule](step, 10, 0.3, 0.01))
        assert rates["vision.mlp"] == pytest.approx(rates["text.mlp"] / 2)
    assert [group["betas"] for group in optimizer.param_groups] == betas


def test_the_table_of_groups_counts_every_parameter_once():
    network = build_network(random_clip())
    rows = group_table(list(groups_of(network, layer_decay=0.9).values()), 1e-3)
    counted = sum(int(row["parameters"].replace(",", "")) for row in rows)
    assert counted == sum(parameter.numel() for parameter in network.parameters())
    assert next(row for row in rows if row["group"] == "text.mlp")["peak rate"] == "0.00081 to 0.0009"


# ---- optimizers ------------------------------------------------------------------------------------------------------


def random_parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(700, 900), (5,), (), (300, 7), (33, 1)]  # one is larger than a chunk
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)


def belief_groups(parameters):
    return [
        dict(params=parameters[:2], weight_decay=0.1),
        dict(params=parameters[2:4], weight_decay=0.0),
        dict(params=parameters[4:], weight_decay=0.3),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("guarded", [False, True])
def test_adabelief_is_the_librarys_to_the_last_bit(dtype, guarded, capsys):
    """Over 14 steps, across the switch of the rectification after the fifth, at changing rates, with a parameter that
    joins later and one that misses steps."""
    from adabelief_pytorch import AdaBelief

    from clip_finetune.engine.train.optim.adabelief import ChunkedAdaBelief

    settings = dict(lr=1e-3, eps=1e-16, betas=(0.9, 0.999), weight_decouple=True, rectify=True, print_change_log=False)
    theirs, ours = random_parameters(dtype), random_parameters(dtype)
    library, chunked = AdaBelief(belief_groups(theirs), **settings), ChunkedAdaBelief(belief_groups(ours), **settings)
    for step in range(14):
        for parameters, optimizer in ((theirs, library), (ours, chunked)):
            give_gradients(parameters, step)
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


@pytest.mark.parametrize("name", ["adabelief", "adamw", "adafactor"])
@pytest.mark.parametrize("steps", [2, 9])
def test_a_braked_step_changes_nothing(name, steps):
    """Before and after the switch of AdaBelief's rectification; the step after it is as if it had never been."""
    config = OptimizerConfig(optimizer=name)

    def trained(braked):
        parameters = random_parameters(torch.float32)
        optimizer = build_optimizer(config, 1e-2, belief_groups(parameters))
        optimizer.found_inf = torch.zeros(())
        for step in range(steps + 1):
            if step == steps and braked:
                for parameter in parameters:
                    parameter.grad = torch.full_like(parameter, torch.nan)
                optimizer.found_inf = torch.ones(())
                optimizer.step()
                undo_steps(optimizer, 1)
                optimizer.found_inf = torch.zeros(())
            give_gradients(parameters, step)
            optimizer.step()
        return parameters, [optimizer.state[parameter] for parameter in parameters]

    (ones, one_states), (others, other_states) = trained(True), trained(False)
    for one, other, state, other_state in zip(ones, others, one_states, other_states, strict=True):
        assert same_bits(one.data, other.data)
        for key, value in state.items():
            assert same_bits(value, other_state[key]) if isinstance(value, torch.Tensor) else value == other_state[key]


# ---- gradients -------------------------------------------------------------------------------------------------------


def metered():
    network = build_network(random_clip())
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return network, GradientMeter(parameter_groups(trainable(network), TINY, OptimizerConfig()), TINY)


def test_norms_are_torchs_by_group_and_layer():
    network, meter = metered()
    norms = meter.measure()
    total = torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(norms.total, total, rtol=1e-5, atol=0)
    by_group = dict(zip(meter.groups, norms.by_group, strict=True))
    blocks = [network.transformer.resblocks, network.visual.transformer.resblocks]
    attention = [p.grad for p in (*blocks[0].parameters(),) if p.ndim == 2 and p.shape[1] == 64 and p.shape[0] < 256]
    torch.testing.assert_close(by_group["text.attention"], torch.nn.utils.get_total_norm(attention), rtol=1e-5, atol=0)
    by_layer = dict(zip(meter.layers, norms.by_layer, strict=True))
    block = torch.nn.utils.get_total_norm([parameter.grad for parameter in blocks[1][0].parameters()])
    torch.testing.assert_close(by_layer[("vision", 1)], block, rtol=1e-5, atol=0)
    torch.testing.assert_close(norms.by_layer.norm(), norms.total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_torchs(limit):
    (one, meter), (other, _) = metered(), metered()
    meter.clip(meter.measure(), limit)
    torch.nn.utils.clip_grad_norm_(other.parameters(), limit)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=0)


def test_a_layer_whose_gradient_explodes_or_vanishes_is_named():
    network, meter = metered()
    assert meter.warnings(meter.measure().by_layer.tolist()) == []
    for parameter in network.visual.transformer.resblocks[1].parameters():
        parameter.grad *= 1e4
    for parameter in network.transformer.resblocks[0].parameters():
        parameter.grad *= 1e-9
    said = meter.warnings(meter.measure().by_layer.tolist())
    assert len(said) == 2
    assert "explodes in block 1 of the vision tower" in said[1] and "learning_rate" in said[1]
    assert "vanishes in block 0 of the text tower" in said[0] and "precision" in said[0]
    assert meter.warnings(meter.measure().by_layer.tolist()) == []  # once is enough


def test_the_place_of_a_gradient_that_is_not_a_number_is_named():
    network, meter = metered()
    network.transformer.resblocks[1].mlp.c_fc.bias.grad[3] = torch.inf
    assert meter.broken_place(meter.measure().by_layer.tolist()) == "first in block 1 of the text tower"


# ---- neurons ---------------------------------------------------------------------------------------------------------


def test_named_units_are_louder_while_training_and_only_then():
    """Against the same scaling written into the weights: c_fc's output unit times a factor, before the activation."""
    network = build_network(random_clip())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = network.eval().encode_image(images)
        network.train()
        scale_neurons(network, parse_neurons("1:7=100, 0:3=-2.5, 1:200=3", TINY))
        loud, validated = network.encode_image(images), network.eval().encode_image(images)
        by_weights = build_network(random_clip())
        for block, unit, factor in ((1, 7, 100), (0, 3, -2.5), (1, 200, 3)):
            layer = by_weights.visual.transformer.resblocks[block].mlp.c_fc
            layer.weight[unit] *= factor
            layer.bias[unit] *= factor
        torch.testing.assert_close(loud, by_weights.encode_image(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(validated, plain) and not torch.allclose(loud, plain, atol=1e-3)


@pytest.mark.parametrize("text, words", [("2:0=1", "blocks 0 to 1"), ("0:256=1", "units 0 to 255"), ("0=1", "entry")])
def test_units_that_are_not_there_are_told(text, words):
    with pytest.raises(UserError, match=words):
        parse_neurons(text, TINY)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(batch_size=1), "at least two pairs"),
        (dict(epochs=0), "epochs is 0"),
        (dict(learning_rate=math.nan), "learning_rate is nan"),
        (dict(towers="left"), "both or text or vision"),
        (dict(epochs=1.5), "whole number"),
    ],
)
def test_a_value_out_of_range_is_told(values, words):
    with pytest.raises(UserError, match=words):
        TrainConfig.from_flat(**values)


def test_the_default_preset_holds_the_defaults_and_all_presets_set_the_same_fields():
    for presets in (PRESETS, GMP_PRESETS):
        default = presets[DEFAULT_PRESET].values
        assert default.items() <= TrainConfig().flat().items()
        for preset in presets.values():
            assert preset.values.keys() == default.keys()
            TrainConfig.from_flat(**preset.values)
