"""Typographic attack: does a wrong word written into a picture win over what the picture shows?

Goh et al. 2021, "Multimodal neurons in artificial neural networks" (distill.pub/2021/multimodal-neurons).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..clip.full_clip import FullCLIP
from ..data.cache import PictureCache
from ..data.dataset import ClipDataset
from ..data.loader import Pictures, image_batches
from .features import BATCH, Encoder, encode_pictures
from .zero_shot import class_features, ranks_of, require_classes, sentences_of

# The word's height as a share of the picture's, and how opaque its ground is.
_HEIGHTS, _GROUNDS = (0.12, 0.2), (0, 255)


@dataclasses.dataclass(frozen=True)
class TypographicResult:
    """Accuracies from 0 to 1 on the clean and on the attacked pictures; `word_wins` is how often the answer is the
    class that was written."""

    images: int
    accuracy_clean: float
    accuracy_under_attack: float
    word_wins: float
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "accuracy_clean": self.accuracy_clean,
            "accuracy_under_attack": self.accuracy_under_attack,
            "word_wins": self.word_wins,
        }


def eval_typographic(
    full_clip: FullCLIP,
    dataset: ClipDataset,
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
    cache: PictureCache | None = None,
) -> TypographicResult:
    """Zero-shot accuracy before and after the name of another class was written into each labelled picture.

    Word, place, size and colours are functions of `seed` and the picture's name. Raises `UserError` for a data set
    without at least two classes.
    """
    require_classes(dataset)
    encoder = Encoder.of(
        full_clip, device=device, on_progress=on_progress, check_cancelled=check_cancelled, cache=cache
    )
    classifier = class_features(encoder, dataset.class_names, sentences_of("simple")).double()
    clean = encode_pictures(encoder, dataset)
    rows = [row for row, samples in enumerate(clean.samples) if dataset.labels[samples[0]] is not None]
    labels = torch.tensor([dataset.labels[clean.samples[row][0]] for row in rows])
    words = torch.tensor([_word(dataset, clean.samples[row][0], seed) for row in rows])
    firsts = [clean.samples[row][0] for row in rows]
    batches = _attacked(encoder.pictures(dataset), firsts, words.tolist(), seed)
    _, attacked = encoder.images(batches, len(rows))
    scores_clean, scores_attacked = clean.features[rows].double() @ classifier.T, attacked.double() @ classifier.T
    return TypographicResult(
        images=len(rows),
        accuracy_clean=_accuracy(scores_clean, labels),
        accuracy_under_attack=_accuracy(scores_attacked, labels),
        word_wins=_accuracy(scores_attacked, words),
        notes=clean.notes,
    )


def _accuracy(scores_nc: Tensor, labels_n: Tensor) -> float:
    right = torch.nn.functional.one_hot(labels_n, scores_nc.shape[1]).bool()
    return (ranks_of(scores_nc, right) == 1).double().mean().item()


def _word(dataset: ClipDataset, index: int, seed: int) -> int:
    """A class other than the picture's own."""
    others = [number for number in range(len(dataset.class_names)) if number != dataset.labels[index]]
    return random.Random(f"{seed} {dataset.names[index]} word").choice(others)


def _attacked(
    pictures: Pictures, indices: list[int], words: list[int], seed: int
) -> Iterator[tuple[list[int], Tensor]]:
    dataset, start = pictures.dataset, 0
    for found, images_u8 in image_batches(pictures, indices, BATCH):
        written = [
            write_word(image, dataset.class_names[words[start + row]], random.Random(f"{seed} {dataset.names[index]}"))
            for row, (index, image) in enumerate(zip(found, images_u8, strict=True))
        ]
        start += len(found)
        yield found, torch.stack(written)


def write_word(image_u8: Tensor, word: str, chance: random.Random) -> Tensor:
    """uint8 [3, s, s] with the word drawn into it, whole, in a size, place and colours that `chance` decides."""
    from PIL import Image, ImageDraw, ImageFont
    from torchvision.transforms.functional import pil_to_tensor

    picture = Image.fromarray(image_u8.permute(1, 2, 0).contiguous().numpy())
    size = picture.width
    height = size * chance.uniform(*_HEIGHTS)
    font = ImageFont.load_default(height)
    left, top, right, bottom = font.getbbox(word)
    if right - left > size * 0.95:
        font = ImageFont.load_default(height * size * 0.95 / (right - left))
        left, top, right, bottom = font.getbbox(word)
    x = chance.uniform(0, max(0.0, size - (right - left)))
    y = chance.uniform(0, max(0.0, size - (bottom - top)))
    ink, ground = chance.choice((("black", "white"), ("white", "black"), ("yellow", "navy"), ("red", "white")))
    draw = ImageDraw.Draw(picture, "RGBA")
    if chance.choice(_GROUNDS):
        draw.rectangle((x - 2, y - 2, x + right - left + 2, y + bottom - top + 2), fill=ground)
    draw.text(
        (x - left, y - top), word, fill=ink, font=font, stroke_width=max(1, round(height / 16)), stroke_fill=ground
    )
    return pil_to_tensor(picture.convert("RGB"))
