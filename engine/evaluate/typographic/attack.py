"""Typographic attack: does a wrong word written on an image win over what the image shows?

Goh et al. 2021, "Multimodal neurons in artificial neural networks" (distill.pub/2021/multimodal-neurons); images that
people wrote on: Westerhoff et al. 2025, "SCAM" (arxiv.org/abs/2504.04893).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from typing_extensions import Unpack

from ...clip.full_clip import FullCLIP
from ...data.dataset import ClipDataset
from ...data.decoded_images import DecodedImages, image_batches
from ...data.images.transforms import Transform
from ...errors import UserError
from ...report.charts import bar_chart
from ...report.tables import Rows, percent
from ..class_names import with_classes
from ..encoder import BATCH, EncodedImages, Encoder, Runtime, encode_images, require_images
from ..zero_shot import (
    ROWS,
    Sentence,
    class_features,
    ranks_of,
    require_classes,
    require_labelled,
    right_classes,
    sentences_of,
)
from .drawing import can_be_drawn, write_word
from .photographed import CLEAN, DRAWN, WrittenOn, attacks_in


@dataclasses.dataclass(frozen=True)
class Attacked:
    """An image with a word on it: sample `index` of the dataset; `name` seeds the drawing of its word.

    `answer` is what the model takes it for, `fooled` whether that is the word.
    """

    index: int
    name: str
    shows: str
    word: str
    kind: str
    answer: str
    right: bool
    fooled: bool


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of the images of one kind: how many are right among all names, and for how many the written word wins.

    `object_over_word`: how many are right with only the object and its word to choose from, which is what SCAM
    publishes (None where no word is known).
    """

    images: int
    accuracy: float
    word_wins: float
    object_over_word: float | None


@dataclasses.dataclass(frozen=True)
class TypographicResult:
    """Accuracies (0 to 1) on clean and attacked images; `images` counts the attacked ones.

    `word_wins` is how often the answer is the written word. `kinds` has the shares by how the words got on the images.
    Without clean images `accuracy_clean` is None. `attacked` are the single images, in an order that is the same for
    all models; `transform` and `seed` show them as the model saw them.
    """

    images: int
    accuracy_clean: float | None
    accuracy_under_attack: float
    word_wins: float
    notes: tuple[str, ...] = ()
    kinds: Mapping[str, Shares] = dataclasses.field(default_factory=dict)
    attacked: tuple[Attacked, ...] = dataclasses.field(default=(), repr=False)
    transform: Transform | None = dataclasses.field(default=None, repr=False)
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "accuracy_clean": self.accuracy_clean,
            "accuracy_under_attack": self.accuracy_under_attack,
            "word_wins": self.word_wins,
            "kinds": {kind: dataclasses.asdict(shares) for kind, shares in self.kinds.items()},
        }

    def rows(self) -> dict[str, str]:
        return {
            "clean": percent(self.accuracy_clean),
            "under attack": percent(self.accuracy_under_attack),
            "word wins": percent(self.word_wins),
        }


def typographic_chart(results: Mapping[str, TypographicResult], title: str) -> Image:
    groups: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        for kind, shares in result.kinds.items():
            groups.setdefault(f"right, {kind}", {})[name] = shares.accuracy
        groups.setdefault("the word wins", {})[name] = result.word_wins
    return bar_chart(groups, title=title)


def kind_tables(results: Mapping[str, TypographicResult]) -> dict[str, Rows]:
    """Return each kind's shares as a table by heading."""
    rows: Rows = []
    for kind, shares in next(iter(results.values())).kinds.items():
        for words, field in (
            ("right", "accuracy"),
            ("the written word wins", "word_wins"),
            ("object over its word", "object_over_word"),
        ):
            if kind != CLEAN or field != "word_wins":
                numbers = {name: percent(getattr(result.kinds[kind], field)) for name, result in results.items()}
                rows.append({"images": f"{kind} ({shares.images}): {words}"} | numbers)
    return {"Typographic attack, by kind": rows}


def eval_typographic(
    full_clip: FullCLIP,
    dataset: ClipDataset,
    *,
    seed: int = 0,
    templates: str = "simple",
    **runtime: Unpack[Runtime],
) -> TypographicResult:
    """Measure zero-shot accuracy on clean images, and on images with a wrong word on them.

    Where the dataset says which words are written on its images (`attacks_in`), these are measured, among all objects
    and words. Otherwise the name of another class is drawn on each labelled image; word, font, position, size and
    colours depend on `seed` and the image's name alone, so that every model sees the same. Raises `UserError` for a
    dataset without at least two classes.
    """
    require_attackable(dataset)
    return typographic_of(Encoder.of(full_clip, **runtime), dataset, seed=seed, templates=templates)


def require_attackable(dataset: ClipDataset) -> None:
    """Raise `UserError` unless words are written on the images, or there are classes whose names can be drawn."""
    require_images(dataset)
    if not _has_attacks(attacks_in(dataset)):
        require_classes(with_classes(dataset)[0])


def _has_attacks(written: Mapping[int, WrittenOn]) -> bool:
    return any(about.is_attack for about in written.values())


def typographic_of(
    encoder: Encoder,
    dataset: ClipDataset,
    *,
    seed: int = 0,
    templates: str = "simple",
    images: EncodedImages | None = None,
) -> TypographicResult:
    """As `eval_typographic`, with a network that is already built, and its images if they are already encoded."""
    sentences = sentences_of(templates)
    written = attacks_in(dataset)
    encoded = images or encode_images(encoder, dataset)
    if _has_attacks(written):
        result = _measure_written(encoder, dataset, written, sentences, encoded)
    else:
        result = _measure_drawn(encoder, dataset, seed, sentences, encoded)
    return dataclasses.replace(result, transform=encoder.transform, seed=seed)


class _Questions(NamedTuple):
    """Images to be classified among `names`, one a row.

    `indices` and `keys` identify samples (see `Attacked`), `kinds` say how the word got there. `right` bool
    [n, names] are the right answers, `words` int64 [n] the names that are written, -1 where none is.
    """

    names: Sequence[str]
    indices: Sequence[int]
    keys: Sequence[str]
    kinds: Sequence[str]
    right: Tensor
    words: Tensor


# ---- words that were written on the images ---------------------------------------------------------------------------


def _measure_written(
    encoder: Encoder,
    dataset: ClipDataset,
    written: Mapping[int, WrittenOn],
    sentences: Sequence[Sentence],
    images: EncodedImages,
) -> TypographicResult:
    names = sorted({name for about in written.values() for name in (about.shows, about.word) if name})
    numbers = {name: number for number, name in enumerate(names)}
    index_of = {
        row: next(index for index in samples if index in written)
        for row, samples in enumerate(images.samples)
        if not written.keys().isdisjoint(samples)
    }
    about = [written[index] for index in index_of.values()]
    if not any(each.is_attack for each in about):
        raise UserError(
            f"None of the images of {dataset.name} that have words on them can be opened; put them where its table "
            "says they are."
        )
    right = torch.zeros(len(about), len(names), dtype=torch.bool)
    right[range(len(about)), [numbers[each.shows] for each in about]] = True
    words = torch.tensor([numbers.get(each.word, -1) for each in about])
    indices = list(index_of.values())
    keys, kinds = [dataset.names[index] for index in indices], [each.kind for each in about]
    notes = [*images.notes]
    if left_out := len(images.samples) - len(about):
        notes.append(f"{left_out} images of {dataset.name} are in no table of attacks and are left out.")
    classifier = class_features(encoder, names, sentences)
    questions = _Questions(names, indices, keys, kinds, right, words)
    return _result(questions, _answers(images.features[list(index_of)], classifier, questions), notes)


# ---- words that are drawn --------------------------------------------------------------------------------------------


def _measure_drawn(
    encoder: Encoder, dataset: ClipDataset, seed: int, sentences: Sequence[Sentence], images: EncodedImages
) -> TypographicResult:
    dataset, notes = with_classes(dataset)
    require_classes(dataset)
    drawable = [can_be_drawn(name) for name in dataset.class_names]
    if sum(drawable) < 2:
        raise UserError(
            f"No font here has the letters of the class names of {dataset.name}, such as {dataset.class_names[0]}, so "
            "words cannot be drawn; give classes with names in Latin, Greek or Cyrillic letters."
        )
    right = right_classes(dataset, images.samples)
    require_labelled(right, dataset)
    rows = (right.any(1) & ~right.all(1)).nonzero().flatten().tolist()
    if not rows:
        raise UserError(
            f"The images of {dataset.name} belong to all of its classes at once, so there is no other class to write "
            "on them; put different images into its classes."
        )
    firsts = [images.samples[row][0] for row in rows]
    keys = [min(dataset.names[index] for index in images.samples[row]) for row in rows]
    words = [_other_class(right[row], drawable, f"{seed} {key} word") for row, key in zip(rows, keys, strict=True)]
    drawings = {
        index: (dataset.class_names[word], f"{seed} {key}")
        for index, word, key in zip(firsts, words, keys, strict=True)
    }
    indices, features = encoder.encode_batches(_with_words(encoder.images_of(dataset), drawings), len(rows))
    if indices != firsts:
        raise UserError(f"Images of {dataset.name} disappeared while it was measured; put them back and try again.")
    questions = _Questions(
        dataset.class_names,
        firsts * 2,
        keys * 2,
        [CLEAN] * len(rows) + [DRAWN] * len(rows),
        right[rows].repeat(2, 1),
        torch.tensor(words * 2),
    )
    classifier = class_features(encoder, dataset.class_names, sentences)
    answers = _answers(torch.cat([images.features[rows], features]), classifier, questions)
    return _result(questions, answers, [*notes, *images.notes])


def _other_class(right_c: Tensor, drawable: Sequence[bool], seed: str) -> int:
    """Draw a class that is not the image's own."""
    others = (~right_c).nonzero().flatten().tolist()
    return random.Random(seed).choice([number for number in others if drawable[number]] or others)


def _with_words(images: DecodedImages, drawings: Mapping[int, tuple[str, str]]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of (indices, uint8 images) with the word of `drawings[index]` (word, seed) drawn on each."""
    for indices, images_u8 in image_batches(images, list(drawings), BATCH):
        written = []
        for index, image in zip(indices, images_u8, strict=True):
            word, seed = drawings[index]
            written.append(write_word(image, word, random.Random(seed)))
        yield indices, torch.stack(written)


# ---- the same for both -----------------------------------------------------------------------------------------------


class _Answers(NamedTuple):
    """bool [n]: the own class is first, the written word is first, the own class is before the word; int64 [n]: which
    class is first."""

    right: Tensor
    word_first: Tensor
    over_word: Tensor
    first: Tensor


def _answers(features_nd: Tensor, classifier_cd: Tensor, questions: _Questions) -> _Answers:
    """Classify the images; a tie is a win for neither the own class nor the word."""
    blocks, classifier = [], classifier_cd.double().T
    for start in range(0, len(features_nd), ROWS):
        rows = slice(start, start + ROWS)
        scores, right, words = features_nd[rows].double() @ classifier, questions.right[rows], questions.words[rows]
        word = torch.zeros_like(right)
        word[(words >= 0).nonzero().flatten(), words[words >= 0]] = True
        word_score = scores.masked_fill(~word, -torch.inf).amax(1, keepdim=True)
        own_score = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        pair = torch.cat([own_score, word_score], 1)
        own = torch.tensor([[True, False]]).expand(len(pair), 2)
        block = _Answers(
            right=ranks_of(scores, right) == 1,
            word_first=(ranks_of(scores, word) == 1) & word.any(1),
            over_word=ranks_of(pair, own) == 1,
            first=scores.argmax(1),
        )
        blocks.append(block)
    return _Answers(*map(torch.cat, zip(*blocks, strict=True)))


def _result(questions: _Questions, answers: _Answers, notes: Sequence[str]) -> TypographicResult:
    has_word = questions.words >= 0
    kinds = {
        kind: _shares(torch.tensor([each == kind for each in questions.kinds]), answers, has_word)
        for kind in dict.fromkeys(questions.kinds)
    }
    attacked = torch.tensor([kind != CLEAN for kind in questions.kinds])
    under_attack = _shares(attacked, answers, has_word)
    return TypographicResult(
        images=under_attack.images,
        accuracy_clean=kinds[CLEAN].accuracy if CLEAN in kinds else None,
        accuracy_under_attack=under_attack.accuracy,
        word_wins=under_attack.word_wins,
        notes=tuple(notes),
        kinds=kinds,
        attacked=tuple(_attacked(questions, answers, row) for row in attacked.nonzero().flatten().tolist()),
    )


def _attacked(questions: _Questions, answers: _Answers, row: int) -> Attacked:
    names, word = questions.names, int(questions.words[row])
    return Attacked(
        index=questions.indices[row],
        name=questions.keys[row],
        shows=names[int(questions.right[row].int().argmax())],
        word=names[word] if word >= 0 else "",
        kind=questions.kinds[row],
        answer=names[int(answers.first[row])],
        right=bool(answers.right[row]),
        fooled=bool(answers.word_first[row]),
    )


def _shares(rows: Tensor, answers: _Answers, has_word: Tensor) -> Shares:
    def share(values: Tensor) -> float:
        return values.double().mean().item()

    with_word = rows & has_word
    return Shares(
        images=int(rows.sum()),
        accuracy=share(answers.right[rows]),
        word_wins=share(answers.word_first[rows]),
        object_over_word=share(answers.over_word[with_word]) if with_word.any() else None,
    )
