"""Compare the memory estimate of a training with what torch's allocator says of a step.

    python benchmarks/memory.py [GB]

Random weights, several kinds of training: ViT-B/32 on a CPU, ViT-L/14 on a GPU. With GB, the process may use only that
much of the GPU, as if it were a smaller one: with 24, batches of 4,096 must fit; with 8, the text tower must train.
Nothing is downloaded.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from clip_finetune.engine.bench.measure import machine
from clip_finetune.engine.bench.workload import ARCHITECTURES, peak_allocation, random_batch
from clip_finetune.engine.clip.gmp import to_gmp
from clip_finetune.engine.clip.network import random_full_clip
from clip_finetune.engine.errors import UserError
from clip_finetune.engine.notes import Notes
from clip_finetune.engine.train.config import TrainConfig
from clip_finetune.engine.train.device import resolve_device, resolve_precision
from clip_finetune.engine.train.run.results import Callbacks
from clip_finetune.engine.train.setup import Plan
from clip_finetune.engine.train.step import TrainingStep, build_weights


def trainings(on_gpu: bool, limited: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (pairs, settings)."""
    if limited:
        yield 4096, {"gmp": True, "activation_checkpointing": True}
        yield 4096, {"gmp": True}
        yield 1024, {"towers": "text"}
        return
    pairs = 128 if on_gpu else 16
    yield pairs, {}
    yield pairs, {"gmp": True}
    yield pairs, {"gmp": True, "micro_batch": pairs // 4}
    yield 4 * pairs, {"gmp": True, "activation_checkpointing": True}
    yield 2 * pairs, {"towers": "text"}
    yield pairs, {"optimizer": "adamw"}
    yield pairs, {"optimizer": "adafactor", "towers": "text"}


def main(arguments: Sequence[str]) -> None:
    device, limit = resolve_device(None), int(arguments[0]) if arguments else None
    on_gpu = device.type == "cuda"
    if limit and not on_gpu:
        sys.exit("GB is for GPUs, and there is none.")
    if limit:
        torch.cuda.set_per_process_memory_fraction(limit * 1e9 / torch.cuda.mem_get_info(device)[1], device)
    name = "ViT-L-14" if on_gpu else "ViT-B-32"
    model = random_full_clip(ARCHITECTURES[name], 0)
    precision = resolve_precision("auto", device, model.architecture.text_width)
    print(f"{machine(device)}; {name}, {precision}{f', at most {limit} GB' if limit else ''}\n")
    print("| training | batch | micro-batch | estimate (GB) | allocated (GB) | allocated / estimate |")
    print("|---|---|---|---|---|---|")
    for pairs, settings in trainings(on_gpu, limited=limit is not None):
        config = TrainConfig.from_flat(batch_size=pairs, **settings)
        label = ", ".join(f"{key} {value}" for key, value in settings.items()) or "default"
        plan = Plan(device=device, precision=precision, batch_size=pairs, steps_per_epoch=10, total_steps=10)
        weights = build_weights(to_gmp(model) if config.gmp else model, config, plan)
        step = TrainingStep(weights, config, plan, callbacks=Callbacks(Notes(print)))
        batch = random_batch(model.architecture, pairs)
        length = step.trim(batch.tokens).shape[1]
        try:
            step.memory().require(pairs, length, device, ())
        except UserError as error:
            print(f"| {label} | {pairs} | | refused: {error} | | |")
            continue
        step(batch, 0)  # so that the optimizer's state is there
        step.optimizer.zero_grad(set_to_none=True)
        estimate = step.memory().forecast(pairs, step.micro_batch, length)
        allocated = estimate.weights + estimate.optimizer
        allocated += peak_allocation(functools.partial(step, batch, 1), device)
        print(
            f"| {label} | {pairs} | {step.micro_batch} | {estimate.peak / 1e9:.2f} | {allocated / 1e9:.2f} | "
            f"{allocated / estimate.peak:.3f} |",
            flush=True,
        )
        del step, batch
        if on_gpu:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
