"""Does this program measure what others measured? OpenAI's weights against the figures that were published for them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..data.images.image_cache import ImageCache
from ..data.load import load_dataset
from ..errors import UserError
from ..report.tables import table
from .coco import SPLIT_FILES, karpathy_test
from .encoder import Encoder, encode_images
from .retrieval import retrieval_of
from .zero_shot import zero_shot_of

ACTIVATIONS = ("quick_gelu", "gelu")
_SIZE = 0.02  # by how much of its pictures a set may be off


@dataclasses.dataclass(frozen=True)
class Figure:
    """A published share (0 to 1) of a model on a set ("imagenet" or "coco") of so many pictures, and by how much a
    measurement may be off: decoders and resizers differ a little."""

    name: str
    on: str
    value: float
    tolerance: float
    pictures: int


# Of ViT-L/14, as open_clip's and CLIP_benchmark's tables of results have them; COCO's are those of Karpathy's split.
PUBLISHED = (
    Figure("ImageNet zero-shot top 1", "imagenet", 0.755, 0.004, 50_000),
    Figure("COCO text to image R@5", "coco", 0.611, 0.01, 5000),
    Figure("COCO image to text R@5", "coco", 0.792, 0.01, 5000),
)


@dataclasses.dataclass(frozen=True)
class SelfCheck:
    """`measured[activation][figure's name]`; `passed` if what the model's own activation gives is what was published;
    `verdict` says it in words."""

    activation: str
    figures: tuple[Figure, ...]
    measured: Mapping[str, Mapping[str, float]]
    passed: bool
    verdict: str
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "verdict": self.verdict,
            "activation": self.activation,
            "figures": [
                {"name": figure.name, "published": figure.value, "tolerance": figure.tolerance}
                | {activation: found[figure.name] for activation, found in self.measured.items()}
                for figure in self.figures
            ],
        }

    def table(self) -> str:
        rows = []
        for figure in self.figures:
            row = {"figure": figure.name, "published": f"{figure.value:.1%}"}
            for activation, found in self.measured.items():
                row[f"measured ({activation})"] = f"{found[figure.name]:.1%}"
            rows.append(row)
        return table(rows)


def selfcheck(
    full_clip: FullCLIP,
    *,
    imagenet: str | os.PathLike | None = None,
    coco: str | os.PathLike | None = None,
    published: Sequence[Figure] = PUBLISHED,
    device: torch.device | str | None = None,
    cache: ImageCache | None = None,
    on_note: Callable[[str], None] = lambda note: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> SelfCheck:
    """Measure a model whose figures are known, with both activations that its file may mean, and compare.

    `imagenet` is a folder of ImageNet's validation pictures with a subfolder for each class, `coco` one of pictures
    with COCO's captions, of which those of Karpathy's test part count where a file tells which these are (see
    `karpathy_test`). Raises `UserError` if neither is given, or if one cannot be used.
    """
    sets = _opened(imagenet, coco)
    figures = tuple(figure for figure in published if figure.on in sets)
    for figure in figures:
        _require_size(figure, sets[figure.on])
    own = full_clip.architecture.activation
    measured: dict[str, dict[str, float]] = {}
    notes: list[str] = []
    for activation in (own, *(other for other in ACTIVATIONS if other != own)):
        architecture = dataclasses.replace(full_clip.architecture, activation=activation)
        encoder = Encoder.of(
            dataclasses.replace(full_clip, architecture=architecture),
            device=device,
            cache=cache,
            check_cancelled=check_cancelled,
        )
        measured[activation] = {}
        for name, dataset in sets.items():
            on_note(f"{name} with {activation}: {len(dataset)} pictures.")
            shares, told = _measured(name, encoder, dataset)
            measured[activation] |= shares
            notes += [note for note in told if note not in notes]
    passed, verdict = judge(own, figures, measured)
    return SelfCheck(own, figures, measured, passed, verdict, tuple(notes))


def require_sets(imagenet: str | os.PathLike | None, coco: str | os.PathLike | None) -> None:
    """Raise `UserError` unless one of the sets is given, and each that is given is a folder."""
    if not imagenet and not coco:
        raise UserError(
            "The self-check measures on sets that are not here: give --imagenet, a folder of ImageNet's 50,000 "
            "validation pictures in a subfolder for each class, or --coco, one with COCO's pictures and Karpathy's "
            "dataset_coco.json."
        )
    for name, place in (("imagenet", imagenet), ("coco", coco)):
        if place and not os.path.isdir(place):
            raise UserError(f"--{name} is {place}, which is no folder; give the one with the set's pictures.")


def _opened(imagenet: str | os.PathLike | None, coco: str | os.PathLike | None) -> dict[str, ClipDataset]:
    require_sets(imagenet, coco)
    found = {}
    if imagenet:
        found["imagenet"] = load_dataset(imagenet)
        if not found["imagenet"].has_labels:
            raise UserError(f"--imagenet is {imagenet}, which has no subfolder of pictures for each class.")
    if coco:
        found["coco"] = karpathy_test(coco) or load_dataset(coco)
        if not found["coco"].has_captions:
            raise UserError(f"--coco is {coco}, which has no captions.")
    return found


def _require_size(figure: Figure, dataset: ClipDataset) -> None:
    """Among more pictures the right one is found less often: a figure holds for sets of its own size alone."""
    found = len(dataset) - len(dataset.missing())
    if abs(found - figure.pictures) <= _SIZE * figure.pictures:
        return
    why = f"--{figure.on} has {found:,} pictures, and the published figures are those of {figure.pictures:,}"
    if figure.on == "coco":
        raise UserError(
            f"{why}, the test part of Karpathy's split; put {SPLIT_FILES[0]}, which tells them apart, into its folder "
            "with the pictures of 2014 or 2017."
        )
    raise UserError(f"{why}; give the whole validation set, with a subfolder for each class.")


def _measured(name: str, encoder: Encoder, dataset: ClipDataset) -> tuple[dict[str, float], Sequence[str]]:
    pictures = encode_images(encoder, dataset)
    if name == "imagenet":
        zero_shot = zero_shot_of(encoder, dataset, pictures=pictures)
        return {"ImageNet zero-shot top 1": zero_shot.top1}, zero_shot.notes
    found = retrieval_of(encoder, dataset, pictures=pictures)
    return {
        "COCO text to image R@5": found.text_to_image["r5"],
        "COCO image to text R@5": found.image_to_text["r5"],
    }, found.notes


def judge(own: str, figures: Sequence[Figure], measured: Mapping[str, Mapping[str, float]]) -> tuple[bool, str]:
    """(whether the model's own activation gives the published figures, a verdict in one sentence)."""

    def reached(activation: str) -> bool:
        return all(abs(measured[activation][figure.name] - figure.value) <= figure.tolerance for figure in figures)

    if reached(own):
        return True, f"The published figures are reached: the evaluators and the activation ({own}) are right."
    others = [activation for activation in measured if activation != own]
    if right := next((activation for activation in others if reached(activation)), None):
        return False, (
            f"The activation is wrong: the model is run with {own}, but the published figures are those of {right}; "
            f"use --activation {right}."
        )
    far = max(figures, key=lambda figure: abs(measured[own][figure.name] - figure.value) - figure.tolerance)
    nearer = [
        activation
        for activation in others
        if _distance(measured[activation], figures) < _distance(measured[own], figures)
    ]
    return False, (
        f"The published figures are not reached with either activation: {far.name} is {measured[own][far.name]:.1%} "
        f"and not {far.value:.1%}"
        + (f", and {nearer[0]} comes nearer than {own}" if nearer else "")
        + "; are these OpenAI's ViT-L/14 weights, and the whole validation set?"
    )


def _distance(found: Mapping[str, float], figures: Sequence[Figure]) -> float:
    return sum(abs(found[figure.name] - figure.value) for figure in figures)
