"""Contrastive losses on the features of a batch, and which of its pairs are positives of each other.

A loss is a module that is called with the features [b, d] of both sides in any length, `logit_scale` as the model
stores it (a logarithm), and `positives` bool [b, b]; it gives a scalar. It computes in float32, or float64 for float64
features, and sees the whole batch. What it learns itself (SigLIP's bias) is a parameter of it. A new loss is a class
here, a line in LOSSES, and its test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..settings import Settings, setting


def positive_pairs(originals_b: Tensor, texts_b: Tensor) -> Tensor:
    """bool [b, b]: pair i's picture goes with pair j's caption, because they share the original picture or the caption.

    `originals_b` and `texts_b` are integers, equal where the pictures come from one original or the captions are
    identical.
    """
    return (originals_b[:, None] == originals_b) | (texts_b[:, None] == texts_b)


class InfoNCE(nn.Module):
    """The symmetric loss of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3) with several positives.

    The target of each row is spread evenly over its positives; with one positive a row it is open_clip's `ClipLoss`.
    """

    def forward(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
        logits = _at_least_float32(logit_scale).exp() * _cosines(images_bd, texts_bd)
        return _both_ways(_cross_entropy, logits, positives)


class FixedTemperature(nn.Module):
    """InfoNCE at a temperature that does not train, with label smoothing: the recipe of popular text encoders.

    The logits are cosines / `temperature`; the targets are smoothed as torch's `cross_entropy` does it (Szegedy et al.
    2015, arXiv:1512.00567): (1 - s) · target + s / b. `logit_scale` gets no gradient.
    """

    def __init__(self, temperature: float = 0.07, label_smoothing: float = 0.1):
        super().__init__()
        self.temperature, self.label_smoothing = temperature, label_smoothing

    def forward(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
        logits = _cosines(images_bd, texts_bd) / self.temperature
        return _both_ways(lambda *row: _cross_entropy(*row, self.label_smoothing), logits, positives)


class EntropyPenalty(FixedTemperature):
    """FixedTemperature minus 0.02 · H(softmax): too sure an answer costs (Pereyra et al. 2017, arXiv:1701.06548)."""

    WEIGHT = 0.02

    def forward(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
        logits = _cosines(images_bd, texts_bd) / self.temperature
        smoothed = _both_ways(lambda *row: _cross_entropy(*row, self.label_smoothing), logits, positives)
        return smoothed - self.WEIGHT * _both_ways(lambda rows, _: _entropy(rows), logits, positives)


class SigLIP(nn.Module):
    """A yes or no for every picture and caption (Zhai et al. 2023, arXiv:2303.15343); open_clip's `SigLipLoss`.

    −Σ log σ(±(exp(logit_scale) · cosine + logit_bias)) / b, plus for positives and minus for the others. CLIP has no
    `logit_bias`: it begins at the value that is best for the first batch, and trains from there; it is part of the
    saved state, not of the model.
    """

    def __init__(self):
        super().__init__()
        self.logit_bias = nn.Parameter(torch.tensor(torch.nan))

    def forward(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
        logits = _at_least_float32(logit_scale).exp() * _cosines(images_bd, texts_bd)
        return -F.logsigmoid(_signs(positives, logits) * (logits + self.logit_bias)).sum() / len(logits)

    @torch.no_grad()
    def begin(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> None:
        """Set `logit_bias` to where its gradient vanishes for this batch, by bisection: the gradient rises with it."""
        logits = _at_least_float32(logit_scale).exp() * _cosines(images_bd, texts_bd)
        signs = _signs(positives, logits)
        low, high = -logits.abs().max() - 50, logits.abs().max() + 50
        for _ in range(60):
            middle = (low + high) / 2
            rising = (signs * torch.sigmoid(-signs * (logits + middle))).sum() > 0  # minus the gradient
            low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
        self.logit_bias.copy_(middle)


class SecondOrder(nn.Module):
    """The loss of the published GmP scripts, for reproduction only: cross-entropy both ways of Â·B̂ᵀ / 0.07, where Â
    and B̂ are the logit matrices (pictures by texts, texts by pictures) with rows of length 1.

    It compares rows of similarities, not pairs; `logit_scale` cancels out and gets no gradient, and a batch that is all
    right still costs much. Prefer InfoNCE.
    """

    def __init__(self, temperature: float = 0.07):
        super().__init__()
        self.temperature = temperature

    def forward(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
        cosines = _cosines(images_bd, texts_bd)
        logits = F.normalize(cosines, dim=1) @ F.normalize(cosines.T, dim=1).T / self.temperature
        return _both_ways(_cross_entropy, logits, positives)


def _cosines(images_bd: Tensor, texts_bd: Tensor) -> Tensor:
    images, texts = (F.normalize(_at_least_float32(features), dim=1) for features in (images_bd, texts_bd))
    return images @ texts.T


def _both_ways(of_rows: Callable[[Tensor, Tensor], Tensor], logits: Tensor, positives: Tensor) -> Tensor:
    return (of_rows(logits, positives) + of_rows(logits.T, positives.T)) / 2


def _cross_entropy(logits: Tensor, positives: Tensor, label_smoothing: float = 0.0) -> Tensor:
    targets = positives.to(logits.dtype)
    return F.cross_entropy(logits, targets / targets.sum(1, keepdim=True), label_smoothing=label_smoothing)


def _entropy(logits: Tensor) -> Tensor:
    log_shares = logits.log_softmax(1)
    return -(log_shares.exp() * log_shares).sum(1).mean()


def _signs(positives: Tensor, logits: Tensor) -> Tensor:
    return 2 * positives.to(logits.dtype) - 1


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()


@dataclasses.dataclass(frozen=True)
class LossChoice:
    """How a loss is made from a temperature and a label smoothing, and what it is in a few words."""

    make: Callable[[float, float], nn.Module]
    words: str


LOSSES: dict[str, LossChoice] = {
    "infonce": LossChoice(lambda temperature, smoothing: InfoNCE(), "CLIP's own"),
    "siglip": LossChoice(lambda temperature, smoothing: SigLIP(), "a yes or no for each picture and caption"),
    "fixed_temperature": LossChoice(FixedTemperature, "the recipe of popular text encoders, with label smoothing"),
    "entropy_penalty": LossChoice(EntropyPenalty, "the same, and answers that are too sure cost"),
    "second_order": LossChoice(
        lambda temperature, smoothing: SecondOrder(temperature), "that of the published GmP scripts, to reproduce them"
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(Settings):
    """What the training minimises."""

    loss: str = setting(
        "infonce",
        "What the training minimises. " + "; ".join(f"{name}: {loss.words}" for name, loss in LOSSES.items()) + ".",
        choices=LOSSES,
    )
    temperature: float = setting(
        0.07,
        "For the losses with a fixed temperature; a smaller one is stricter. The others learn theirs (logit_scale).",
        min=0.001,
        max=10.0,
        step=0.01,
    )
    label_smoothing: float = setting(
        0.1,
        "For fixed_temperature and entropy_penalty: the share of the target that is spread evenly over all captions.",
        min=0.0,
        max=0.99,
        step=0.01,
    )
    train_logit_scale: bool = setting(True, "Train the temperature (logit_scale) too; it never rises above 100.")
