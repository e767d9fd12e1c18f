"""Compare a fine-tune with its baseline before any image is generated: embeddings, weights, what image models read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL.Image import Image
from typing_extensions import Unpack

from ..clip.full_clip import FullCLIP
from ..data.dataset import ClipDataset
from ..notes import Notes
from ..report.comparison_charts import comparison_chart
from ..report.tables import Rows, table
from .calibration import Calibration, calibration_of
from .drift import (
    PROMPTS,
    STATES,
    ConditioningDrift,
    PromptStates,
    WeightDrift,
    compare_states,
    limit_prompts,
    read_states,
    require_one_architecture,
    weight_drift,
)
from .encoder import Encoder, Runtime, ignore_progress, never_cancelled, require_images
from .geometry import Axes, Geometry, axes_of, embed, geometry_of

# Provisional: chosen by reason, not yet checked against images that people judged.
COLLAPSED = 0.5  # below this share of the baseline's effective rank or separation, most of it is lost
WEAKER, STRONGER = 0.9, 1.1  # of the baseline's separation
TELLS_APART = 0.5  # separation of a baseline that can tell the pairs apart at all
FEW_IMAGES = 100  # with fewer, chance decides much
NEAR_STATES, FAR_STATES = 0.05, 0.5  # relative L2 of what image models read at word and end tokens
FAR_WEIGHTS = 0.2  # relative change of a tower's weights
SOUND, DOUBTFUL, RUINED = "sound", "doubtful", "ruined"
_HEADLINES = {
    SOUND: "Sound: nothing measured here suggests that the model was harmed.",
    DOUBTFUL: "Doubtful: look at images made with it before you rely on it.",
    RUINED: "Ruined: the model no longer tells things apart. Use an earlier step, a lower learning rate, or a blend "
    "with the baseline.",
}
_GEOMETRY_ROWS = (
    ("images", "images", "{}"),
    ("texts", "texts", "{}"),
    ("cosine of an image and its own texts", "matching", "{:.4f}"),
    ("cosine of an image and other texts", "other", "{:.4f}"),
    ("separation of the two, in standard deviations", "separation", "{:.2f}"),
    ("mean cosine of two images", "similarity_images", "{:.4f}"),
    ("mean cosine of two texts", "similarity_texts", "{:.4f}"),
    ("effective rank of images", "effective_rank_images", "{:.1f}"),
    ("effective rank of texts", "effective_rank_texts", "{:.1f}"),
    ("modality gap", "modality_gap", "{:.4f}"),
    ("uniformity of images (lower: more even)", "uniformity_images", "{:.3f}"),
    ("uniformity of texts (lower: more even)", "uniformity_texts", "{:.3f}"),
    ("alignment (lower: nearer)", "alignment", "{:.4f}"),
)
_CALIBRATION_ROWS = (
    ("scale of the scores (exp of logit_scale)", "stored", "{:.1f}"),
    ("best scale for this data", "best", "{:.1f}"),
    ("calibration error as stored", "ece_stored", "{:.1%}"),
    ("calibration error at the best scale", "ece_best", "{:.1%}"),
)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both models' geometry on the baseline's axes, their calibrations, what has moved, and a verdict.

    `health` is sound, doubtful or ruined; `verdict` gives the reasons in sentences. The thresholds are provisional.
    """

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
        return {
            "health": self.health,
            "verdict": list(self.verdict),
            "baseline": self.baseline.as_dict(),
            "model": self.model.as_dict(),
            "weights": self.weights.as_dict(),
            "conditioning": self.conditioning.as_dict(),
            "calibration": {
                "baseline": self.calibration_baseline.as_dict(),
                "model": self.calibration_model.as_dict(),
            },
        }

    def table(self) -> str:
        """The verdict and all numbers as text."""
        return "\n\n".join(["\n".join(self.verdict), *(table(rows) for rows in self.tables().values())])

    def tables(self) -> dict[str, Rows]:
        """The numbers as rows, by topic."""
        embeddings = [_row(words, self.baseline, self.model, *number) for words, *number in _GEOMETRY_ROWS]
        embeddings += [
            _row(words, self.calibration_baseline, self.calibration_model, *number)
            for words, *number in _CALIBRATION_ROWS
        ]
        return {
            "embeddings": embeddings,
            "what image models read": self._state_rows(),
            "weights": self._weight_rows(),
        }

    def chart(self) -> Image:
        """Draw the map, the histograms, what image models read, and the weights by depth."""
        states = {
            f"{self.conditioning.readers[state]}\n({state})": {
                position: drift.relative_l2 for position, drift in positions.items()
            }
            for state, positions in self.conditioning.states.items()
        }
        layers = {
            tower: [layer.drift for layer in self.weights.layers if layer.tower == tower and layer.depth is not None]
            for tower in ("vision", "text")
        }
        models = {"baseline": self.baseline, "model": self.model}
        points = {name: {"images": it.points_images, "texts": it.points_texts} for name, it in models.items()}
        histograms = {
            name: {"matching": it.histogram_matching, "other": it.histogram_other} for name, it in models.items()
        }
        return comparison_chart(points, histograms, states, layers, title=self.verdict[0])

    def _state_rows(self) -> Rows:
        heading, rows = "what image models read", []
        for state, positions in self.conditioning.states.items():
            rows.append({heading: f"{self.conditioning.readers[state]}: {STATES[state]}"})
            for position, drift in positions.items():
                numbers = {"cosine": f"{drift.cosine:.4f}", "change": f"{drift.relative_l2:.1%}"}
                rows.append({heading: f"  at {position}"} | numbers)
        return rows

    def _weight_rows(self) -> Rows:
        drifts = {"vision tower": self.weights.vision, "text tower": self.weights.text}
        drifts |= {f"{layer.tower}, {layer.layer}": layer.drift for layer in self.weights.layers}
        return [{"weights": name, "change": f"{drift:.2%}"} for name, drift in drifts.items()]


def _row(words: str, baseline: object, model: object, field: str, digits: str) -> dict[str, str]:
    numbers = {"baseline": getattr(baseline, field), "model": getattr(model, field)}
    return {"embeddings": words} | {name: digits.format(number) for name, number in numbers.items()}


def compare_full_clips(
    full_clip: FullCLIP,
    baseline: FullCLIP,
    dataset: ClipDataset,
    *,
    prompts: Sequence[str] = PROMPTS,
    **runtime: Unpack[Runtime],
) -> Comparison:
    """Measure both models on a dataset and on prompts; each model encodes each image once.

    Raises `UserError` for two architectures and for fewer than two distinct images or texts, and `BrokenModel` for a
    model that computes NaN.
    """
    require_one_architecture(full_clip, baseline)
    require_images(dataset)
    prompts, prompt_notes = limit_prompts(prompts)
    weights = weight_drift(full_clip, baseline, check_cancelled=runtime.get("check_cancelled", never_cancelled))
    before = _measure(_encoder(baseline, 0, runtime), baseline, dataset, prompts, None)
    after = _measure(_encoder(full_clip, 1, runtime), full_clip, dataset, prompts, before.axes)
    conditioning = compare_states(after.states, before.states, full_clip.architecture, prompt_notes)
    notes = Notes()
    notes.extend(notes_of(after.geometry.notes, before.geometry.notes))
    notes.extend(conditioning.notes)
    if after.geometry.images < FEW_IMAGES:
        notes.add(f"There are only {after.geometry.images} distinct images; below {FEW_IMAGES}, chance decides much.")
    notes.extend(notes_of(after.calibration.notes, before.calibration.notes))
    health, verdict = judge(before.geometry, after.geometry, weights, conditioning)
    return Comparison(
        baseline=before.geometry,
        model=after.geometry,
        weights=weights,
        conditioning=conditioning,
        calibration_baseline=before.calibration,
        calibration_model=after.calibration,
        axes=before.axes,
        health=health,
        verdict=verdict,
        notes=tuple(notes),
    )


def notes_of(model: Sequence[str], baseline: Sequence[str] | None = None) -> list[str]:
    """Return the notes on two models, each once; a note on only one of them says which."""
    if baseline is None:
        return list(dict.fromkeys(model))
    return [
        note if note in model and note in baseline else f"{'Model' if note in model else 'Baseline'}: {note}"
        for note in dict.fromkeys((*model, *baseline))
    ]


class _Measured(NamedTuple):
    axes: Axes
    geometry: Geometry
    states: PromptStates
    calibration: Calibration


def _encoder(full_clip: FullCLIP, number: int, runtime: Runtime) -> Encoder:
    """Build the first or second of two models' encoders, whose progress is one of the two halves of the whole."""
    on_progress = runtime.get("on_progress", ignore_progress)
    halves: Runtime = {
        **runtime,
        "on_progress": lambda done, total: on_progress(number * total + done, 2 * total),
    }
    return Encoder.of(full_clip, **halves)


def _measure(
    encoder: Encoder, full_clip: FullCLIP, dataset: ClipDataset, prompts: Sequence[str], axes: Axes | None
) -> _Measured:
    """Measure one model, on axes of its own if there are none yet."""
    embedded = embed(encoder, dataset)
    axes = axes or axes_of(embedded)
    return _Measured(
        axes,
        geometry_of(embedded, axes, check_cancelled=encoder.host.check_cancelled),
        read_states(encoder, prompts, full_clip.architecture),
        calibration_of(encoder, dataset, embedded.images),
    )


def judge(
    before: Geometry, after: Geometry, weights: WeightDrift, conditioning: ConditioningDrift
) -> tuple[str, tuple[str, ...]]:
    """Return the health (the worst that embeddings, hidden states and weights suggest) and the verdict's sentences."""
    if not weights.vision and not weights.text and weights.logit_scale[0] == weights.logit_scale[1]:
        return SOUND, ("The two models are the same.",)
    findings = [_judge_embeddings(before, after), _judge_states(conditioning), *_judge_weights(weights)]
    health = max((level for level, _ in findings), key=(SOUND, DOUBTFUL, RUINED).index)
    return health, (_HEADLINES[health], *(sentence for _, sentence in findings))


def _judge_embeddings(before: Geometry, after: Geometry) -> tuple[str, str]:
    lowest, what = min(
        (after.effective_rank_images / before.effective_rank_images, "images"),
        (after.effective_rank_texts / before.effective_rank_texts, "texts"),
    )
    if lowest < COLLAPSED:
        return RUINED, f"The {what} have collapsed: they use {lowest:.0%} of the directions that they used before."
    if before.separation < TELLS_APART:
        return SOUND, (
            "The baseline itself hardly tells which text belongs to which image here, so these pairs cannot show "
            "whether the model got worse at it."
        )
    ratio = after.separation / before.separation
    change = f"{before.separation:.2f} to {after.separation:.2f} standard deviations"
    if ratio < COLLAPSED:
        return RUINED, f"Images and their own texts hardly stand out from other pairs any more ({change})."
    if ratio < WEAKER:
        return DOUBTFUL, f"Images and their own texts stand out less from other pairs than before ({change})."
    if ratio > STRONGER:
        return SOUND, f"Images and their own texts stand out more from other pairs than before ({change})."
    return SOUND, f"Images and their own texts stand out from other pairs as before ({change})."


def _judge_states(conditioning: ConditioningDrift) -> tuple[str, str]:
    worst = conditioning.worst
    if worst == 0:
        return SOUND, "Image models get the same text conditioning as before: their images will not change."
    if worst < NEAR_STATES:
        return SOUND, f"The text conditioning of image models moved by at most {worst:.1%}: images will hardly change."
    if worst < FAR_STATES:
        return SOUND, f"The text conditioning of image models moved by up to {worst:.0%}: their images will change."
    return DOUBTFUL, (
        f"The text conditioning of image models moved by up to {worst:.0%}, which is far from what they were trained "
        "on: their images may suffer. A blend with the baseline is nearer."
    )


def _judge_weights(weights: WeightDrift) -> list[tuple[str, str]]:
    return [
        (DOUBTFUL, f"The {tower} tower's weights changed by {drift:.0%}, which is a lot for a fine-tune.")
        for tower, drift in (("vision", weights.vision), ("text", weights.text))
        if drift > FAR_WEIGHTS
    ]
