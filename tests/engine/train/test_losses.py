"""Every loss, compared with open_clip's, with torch's own functions, or with sums in plain Python."""

import math

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch.nn import functional as F

from clip_finetune.engine.train.losses import (
    LOSSES,
    EntropyPenalty,
    FixedTemperature,
    InfoNCE,
    SecondOrder,
    SigLIP,
    positive_pairs,
)

SCALE = torch.tensor(2.5, dtype=torch.float64)
# Pairs 0 and 2 share their image, pairs 1 and 2 their caption.
SHARED = positive_pairs(torch.tensor([7, 8, 7, 9]), torch.tensor([1, 2, 2, 3]))


def features(count, width=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, dtype=torch.float64, generator=rng) for _ in range(2)]


def cosines(images, texts):
    return F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T


def by_hand(logits, positives, smoothing=0.0):
    """Symmetric softmax cross-entropy in plain Python; targets are spread evenly over the positives, then smoothed."""
    total, count = 0.0, len(logits)
    for rows, right in ((logits.tolist(), positives.tolist()), (logits.T.tolist(), positives.T.tolist())):
        for row, positive in zip(rows, right, strict=True):
            log_sum = math.log(sum(math.exp(value) for value in row))
            for value, is_right in zip(row, positive, strict=True):
                target = (1 - smoothing) * is_right / sum(positive) + smoothing / count
                total += target * (log_sum - value) / count / 2
    return total


def test_positives_share_their_image_or_their_caption():
    assert SHARED.int().tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


def test_infonce_equals_open_clips_for_distinct_pairs():
    images, texts = features(12)
    theirs = ClipLoss()(F.normalize(images, dim=1), F.normalize(texts, dim=1), SCALE.exp())
    ours = InfoNCE()(images, texts, SCALE, torch.eye(12, dtype=torch.bool))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_siglip_equals_open_clips_for_distinct_pairs():
    images, texts = features(12)
    loss = SigLIP().double()
    with torch.no_grad():
        loss.logit_bias.fill_(-7.25)
    theirs = SigLipLoss()(F.normalize(images, dim=1), F.normalize(texts, dim=1), SCALE.exp(), loss.logit_bias.detach())
    torch.testing.assert_close(loss(images, texts, SCALE, torch.eye(12, dtype=torch.bool)), theirs, rtol=1e-12, atol=0)


def test_siglip_counts_every_positive():
    images, texts = features(4, seed=3)
    loss = SigLIP().double()
    with torch.no_grad():
        loss.logit_bias.fill_(-3.0)
    logits = (math.exp(2.5) * cosines(images, texts) - 3.0).tolist()
    expected = sum(
        math.log1p(math.exp(-value if SHARED[i, j] else value))
        for i, row in enumerate(logits)
        for j, value in enumerate(row)
    )
    assert loss(images, texts, SCALE, SHARED).item() == pytest.approx(expected / 4, rel=1e-12)


def test_siglips_bias_begins_where_the_first_batch_has_its_lowest_loss():
    images, texts = features(8)
    loss = SigLIP().double()
    loss.begin(images, texts, SCALE, torch.eye(8, dtype=torch.bool))
    value = loss(images, texts, SCALE, torch.eye(8, dtype=torch.bool))
    value.backward()
    assert abs(loss.logit_bias.grad) < 1e-12
    with torch.no_grad():
        for shift in (-0.1, 0.1):
            moved = SigLIP().double()
            moved.logit_bias.copy_(loss.logit_bias + shift)
            assert moved(images, texts, SCALE, torch.eye(8, dtype=torch.bool)) > value


def test_the_fixed_temperature_loss_equals_torchs_smoothed_cross_entropy():
    images, texts = features(12)
    logits, labels = cosines(images, texts) / 0.08, torch.arange(12)
    theirs = sum(F.cross_entropy(side, labels, label_smoothing=0.1) for side in (logits, logits.T)) / 2
    ours = FixedTemperature(0.08, 0.1)(images, texts, SCALE, torch.eye(12, dtype=torch.bool))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_the_entropy_penalty_subtracts_torchs_entropy():
    images, texts = features(12)
    eye = torch.eye(12, dtype=torch.bool)
    logits = cosines(images, texts) / 0.07
    entropy = sum(torch.distributions.Categorical(logits=side).entropy().mean() for side in (logits, logits.T)) / 2
    expected = FixedTemperature(0.07, 0.1)(images, texts, SCALE, eye) - 0.02 * entropy
    torch.testing.assert_close(EntropyPenalty(0.07, 0.1)(images, texts, SCALE, eye), expected, rtol=1e-12, atol=0)


def test_the_second_order_loss_compares_rows_of_logits():
    """In plain Python: both logit matrices with normalised rows, multiplied, over 0.07."""
    images, texts = features(4, seed=1)
    logits = (math.exp(2.5) * cosines(images, texts)).tolist()
    turned = [list(column) for column in zip(*logits, strict=True)]
    a, b = ([[value / math.hypot(*row) for value in row] for row in rows] for rows in (logits, turned))
    second = torch.tensor([[sum(x * y for x, y in zip(p, q, strict=True)) / 0.07 for q in b] for p in a]).double()
    eye = torch.eye(4, dtype=torch.bool)
    ours = SecondOrder(0.07)(images, texts, SCALE, eye).item()
    assert ours == pytest.approx(by_hand(second, eye), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_spread_evenly_over_the_positives(smoothing):
    images, texts = features(4, seed=3)
    logits = cosines(images, texts)
    if not smoothing:
        ours = InfoNCE()(images, texts, SCALE, SHARED).item()
        assert ours == pytest.approx(by_hand(math.exp(2.5) * logits, SHARED), rel=1e-12)
        second = F.normalize(logits, dim=1) @ F.normalize(logits.T, dim=1).T / 0.07
        ours = SecondOrder(0.07)(images, texts, SCALE, SHARED).item()
        assert ours == pytest.approx(by_hand(second, SHARED), rel=1e-12)
    ours = FixedTemperature(0.07, smoothing)(images, texts, SCALE, SHARED).item()
    assert ours == pytest.approx(by_hand(logits / 0.07, SHARED, smoothing), rel=1e-12)


def test_only_the_losses_that_say_so_train_the_temperature():
    images, texts = features(6)
    trains = set()
    for name, choice in LOSSES.items():
        scale = SCALE.clone().requires_grad_()
        loss = choice.make(0.07, 0.1).double()
        if name == "siglip":
            loss.begin(images, texts, scale, torch.eye(6, dtype=torch.bool))
        value = loss(images.requires_grad_(), texts, scale, torch.eye(6, dtype=torch.bool))
        if torch.autograd.grad(value, scale, allow_unused=True)[0] is not None:
            trains.add(name)
    assert trains == {"infonce", "siglip"}
