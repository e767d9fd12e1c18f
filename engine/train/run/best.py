"""best.safetensors: the model that a run gives, and which step it is from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...clip.exports import save_full_clip
from ...clip.full_clip import FullCLIP
from ...clip.load import load_full_clip
from ...data.images.transforms import Transform
from ...evaluate.encoder import with_trained_transform
from .checkpoints import Best


def write_best(file: Path, model: FullCLIP, transform: Transform, step: int, best: Best | None) -> None:
    """Save the model; its own metadata say which step it is from, so that a crash cannot make the two differ."""
    provenance = {**model.provenance, "validation": best and dataclasses.asdict(best), "step": step}
    save_full_clip(dataclasses.replace(model, provenance=with_trained_transform(provenance, transform)), file)


def read_best(file: Path) -> tuple[Best | None, int | None]:
    """Return the validation of the model in the file and its step; None for what is not there."""
    if not file.is_file():
        return None, None
    provenance = load_full_clip(file).provenance
    best = provenance.get("validation")
    return Best(**best) if best else None, provenance.get("step")
