"""Measure what GmP costs: a training step in GmP form beside the plain one, and beside the naive way of doing GmP.

    python benchmarks/gmp.py [8 | 32 | naive] [rounds]

ViT-B/32 with random weights; whole steps take turns in one process, with 8 or 32 pairs at the precision that `auto`
chooses. `naive` takes 8 pairs in fp32 and adds a step with `GmPLinear` layers, which normalise in every forward under
autograd, at the same loss and optimizer. On a CPU the time is CPU time of one thread, which other work on the machine
changes little. Needs 6 to 8 GB of memory. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clip_finetune.engine.bench.contenders import OurStep, Step
from clip_finetune.engine.bench.measure import machine
from clip_finetune.engine.bench.workload import ARCHITECTURES, random_batch
from clip_finetune.engine.clip.full_clip import FullCLIP
from clip_finetune.engine.clip.gmp import to_gmp
from clip_finetune.engine.clip.network import build_network, random_full_clip
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.data.loader import Batch
from clip_finetune.engine.data.tokenizer import cut_to_longest
from clip_finetune.engine.train.config import TrainConfig
from clip_finetune.engine.train.device import resolve_device, resolve_precision
from clip_finetune.engine.train.losses import InfoNCE
from clip_finetune.engine.train.optim.factory import build_optimizer, undo_steps
from clip_finetune.engine.train.optim.parameter_groups import parameter_groups

PLAIN, FOLDED, NAIVE = "plain", "GmP, folded once a step", "GmP, normalised in every forward"
PAST_RECTIFICATION = 10  # steps; AdaBelief computes less in the first few


class NaiveStep:
    """A step in fp32 with r and theta in the network itself."""

    def __init__(self, model: FullCLIP, device: torch.device, batch: Batch) -> None:
        self.device, self.positives = device, torch.eye(batch.pairs, dtype=torch.bool, device=device)
        self.network = build_network(to_gmp(model), device=device)
        self.loss = InfoNCE()
        config = TrainConfig()
        groups = parameter_groups(self.network.named_parameters(), model.architecture, config.optimizer)
        self.optimizer = build_optimizer(config.optimizer, config.learning_rate, groups)

    def __call__(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        images = self.network.encode_image(normalize(batch.images.to(self.device)))
        texts = self.network.encode_text(cut_to_longest(batch.tokens).to(self.device))
        loss: Tensor = self.loss(images, texts, self.network.logit_scale, self.positives)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def take_turns(steps: Mapping[str, Step], batch: Batch, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each step, one entry per round."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        undo_steps(step.optimizer, -PAST_RECTIFICATION)
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            float(step(batch))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(clock() - start)
            step.optimizer.zero_grad(set_to_none=True)  # so that waiting steps hold no gradients
    return seconds


def main(arguments: Sequence[str]) -> None:
    mode, rounds = arguments[0] if arguments else "8", int(arguments[1]) if len(arguments) > 1 else 5
    device, pairs = resolve_device(None), 32 if mode == "32" else 8
    torch.set_num_threads(1)
    model = random_full_clip(ARCHITECTURES["ViT-B-32"], 0)
    auto = resolve_precision("auto", device, model.architecture.text_width)
    precision, batch = "fp32" if mode == "naive" else auto, random_batch(model.architecture, pairs)
    build = functools.partial(OurStep, model, device, batch, precision=precision)
    steps: dict[str, Step] = {PLAIN: build(), FOLDED: build(gmp=True)}
    if mode == "naive":
        steps[NAIVE] = NaiveStep(model, device, batch)
    losses = {name: float(step(batch)) for name, step in steps.items()}
    seconds = take_turns(steps, batch, rounds, device)
    unit = "CPU-s" if device.type == "cpu" else "seconds"
    print(f"{machine(device)}; ViT-B/32, {rounds} rounds\n")
    print(f"| step | dtype | batch | {unit} | ÷ plain | first loss |\n|---|---|---|---|---|---|")
    for name, own in seconds.items():
        ratio = statistics.median(ours / plain for ours, plain in zip(own, seconds[PLAIN], strict=True))
        print(f"| {name} | {precision} | {pairs} | {statistics.median(own):.2f} | {ratio:.2f} | {losses[name]:.5f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
