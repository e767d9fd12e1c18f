"""The parts of a training step, each against something that was not written here."""

import math

import pytest
import torch
from clips import TINY, random_clip

from clip_finetune.engine import UserError, build_network, to_gmp
from clip_finetune.engine.train.config import DEFAULT_PRESET, GMP_PRESETS, PRESETS, TrainConfig
from clip_finetune.engine.train.large_batch import Side, batch_gradients
from clip_finetune.engine.train.losses import InfoNCE, positive_pairs
from clip_finetune.engine.train.optimizers import build_optimizer, parameter_groups, set_learning_rates
from clip_finetune.engine.train.schedules import one_cycle

# ---- loss ------------------------------------------------------------------------------------------------------------


def features(count, width=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, dtype=dtype, generator=generator) for _ in range(2)]


def test_with_distinct_pairs_the_loss_is_open_clips():
    import open_clip
    from torch.nn.functional import normalize

    images, texts = features(12)
    scale = torch.tensor(2.5, dtype=torch.float64)
    theirs = open_clip.ClipLoss()(normalize(images, dim=1), normalize(texts, dim=1), scale.exp())
    ours = InfoNCE()(images, texts, scale, torch.eye(12, dtype=torch.bool))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_the_target_is_spread_evenly_over_the_positives():
    """By hand in float64: pairs 0 and 2 share their picture, pairs 1 and 2 their caption."""
    images, texts = features(4, seed=3)
    positives = positive_pairs(torch.tensor([7, 8, 7, 9]), torch.tensor([1, 2, 2, 3]))
    assert positives.int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    unit = [f / f.norm(dim=1, keepdim=True) for f in (images, texts)]
    logits = (math.exp(1.5) * unit[0] @ unit[1].T).tolist()
    total = 0.0
    for rows in (logits, [list(column) for column in zip(*logits, strict=True)]):
        for i, row in enumerate(rows):
            log_sum = math.log(sum(math.exp(value) for value in row))
            right = [j for j in range(4) if positives[i, j]]
            total += sum(log_sum - row[j] for j in right) / len(right) / 4 / 2
    loss = InfoNCE()(images, texts, torch.tensor(1.5, dtype=torch.float64), positives)
    assert loss.item() == pytest.approx(total, rel=1e-12)


# ---- large batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gmp", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 5, 8])
def test_the_gradient_of_a_batch_does_not_depend_on_the_micro_batch(micro_batch, gmp):
    """In float64, logit_scale included, with a last micro-batch that is smaller and pairs that share a caption."""
    model = to_gmp(random_clip()) if gmp else random_clip()
    images = torch.randn(16, 3, 32, 32, dtype=torch.float64)
    tokens = torch.randint(1, 49405, (16, 77))
    tokens[:, 12] = 49407
    positives = torch.eye(16, dtype=torch.bool)
    positives[3, 4] = positives[4, 3] = True

    def gradients(size):
        network = build_network(model, dtype=torch.float64)
        sides = (Side(network.encode_image, images, True), Side(network.encode_text, tokens, True))
        loss = batch_gradients(
            sides, lambda i, t: InfoNCE()(i, t, network.logit_scale, positives), micro_batch=size
        )  # fmt: skip
        return loss, {name: parameter.grad for name, parameter in network.named_parameters()}

    whole_loss, whole = gradients(16)
    loss, parts = gradients(micro_batch)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=0)
    for name, gradient in whole.items():
        assert (parts[name] - gradient).norm() <= 1e-10 * gradient.norm(), name
    assert whole["logit_scale"].abs() > 1e-6


def test_a_frozen_side_gets_no_gradient_and_the_other_the_same():
    model = random_clip()
    images, tokens = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.randint(1, 49405, (6, 77))
    found = []
    for size in (6, 2):
        network = build_network(model, dtype=torch.float64)
        network.visual.requires_grad_(False)
        sides = (Side(network.encode_image, images, False), Side(network.encode_text, tokens, True))
        batch_gradients(
            sides, lambda i, t, n=network: InfoNCE()(i, t, n.logit_scale, torch.eye(6, dtype=torch.bool)),
            micro_batch=size,
        )  # fmt: skip
        assert all(parameter.grad is None for parameter in network.visual.parameters())
        found.append(network.text_projection.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


# ---- schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total, warmup", [(20, 0.3), (100, 0.1), (333, 0.5)])
def test_the_schedule_is_torchs_one_cycle(total, warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=(0.8, 0.9))
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=warmup, div_factor=25, final_div_factor=4,
        cycle_momentum=False,
    )  # fmt: skip
    for step in range(total):
        assert one_cycle(step, total, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        if step < total - 1:
            theirs.step()


@pytest.mark.parametrize("total", [2, 3, 5, 10, 1000])
def test_the_rate_starts_lower_and_ends_at_one_percent(total):
    rates = [one_cycle(step, total, 0.1) for step in range(total)]
    assert rates[0] == pytest.approx(1 / 25) and rates[-1] == pytest.approx(0.01)
    assert max(rates) <= 1 and (total == 2 or max(rates) > 0.5)


# ---- optimizer groups ------------------------------------------------------------------------------------------------


def trainable(network):
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("gmp", [False, True])
def test_every_trainable_parameter_is_in_exactly_one_group(gmp):
    network = build_network(to_gmp(random_clip()) if gmp else random_clip())
    network.visual.ln_post.requires_grad_(False)
    groups = parameter_groups(trainable(network), TINY, TrainConfig())
    found = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = [id(parameter) for parameter in network.parameters() if parameter.requires_grad]
    assert sorted(found) == sorted(wanted)


def test_weight_decay_skips_embeddings_norms_biases_gmp_and_logit_scale():
    network = build_network(to_gmp(random_clip()))
    decayed = {
        name
        for group in parameter_groups(trainable(network), TINY, TrainConfig())
        if group["weight_decay"]
        for name in group["names"]
    }
    for name, parameter in network.named_parameters():
        skipped = parameter.ndim < 2 or "embedding" in name or name.endswith((".r", ".theta"))
        assert (name in decayed) != skipped, name
    assert "text_projection" in decayed and "visual.conv1.weight" in decayed


@pytest.mark.parametrize("optimizer", ["adabelief", "adamw"])
def test_decay_is_decoupled(optimizer):
    """Without a gradient a decayed weight shrinks by 1 − rate · decay, and nothing else moves."""
    network = build_network(random_clip())
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    config = TrainConfig(optimizer=optimizer, learning_rate=0.1, weight_decay=0.5)
    built = build_optimizer(config, parameter_groups(trainable(network), TINY, config))
    rates = set_learning_rates(built, 0.1, 0.5)
    assert set(rates.values()) == {0.05} and {"text.attention", "vision.mlp", "logit_scale"} <= set(rates)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    decayed = {name for group in built.param_groups if group["weight_decay"] for name in group["names"]}
    for name, parameter in network.named_parameters():
        expected = before[name] * (1 - 0.05 * 0.5) if name in decayed else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(batch_size=1), "two pairs at least"),
        (dict(epochs=0), "epochs is 0"),
        (dict(learning_rate=math.nan), "learning_rate is nan"),
        (dict(towers="left"), "both or text or vision"),
        (dict(epochs=1.5), "whole number"),
    ],
)
def test_a_value_out_of_range_is_told(values, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(**values)


def test_the_default_preset_holds_the_defaults_and_all_presets_set_the_same_fields():
    for presets in (PRESETS, GMP_PRESETS):
        default = presets[DEFAULT_PRESET].values
        assert all(getattr(TrainConfig(), name) == value for name, value in default.items())
        for preset in presets.values():
            assert preset.values.keys() == default.keys()
            TrainConfig(**preset.values)
