"""`clip-finetune demo`: train, fine-tune, fold, export and measure a small CLIP on images that are drawn for it.

Nothing is downloaded, and the same seed gives the same numbers on the same machine.
"""

from __future__ import annotations

import argparse
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
from .arguments import Commands
from .terminal import print_line

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
# fp32 on the CPU, so that the numbers do not depend on the GPU.
PRETRAINING = TrainConfig.from_flat(
    epochs=26, learning_rate=1.5e-3, batch_size=72, optimizer="adamw", weight_decay=0.05, precision="fp32"
)
FINE_TUNING = TrainConfig.from_flat(epochs=12, learning_rate=1e-3, batch_size=72, precision="fp32")
DEVICE = "cpu"


def add_commands(commands: Commands) -> None:
    demo = commands.add(
        "demo",
        _run,
        "Train, fold, export and evaluate a small CLIP on images that are drawn for it.",
        opens_model=False,
    )
    demo.add_argument("--out", default="clip_finetune_demo", metavar="DIR", help="where everything goes")
    demo.add_argument("--seed", type=int, default=0, help="another seed draws other images (default: 0)")


def _run(arguments: argparse.Namespace) -> None:
    run_demo(Path(arguments.out), seed=arguments.seed, print_line=print_line)


@dataclasses.dataclass(frozen=True)
class DemoData:
    """The demo's datasets. The held-out ones show combinations of colour and shape that no training image shows."""

    plain: ClipDataset
    shifted: ClipDataset
    held_out: ClipDataset
    held_out_classes: ClipDataset
    held_out_plain: ClipDataset


def draw_images(folder: Path, seed: int) -> DemoData:
    """Draw 1,980 images; those that exist already keep their files."""
    train_plain = draw_demo_dataset(folder / "plain", count=720, seed=seed, style="plain", split="train")
    train_shifted = draw_demo_dataset(folder / "shifted", count=540, seed=seed, style="shifted", split="train")
    held_out = draw_demo_dataset(folder / "held_out", count=240, seed=seed, style="shifted", split="held_out")
    classes = draw_demo_classes(folder / "held_out_classes", count=240, seed=seed, style="shifted", split="held_out")
    plain = draw_demo_classes(folder / "held_out_plain_classes", count=240, seed=seed, style="plain", split="held_out")
    return DemoData(*(load_dataset(path) for path in (train_plain, train_shifted, held_out, classes, plain)))


def measure(model: FullCLIP, data: DemoData) -> dict[str, float]:
    """Measure on the held-out combinations; every number is from 0 to 1."""
    zero_shot = eval_zero_shot(model, data.held_out_classes, templates="simple", device=DEVICE)
    retrieval = eval_retrieval(model, data.held_out, device=DEVICE)
    before = eval_zero_shot(model, data.held_out_plain, templates="simple", device=DEVICE)
    return {
        "zero-shot, new style": zero_shot.top1,
        "image to text R@5": retrieval.image_to_text.r5,
        "text to image R@5": retrieval.text_to_image.r5,
        "zero-shot, old style": before.top1,
    }


def run_demo(out: Path, *, seed: int = 0, print_line: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the whole demo in `out`, and return its numbers, which are also in `out`/results.json."""
    start = time.monotonic()
    print_line(f"Drawing images of coloured shapes into {out / 'images'} …")
    try:
        data = draw_images(out / "images", seed)
    except OSError as error:
        raise UserError(f"{out} could not be written ({error.strerror}); choose another folder with --out.") from error
    print_line(
        f"{len(data.plain)} to pretrain on, {len(data.shifted)} in another style to fine-tune on, and "
        f"{len(data.held_out)} of combinations that are in neither, to measure on."
    )
    models = _train_all(data, out, seed, print_line)
    folded = save_full_clip(models["fine-tuned with GmP"], out / "gmp_folded.safetensors")
    exported = export_text_encoder(models["fine-tuned with GmP"], out / "text_encoder.safetensors", dtype="fp16")
    print_line(f"\nFolded GmP to plain weights: {folded}\nExported the text encoder:   {exported}\nMeasuring …")
    results = {name: measure(model, data) for name, model in models.items()}
    chance = 1 / len(data.held_out_classes.class_names)
    numbers = {"seed": seed, "chance_zero_shot": chance, "models": results}
    write_json(out / "results.json", numbers)
    chart = _write_chart(out / "before_and_after.png", results)
    rows = [{"model": name} | {key: percent(value) for key, value in row.items()} for name, row in results.items()]
    print_line(f"\nOn combinations of colour and shape that no training image shows:\n\n{table(rows)}")
    print_line(
        f"\nChance is {percent(chance)} zero-shot. Charts: {chart}, and chart.png in each run folder. "
        f"This took {time.monotonic() - start:.0f} seconds."
    )
    return numbers


def _train_all(data: DemoData, out: Path, seed: int, print_line: Callable[[str], None]) -> dict[str, FullCLIP]:
    """Pretrain, then fine-tune with and without GmP; the GmP model comes back folded."""
    untrained = random_full_clip(SMALL_CLIP, seed)
    print_line("\nPretraining a small CLIP from scratch on the plain images …")
    pretraining = dataclasses.replace(PRETRAINING, seed=seed)
    pretrained = _train(untrained, data.plain, pretraining, out / "run_pretrain", print_line)
    save_full_clip(pretrained, out / "pretrained.safetensors")
    print_line("\nFine-tuning it on the new style, without GmP …")
    config = dataclasses.replace(FINE_TUNING, seed=seed)
    plain = _train(pretrained, data.shifted, config, out / "run_plain", print_line)
    print_line("\nFine-tuning it on the new style, with GmP …")
    config = dataclasses.replace(config, gmp=True)
    gmp = _train(pretrained, data.shifted, config, out / "run_gmp", print_line)
    return {"untrained": untrained, "pretrained": pretrained, "fine-tuned": plain, "fine-tuned with GmP": fold_gmp(gmp)}


def _write_chart(path: Path, results: dict[str, dict[str, float]]) -> Path:
    groups = {
        axis_name: {model: results[model][key] for model in results if model != "untrained"}
        for key, axis_name in _AXIS_NAMES.items()
    }
    with replacing(path) as temporary:
        bar_chart(groups, title="Held-out combinations").save(temporary, "PNG")
    return path


# Names short enough for an axis.
_AXIS_NAMES = {
    "zero-shot, new style": "zero-shot\nnew style",
    "image to text R@5": "image to\ntext R@5",
    "text to image R@5": "text to\nimage R@5",
    "zero-shot, old style": "zero-shot\nold style",
}


def _train(
    model: FullCLIP, data: ClipDataset, config: TrainConfig, folder: Path, print_line: Callable[[str], None]
) -> FullCLIP:
    def show_progress(progress: Progress) -> None:
        if progress.steps and progress.step % max(1, progress.total_steps // 4) == 0:
            last = progress.steps[-1]
            print_line(f"  step {last['step']}/{progress.total_steps}  loss {last['loss']:.2f}")

    def show_note(note: str) -> None:
        if "\n" not in note:  # the tables are also in the run folder
            print_line(f"  {note}")

    result = train(
        model, data, None, config, run_folder=folder, device=DEVICE, on_note=show_note, on_progress=show_progress
    )
    return result.full_clip
