"""Compare our AdaBelief with adabelief-pytorch's own over the tensors of a CLIP: time, and whether the bits are equal.

    python benchmarks/optimizer.py [ViT-B-32 | ViT-L-14] [steps] [cpu | cuda]

All take turns in one process on one thread, with the same gradients, across the sixth step, at which rectification
begins. The third row is what a training runs: with the tensor that says whether a step is finite, and on CUDA (the
default if there is a GPU) with the Triton kernel, timed from an idle device to an idle device. ViT-L-14 needs 18 GB of
memory. Nothing is downloaded.
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

from clip_finetune.engine.bench.workload import ARCHITECTURES
from clip_finetune.engine.train.optim.adabelief import ChunkedAdaBelief

LIBRARY, CHUNKED, IN_TRAINING = "adabelief-pytorch", "in chunks", "in chunks, as in a training"
KERNEL = "Triton kernel, as in a training"


def optimizers(weights: Sequence[torch.Tensor], in_training: str) -> dict[str, AdaBelief]:
    def parameters() -> list[nn.Parameter]:
        return [nn.Parameter(weight.clone()) for weight in weights]

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its options
        library = AdaBelief(parameters(), lr=1e-3, weight_decay=0.01, print_change_log=False)
    chunked, trained = (ChunkedAdaBelief(parameters(), lr=1e-3, weight_decay=0.01, on_note=print) for _ in range(2))
    chunked.use_kernel = False
    trained.found_inf = torch.zeros((), device=weights[0].device)
    return {LIBRARY: library, CHUNKED: chunked, in_training: trained}


def parameters_of(optimizer: AdaBelief) -> list[nn.Parameter]:
    return optimizer.param_groups[0]["params"]


def same_bits(one: AdaBelief, other: AdaBelief) -> bool:
    """Return whether all weights and both moments are equal."""
    return all(
        torch.equal(a, b)
        and all(torch.equal(one.state[a][name], other.state[b][name]) for name in ("exp_avg", "exp_avg_var"))
        for a, b in zip(parameters_of(one), parameters_of(other), strict=True)
    )


def seconds_of(step: Callable[[], None], device: str) -> float:
    """Return CPU time; on CUDA the wall clock until the device is done."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main(arguments: Sequence[str]) -> None:
    model, steps = arguments[0] if arguments else "ViT-B-32", int(arguments[1]) if len(arguments) > 1 else 10
    device = arguments[2] if len(arguments) > 2 else "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    shapes = ARCHITECTURES[model].shapes().values()
    weights = [torch.randn(shape, generator=rng).mul_(0.02).to(device) for shape in shapes]
    gradients = [torch.randn(shape, generator=rng).mul_(1e-3).to(device) for shape in shapes]
    sides = optimizers(weights, IN_TRAINING if device == "cpu" else KERNEL)
    del weights
    for optimizer in sides.values():
        for parameter, gradient in zip(parameters_of(optimizer), gradients, strict=True):
            parameter.grad = gradient
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(steps):
        for gradient in gradients:
            gradient.mul_(-1 if step % 3 else 0.9)
        for name, optimizer in sides.items():
            seconds[name].append(seconds_of(optimizer.step, device))
    values = sum(gradient.numel() for gradient in gradients)
    print(
        f"{model}: {len(gradients)} tensors, {values / 1e6:.0f} million values, {steps} steps, one thread, "
        f"torch {torch.__version__}{'' if device == 'cpu' else ', ' + torch.cuda.get_device_name()}\n"
    )
    unit, factor = ("CPU-s", 1.0) if device == "cpu" else ("ms", 1e3)
    print(f"| AdaBelief | {unit} per step | ÷ adabelief-pytorch | bits of weights and moments |\n|---|---|---|---|")
    rectified = slice(min(6, steps - 1), None)  # nearly all steps of a training are rectified
    library = seconds[LIBRARY][rectified]
    for name in sides:
        own = seconds[name][rectified]
        ratio = statistics.median(ours / theirs for ours, theirs in zip(own, library, strict=True))
        bits = "" if name == LIBRARY else "equal" if same_bits(sides[name], sides[LIBRARY]) else "DIFFERENT"
        print(f"| {name} | {factor * statistics.median(own):.3f} | {ratio:.2f} | {bits} |")


if __name__ == "__main__":
    main(sys.argv[1:])
