"""A fine-tune beside its baseline, before any picture is generated: embeddings, weights, what image models read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..data.images.image_cache import ImageCache
from ..report.comparison_charts import comparison_chart
from ..report.tables import table
from .calibration import Calibration, calibration_of
from .drift import (
    PROMPTS,
    STATES,
    ConditioningDrift,
    PromptStates,
    WeightDrift,
    chosen_prompts,
    compare_states,
    read_states,
    require_one_architecture,
    weight_drift,
)
from .encoder import Encoder, EncodingCache, require_images
from .geometry import Axes, Geometry, axes_of, embed, geometry_of
from .suite import notes_of

# Provisional: chosen by reason, not yet held against pictures that people judged.
COLLAPSED = 0.5  # of the baseline's effective rank, or separation, left: most of what told things apart is gone
WEAKER, STRONGER = 0.9, 1.1  # of the baseline's separation
TELLS = 0.5  # separation of a baseline that can tell the pairs apart at all
FEW = 100  # pictures, of which chance decides much
NEAR_STATES, FAR_STATES = 0.05, 0.5  # relative L2 of what image models read of words and end tokens
FAR_WEIGHTS = 0.2  # relative change of a tower's weights
SOUND, DOUBTFUL, RUINED = "sound", "doubtful", "ruined"

_MEASURES = (
    ("pictures", "images", "{}"),
    ("texts", "texts", "{}"),
    ("cosine of a picture and its own texts", "matching", "{:.4f}"),
    ("cosine of a picture and other texts", "other", "{:.4f}"),
    ("what lies between, in deviations", "separation", "{:.2f}"),
    ("mean cosine of two pictures", "similarity_images", "{:.4f}"),
    ("mean cosine of two texts", "similarity_texts", "{:.4f}"),
    ("effective rank of pictures", "effective_rank_images", "{:.1f}"),
    ("effective rank of texts", "effective_rank_texts", "{:.1f}"),
    ("modality gap", "modality_gap", "{:.4f}"),
    ("uniformity of pictures (lower: more even)", "uniformity_images", "{:.3f}"),
    ("uniformity of texts (lower: more even)", "uniformity_texts", "{:.3f}"),
    ("alignment (lower: nearer)", "alignment", "{:.4f}"),
)
_TEMPERATURE = (
    ("temperature: scores are multiplied by", "stored", "{:.1f}"),
    ("the best factor for this data", "best", "{:.1f}"),
    ("calibration error as stored", "ece_stored", "{:.1%}"),
    ("calibration error at the best", "ece_best", "{:.1%}"),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both models' geometry on the baseline's axes, what has moved, both calibrations
    and a verdict: `health` is sound, doubtful or ruined, and `verdict` says in sentences why. The thresholds are
    provisional."""

    baseline: Geometry
    model: Geometry
    weights: WeightDrift
    conditioning: ConditioningDrift
    calibration_baseline: Calibration
    calibration_model: Calibration
    axes: Axes = dataclasses.field(repr=False)
    health: str
    verdict: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        calibrations = {"baseline": self.calibration_baseline, "model": self.calibration_model}
        return {
            "health": self.health,
            "verdict": list(self.verdict),
            "baseline": self.baseline.as_dict(),
            "model": self.model.as_dict(),
            "weights": self.weights.as_dict(),
            "conditioning": self.conditioning.as_dict(),
            "calibration": {name: found.as_dict() for name, found in calibrations.items()},
        }

    def table(self) -> str:
        """The verdict and all numbers for a reader."""
        return "\n\n".join(["\n".join(self.verdict), *(table(rows) for rows in self.tables().values())])

    def tables(self) -> dict[str, list[dict[str, str]]]:
        """The numbers as rows of words, by what they are about."""
        return {
            "embeddings": self._rows_of_measures(),
            "what image models read": self._rows_of_states(),
            "weights": self._rows_of_weights(),
        }

    def chart(self):
        """PIL, RGB: the map, the histograms, what image models read, the weights by depth."""
        both = {"baseline": self.baseline, "model": self.model}
        return comparison_chart(
            {name: {"pictures": found.points_images, "texts": found.points_texts} for name, found in both.items()},
            {
                name: {"matching": found.histogram_matching, "other": found.histogram_other}
                for name, found in both.items()
            },
            {
                f"{self.conditioning.readers[state]}\n({state})": {
                    position: moved.relative_l2 for position, moved in positions.items()
                }
                for state, positions in self.conditioning.states.items()
            },
            {
                tower: [
                    layer.drift for layer in self.weights.layers if layer.tower == tower and layer.depth is not None
                ]
                for tower in ("vision", "text")
            },
            title=self.verdict[0],
        )

    def _rows_of_measures(self) -> list[dict[str, str]]:
        rows = [
            {"embeddings": words}
            | {
                name: digits.format(getattr(found, field))
                for name, found in (("baseline", self.baseline), ("model", self.model))
            }
            for words, field, digits in _MEASURES
        ]
        both = (("baseline", self.calibration_baseline), ("model", self.calibration_model))
        for words, field, digits in _TEMPERATURE:
            rows.append({"embeddings": words} | {name: digits.format(getattr(found, field)) for name, found in both})
        return rows

    def _rows_of_states(self) -> list[dict[str, str]]:
        rows = []
        for state, positions in self.conditioning.states.items():
            rows.append({"what image models read": f"{self.conditioning.readers[state]}: {STATES[state]}"})
            for position, moved in positions.items():
                rows.append(
                    {
                        "what image models read": f"  of {position}",
                        "cosine": f"{moved.cosine:.4f}",
                        "change": f"{moved.relative_l2:.1%}",
                    }
                )
        return rows

    def _rows_of_weights(self) -> list[dict[str, str]]:
        rows = [{"weights": "vision tower", "change": f"{self.weights.vision:.2%}"}]
        rows += [{"weights": "text tower", "change": f"{self.weights.text:.2%}"}]
        rows += [
            {"weights": f"{layer.tower}, {layer.layer}", "change": f"{layer.drift:.2%}"}
            for layer in self.weights.layers
        ]
        return rows


def compare_full_clips(
    full_clip: FullCLIP,
    baseline: FullCLIP,
    dataset: ClipDataset,
    *,
    prompts: Sequence[str] = PROMPTS,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
    cache: ImageCache | None = None,
    features: EncodingCache | None = None,
) -> Comparison:
    """Measure both models on a data set and on prompts; each picture is encoded once by each model.

    Raises `UserError` for two architectures and for a data set with fewer than two distinct pictures or texts, and
    `BrokenModel` for a model that computes NaN.
    """
    require_one_architecture(full_clip, baseline)
    require_images(dataset)
    prompts, notes = chosen_prompts(prompts)
    weights = weight_drift(full_clip, baseline, check_cancelled=check_cancelled)
    axes, measured = None, []
    for number, model in enumerate((baseline, full_clip)):

        def count(done: int, total: int, number=number) -> None:
            on_progress(number * total + done, 2 * total)

        encoder = Encoder.of(
            model, device=device, on_progress=count, check_cancelled=check_cancelled, cache=cache, features=features
        )
        axes, found = _measure(encoder, model, dataset, prompts, axes)
        measured.append(found)
        del encoder  # before the next one takes its memory
    before, after = measured
    if after.geometry.images < FEW:
        notes.append(
            f"There are only {after.geometry.images} different pictures: of fewer than {FEW}, chance decides much."
        )
    conditioning = compare_states(after.states, before.states, full_clip.architecture, notes)
    notes = [
        *notes_of(after.geometry, before.geometry),
        *conditioning.notes,
        *notes_of(after.calibration, before.calibration),
    ]
    health, verdict = judge(before.geometry, after.geometry, weights, conditioning)
    return Comparison(
        baseline=before.geometry,
        model=after.geometry,
        weights=weights,
        conditioning=conditioning,
        calibration_baseline=before.calibration,
        calibration_model=after.calibration,
        axes=axes,
        health=health,
        verdict=verdict,
        notes=tuple(dict.fromkeys(notes)),
    )


@dataclasses.dataclass(frozen=True)
class _Measured:
    geometry: Geometry
    states: PromptStates
    calibration: Calibration


def _measure(
    encoder: Encoder, model: FullCLIP, dataset: ClipDataset, prompts: Sequence[str], axes: Axes | None
) -> tuple[Axes, _Measured]:
    """What one model computes, on axes of its own if there are none yet."""
    embedded = embed(encoder, dataset)
    axes = axes or axes_of(embedded)
    return axes, _Measured(
        geometry_of(embedded, axes, check_cancelled=encoder.check_cancelled),
        read_states(encoder, prompts, model.architecture),
        calibration_of(encoder, dataset, embedded.pictures),
    )


def judge(
    before: Geometry, after: Geometry, weights: WeightDrift, conditioning: ConditioningDrift
) -> tuple[str, tuple[str, ...]]:
    """(sound, doubtful or ruined; sentences): the worst of what embeddings, hidden states and weights say."""
    if not weights.vision and not weights.text and weights.logit_scale[0] == weights.logit_scale[1]:
        return SOUND, ("The two models are the same.",)
    found = [_embeddings(before, after), _states(conditioning), *_weights(weights)]
    order = (SOUND, DOUBTFUL, RUINED)
    health = max((level for level, _ in found), key=order.index)
    first = {
        SOUND: "Sound: nothing here says that the model was harmed.",
        DOUBTFUL: "Doubtful: look at pictures made with it before you rely on it.",
        RUINED: "Ruined: the model no longer tells things apart. Use an earlier step, a lower learning rate, or a "
        "blend with the baseline.",
    }[health]
    return health, (first, *(sentence for _, sentence in found))


def _embeddings(before: Geometry, after: Geometry) -> tuple[str, str]:
    ranks = (
        (after.effective_rank_images / before.effective_rank_images, "pictures"),
        (after.effective_rank_texts / before.effective_rank_texts, "texts"),
    )
    lowest, what = min(ranks)
    if lowest < COLLAPSED:
        return RUINED, f"The {what} have collapsed: they use {lowest:.0%} of the directions that they used before."
    if before.separation < TELLS:
        return SOUND, (
            "The baseline itself hardly tells which text belongs to which picture here, so these pairs cannot show "
            "whether the model got worse at it."
        )
    kept = after.separation / before.separation
    told = f"{before.separation:.2f} to {after.separation:.2f} deviations"
    if kept < COLLAPSED:
        return RUINED, f"Pictures and their own texts hardly stand out from other pairs any more ({told})."
    if kept < WEAKER:
        return DOUBTFUL, f"Pictures and their own texts stand out less from other pairs than before ({told})."
    if kept > STRONGER:
        return SOUND, f"Pictures and their own texts stand out more from other pairs than before ({told})."
    return SOUND, f"Pictures and their own texts stand out from other pairs as before ({told})."


def _states(conditioning: ConditioningDrift) -> tuple[str, str]:
    far = conditioning.worst
    if far == 0:
        return SOUND, "The text tower gives image models what it gave them before: their pictures will not change."
    if far < NEAR_STATES:
        return SOUND, f"What image models read has moved by {far:.1%} at most: their pictures will hardly change."
    if far < FAR_STATES:
        return SOUND, f"What image models read has moved by up to {far:.0%}: their pictures will change."
    return DOUBTFUL, (
        f"What image models read has moved by up to {far:.0%}, which is far: they were not trained for it, and their "
        "pictures may suffer. A blend with the baseline is nearer."
    )


def _weights(weights: WeightDrift) -> list[tuple[str, str]]:
    return [
        (DOUBTFUL, f"The {tower} tower's weights have changed by {drift:.0%}, which is much for a fine-tune.")
        for tower, drift in (("vision", weights.vision), ("text", weights.text))
        if drift > FAR_WEIGHTS
    ]
