"""Contrastive losses over the features of a batch, and which of its pairs are positives of each other.

A loss is a module called with the image and text features [b, d] of the whole batch (any norm), `logit_scale` as the
model stores it (a logarithm), and `positives` bool [b, b]; it returns a scalar. It computes in float32, or in float64
for float64 features. What a loss learns itself (SigLIP's bias) is a parameter of it. To add one, write its class and
its record in LOSSES, and add it to the tests in test_losses.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..settings import Settings, setting


def positive_pairs(originals_b: Tensor, captions_b: Tensor) -> Tensor:
    """Return bool [b, b]: image i matches caption j, because they share the original image or the caption.

    `originals_b` and `captions_b` are integers; equal ones mean the same original image, or identical captions.
    """
    return (originals_b[:, None] == originals_b) | (captions_b[:, None] == captions_b)


class InfoNCE(nn.Module):
    """The symmetric loss of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3), with several positives per row.

    The target of a row is spread evenly over its positives; with one positive per row it equals open_clip's `ClipLoss`.
    """

    def forward(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
        logits = _at_least_float32(logit_scale).exp() * _cosines(images_bd, texts_bd)
        return _symmetric_cross_entropy(logits, positives)


class FixedTemperature(nn.Module):
    """InfoNCE at a temperature that does not train, with label smoothing: the recipe of popular text encoders.

    The logits are cosines / `temperature`. Targets are smoothed as in torch's `cross_entropy` (Szegedy et al. 2015,
    arXiv:1512.00567): (1 - s) * target + s / b. `logit_scale` gets no gradient.
    """

    def __init__(self, temperature: float = 0.07, label_smoothing: float = 0.1) -> None:
        super().__init__()
        self.temperature, self.label_smoothing = temperature, label_smoothing

    def forward(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
        logits = _cosines(images_bd, texts_bd) / self.temperature
        return _symmetric_cross_entropy(logits, positives, self.label_smoothing)


class EntropyPenalty(FixedTemperature):
    """FixedTemperature - 0.02 * entropy of the softmax: penalises overconfidence (Pereyra et al. 2017,
    arXiv:1701.06548)."""

    WEIGHT = 0.02

    def forward(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
        logits = _cosines(images_bd, texts_bd) / self.temperature
        cross_entropy = _symmetric_cross_entropy(logits, positives, self.label_smoothing)
        return cross_entropy - self.WEIGHT * ((_entropy(logits) + _entropy(logits.T)) / 2)


class SigLIP(nn.Module):
    """A binary classification of every image-caption combination (Zhai et al. 2023, arXiv:2303.15343).

    -sum(log sigmoid(±(exp(logit_scale) * cosine + logit_bias))) / b, plus for positives and minus for all others:
    open_clip's `SigLipLoss`. CLIP has no `logit_bias`; `begin` sets it to the best value for the first batch, and it
    trains from there. It is saved in checkpoints, not in the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logit_bias = nn.Parameter(torch.tensor(torch.nan))

    def forward(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
        logits = _at_least_float32(logit_scale).exp() * _cosines(images_bd, texts_bd)
        return -F.logsigmoid(_signs(positives, logits) * (logits + self.logit_bias)).sum() / len(logits)

    @torch.no_grad()
    def begin(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> None:
        """Set `logit_bias` to the value whose gradient is zero for this batch.

        Bisection finds it, because the gradient grows with the bias; `torch.where` keeps the host from waiting.
        """
        logits = _at_least_float32(logit_scale).exp() * _cosines(images_bd, texts_bd)
        signs = _signs(positives, logits)
        low, high = -logits.abs().max() - 50, logits.abs().max() + 50
        for _ in range(60):
            middle = (low + high) / 2
            too_low = (signs * torch.sigmoid(-signs * (logits + middle))).sum() > 0  # minus the gradient
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        self.logit_bias.copy_(middle)


class SecondOrder(nn.Module):
    """The loss of the published GmP scripts, only for reproducing their results; otherwise prefer InfoNCE.

    Symmetric cross-entropy of A @ B.T / 0.07, where A and B are the logit matrices (images by texts, texts by images)
    with normalised rows. It compares rows of similarities instead of pairs: `logit_scale` cancels out and gets no
    gradient, and even a perfect batch has a high loss.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, images_bd: Tensor, texts_bd: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
        cosines = _cosines(images_bd, texts_bd)
        logits = F.normalize(cosines, dim=1) @ F.normalize(cosines.T, dim=1).T / self.temperature
        return _symmetric_cross_entropy(logits, positives)


def _cosines(images_bd: Tensor, texts_bd: Tensor) -> Tensor:
    images, texts = (F.normalize(_at_least_float32(features), dim=1) for features in (images_bd, texts_bd))
    return images @ texts.T


def _symmetric_cross_entropy(logits: Tensor, positives: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean of the cross-entropies over the rows and over the columns, targets spread over the positives."""

    def over_rows(logits: Tensor, positives: Tensor) -> Tensor:
        targets = positives.to(logits.dtype)
        return F.cross_entropy(logits, targets / targets.sum(1, keepdim=True), label_smoothing=label_smoothing)

    return (over_rows(logits, positives) + over_rows(logits.T, positives.T)) / 2


def _entropy(logits: Tensor) -> Tensor:
    log_probabilities = logits.log_softmax(1)
    return -(log_probabilities.exp() * log_probabilities).sum(1).mean()


def _signs(positives: Tensor, logits: Tensor) -> Tensor:
    return 2 * positives.to(logits.dtype) - 1


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()


@dataclasses.dataclass(frozen=True)
class LossInfo:
    """A loss that the user can choose. `make` takes the temperature and the label smoothing; `help` follows the
    name."""

    name: str
    make: Callable[[float, float], nn.Module]
    help: str
    paper: str = ""


_RECORDS = (
    LossInfo("infonce", lambda *_: InfoNCE(), "CLIP's own loss", "arXiv:2103.00020"),
    LossInfo("siglip", lambda *_: SigLIP(), "a yes or no for every image-caption combination", "arXiv:2303.15343"),
    LossInfo("fixed_temperature", FixedTemperature, "the recipe of popular text encoders", "arXiv:1512.00567"),
    LossInfo("entropy_penalty", EntropyPenalty, "the same, and overconfidence costs extra", "arXiv:1701.06548"),
    LossInfo("second_order", lambda temperature, _: SecondOrder(temperature), "that of the published GmP scripts"),
)
LOSSES: dict[str, LossInfo] = {loss.name: loss for loss in _RECORDS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(Settings):
    """What the training minimises."""

    loss: str = setting("infonce", "What the training minimises.", choices=LOSSES)
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
