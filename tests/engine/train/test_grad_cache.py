"""Gradients through micro-batches, compared with those of the whole batch at once, in float64."""

import pytest
import torch
from clips import random_clip

from clip_finetune.engine import build_network, to_gmp
from clip_finetune.engine.train.grad_cache import Side, batch_gradients
from clip_finetune.engine.train.losses import LOSSES, InfoNCE


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("gmp", [False, True])
def test_gradients_through_micro_batches_are_exact_with_every_loss(name, gmp):
    """For everything that trains, with a smaller last micro-batch and two pairs that share a caption."""
    model = to_gmp(random_clip()) if gmp else random_clip()
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 32, 32, dtype=torch.float64, generator=rng)
    tokens = torch.randint(1, 49405, (10, 77), generator=rng)
    tokens[:, 12] = 49407
    positives = torch.eye(10, dtype=torch.bool)
    positives[3, 4] = positives[4, 3] = True

    def gradients(micro_batch):
        network = build_network(model, dtype=torch.float64)
        loss = LOSSES[name].make(0.07, 0.1).double()
        sides = (Side(network.encode_image, images, True), Side(network.encode_text, tokens, True))
        if hasattr(loss, "begin"):
            loss.begin(*(side.features(10) for side in sides), network.logit_scale, positives)
        value = batch_gradients(sides, lambda i, t: loss(i, t, network.logit_scale, positives), micro_batch=micro_batch)
        trained = [*network.named_parameters(), *loss.named_parameters()]
        return value, {name: parameter.grad for name, parameter in trained}

    whole_loss, whole = gradients(10)
    loss, in_parts = gradients(4)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=0)
    # A gradient that should be zero (SigLIP's bias at its best value) is compared with the largest one.
    largest = max(gradient.norm() for gradient in whole.values() if gradient is not None)
    for parameter, gradient in whole.items():
        if gradient is None:
            assert in_parts[parameter] is None and parameter == "logit_scale"
            continue
        scale = gradient.norm() if gradient.norm() > 1e-8 * largest else largest
        assert (in_parts[parameter] - gradient).norm() <= 1e-10 * scale, parameter


def test_a_frozen_tower_gets_no_gradient_and_the_other_the_same():
    model = random_clip()
    images, tokens = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.randint(1, 49405, (6, 77))
    gradients = []
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
        gradients.append(network.text_projection.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)
