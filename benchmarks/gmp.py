"""What GmP costs: a training step in GmP form against the plain one, and the old way.

    python benchmarks/gmp.py [8 | 32 | old] [rounds]

ViT-B/32 with random weights, whole steps that take turns in one process: with 8 or 32 pairs at the precision that
`auto` chooses; or `old`, 8 pairs in fp32 against `GmPLinear` layers too, which normalise in every forward under
autograd (same loss and optimizer). On a processor it is CPU time of one thread, which other work on the machine changes
little. Needs 6 to 8 GB of memory. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from clip_finetune.engine.bench.contenders import OurStep
from clip_finetune.engine.bench.measure import machine
from clip_finetune.engine.bench.work import ARCHITECTURES, random_batch
from clip_finetune.engine.clip.full_clip import FullCLIP
from clip_finetune.engine.clip.gmp import to_gmp
from clip_finetune.engine.clip.network import build_network, random_full_clip
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.data.loader import Batch
from clip_finetune.engine.data.tokenizer import cut_to_longest
from clip_finetune.engine.train.config import TrainConfig
from clip_finetune.engine.train.device import resolve_device, resolve_precision
from clip_finetune.engine.train.losses import LOSSES
from clip_finetune.engine.train.optim.factory import build_optimizer, parameter_groups, undo_steps

Step = Callable[[Batch], Tensor]
PLAIN, FOLDED, OLD = "plain", "GmP, folded once a step", "GmP, normalised in every forward"
PAST_RECTIFICATION = 10  # steps; before, AdaBelief computes less


class OldWay:
    """A step in fp32 with r and theta in the network itself."""

    def __init__(self, model: FullCLIP, device: torch.device, batch: Batch):
        self.device, self.positives = device, torch.eye(batch.pairs, dtype=torch.bool, device=device)
        self.network = build_network(to_gmp(model), device=device)
        config = TrainConfig.from_flat(batch_size=batch.pairs)
        self.loss = LOSSES[config.loss.loss].make(config.loss.temperature, config.loss.label_smoothing)
        groups = parameter_groups(self.network.named_parameters(), model.architecture, config.optimizer)
        self.optimizer = build_optimizer(config.optimizer, config.learning_rate, groups)

    def __call__(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        images = self.network.encode_image(normalize(batch.images.to(self.device)))
        texts = self.network.encode_text(cut_to_longest(batch.tokens).to(self.device))
        loss = self.loss(images, texts, self.network.logit_scale, self.positives)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def take_turns(steps: Mapping[str, Step], batch: Batch, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step by round."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        undo_steps(step.optimizer, -PAST_RECTIFICATION)
    for _ in range(rounds):
        for name, step in steps.items():
            began = clock()
            float(step(batch))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(clock() - began)
            step.optimizer.zero_grad(set_to_none=True)  # so that those who wait hold none
    return seconds


def main(arguments: Sequence[str]) -> None:
    asked, rounds = arguments[0] if arguments else "8", int(arguments[1]) if len(arguments) > 1 else 5
    device, pairs = resolve_device(None), 32 if asked == "32" else 8
    torch.set_num_threads(1)
    model = random_full_clip(ARCHITECTURES["ViT-B-32"], 0)
    auto = resolve_precision("auto", device, model.architecture.text_width)
    precision, batch = "fp32" if asked == "old" else auto, random_batch(model.architecture, pairs)
    build = functools.partial(OurStep, model, device, batch, precision=precision)
    steps: dict[str, Step] = {PLAIN: build(), FOLDED: build(gmp=True)}
    if asked == "old":
        steps[OLD] = OldWay(model, device, batch)
    losses = {name: float(step(batch)) for name, step in steps.items()}
    spent = take_turns(steps, batch, rounds, device)
    print(f"{machine(device)}; ViT-B/32, {rounds} rounds\n")
    unit = "CPU-s" if device.type == "cpu" else "seconds"
    print(f"| step | dtype | batch | {unit} | ÷ plain | first loss |\n|---|---|---|---|---|---|")
    for name, seconds in spent.items():
        share = statistics.median(own / plain for own, plain in zip(seconds, spent[PLAIN], strict=True))
        print(
            f"| {name} | {precision} | {pairs} | {statistics.median(seconds):.2f} | {share:.2f} | {losses[name]:.5f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
