"""Ranking: which of some texts a model finds nearest to one image."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image
from typing_extensions import Unpack

from ..clip.full_clip import FullCLIP
from ..errors import UserError
from ..report.image_charts import ranking_chart
from ..report.tables import percent, table
from .encoder import Encoder, Runtime

_MAX_TEXTS = 1000


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The cosine of each text with the image, and its share, in the order of the texts.

    Shares are the softmax over these texts of the cosine times the model's own `logit_scale` (about 100 in OpenAI's).
    """

    texts: tuple[str, ...]
    cosines: tuple[float, ...]
    shares: tuple[float, ...]
    logit_scale: float
    notes: tuple[str, ...] = ()

    @property
    def order(self) -> list[int]:
        """Indices of the texts, nearest first; equal ones in the given order."""
        return sorted(range(len(self.texts)), key=lambda index: -self.cosines[index])

    def in_order(self, order: Sequence[int]) -> Ranking:
        return dataclasses.replace(
            self,
            texts=tuple(self.texts[index] for index in order),
            cosines=tuple(self.cosines[index] for index in order),
            shares=tuple(self.shares[index] for index in order),
        )

    def as_dict(self) -> dict[str, Any]:
        ordered = self.in_order(self.order)
        lines = zip(ordered.texts, ordered.cosines, ordered.shares, strict=True)
        return {
            "logit_scale": self.logit_scale,
            "texts": [{"text": text, "cosine": cosine, "share": share} for text, cosine, share in lines],
        }


def rank_captions(full_clip: FullCLIP, image: Image, texts: Sequence[str], **runtime: Unpack[Runtime]) -> Ranking:
    """Rank texts for an image of any mode and size, which is transformed as in the model's training.

    A text that comes twice counts once, and empty ones not at all. Raises `UserError` if there is none.
    """
    lines = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not lines:
        raise UserError("There is no text to rank; write one per line, such as “a photo of a cat”.")
    if len(lines) > _MAX_TEXTS:
        raise UserError(f"There are {len(lines)} texts; at most {_MAX_TEXTS} can be ranked for one image.")
    encoder = Encoder.of(full_clip, **runtime)
    notes: tuple[str, ...] = ()
    if cut := [line for line in lines if encoder.tokenizer.truncated(line)]:
        notes = (
            f"{len(cut)} texts are longer than the model reads, such as “{cut[0][:40]}…”; their ends are cut off.",
        )
    pixels = encoder.transform.load(_as_file(image))
    _, features = encoder.encode_batches([([0], pixels[None])], 1)
    cosines = (encoder.encode_texts(lines).double() @ features[0].double()).clamp(-1, 1)
    shares = (encoder.logit_scale * cosines).softmax(0)
    return Ranking(lines, tuple(cosines.tolist()), tuple(shares.tolist()), encoder.logit_scale, notes)


def _as_file(image: Image) -> io.BytesIO:
    """Return what a `Transform` opens; PNG keeps every pixel."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file


def rankings_chart(image: Image, rankings: Mapping[str, Ranking]) -> Image:
    """Draw the image beside its texts, in the order of the model called "model"."""
    ordered = _in_models_order(rankings)
    return ranking_chart(
        image,
        ordered["model"].texts,
        {name: ranking.shares for name, ranking in ordered.items()},
        {name: ranking.cosines for name, ranking in ordered.items()},
    )


def rankings_table(rankings: Mapping[str, Ranking]) -> str:
    """Return a row for each text, in the order of the model called "model"."""
    ordered = _in_models_order(rankings)
    rows = [{"text": text} for text in ordered["model"].texts]
    for name, ranking in ordered.items():
        for row, share, cosine in zip(rows, ranking.shares, ranking.cosines, strict=True):
            row |= {f"{name} share": percent(share), f"{name} cosine": f"{cosine:.4f}"}
    return table(rows)


def _in_models_order(rankings: Mapping[str, Ranking]) -> dict[str, Ranking]:
    order = rankings["model"].order
    return {name: ranking.in_order(order) for name, ranking in rankings.items()}
