"""The forecast of a training's memory beside what torch's allocator says of a step.

    python benchmarks/memory.py [GB]

On a processor ViT-B/32, on a graphics card ViT-L/14 with random weights, in several kinds of training. With GB, as many
as a smaller card has (24, 8), the process may take no more of the card: batches of 4,096 must go through 24 GB, and the
text tower must train on 8. Nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from clip_finetune.engine.bench.measure import machine
from clip_finetune.engine.bench.work import ARCHITECTURES, most_allocated, random_batch
from clip_finetune.engine.clip.gmp import to_gmp
from clip_finetune.engine.clip.network import random_full_clip
from clip_finetune.engine.errors import UserError
from clip_finetune.engine.notes import Notes
from clip_finetune.engine.train.config import TrainConfig
from clip_finetune.engine.train.device import resolve_device, resolve_precision
from clip_finetune.engine.train.run.results import Callbacks
from clip_finetune.engine.train.setup import Plan
from clip_finetune.engine.train.step import TrainingStep, build_weights


def kinds(card: bool, limit: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(pairs, settings)."""
    if limit:
        yield 4096, {"gmp": True, "activation_checkpointing": True}
        yield 4096, {"gmp": True}
        yield 1024, {"towers": "text"}
        return
    pairs = 128 if card else 16
    yield pairs, {}
    yield pairs, {"gmp": True}
    yield pairs, {"gmp": True, "micro_batch": pairs // 4}
    yield 4 * pairs, {"gmp": True, "activation_checkpointing": True}
    yield 2 * pairs, {"towers": "text"}
    yield pairs, {"optimizer": "adamw"}
    yield pairs, {"optimizer": "adafactor", "towers": "text"}


def main(arguments: Sequence[str]) -> None:
    device, limit = resolve_device(None), int(arguments[0]) if arguments else None
    card = device.type == "cuda"
    if limit and not card:
        sys.exit("GB is for graphics cards, and there is none.")
    if limit:
        torch.cuda.set_per_process_memory_fraction(limit * 1e9 / torch.cuda.mem_get_info(device)[1], device)
    name = "ViT-L-14" if card else "ViT-B-32"
    model = random_full_clip(ARCHITECTURES[name], 0)
    precision = resolve_precision("auto", device, model.architecture.text_width)
    print(f"{machine(device)}; {name}, {precision}{f', at most {limit} GB' if limit else ''}\n")
    print("| training | batch | micro-batch | forecast (GB) | allocated (GB) | allocated / forecast |")
    print("|---|---|---|---|---|---|")
    for pairs, settings in kinds(card, limit):
        config = TrainConfig.from_flat(batch_size=pairs, **settings)
        told = ", ".join(f"{key} {value}" for key, value in settings.items()) or "default"
        plan = Plan(device=device, precision=precision, batch_size=pairs, steps_per_epoch=10, total_steps=10)
        weights = build_weights(to_gmp(model) if config.gmp else model, config, plan)
        work = TrainingStep(weights, config, plan, callbacks=Callbacks(Notes(print)))
        batch = random_batch(model.architecture, pairs)
        length = work.trim(batch.tokens).shape[1]
        try:
            work.memory().require(pairs, length, device, ())
        except UserError as error:
            print(f"| {told} | {pairs} | | refused: {error} | | |")
            continue
        work(batch, 0)  # which makes the optimizer's moments
        work.optimizer.zero_grad(set_to_none=True)
        found = work.memory().forecast(pairs, work.micro_batch, length)
        fixed = found.weights + found.optimizer
        taken = fixed + most_allocated(lambda work=work, batch=batch: work(batch, 1), device)
        print(
            f"| {told} | {pairs} | {work.micro_batch} | {found.peak / 1e9:.2f} | {taken / 1e9:.2f} | "
            f"{taken / found.peak:.3f} |",
            flush=True,
        )
        del work, batch
        if card:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
