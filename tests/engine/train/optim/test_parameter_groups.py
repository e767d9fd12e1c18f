"""Parameter groups: which parameter is where, and its learning rate and weight decay."""

import pytest
from clips import TINY, random_clip

from clip_finetune.engine import UserError, build_network, to_gmp
from clip_finetune.engine.train.optim.factory import OPTIMIZERS, OptimizerConfig, build_optimizer
from clip_finetune.engine.train.optim.parameter_groups import group_table, parameter_groups, set_learning_rates
from clip_finetune.engine.train.schedules import SCHEDULES


def trainable(network):
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]


def groups_of(network, **settings):
    return {group["name"]: group for group in parameter_groups(trainable(network), TINY, OptimizerConfig(**settings))}


@pytest.mark.parametrize("gmp", [False, True])
def test_every_trainable_parameter_is_in_exactly_one_group(gmp):
    network = build_network(to_gmp(random_clip()) if gmp else random_clip())
    network.visual.ln_post.requires_grad_(False)
    grouped = [id(parameter) for group in groups_of(network).values() for parameter in group["params"]]
    expected = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(expected)


def test_groups_are_by_tower_and_kind():
    network = build_network(to_gmp(random_clip()))
    kinds = ("attention", "biases", "embeddings", "norms", "projection", "r", "theta")
    expected = {f"{tower}.{kind}" for tower in ("text", "vision") for kind in kinds}
    assert groups_of(network).keys() == expected | {"vision.patches", "logit_scale"}


def test_weight_decay_skips_embeddings_norms_biases_gmp_and_logit_scale():
    network = build_network(to_gmp(random_clip()))
    decayed = {name for group in groups_of(network).values() if group["weight_decay"] for name in group["names"]}
    for name, parameter in network.named_parameters():
        skipped = parameter.ndim < 2 or "embedding" in name or name.endswith((".r", ".theta"))
        assert (name in decayed) != skipped, name
    assert "text_projection" in decayed and "visual.conv1.weight" in decayed


def test_multipliers_multiply_and_the_fastest_group_has_the_learning_rate():
    groups = groups_of(build_network(random_clip()), lr_multipliers="vision=0.5, embeddings = 0.1, text.mlp=4")
    expected = {"text.mlp": 1.0, "text.attention": 0.25, "vision.attention": 0.125, "vision.embeddings": 0.0125}
    assert {name: groups[name]["multiplier"] for name in expected} == pytest.approx(expected)


def test_a_multiplier_of_a_scalar_counts_once():
    assert groups_of(build_network(random_clip()), lr_multipliers="logit_scale=0.5")["logit_scale"]["multiplier"] == 0.5


@pytest.mark.parametrize("entry", ["left=1", "vision", "text=0", "text=-1", "text=nan", "text=fast"])
def test_a_multiplier_that_means_nothing_is_refused(entry):
    with pytest.raises(UserError, match="lr_multipliers has the entry"):
        groups_of(build_network(random_clip()), lr_multipliers=entry)


def test_with_layer_decay_each_layer_learns_slower_than_the_one_above():
    """0.5 for each layer below the top: two blocks, what is before them, and what is after them, which has depth 3."""
    groups = groups_of(build_network(random_clip()), layer_decay=0.5)
    expected = {"text.projection.3": 1.0, "text.mlp.2": 0.5, "text.mlp.1": 0.25, "text.embeddings.0": 0.125}
    assert {name: groups[name]["multiplier"] for name in expected} == expected
    assert groups["logit_scale"]["multiplier"] == 1.0


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_schedule_keeps_the_ratios_of_the_groups_and_the_betas(schedule, optimizer):
    config = OptimizerConfig(optimizer=optimizer, lr_multipliers="vision=0.5")
    built = build_optimizer(config, 0.3, groups_of(build_network(random_clip()), lr_multipliers="vision=0.5").values())
    betas = [group.get("betas") for group in built.param_groups]
    for step in range(10):
        rates = set_learning_rates(built, 0.3, SCHEDULES[schedule].multiple(step, 10, 0.3, 0.01))
        assert rates["vision.mlp"] == pytest.approx(rates["text.mlp"] / 2)
    assert [group.get("betas") for group in built.param_groups] == betas


def test_the_table_of_groups_counts_every_parameter_once():
    network = build_network(random_clip())
    rows = group_table(list(groups_of(network, layer_decay=0.9).values()), 1e-3)
    counted = sum(int(row["parameters"].replace(",", "")) for row in rows)
    assert counted == sum(parameter.numel() for parameter in network.parameters())
    assert next(row for row in rows if row["group"] == "text.mlp")["peak learning rate"] == "0.00081 to 0.0009"
