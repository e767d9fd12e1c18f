"""The demo: a small CLIP learns pictures that are drawn for it, is fine-tuned on others, folded, exported and measured.

Everything is learnt and measured here; the same seed gives the same numbers on the same machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..clip.architecture import Architecture
from ..clip.exports import export_text_encoder, save_full_clip
from ..clip.full_clip import FullCLIP
from ..clip.gmp import fold_gmp
from ..clip.network import random_full_clip
from ..data.dataset import ClipDataset
from ..data.load import load_dataset
from ..data.tools.demo_images import IMAGE_SIZE, draw_demo_classes, draw_demo_dataset
from ..errors import UserError
from ..evaluate.retrieval import eval_retrieval
from ..evaluate.zero_shot import eval_zero_shot
from ..files import replacing, write_json
from ..report.charts import bar_chart
from ..report.tables import percent, table
from ..train.config import TrainConfig
from ..train.run.results import Progress
from ..train.trainer import train

SMALL_CLIP = Architecture(
    embed_dim=128,
    image_size=IMAGE_SIZE,
    patch_size=8,
    vision_width=128,
    vision_layers=4,
    vision_heads=2,
    vision_mlp_width=512,
    context_length=24,
    vocab_size=49408,
    text_width=128,
    text_layers=2,
    text_heads=2,
    text_mlp_width=512,
    activation="quick_gelu",
)
# fp32 on the CPU everywhere, so that the numbers do not depend on the graphics card.
PRETRAINING = TrainConfig.from_flat(
    epochs=26, learning_rate=1.5e-3, batch_size=72, optimizer="adamw", weight_decay=0.05, precision="fp32"
)
FINE_TUNING = TrainConfig.from_flat(epochs=12, learning_rate=1e-3, batch_size=72, precision="fp32")
DEVICE = "cpu"


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The demo's data sets. The held-out ones show combinations of colour and shape that no training picture shows."""

    plain: ClipDataset
    shifted: ClipDataset
    held_out: ClipDataset
    held_out_classes: ClipDataset
    held_out_plain: ClipDataset


def draw_images(folder: Path, seed: int) -> Pictures:
    """Draw 1,980 pictures; those that are there already keep their files."""
    train_plain = draw_demo_dataset(folder / "plain", count=720, seed=seed, style="plain", split="train")
    train_shifted = draw_demo_dataset(folder / "shifted", count=540, seed=seed, style="shifted", split="train")
    held_out = draw_demo_dataset(folder / "held_out", count=240, seed=seed, style="shifted", split="held_out")
    classes = draw_demo_classes(folder / "held_out_classes", count=240, seed=seed, style="shifted", split="held_out")
    plain = draw_demo_classes(folder / "held_out_plain_classes", count=240, seed=seed, style="plain", split="held_out")
    return Pictures(*(load_dataset(place) for place in (train_plain, train_shifted, held_out, classes, plain)))


def measure(model: FullCLIP, pictures: Pictures) -> dict[str, float]:
    """Shares from 0 to 1 on the held-out combinations."""
    zero_shot = eval_zero_shot(model, pictures.held_out_classes, templates="simple", device=DEVICE)
    retrieval = eval_retrieval(model, pictures.held_out, device=DEVICE)
    before = eval_zero_shot(model, pictures.held_out_plain, templates="simple", device=DEVICE)
    return {
        "zero-shot, new style": zero_shot.top1,
        "image to text R@5": retrieval.image_to_text.r5,
        "text to image R@5": retrieval.text_to_image.r5,
        "zero-shot, old style": before.top1,
    }


def run_demo(out: Path, *, seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the whole demo in `out` and return its numbers, which are in `out`/results.json too."""
    began = time.monotonic()
    say(f"Drawing pictures of coloured shapes into {out / 'pictures'} …")
    try:
        pictures = draw_images(out / "pictures", seed)
    except OSError as error:
        raise UserError(f"{out} could not be written ({error.strerror}); give another folder with --out.") from error
    say(
        f"{len(pictures.plain)} to learn from, {len(pictures.shifted)} in another style to fine-tune on, and "
        f"{len(pictures.held_out)} of combinations that are in neither, to measure on."
    )

    untrained = random_full_clip(SMALL_CLIP, seed)
    models = {"untrained": untrained}
    say("\nPretraining a small CLIP from nothing on the plain pictures …")
    pretraining = dataclasses.replace(PRETRAINING, seed=seed)
    models["pretrained"] = _train(untrained, pictures.plain, pretraining, out / "run_pretrain", say)
    save_full_clip(models["pretrained"], out / "pretrained.safetensors")
    for name, gmp in (("fine-tuned", False), ("fine-tuned with GmP", True)):
        say(f"\nFine-tuning it on the new style, {'with GmP' if gmp else 'plainly'} …")
        config = dataclasses.replace(FINE_TUNING, seed=seed, gmp=gmp)
        tuned = _train(models["pretrained"], pictures.shifted, config, out / ("run_gmp" if gmp else "run_plain"), say)
        models[name] = fold_gmp(tuned) if gmp else tuned

    folded = save_full_clip(models["fine-tuned with GmP"], out / "gmp_folded.safetensors")
    exported = export_text_encoder(models["fine-tuned with GmP"], out / "text_encoder.safetensors", dtype="fp16")
    say(f"\nFolded GmP to plain weights: {folded}\nExported the text encoder:   {exported}\nMeasuring …")
    results = {name: measure(model, pictures) for name, model in models.items()}
    numbers = {
        "seed": seed,
        "chance_zero_shot": 1 / len(pictures.held_out_classes.class_names),
        "models": results,
    }
    write_json(out / "results.json", numbers)
    chart = out / "before_and_after.png"
    with replacing(chart) as beside:
        shown = {what: {name: results[name][what] for name in results if name != "untrained"} for what in _WHAT}
        bar_chart({_WHAT[what]: bars for what, bars in shown.items()}, title="Held-out combinations").save(
            beside, "PNG"
        )
    say("\nOn combinations of colour and shape that none of the training pictures show:\n")
    say(
        table(
            [{"model": name} | {what: percent(value) for what, value in row.items()} for name, row in results.items()]
        )
    )
    say(
        f"\nChance is {percent(numbers['chance_zero_shot'])} zero-shot. Charts: {chart}, and chart.png in each run "
        f"folder. This took {time.monotonic() - began:.0f} seconds."
    )
    return numbers


# What is measured, as short as an axis wants it.
_WHAT = {
    "zero-shot, new style": "zero-shot\nnew style",
    "image to text R@5": "image to\ntext R@5",
    "text to image R@5": "text to\nimage R@5",
    "zero-shot, old style": "zero-shot\nold style",
}


def _train(
    model: FullCLIP, data: ClipDataset, config: TrainConfig, folder: Path, say: Callable[[str], None]
) -> FullCLIP:
    def show(progress: Progress) -> None:
        if progress.steps and progress.step % max(1, progress.total_steps // 4) == 0:
            last = progress.steps[-1]
            say(f"  step {last['step']}/{progress.total_steps}  loss {last['loss']:.2f}")

    def tell(note: str) -> None:
        if "\n" not in note:  # tables are in the run folder too
            say(f"  {note}")

    result = train(
        model,
        data,
        None,
        config,
        run_folder=folder,
        device=DEVICE,
        on_note=tell,
        on_progress=show,
    )
    return result.full_clip
