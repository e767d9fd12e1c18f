"""AdaBelief in chunks against adabelief-pytorch's own, over a CLIP's tensors: time, and whether the bits are equal.

    python benchmarks/optimizer.py [ViT-B-32 | ViT-L-14] [steps] [cpu | cuda]

Both take turns in one process on one thread, with the same gradients, across the step at which rectification begins,
the sixth. The third side is what a training runs: in chunks, with the tensor that says whether a step is finite. On
CUDA, which is taken where it is there, that is the Triton kernel, and what is timed is from an idle device to an idle
device. ViT-L-14 needs 18 GB of memory. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from adabelief_pytorch import AdaBelief
from torch import nn

from clip_finetune.engine.bench.work import ARCHITECTURES
from clip_finetune.engine.train.optim.adabelief import ChunkedAdaBelief

LIBRARY, CHUNKED, IN_TRAINING = "adabelief-pytorch", "in chunks", "in chunks, as in a training"
KERNEL = "Triton kernel, as in a training"
SETTINGS = dict(
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-16,
    weight_decay=0.01,
    weight_decouple=True,
    rectify=True,
    print_change_log=False,
)


def optimizer_of(kind: type[AdaBelief], weights: Sequence[torch.Tensor]) -> AdaBelief:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its settings
        return kind([nn.Parameter(weight.clone()) for weight in weights], **SETTINGS)


def parameters(optimizer: AdaBelief) -> list[nn.Parameter]:
    return optimizer.param_groups[0]["params"]


def same_bits(one: AdaBelief, other: AdaBelief) -> bool:
    """Of all weights and of both moments."""
    pairs = zip(parameters(one), parameters(other), strict=True)
    return all(
        torch.equal(a, b)
        and all(torch.equal(one.state[a][name], other.state[b][name]) for name in ("exp_avg", "exp_avg_var"))
        for a, b in pairs
    )


def seconds_of(step: Callable[[], None], device: str) -> float:
    """Of the processor; on CUDA by the clock, until the device is done."""
    if device == "cpu":
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main(arguments: Sequence[str]) -> None:
    model, steps = arguments[0] if arguments else "ViT-B-32", int(arguments[1]) if len(arguments) > 1 else 10
    device = arguments[2] if len(arguments) > 2 else "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shapes = ARCHITECTURES[model].shapes().values()
    weights = [torch.randn(shape, generator=generator).mul_(0.02).to(device) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator).mul_(1e-3).to(device) for shape in shapes]
    last = IN_TRAINING if device == "cpu" else KERNEL
    sides = {
        LIBRARY: optimizer_of(AdaBelief, weights),
        CHUNKED: optimizer_of(ChunkedAdaBelief, weights),
        last: optimizer_of(ChunkedAdaBelief, weights),
    }
    sides[CHUNKED].use_kernel = False
    sides[last].found_inf, sides[last].say = torch.zeros((), device=device), print
    del weights
    for optimizer in sides.values():
        for parameter, gradient in zip(parameters(optimizer), gradients, strict=True):
            parameter.grad = gradient
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(steps):
        for gradient in gradients:
            gradient.mul_(-1 if step % 3 else 0.9)
        for name, optimizer in sides.items():
            spent[name].append(seconds_of(optimizer.step, device))
    values = sum(gradient.numel() for gradient in gradients)
    print(
        f"{model}: {len(gradients)} tensors, {values / 1e6:.0f} million values, {steps} steps, one thread, "
        f"torch {torch.__version__}{'' if device == 'cpu' else ', ' + torch.cuda.get_device_name()}\n"
    )
    unit, factor = ("CPU-s", 1) if device == "cpu" else ("ms", 1e3)
    print(f"| AdaBelief | {unit} a step | ÷ adabelief-pytorch | bits |\n|---|---|---|---|")
    rectified = slice(min(6, steps - 1), None)  # what nearly all steps are
    for name, seconds in spent.items():
        share = statistics.median(
            own / theirs for own, theirs in zip(seconds[rectified], spent[LIBRARY][rectified], strict=True)
        )
        bits = "" if name == LIBRARY else "equal" if same_bits(sides[name], sides[LIBRARY]) else "DIFFERENT"
        print(f"| {name} | {factor * statistics.median(seconds[rectified]):.3f} | {share:.2f} | {bits} |")


if __name__ == "__main__":
    main(sys.argv[1:])
