"""Zero-shot classification: the class whose name, put into sentences, lies nearest to the picture."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..data.images.image_cache import ImageCache
from ..errors import UserError
from .class_names import with_classes
from .encoder import BATCH, EncodedImages, Encoder, EncodingCache, encode_images, require_images
from .intervals import bootstrap_interval

TEMPLATES = ("openai-80", "simple", "none", "custom")
PROTOCOLS = ("whole set", "published")
_LABELS, _SHUFFLES = 48, 10  # in a batch of the published evaluation; how many times it is drawn here
ROWS = 4096  # pictures whose scores are in memory at once
_TOGETHER = 16 * BATCH  # sentences of several classes, so that batches are full


@dataclasses.dataclass(frozen=True)
class ZeroShotResult:
    """Accuracies from 0 to 1; `per_class` by class name, for the classes that have pictures, and `per_class_images`
    how many.

    `top1_interval` is the 95 % bootstrap interval of `top1`. `confused` are (class, what it was taken for, how often),
    the most frequent first. `right_first` [images] says which pictures were right, in an order that is the same for all
    models. `in_batch` is the figure of the published evaluation (see `in_batch_share`), which is not an accuracy, where
    it was asked for.
    """

    images: int
    top1: float
    top5: float
    mean_per_class: float
    per_class: dict[str, float]
    classes: int
    notes: tuple[str, ...] = ()
    per_class_images: dict[str, int] = dataclasses.field(default_factory=dict)
    top1_interval: tuple[float, float] = (0.0, 1.0)
    confused: tuple[tuple[str, str, int], ...] = ()
    in_batch: float | None = None
    right_first: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {"top1": self.top1, "top5": self.top5, "mean_per_class": self.mean_per_class, "classes": self.classes}

    def details(self) -> dict[str, Any]:
        """What `as_dict` leaves out."""
        found: dict[str, Any] = {
            "top1_interval": list(self.top1_interval),
            "per_class": [
                {"class": name, "images": self.per_class_images[name], "top1": share}
                for name, share in self.per_class.items()
            ],
            "confused": [{"class": name, "taken_for": other, "images": count} for name, other, count in self.confused],
        }
        if self.in_batch is not None:
            found["published_in_batch_share"] = self.in_batch
        return found


def eval_zero_shot(
    full_clip: FullCLIP,
    dataset: ClipDataset,
    *,
    templates: str = "openai-80",
    custom_templates: Sequence[str] = (),
    protocol: str = "whole set",
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
    cache: ImageCache | None = None,
    features: EncodingCache | None = None,
) -> ZeroShotResult:
    """Zero-shot accuracy over a labelled data set; raises `UserError` for one without at least two classes. With the
    protocol "published" also the figure that was published for fine-tunes, which is another thing."""
    require_classes(with_classes(dataset)[0])  # before a network is built for nothing
    encoder = Encoder.of(
        full_clip,
        device=device,
        on_progress=on_progress,
        check_cancelled=check_cancelled,
        cache=cache,
        features=features,
    )
    return zero_shot_of(encoder, dataset, templates=templates, custom_templates=custom_templates, protocol=protocol)


def require_classes(dataset: ClipDataset) -> None:
    require_images(dataset)
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
    protocol: str = "whole set",
    pictures: EncodedImages | None = None,
) -> ZeroShotResult:
    """Zero-shot accuracy with a network that is already there, and its pictures if they were encoded before.

    A picture with several classes is right with any of them. A picture is right at k if fewer than k wrong classes
    have at least the score of its best right one.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"The protocol {protocol!r} is not known; choose {' or '.join(PROTOCOLS)}.")
    dataset, notes = with_classes(dataset)
    require_classes(dataset)
    sentences = sentences_of(templates, custom_templates)
    pictures = pictures or encode_images(encoder, dataset)
    classifier = class_features(encoder, dataset.class_names, sentences)
    right = right_classes(dataset, pictures.samples)
    require_labelled(right, dataset)
    labelled = right.any(1)
    right, features = right[labelled], pictures.features[labelled]
    ranks, taken_for = _answers(features, classifier, right)
    names, top1 = _told_apart(dataset.class_names), (ranks <= 1).double()
    members = {name: right[:, number] for number, name in enumerate(names) if right[:, number].any()}
    per_class = {name: top1[rows].mean().item() for name, rows in members.items()}
    in_batch = None
    if protocol == "published":
        samples = [samples for samples, known in zip(pictures.samples, labelled.tolist(), strict=True) if known]
        in_batch = _in_batch(encoder, dataset, features, samples)
    return ZeroShotResult(
        images=len(right),
        top1=top1.mean().item(),
        top5=(ranks <= 5).double().mean().item(),
        mean_per_class=sum(per_class.values()) / len(per_class),
        per_class=per_class,
        classes=len(dataset.class_names),
        notes=(*notes, *pictures.notes),
        per_class_images={name: int(rows.sum()) for name, rows in members.items()},
        top1_interval=bootstrap_interval(top1),
        confused=_confused(names, right, ranks, taken_for),
        in_batch=in_batch,
        right_first=ranks <= 1,
    )


def right_classes(dataset: ClipDataset, samples: Sequence[Sequence[int]]) -> Tensor:
    """bool [n, classes]: the classes of any of a picture's copies."""
    right = torch.zeros(len(samples), len(dataset.class_names), dtype=torch.bool)
    for row, copies in enumerate(samples):
        for index in copies:
            if dataset.labels[index] is not None:
                right[row, dataset.labels[index]] = True
    return right


def require_labelled(right_nc: Tensor, dataset: ClipDataset) -> None:
    if not right_nc.any():
        raise UserError(f"None of the pictures of {dataset.name} that can be opened has a class.")


def _answers(features_nd: Tensor, classifier_cd: Tensor, right_nc: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [n]: the rank of each picture's best right class, and the wrong class of the highest score."""
    ranks, wrong = [], []
    for start in range(0, len(features_nd), ROWS):
        scores = features_nd[start : start + ROWS].double() @ classifier_cd.double().T
        right = right_nc[start : start + ROWS]
        ranks.append(ranks_of(scores, right))
        wrong.append(scores.masked_fill(right, -torch.inf).argmax(1))
    return torch.cat(ranks), torch.cat(wrong)


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names of which none comes twice."""
    counts, seen = collections.Counter(names), collections.Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if counts[name] == 1 else f"{name} ({seen[name]})")
    return found


def _confused(
    names: Sequence[str], right_nc: Tensor, ranks_n: Tensor, taken_for_n: Tensor
) -> tuple[tuple[str, str, int], ...]:
    wrong = ranks_n > 1
    pairs = zip(right_nc[wrong].int().argmax(1).tolist(), taken_for_n[wrong].tolist(), strict=True)
    ordered = sorted(collections.Counter(pairs).items(), key=lambda item: (-item[1], item[0]))
    return tuple((names[one], names[other], count) for (one, other), count in ordered)


def _in_batch(encoder: Encoder, dataset: ClipDataset, features: Tensor, samples: Sequence[Sequence[int]]) -> float:
    """`in_batch_share` of a data set's pictures, in the order of their names, and of their bare class names."""
    labels = [
        next(dataset.labels[index] for index in copies if dataset.labels[index] is not None) for copies in samples
    ]
    names = [min(dataset.names[index] for index in copies) for copies in samples]
    order = sorted(range(len(names)), key=names.__getitem__)
    texts = encoder.raw_texts(dataset.class_names)
    return in_batch_share(features[order], texts, [labels[row] for row in order])


def in_batch_share(features_nd: Tensor, texts_cd: Tensor, labels_n: Sequence[int], *, seed: int = 0) -> float:
    """The figure that was published for GmP fine-tunes as their accuracy (github.com/zer0int/CLIP-fine-tune, its
    evaluation on ObjectNet/MVT): the pictures are shuffled into batches of 48, and each is asked only which of the 48
    labels in its batch is its own, by products with text features of whatever length they have. Chance is 1 in 48 or
    better, a label that the batch does not hold can not be mistaken, and long texts win: it is no zero-shot accuracy,
    and only compares with figures of the same kind.

    The mean of ten shuffles; there each row of the table was a picture, here each picture is there once.
    """
    chance, count, right = random.Random(seed), len(labels_n), 0
    labels, texts = torch.tensor(labels_n), texts_cd.double()
    for _ in range(_SHUFFLES):
        order = torch.tensor(chance.sample(range(count), count))
        for rows in order.split(_LABELS):
            scores = features_nd[rows].double() @ texts[labels[rows]].T
            right += int((labels[rows][scores.argmax(1)] == labels[rows]).sum())
    return right / (_SHUFFLES * count)


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
    texts = {name: [sentence(name) for sentence in sentences] for name in class_names}
    named = {
        name: hashlib.sha256("\0".join(lines).encode("utf-8", "replace")).digest() for name, lines in texts.items()
    }
    found = {name: row for name in texts if (row := encoder.kept("class", named[name])) is not None}
    fresh = [name for name in texts if name not in found]
    together = max(1, _TOGETHER // len(sentences))
    for start in range(0, len(fresh), together):
        names = fresh[start : start + together]
        features = encoder.passing_texts([line for name in names for line in texts[name]])
        for name, row in zip(names, features.view(len(names), len(sentences), -1), strict=True):
            found[name] = F.normalize(row.mean(0), dim=0)
            encoder.keep(found[name], "class", named[name])
    return torch.stack([found[name] for name in class_names])
