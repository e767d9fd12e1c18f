"""Contrastive losses on the features of a batch, and which of its pairs are positives of each other."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def positive_pairs(originals_b: Tensor, texts_b: Tensor) -> Tensor:
    """bool [b, b]: pair i's picture goes with pair j's caption, because they share the original picture or the caption.

    `originals_b` and `texts_b` are integers, equal where the pictures come from one original or the captions are
    identical.
    """
    return (originals_b[:, None] == originals_b) | (texts_b[:, None] == texts_b)


class InfoNCE:
    """The symmetric loss of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3) with several positives.

    Features [b, d] in any length, `logit_scale` as the model stores it (a logarithm), `positives` bool [b, b]. The
    target of each row is spread evenly over its positives; with one positive a row it is open_clip's `ClipLoss`.
    Computed in float32, or float64 for float64 features; the result is a scalar, the mean of both directions.
    """

    def __call__(
        self, image_features_bd: Tensor, text_features_bd: Tensor, logit_scale: Tensor, positives: Tensor
    ) -> Tensor:
        images, texts = (F.normalize(_at_least_float32(f), dim=1) for f in (image_features_bd, text_features_bd))
        logits = _at_least_float32(logit_scale).exp() * images @ texts.T
        targets = positives.to(logits.dtype)
        to_text = F.cross_entropy(logits, targets / targets.sum(1, keepdim=True))
        to_image = F.cross_entropy(logits.T, targets.T / targets.T.sum(1, keepdim=True))
        return (to_text + to_image) / 2


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.element_size() >= 4 else tensor.float()


LOSSES = {"infonce": InfoNCE}
