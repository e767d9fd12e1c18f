"""Self-check: do the evaluators reproduce the published figures of OpenAI's weights on ImageNet and COCO?"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from typing_extensions import Unpack

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..data.images.folder_tree import is_image
from ..data.images.paths import files_in
from ..data.load import load_dataset
from ..data.readers.parsed import Captions, caption_lines
from ..errors import UserError, one_line, shown
from ..notes import Notes
from ..report.tables import table
from .encoder import Encoder, Runtime, encode_images
from .retrieval import retrieval_of
from .zero_shot import zero_shot_of

Activation = Literal["quick_gelu", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
_SIZE_TOLERANCE = 0.02  # share of its images that a dataset may lack or have too many of


@dataclasses.dataclass(frozen=True)
class Figure:
    """A published share (0 to 1) on "imagenet" or "coco", and how far a measurement may be off.

    Decoders and resizers differ a little. The figure holds for a dataset of `images` images.
    """

    name: str
    on: str
    value: float
    tolerance: float
    images: int


TOP_1, TEXT_TO_IMAGE, IMAGE_TO_TEXT = "ImageNet zero-shot top 1", "COCO text to image R@5", "COCO image to text R@5"
# Of ViT-L/14, from the result tables of open_clip and CLIP_benchmark; COCO's are on Karpathy's split.
PUBLISHED = (
    Figure(TOP_1, "imagenet", 0.755, 0.004, 50_000),
    Figure(TEXT_TO_IMAGE, "coco", 0.611, 0.01, 5000),
    Figure(IMAGE_TO_TEXT, "coco", 0.792, 0.01, 5000),
)


@dataclasses.dataclass(frozen=True)
class SelfCheck:
    """`measured[activation][figure's name]`, and whether the model's own activation reproduces the figures."""

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
                | {activation: values[figure.name] for activation, values in self.measured.items()}
                for figure in self.figures
            ],
        }

    def table(self) -> str:
        return table(
            [
                {"figure": figure.name, "published": f"{figure.value:.1%}"}
                | {f"measured ({name})": f"{values[figure.name]:.1%}" for name, values in self.measured.items()}
                for figure in self.figures
            ]
        )


def selfcheck(
    full_clip: FullCLIP,
    *,
    imagenet: str | os.PathLike | None = None,
    coco: str | os.PathLike | None = None,
    published: Sequence[Figure] = PUBLISHED,
    on_note: Callable[[str], None] = lambda note: None,
    **runtime: Unpack[Runtime],
) -> SelfCheck:
    """Measure a model whose figures are known, with both activations that its file may mean, and compare.

    `imagenet` is a folder of ImageNet's validation images with a subfolder for each class; `coco` is one with COCO's
    captioned images, of which Karpathy's test split counts if its file is there (see `karpathy_test`). Raises
    `UserError` if neither is given or one cannot be used.
    """
    datasets = _load_datasets(imagenet, coco)
    figures = tuple(figure for figure in published if figure.on in datasets)
    for figure in figures:
        _require_size(figure, datasets[figure.on])
    own = full_clip.architecture.activation
    measured: dict[str, dict[str, float]] = {}
    notes = Notes()
    for activation in (own, *(other for other in ACTIVATIONS if other != own)):
        architecture = dataclasses.replace(full_clip.architecture, activation=activation)
        encoder = Encoder.of(dataclasses.replace(full_clip, architecture=architecture), **runtime)
        measured[activation] = {}
        for name, dataset in datasets.items():
            on_note(f"{name} with {activation}: {len(dataset)} images.")
            shares, more = _measure(name, encoder, dataset)
            measured[activation] |= shares
            notes.extend(more)
    passed, verdict = judge(own, figures, measured)
    return SelfCheck(own, figures, measured, passed, verdict, tuple(notes))


def require_folders(imagenet: str | os.PathLike | None, coco: str | os.PathLike | None) -> None:
    """Raise `UserError` unless at least one is given, and each that is given is a folder."""
    if not imagenet and not coco:
        raise UserError(
            "The self-check needs a dataset with published figures: give --imagenet, a folder of ImageNet's 50,000 "
            "validation images in a subfolder for each class, or --coco, one with COCO's images and Karpathy's "
            "dataset_coco.json."
        )
    for name, path in (("imagenet", imagenet), ("coco", coco)):
        if path and not os.path.isdir(path):
            raise UserError(f"--{name} is {path}, which is not a folder; give the one with the images.")


def _load_datasets(imagenet: str | os.PathLike | None, coco: str | os.PathLike | None) -> dict[str, ClipDataset]:
    require_folders(imagenet, coco)
    datasets = {}
    if imagenet:
        datasets["imagenet"] = load_dataset(imagenet)
        if not datasets["imagenet"].has_labels:
            raise UserError(f"--imagenet is {imagenet}, which has no subfolder of images for each class.")
    if coco:
        datasets["coco"] = karpathy_test(coco) or load_dataset(coco)
        if not datasets["coco"].has_captions:
            raise UserError(f"--coco is {coco}, which has no captions.")
    return datasets


def _require_size(figure: Figure, dataset: ClipDataset) -> None:
    """Refuse a dataset of another size: among more images the right one is found less often."""
    count = len(dataset) - len(dataset.missing())
    if abs(count - figure.images) <= _SIZE_TOLERANCE * figure.images:
        return
    problem = f"--{figure.on} has {count:,} images, and the published figures are for {figure.images:,}"
    if figure.on == "coco":
        raise UserError(
            f"{problem}, the test part of Karpathy's split; put {SPLIT_FILES[0]}, which lists them, into the folder "
            "with the images of 2014 or 2017."
        )
    raise UserError(f"{problem}; give the whole validation set, with a subfolder for each class.")


def _measure(name: str, encoder: Encoder, dataset: ClipDataset) -> tuple[dict[str, float], Sequence[str]]:
    images = encode_images(encoder, dataset)
    if name == "imagenet":
        zero_shot = zero_shot_of(encoder, dataset, images=images)
        return {TOP_1: zero_shot.top1}, zero_shot.notes
    retrieval = retrieval_of(encoder, dataset, images=images)
    recalls = {TEXT_TO_IMAGE: retrieval.text_to_image.r5, IMAGE_TO_TEXT: retrieval.image_to_text.r5}
    return recalls, retrieval.notes


def judge(own: str, figures: Sequence[Figure], measured: Mapping[str, Mapping[str, float]]) -> tuple[bool, str]:
    """Return whether the model's own activation reproduces the published figures, and a verdict in one sentence."""

    def reproduced(activation: str) -> bool:
        return all(abs(measured[activation][figure.name] - figure.value) <= figure.tolerance for figure in figures)

    def distance(activation: str) -> float:
        return sum(abs(measured[activation][figure.name] - figure.value) for figure in figures)

    if reproduced(own):
        return True, f"The published figures are reached: the evaluators and the activation ({own}) are right."
    others = [activation for activation in measured if activation != own]
    if right := next(filter(reproduced, others), None):
        return False, (
            f"The activation is wrong: the model runs with {own}, but the published figures need {right}; use "
            f"--activation {right}."
        )
    worst = max(figures, key=lambda figure: abs(measured[own][figure.name] - figure.value) - figure.tolerance)
    nearer = [activation for activation in others if distance(activation) < distance(own)]
    return False, (
        f"The published figures are not reached with either activation: {worst.name} is "
        f"{measured[own][worst.name]:.1%} instead of {worst.value:.1%}"
        + (f", and {nearer[0]} comes nearer than {own}" if nearer else "")
        + "; are these OpenAI's ViT-L/14 weights, and the whole validation set?"
    )


# ---- Karpathy's split of COCO ----------------------------------------------------------------------------------------
# Karpathy and Fei-Fei 2015, "Deep visual-semantic alignments for generating image descriptions" (arXiv:1412.2306).

TEST = "test"
# Karpathy's own file with all parts, and BLIP's with the test part; in the folder itself or one of these below it.
SPLIT_FILES = ("dataset_coco.json", "coco_karpathy_test.json")
_SPLIT_FOLDERS = ("", "annotations", "karpathy")
# The test images come from COCO's validation images of 2014, which the 2017 release distributed differently.
_IMAGE_FOLDERS = ("", "val2014", "train2017", "val2017")
_NUMBER = re.compile(r"(\d{12})\.\w+$")


def karpathy_test(folder: str | os.PathLike) -> ClipDataset | None:
    """Return the 5,000 test images of the split whose file is in COCO's folder; None if there is no such file.

    Images are matched by their numbers, so those of 2014 and of 2017 both work. Raises `UserError` for a file that is
    damaged or lists no test image.
    """
    top = Path(os.path.abspath(folder))
    candidates = (top / subfolder / name for name in SPLIT_FILES for subfolder in _SPLIT_FOLDERS)
    file = next(filter(Path.is_file, candidates), None)
    if file is None:
        return None
    captions = dict(_test_images(file))
    if not captions:
        raise UserError(f"{file} lists no test image with captions; is it Karpathy's split of COCO?")
    paths = _paths_by_number(top)
    return ClipDataset(
        name=top.name,
        folder=top,
        format="karpathy",
        reason=f"{file.name} lists the test images",
        names=[paths.get(_number(name), name) for name in captions],
        captions=Captions(list(captions.values())),
        labels=[None] * len(captions),
    )


def _test_images(file: Path) -> Iterator[tuple[str, str]]:
    """Yield names and captions (one a line).

    Reads {"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]} or [{"image", "caption": […]}].
    """
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
        if isinstance(content, Mapping):
            for record in content["images"]:
                if record["split"] == TEST:
                    name = "/".join(filter(None, (record.get("filepath"), record["filename"])))
                    yield name, caption_lines([sentence["raw"] for sentence in record["sentences"]])
            return
        for record in content:
            name, captions = record["image"], record["caption"]
            if not isinstance(name, str):
                raise TypeError(f"{shown(name)} is not the name of an image")
            yield name, caption_lines([captions] if isinstance(captions, str) else captions)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is not Karpathy's split of COCO ({one_line(error)}); download it again.") from error


def _paths_by_number(top: Path) -> dict[str, str]:
    """Return the paths of COCO's images, relative to its folder, by their numbers."""
    paths: dict[str, str] = {}
    for parent, subfolder in itertools.product(("", "images"), _IMAGE_FOLDERS):
        folder = os.path.join(parent, subfolder)
        for name in sorted(filter(is_image, files_in(str(top / folder)))):
            if number := _number(name):
                paths.setdefault(number, os.path.join(folder, name).replace(os.sep, "/"))
    return paths


def _number(name: str) -> str:
    match = _NUMBER.search(name)
    return match[1] if match else ""
