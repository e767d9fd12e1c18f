"""Zero-shot classification: the class whose name, put into sentences, is nearest to the image."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..errors import UserError
from ..report.charts import bar_chart
from ..report.tables import Rows, percent
from .class_names import with_classes
from .encoder import BATCH, EncodedImages, Encoder, Runtime, encode_images, require_images
from .intervals import bootstrap_interval, difference_interval

TEMPLATES = ("openai-80", "simple", "none", "custom")
PROTOCOLS = ("whole set", "published")
Sentence = Callable[[str], str]  # from a class name
ROWS = 4096  # images whose scores are in memory at once
_PUBLISHED_BATCH, _SHUFFLES = 48, 10  # labels in a batch of the published evaluation; how often it is drawn here
_SENTENCES_AT_ONCE = 16 * BATCH  # of several classes together, so that batches are full
_LISTED_MISTAKES = 100  # in a table; the JSON has all


@dataclasses.dataclass(frozen=True)
class ZeroShotResult:
    """Accuracies from 0 to 1.

    `per_class` has the classes that have images, `per_class_images` how many they have. `top1_interval` is the 95 %
    bootstrap interval of `top1`. `confused` holds (class, what it was taken for, how often), most frequent first.
    `right_first` [images] says which images were right, in an order that is the same for all models. `in_batch` is the
    figure of the published evaluation, if asked for (see `in_batch_share`; it is not an accuracy).
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
        published = {} if self.in_batch is None else {"published_in_batch_share": self.in_batch}
        return published | {
            "top1_interval": list(self.top1_interval),
            "per_class": [
                {"class": name, "images": self.per_class_images[name], "top1": share}
                for name, share in self.per_class.items()
            ],
            "confused": [{"class": name, "taken_for": other, "images": count} for name, other, count in self.confused],
        }

    def rows(self) -> dict[str, str]:
        low, high = self.top1_interval
        rows = {
            "zero-shot top 1": percent(self.top1),
            "95 % interval": f"{100 * low:.1f} to {high:.1%}",
            "top 5": percent(self.top5),
            "mean per class": percent(self.mean_per_class),
        }
        if self.in_batch is not None:
            rows["1 of 48 labels (as published; not an accuracy)"] = percent(self.in_batch)
        return rows


def zero_shot_chart(results: Mapping[str, ZeroShotResult], title: str) -> Image:
    """Draw accuracies; of one or two models also the classes that they mistake most often."""
    groups = {
        "top 1": {name: result.top1 for name, result in results.items()},
        "top 5": {name: result.top5 for name, result in results.items()},
        "mean of classes": {name: result.mean_per_class for name, result in results.items()},
    }
    confused = {name: result.confused for name, result in results.items()} if len(results) <= 2 else {}
    intervals = {"top 1": {name: result.top1_interval for name, result in results.items()}}
    return bar_chart(groups, title=title, intervals=intervals, confused=confused)


def class_tables(results: Mapping[str, ZeroShotResult]) -> dict[str, Rows]:
    """Return the accuracy of each class, and each model's mistakes, as tables by heading."""
    first = next(iter(results.values()))
    classes = [
        {"class": f"class {name} ({first.per_class_images[name]})"}
        | {model: percent(result.per_class[name]) for model, result in results.items()}
        for name in first.per_class
    ]
    tables: dict[str, Rows] = {f"Accuracy of each of {len(classes)} classes": classes}
    for model, result in results.items():
        tables[f"What the {model} mistakes most often"] = [
            {"class": name, "taken for": other, "images": str(count)}
            for name, other, count in result.confused[:_LISTED_MISTAKES]
        ]
    return tables


def difference_remark(model: ZeroShotResult, baseline: ZeroShotResult | None) -> list[str]:
    """Say how far the difference to the baseline may be due to the choice of images."""
    if baseline is None or model.right_first is None or baseline.right_first is None:
        return []
    if len(model.right_first) != len(baseline.right_first):
        return []
    low, high = difference_interval(model.right_first, baseline.right_first)
    return [f"On other images of this kind, top 1 may differ by {100 * low:+.1f} to {100 * high:+.1f} points."]


def eval_zero_shot(
    full_clip: FullCLIP,
    dataset: ClipDataset,
    *,
    templates: str = "openai-80",
    custom_templates: Sequence[str] = (),
    protocol: str = "whole set",
    **runtime: Unpack[Runtime],
) -> ZeroShotResult:
    """Measure zero-shot accuracy on a labelled dataset; raises `UserError` for fewer than two classes.

    With the protocol "published" also the figure that was published for fine-tunes, which is not an accuracy.
    """
    require_classes(with_classes(dataset)[0])  # before a network is built for nothing
    encoder = Encoder.of(full_clip, **runtime)
    return zero_shot_of(encoder, dataset, templates=templates, custom_templates=custom_templates, protocol=protocol)


def require_classes(dataset: ClipDataset) -> None:
    require_images(dataset)
    if len(dataset.class_names) < 2:
        number = "a single class" if dataset.class_names else "no classes"
        raise UserError(
            f"{dataset.name} has {number}; for zero-shot accuracy give a folder with a subfolder of images for each "
            "class."
        )


def zero_shot_of(
    encoder: Encoder,
    dataset: ClipDataset,
    *,
    templates: str = "openai-80",
    custom_templates: Sequence[str] = (),
    protocol: str = "whole set",
    images: EncodedImages | None = None,
) -> ZeroShotResult:
    """Measure with a network that is already built, and its images if they are already encoded.

    An image with several classes is right with any of them. It is right at k if fewer than k wrong classes have at
    least the score of its best right one.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol is {protocol!r}; choose {' or '.join(PROTOCOLS)}.")
    dataset, notes = with_classes(dataset)
    require_classes(dataset)
    sentences = sentences_of(templates, custom_templates)
    encoded = images or encode_images(encoder, dataset)
    classifier = class_features(encoder, dataset.class_names, sentences)
    right = right_classes(dataset, encoded.samples)
    require_labelled(right, dataset)
    labelled = right.any(1)
    right, features = right[labelled], encoded.features[labelled]
    ranks, taken_for = _answers(features, classifier, right)
    names, top1 = _distinct(dataset.class_names), (ranks <= 1).double()
    members = {name: right[:, number] for number, name in enumerate(names) if right[:, number].any()}
    per_class = {name: top1[rows].mean().item() for name, rows in members.items()}
    in_batch = None
    if protocol == "published":
        samples = [samples for samples, known in zip(encoded.samples, labelled.tolist(), strict=True) if known]
        in_batch = _in_batch(encoder, dataset, features, samples)
    return ZeroShotResult(
        images=len(right),
        top1=top1.mean().item(),
        top5=(ranks <= 5).double().mean().item(),
        mean_per_class=sum(per_class.values()) / len(per_class),
        per_class=per_class,
        classes=len(dataset.class_names),
        notes=(*notes, *encoded.notes),
        per_class_images={name: int(rows.sum()) for name, rows in members.items()},
        top1_interval=bootstrap_interval(top1),
        confused=_confused(names, right, ranks, taken_for),
        in_batch=in_batch,
        right_first=ranks <= 1,
    )


def labels_of(dataset: ClipDataset, samples: Sequence[int]) -> list[int]:
    """Return the distinct classes of an image's copies, in ascending order."""
    return sorted({label for index in samples if (label := dataset.labels[index]) is not None})


def right_classes(dataset: ClipDataset, samples: Sequence[Sequence[int]]) -> Tensor:
    """Return bool [n, classes]: the classes of any of an image's copies."""
    right = torch.zeros(len(samples), len(dataset.class_names), dtype=torch.bool)
    for row, copies in enumerate(samples):
        right[row, labels_of(dataset, copies)] = True
    return right


def require_labelled(right_nc: Tensor, dataset: ClipDataset) -> None:
    if not right_nc.any():
        raise UserError(f"None of the images of {dataset.name} that can be opened has a class.")


def _answers(features_nd: Tensor, classifier_cd: Tensor, right_nc: Tensor) -> tuple[Tensor, Tensor]:
    """Return int64 [n]: the rank of each image's best right class, and the wrong class with the highest score."""
    ranks, wrong = [], []
    for start in range(0, len(features_nd), ROWS):
        scores = features_nd[start : start + ROWS].double() @ classifier_cd.double().T
        right = right_nc[start : start + ROWS]
        ranks.append(ranks_of(scores, right))
        wrong.append(scores.masked_fill(right, -torch.inf).argmax(1))
    return torch.cat(ranks), torch.cat(wrong)


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that belong to several classes."""
    counts, seen = collections.Counter(names), collections.Counter[str]()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if counts[name] == 1 else f"{name} ({seen[name]})")
    return distinct


def _confused(
    names: Sequence[str], right_nc: Tensor, ranks_n: Tensor, taken_for_n: Tensor
) -> tuple[tuple[str, str, int], ...]:
    wrong = ranks_n > 1
    pairs = zip(right_nc[wrong].int().argmax(1).tolist(), taken_for_n[wrong].tolist(), strict=True)
    ordered = sorted(collections.Counter(pairs).items(), key=lambda item: (-item[1], item[0]))
    return tuple((names[shown], names[answer], count) for (shown, answer), count in ordered)


def _in_batch(encoder: Encoder, dataset: ClipDataset, features: Tensor, samples: Sequence[Sequence[int]]) -> float:
    """Return `in_batch_share` for a dataset, its images sorted by name and its class names without a sentence."""
    labels = [next(label for index in copies if (label := dataset.labels[index]) is not None) for copies in samples]
    names = [min(dataset.names[index] for index in copies) for copies in samples]
    order = sorted(range(len(names)), key=names.__getitem__)
    texts = encoder.encode_texts_uncached(dataset.class_names, unit=False)
    return in_batch_share(features[order], texts, [labels[row] for row in order])


def in_batch_share(features_nd: Tensor, texts_cd: Tensor, labels_n: Sequence[int], *, seed: int = 0) -> float:
    """Return the figure that was published as the accuracy of GmP fine-tunes. It is not a zero-shot accuracy.

    From github.com/zer0int/CLIP-fine-tune, its evaluation on ObjectNet/MVT: images are shuffled into batches of 48,
    and each one only has to find its label among the 48 of its batch, by products with text features that are not
    normalised. Chance is at least 1 in 48, a class outside the batch cannot be mistaken for, and long text features
    win. It compares with figures of the same kind only. Here it is the mean of ten shuffles, each image counted once
    (there, once per row of a table).
    """
    rng, count, right = random.Random(seed), len(labels_n), 0
    labels, texts = torch.tensor(labels_n), texts_cd.double()
    for _ in range(_SHUFFLES):
        order = torch.tensor(rng.sample(range(count), count))
        for rows in order.split(_PUBLISHED_BATCH):
            scores = features_nd[rows].double() @ texts[labels[rows]].T
            right += int((labels[rows][scores.argmax(1)] == labels[rows]).sum())
    return right / (_SHUFFLES * count)


def ranks_of(scores_nc: Tensor, right_nc: Tensor) -> Tensor:
    """Return 1 + the number of wrong classes with at least the score of the best right one: a tie is not a win."""
    scores = scores_nc.mul(1e9).round()  # equal sentences get equal scores, whatever the order of summation
    best = scores.masked_fill(~right_nc, -torch.inf).amax(1, keepdim=True)
    return 1 + ((scores >= best) & ~right_nc).sum(1)


def sentences_of(templates: str, custom_templates: Sequence[str] = ()) -> list[Sentence]:
    """Return functions from a class name to a sentence: OpenAI's 80, open_clip's short set, the bare name, or custom
    lines with {} where the name goes."""
    if templates not in TEMPLATES:
        raise UserError(f"templates is {templates!r}; choose {' or '.join(TEMPLATES)}.")
    if templates == "none":
        return [str]
    if templates == "custom":
        return _custom_sentences(custom_templates)
    import open_clip

    return list(
        open_clip.OPENAI_IMAGENET_TEMPLATES if templates == "openai-80" else open_clip.SIMPLE_IMAGENET_TEMPLATES
    )


def _custom_sentences(custom_templates: Sequence[str]) -> list[Sentence]:
    lines = [line.strip() for line in custom_templates if line.strip()]
    invalid = [line for line in lines if "{}" not in line]
    if invalid or not lines:
        problem = f"{invalid[0]!r} has none" if invalid else "there is none"
        raise UserError(
            f"A custom template is a line with {{}} where the class name goes, and {problem}; write for example "
            '"a photo of a {}."'
        )

    def sentence_of(line: str) -> Sentence:
        return lambda name: line.replace("{}", name)

    return [sentence_of(line) for line in lines]


def class_features(encoder: Encoder, class_names: Sequence[str], sentences: Sequence[Sentence]) -> Tensor:
    """Return float32 [classes, d]: the normalised mean of a class's normalised sentence features, as in open_clip."""
    texts = {name: [sentence(name) for sentence in sentences] for name in class_names}
    keys = {name: hashlib.sha256("\0".join(lines).encode("utf-8", "replace")).digest() for name, lines in texts.items()}
    rows = {name: row for name in texts if (row := encoder.features.get("class", keys[name])) is not None}
    new = [name for name in texts if name not in rows]
    at_once = max(1, _SENTENCES_AT_ONCE // len(sentences))
    for start in range(0, len(new), at_once):
        names = new[start : start + at_once]
        features = encoder.encode_texts_uncached([line for name in names for line in texts[name]])
        for name, row in zip(names, features.view(len(names), len(sentences), -1), strict=True):
            rows[name] = F.normalize(row.mean(0), dim=0)
            encoder.features.put(rows[name], "class", keys[name])
    return torch.stack([rows[name] for name in class_names])
