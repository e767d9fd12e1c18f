"""Typographic attack: does a wrong word written into a picture win over what the picture shows?

Goh et al. 2021, "Multimodal neurons in artificial neural networks" (distill.pub/2021/multimodal-neurons); pictures that
people wrote on: Westerhoff et al. 2025, "SCAM" (arxiv.org/abs/2504.04893).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...clip.full_clip import FullCLIP
from ...data.dataset import ClipDataset
from ...data.decoded_images import DecodedImages, image_batches
from ...data.images.image_cache import ImageCache
from ...data.images.transforms import Transform
from ...errors import UserError
from ..class_names import with_classes
from ..encoder import BATCH, EncodedImages, Encoder, EncodingCache, encode_images, require_images
from ..zero_shot import ROWS, class_features, ranks_of, require_classes, require_labelled, right_classes, sentences_of
from .drawing import can_be_drawn, write_word
from .photographed import CLEAN, DRAWN, WrittenOn, attacks_in


@dataclasses.dataclass(frozen=True)
class Attacked:
    """A picture with a word on it: sample `index` of the data set, and the `name` that decides how its word is drawn.
    `answer` is what the model takes it for, `fooled` whether that is the word."""

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
    """Of the pictures of one kind: how many are right among all names, how many the written word wins, and how many are
    right where only the object and its word are to choose from, as SCAM is published (None where no word is known)."""

    images: int
    accuracy: float
    word_wins: float
    object_over_word: float | None


@dataclasses.dataclass(frozen=True)
class TypographicResult:
    """Accuracies from 0 to 1 on the clean and on the attacked pictures (`images` counts the attacked ones);
    `word_wins` is how often the answer is what was written. `kinds` has the same by how the words came into the
    pictures; where there is no clean picture, `accuracy_clean` is None. `attacked` are the pictures one by one, in an
    order that is the same for all models; with `transform` and `seed` they can be shown as the model saw them."""

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


def eval_typographic(
    full_clip: FullCLIP,
    dataset: ClipDataset,
    *,
    seed: int = 0,
    templates: str = "simple",
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
    cache: ImageCache | None = None,
    features: EncodingCache | None = None,
) -> TypographicResult:
    """Zero-shot accuracy on clean pictures, and on pictures with a wrong word on them.

    Where the data set says which words are written on its pictures (`attacks_in`), these are measured, among all
    objects and words. Else the name of another class is drawn into each labelled picture: word, font, place, size and
    colours are functions of `seed` and the picture's name, so that every model sees the same. Raises `UserError` for a
    data set without at least two classes.
    """
    require_images(dataset)
    written = attacks_in(dataset)
    if not any(found.kind != CLEAN and found.word for found in written.values()):
        require_classes(with_classes(dataset)[0])
    encoder = Encoder.of(
        full_clip,
        device=device,
        on_progress=on_progress,
        check_cancelled=check_cancelled,
        cache=cache,
        features=features,
    )
    return typographic_of(encoder, dataset, seed=seed, templates=templates)


def typographic_of(
    encoder: Encoder,
    dataset: ClipDataset,
    *,
    seed: int = 0,
    templates: str = "simple",
    pictures: EncodedImages | None = None,
) -> TypographicResult:
    """The same with a network that is already there, and the data set's pictures if they were encoded before."""
    sentences = sentences_of(templates)
    written = attacks_in(dataset)
    pictures = pictures or encode_images(encoder, dataset)
    if any(found.kind != CLEAN and found.word for found in written.values()):
        found = _real(encoder, dataset, written, sentences, pictures)
    else:
        found = _drawn(encoder, dataset, seed, sentences, pictures)
    return dataclasses.replace(found, transform=encoder.transform, seed=seed)


# ---- words that are on the pictures ----------------------------------------------------------------------------------


def _real(
    encoder: Encoder, dataset: ClipDataset, written: Mapping[int, WrittenOn], sentences, pictures: EncodedImages
) -> TypographicResult:
    names = sorted({name for about in written.values() for name in (about.shows, about.word) if name})
    numbers = {name: number for number, name in enumerate(names)}
    found = [next((index for index in samples if index in written), None) for samples in pictures.samples]
    known = [row for row, index in enumerate(found) if index is not None]
    indices = [found[row] for row in known]
    told = [written[index] for index in indices]
    if not any(about.kind != CLEAN and about.word for about in told):
        raise UserError(
            f"None of the pictures of {dataset.name} that have words on them can be opened; put them where its table "
            "says that they are."
        )
    right = torch.zeros(len(known), len(names), dtype=torch.bool)
    words = torch.full((len(known),), -1)
    for row, about in enumerate(told):
        right[row, numbers[about.shows]] = True
        words[row] = numbers.get(about.word, -1)
    answers = _answers(pictures.features[known], class_features(encoder, names, sentences), right, words)
    kinds = [about.kind for about in told]
    notes = [*pictures.notes]
    if left_out := len(pictures.samples) - len(known):
        notes.append(f"{left_out} pictures of {dataset.name} are in no table of attacks and are left out.")
    keys = [dataset.names[index] for index in indices]
    return _result(names, indices, keys, kinds, answers, right, words, notes)


# ---- words that are drawn --------------------------------------------------------------------------------------------


def _drawn(encoder: Encoder, dataset: ClipDataset, seed: int, sentences, pictures: EncodedImages) -> TypographicResult:
    dataset, notes = with_classes(dataset)
    require_classes(dataset)
    drawable = [can_be_drawn(name) for name in dataset.class_names]
    if sum(drawable) < 2:
        raise UserError(
            f"No font here has the letters of the class names of {dataset.name}, such as {dataset.class_names[0]}, so "
            "words cannot be drawn; give classes with names in Latin, Greek or Cyrillic letters."
        )
    right = right_classes(dataset, pictures.samples)
    require_labelled(right, dataset)
    rows = (right.any(1) & ~right.all(1)).nonzero().flatten().tolist()
    if not rows:
        raise UserError(
            f"The pictures of {dataset.name} belong to all of its classes at once, so there is no other class to write "
            "on them; put different pictures into its classes."
        )
    firsts = [pictures.samples[row][0] for row in rows]
    keys = [min(dataset.names[index] for index in pictures.samples[row]) for row in rows]
    words = [_word(right[row], drawable, f"{seed} {key} word") for row, key in zip(rows, keys, strict=True)]
    texts = {index: dataset.class_names[word] for index, word in zip(firsts, words, strict=True)}
    chances = {index: f"{seed} {key}" for index, key in zip(firsts, keys, strict=True)}
    found, features = encoder.images(_with_words(encoder.pictures(dataset), texts, chances), len(rows))
    if found != firsts:
        raise UserError(f"Pictures of {dataset.name} went away while it was measured; put them back and try again.")
    classifier = class_features(encoder, dataset.class_names, sentences)
    twice, both = right[rows].repeat(2, 1), torch.tensor(words * 2)
    answers = _answers(torch.cat([pictures.features[rows], features]), classifier, twice, both)
    kinds = [CLEAN] * len(rows) + [DRAWN] * len(rows)
    return _result(dataset.class_names, firsts * 2, keys * 2, kinds, answers, twice, both, [*notes, *pictures.notes])


def _word(right_c: Tensor, drawable: Sequence[bool], chance: str) -> int:
    """A class that is not the picture's own."""
    others = [number for number, mine in enumerate(right_c.tolist()) if not mine and drawable[number]]
    return random.Random(chance).choice(others or [number for number, mine in enumerate(right_c.tolist()) if not mine])


def _with_words(
    pictures: DecodedImages, texts: Mapping[int, str], chances: Mapping[int, str]
) -> Iterator[tuple[list[int], Tensor]]:
    for found, images_u8 in image_batches(pictures, list(texts), BATCH):
        drawn = [
            write_word(image, texts[index], random.Random(chances[index]))
            for index, image in zip(found, images_u8, strict=True)
        ]
        yield found, torch.stack(drawn)


# ---- the same for both -----------------------------------------------------------------------------------------------


class _Answers(NamedTuple):
    """bool [n]: the picture's own class is first, what is written is first, the own class is before what is written;
    int64 [n]: which class is first."""

    right: Tensor
    word_first: Tensor
    over_word: Tensor
    first: Tensor


def _answers(features_nd: Tensor, classifier_cd: Tensor, right_nc: Tensor, words_n: Tensor) -> _Answers:
    """`words_n` are the classes that are written, -1 where nothing is. A tie is not a win for either."""
    parts, classifier = [], classifier_cd.double().T
    for start in range(0, len(features_nd), ROWS):
        rows = slice(start, start + ROWS)
        scores, right, words = features_nd[rows].double() @ classifier, right_nc[rows], words_n[rows]
        word = torch.zeros_like(right)
        word[(words >= 0).nonzero().flatten(), words[words >= 0]] = True
        word_score = scores.masked_fill(~word, -torch.inf).amax(1, keepdim=True)
        own_score = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        pair = torch.cat([own_score, word_score], 1)
        own = torch.tensor([[True, False]]).expand(len(pair), 2)
        parts.append(
            (
                ranks_of(scores, right) == 1,
                (ranks_of(scores, word) == 1) & word.any(1),
                ranks_of(pair, own) == 1,
                scores.argmax(1),
            )
        )
    return _Answers(*map(torch.cat, zip(*parts, strict=True)))


def _result(
    names: Sequence[str],
    indices: Sequence[int],
    keys: Sequence[str],
    kinds: Sequence[str],
    answers: _Answers,
    right_nc: Tensor,
    words_n: Tensor,
    notes: Sequence[str],
) -> TypographicResult:
    has_word = words_n >= 0
    by_kind = {}
    for kind in dict.fromkeys(kinds):
        by_kind[kind] = _shares(torch.tensor([found == kind for found in kinds]), answers, has_word)
    attack_rows = torch.tensor([kind != CLEAN for kind in kinds])
    under_attack = _shares(attack_rows, answers, has_word)
    attacked = tuple(
        Attacked(
            indices[row],
            keys[row],
            names[int(right_nc[row].int().argmax())],
            names[words_n[row]] if has_word[row] else "",
            kinds[row],
            names[answers.first[row]],
            bool(answers.right[row]),
            bool(answers.word_first[row]),
        )
        for row in attack_rows.nonzero().flatten().tolist()
    )
    return TypographicResult(
        images=under_attack.images,
        accuracy_clean=by_kind[CLEAN].accuracy if CLEAN in by_kind else None,
        accuracy_under_attack=under_attack.accuracy,
        word_wins=under_attack.word_wins,
        notes=tuple(notes),
        kinds=by_kind,
        attacked=attacked,
    )


def _shares(rows: Tensor, answers: _Answers, has_word: Tensor) -> Shares:
    def share(values: Tensor) -> float:
        return values.double().mean().item()

    worded = rows & has_word
    return Shares(
        images=int(rows.sum()),
        accuracy=share(answers.right[rows]),
        word_wins=share(answers.word_first[rows]),
        object_over_word=share(answers.over_word[worded]) if worded.any() else None,
    )


# ---- the pictures that tell the models apart -------------------------------------------------------------------------


def fooled_apart(
    model: TypographicResult, baseline: TypographicResult | None, count: int = 8
) -> list[tuple[Attacked, Attacked | None]]:
    """(what the model makes of a picture, what the baseline does) for pictures that fool one of them and not the other,
    first those that fool the baseline; without a baseline, those that fool the model. At most `count`."""
    if baseline is None:
        return [(found, None) for found in _spread([found for found in model.attacked if found.fooled], count)]
    pairs = list(zip(model.attacked, baseline.attacked, strict=True))
    better = [pair for pair in pairs if pair[1].fooled and not pair[0].fooled]
    worse = [pair for pair in pairs if pair[0].fooled and not pair[1].fooled]
    half = count // 2
    better = _spread(better, max(half, count - len(worse)))
    return better + _spread(worse, count - len(better))


def sheet_of(
    dataset: ClipDataset, model: TypographicResult, baseline: TypographicResult | None
) -> list[tuple[Any, str]]:
    """(picture, what it shows and what it was taken for) of those that `fooled_apart` finds; pictures are PIL's."""

    def told(mine: Attacked, other: Attacked | None) -> str:
        both = f"{mine.shows}, “{mine.word}” is written. Model: {mine.answer}."
        return both if other is None else f"{both} Baseline: {other.answer}."

    return [
        (attacked_image(dataset, mine, model.transform, model.seed), told(mine, other))
        for mine, other in fooled_apart(model, baseline)
    ]


def sheet_heading(beside_a_baseline: bool) -> str:
    return "Pictures that fool one of the models and not the other" if beside_a_baseline else "Pictures that fool it"


def attacked_image(dataset: ClipDataset, attacked: Attacked, transform: Transform, seed: int):
    """The picture as the models saw it, PIL: with its word drawn in anew where it was drawn."""
    from PIL import Image

    square = transform.load(dataset.path(attacked.index))
    if attacked.kind == DRAWN:
        square = write_word(square, attacked.word, random.Random(f"{seed} {attacked.name}"))
    return Image.fromarray(square.permute(1, 2, 0).contiguous().numpy())


def _spread(items: list, count: int) -> list:
    """At most so many of them, from the first to the last."""
    return items if len(items) <= count else [items[number * len(items) // count] for number in range(count)]
