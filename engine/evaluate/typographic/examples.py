"""Single images that tell the models apart: those that fool one of them and not the other."""

from __future__ import annotations

import random
from typing import TypeVar

from PIL import Image

from ...data.dataset import ClipDataset
from .attack import Attacked, TypographicResult
from .drawing import write_word
from .photographed import DRAWN

T = TypeVar("T")


def fooled_apart(
    model: TypographicResult, baseline: TypographicResult | None, count: int = 8
) -> list[tuple[Attacked, Attacked | None]]:
    """Return up to `count` images (as the model sees each, as the baseline does) that fool one model and not the other.

    Those that fool the baseline come first. Without a baseline, those that fool the model.
    """
    if baseline is None:
        return [(mine, None) for mine in _spread([each for each in model.attacked if each.fooled], count)]
    pairs = list(zip(model.attacked, baseline.attacked, strict=True))
    better: list[tuple[Attacked, Attacked | None]] = [(m, b) for m, b in pairs if b.fooled and not m.fooled]
    worse: list[tuple[Attacked, Attacked | None]] = [(m, b) for m, b in pairs if m.fooled and not b.fooled]
    better = _spread(better, max(count // 2, count - len(worse)))
    return better + _spread(worse, count - len(better))


def examples_of(
    dataset: ClipDataset, model: TypographicResult, baseline: TypographicResult | None
) -> tuple[str, list[tuple[Image.Image, str]]]:
    """Return a heading, and the images of `fooled_apart` with a caption that says what they were taken for."""
    heading = "Images that fool it" if baseline is None else "Images that fool one of the models and not the other"
    examples = []
    for mine, other in fooled_apart(model, baseline):
        caption = f"{mine.shows}, with “{mine.word}” written on it. Model: {mine.answer}."
        caption += f" Baseline: {other.answer}." if other else ""
        examples.append((attacked_image(dataset, mine, model), caption))
    return heading, examples


def attacked_image(dataset: ClipDataset, attacked: Attacked, result: TypographicResult) -> Image.Image:
    """Return the image as the models saw it, its word drawn again if it was drawn."""
    assert result.transform is not None
    pixels = result.transform.load(dataset.path(attacked.index))
    if attacked.kind == DRAWN:
        pixels = write_word(pixels, attacked.word, random.Random(f"{result.seed} {attacked.name}"))
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _spread(items: list[T], count: int) -> list[T]:
    """Return at most `count` of them, evenly spread."""
    return items if len(items) <= count else [items[number * len(items) // count] for number in range(count)]
