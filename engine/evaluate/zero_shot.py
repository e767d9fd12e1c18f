"""Zero-shot classification: the class whose name, put into sentences, lies nearest to the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip.full_clip import FullCLIP
from ..data.cache import PictureCache
from ..data.dataset import ClipDataset
from ..errors import UserError
from .features import EncodedPictures, Encoder, encode_pictures, require_pictures

TEMPLATES = ("openai-80", "simple", "none", "custom")


@dataclasses.dataclass(frozen=True)
class ZeroShotResult:
    """Accuracies from 0 to 1; `per_class` by class name, for the classes that have pictures."""

    images: int
    top1: float
    top5: float
    mean_per_class: float
    per_class: dict[str, float]
    classes: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"top1": self.top1, "top5": self.top5, "mean_per_class": self.mean_per_class, "classes": self.classes}


def eval_zero_shot(
    full_clip: FullCLIP,
    dataset: ClipDataset,
    *,
    templates: str = "openai-80",
    custom_templates: Sequence[str] = (),
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
    cache: PictureCache | None = None,
) -> ZeroShotResult:
    """Zero-shot accuracy over a labelled data set; raises `UserError` for one without at least two classes."""
    require_classes(dataset)
    encoder = Encoder.of(
        full_clip, device=device, on_progress=on_progress, check_cancelled=check_cancelled, cache=cache
    )
    return zero_shot_of(encoder, dataset, templates=templates, custom_templates=custom_templates)


def require_classes(dataset: ClipDataset) -> None:
    require_pictures(dataset)
    if len(dataset.class_names) < 2:
        found = "no classes" if not dataset.class_names else "a single class"
        raise UserError(
            f"{dataset.name} has {found}; for zero-shot accuracy give a folder with a subfolder of pictures for each "
            "class."
        )


def zero_shot_of(
    encoder: Encoder,
    dataset: ClipDataset,
    *,
    templates: str = "openai-80",
    custom_templates: Sequence[str] = (),
    pictures: EncodedPictures | None = None,
) -> ZeroShotResult:
    """Zero-shot accuracy with a network that is already there, and its pictures if they were encoded before.

    A picture with several classes is right with any of them. A picture is right at k if fewer than k wrong classes
    have at least the score of its best right one.
    """
    require_classes(dataset)
    sentences = sentences_of(templates, custom_templates)
    pictures = pictures or encode_pictures(encoder, dataset)
    classifier = class_features(encoder, dataset.class_names, sentences)
    right = torch.zeros(len(pictures.features), len(classifier), dtype=torch.bool)
    for row, samples in enumerate(pictures.samples):
        for index in samples:
            if dataset.labels[index] is not None:
                right[row, dataset.labels[index]] = True
    labelled = right.any(1)
    right = right[labelled]
    ranks = ranks_of(pictures.features[labelled].double() @ classifier.double().T, right)
    top1, per_class = (ranks <= 1).double(), {}
    for number, name in enumerate(dataset.class_names):
        members = right[:, number]
        if members.any():
            per_class[name] = top1[members].mean().item()
    return ZeroShotResult(
        images=len(right),
        top1=top1.mean().item(),
        top5=(ranks <= 5).double().mean().item(),
        mean_per_class=sum(per_class.values()) / len(per_class),
        per_class=per_class,
        classes=len(dataset.class_names),
        notes=pictures.notes,
    )


def ranks_of(scores_nc: Tensor, right_nc: Tensor) -> Tensor:
    """1 + the number of wrong classes with at least the score of the best right one: a tie is not a win."""
    scores = scores_nc.mul(1e9).round()  # equal sentences are equal in whatever order they were summed
    best = scores.masked_fill(~right_nc, -torch.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~right_nc).sum(1)


def sentences_of(templates: str, custom_templates: Sequence[str] = ()) -> list[Callable[[str], str]]:
    """Functions from a class name to a sentence: OpenAI's 80, open_clip's short set, the bare name, or one's own."""
    if templates not in TEMPLATES:
        raise UserError(f"The templates {templates!r} are not known; choose {' or '.join(TEMPLATES)}.")
    if templates == "none":
        return [lambda name: name]
    if templates == "custom":
        lines = [line.strip() for line in custom_templates if line.strip()]
        without = [line for line in lines if "{}" not in line]
        if without or not lines:
            which = f"{without[0]!r} has none" if without else "there is none"
            raise UserError(
                f"A custom template is a line with {{}} where the class name goes, and {which}; write for example "
                '"a photo of a {}."'
            )
        return [lambda name, line=line: line.replace("{}", name) for line in lines]
    import open_clip

    return list(
        open_clip.OPENAI_IMAGENET_TEMPLATES if templates == "openai-80" else open_clip.SIMPLE_IMAGENET_TEMPLATES
    )


def class_features(encoder: Encoder, class_names: Sequence[str], sentences: Sequence[Callable[[str], str]]) -> Tensor:
    """float32 [classes, d]: the normalised mean of a class's normalised sentence features, as open_clip builds it."""
    features = []
    for name in class_names:
        texts = encoder.texts([sentence(name) for sentence in sentences])
        features.append(F.normalize(texts.mean(0), dim=0))
    return torch.stack(features)
