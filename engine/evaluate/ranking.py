"""One picture and some texts: which of them a model finds nearest to it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import torch

from ..clip.full_clip import FullCLIP
from ..errors import UserError
from .encoder import Encoder, EncodingCache

_MOST_TEXTS = 1000


@dataclasses.dataclass(frozen=True)
class Ranking:
    """For each text its cosine with the picture, and its share: the softmax over these texts of the cosine times the
    model's own `logit_scale` (about 100 in OpenAI's). In the order of the texts."""

    texts: tuple[str, ...]
    cosines: tuple[float, ...]
    shares: tuple[float, ...]
    logit_scale: float
    notes: tuple[str, ...] = ()

    @property
    def order(self) -> list[int]:
        """Places of the texts, the nearest first; equal ones as they were given."""
        return sorted(range(len(self.texts)), key=lambda place: -self.cosines[place])

    def as_dict(self) -> dict[str, Any]:
        return {
            "logit_scale": self.logit_scale,
            "texts": [
                {"text": self.texts[place], "cosine": self.cosines[place], "share": self.shares[place]}
                for place in self.order
            ],
        }


def rank_captions(
    full_clip: FullCLIP,
    picture,
    texts: Sequence[str],
    *,
    device: torch.device | str | None = None,
    features: EncodingCache | None = None,
) -> Ranking:
    """Rank texts for a picture (PIL's, of any mode and size), which becomes a square as in the model's training.

    A text that comes twice counts once, and empty ones not at all. Raises `UserError` if there is none.
    """
    lines = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not lines:
        raise UserError("There is no text to rank; write one a line, such as “a photo of a cat”.")
    if len(lines) > _MOST_TEXTS:
        raise UserError(f"There are {len(lines)} texts; at most {_MOST_TEXTS} are ranked for one picture.")
    encoder = Encoder.of(full_clip, device=device, features=features)
    notes = ()
    if cut := [line for line in lines if encoder.tokenizer.truncated(line)]:
        notes = (
            f"{len(cut)} of the texts are longer than the model reads; it sees the beginning of “{cut[0][:40]}…”.",
        )
    image = encoder.transform.load(_as_file(picture))
    _, image_features = encoder.images([([0], image[None])], 1)
    cosines = (encoder.texts(lines).double() @ image_features[0].double()).clamp(-1, 1)
    scale = float(encoder.network.logit_scale.detach().exp())
    shares = (scale * cosines).softmax(0)
    return Ranking(lines, tuple(cosines.tolist()), tuple(shares.tolist()), scale, notes)


def _as_file(picture):
    """What a `Transform` opens; PNG keeps every pixel."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file
