"""How fast a training step is and how much memory it takes, ours beside open_clip's and Hugging Face's.

The peers' models are trained with the library's own AdaBelief, on the same weights, pictures and captions. All take
turns in one process, step by step: what else the machine does then hits all alike. `benchmarks/step.py` measures more
peers by the same means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..clip.architecture import Architecture
from ..clip.full_clip import FullCLIP
from ..clip.network import random_full_clip
from ..data.loader import Batch
from ..errors import UserError
from ..report.tables import table
from ..train.device import DTYPES, resolve_device, resolve_precision
from ..train.optim.factory import undo_steps
from .contenders import Contender, our_contenders, peers
from .work import Work, flop_per_pair, our_loss, random_batch

# With it a new process loads its libraries, before its memory is measured.
_WARM_UP = Architecture(
    embed_dim=8,
    image_size=16,
    patch_size=8,
    vision_width=64,
    vision_layers=1,
    vision_heads=1,
    vision_mlp_width=256,
    context_length=32,
    vocab_size=64,
    text_width=64,
    text_layers=1,
    text_heads=1,
    text_mlp_width=256,
    activation="quick_gelu",
)
# AdaBelief computes less in its first five steps (see `rectification`), which are none of a training's.
_PAST_RECTIFICATION = 10
_PRODUCT = {"cpu": 2048, "cuda": 8192}  # rows and columns of the product that peak speed is told by
# Of the logarithm of the batch: how far the first losses may be apart by rounding.
_SAME_LOSS = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
_LIBRARIES = ("open_clip", "adabelief_pytorch", "transformers.models.clip.modeling_clip")
_PER_PARAMETER = 20  # bytes while a contender is there: weights, gradients, moments, copies, activations


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(
    contenders: Sequence[Contender],
    work: Work,
    *,
    device: torch.device,
    rounds: int,
    say: Callable[[str], None] = lambda note: None,
) -> list[dict[str, Any]]:
    """A row for each: pairs_per_second, share_of_peak, peak_bytes (None where the system does not tell), ratio (its
    time for a pair over that of the first contender, the median of the rounds), speed_to_open_clip (the same as a rate
    over open_clip's, None without it), first_loss, cpu_seconds and seconds (a batch). Raises `UserError` if a loss that
    should be ours is not.
    """
    memory = {}
    if device.type != "cuda":  # first, while this process is small
        for contender in contenders:
            say(f"Memory of {contender.name}")
            memory[contender.name] = _peak_of_a_process(contender, work)
    model = work.open_model()
    batch = random_batch(model.architecture, work.batch_size)
    expected = {name: our_loss(model, batch, device, name) for name in {c.loss for c in contenders} - {""}}
    rows: dict[str, dict[str, Any]] = {}
    for group in _groups(contenders, model, device):
        say("Speed of " + ", ".join(contender.name for contender in group))
        for name, row in _take_turns(group, model, device, batch, rounds, expected).items():
            rows.setdefault(name, row)
    peer = next((rows[c.name]["ratio"] for c in contenders if c.name.startswith("open_clip")), None)
    return [
        rows[c.name]
        | {"peak_bytes": memory.get(c.name, rows[c.name]["peak_bytes"])}
        | {"speed_to_open_clip": None if peer is None else peer / rows[c.name]["ratio"]}
        for c in contenders
    ]


def _groups(contenders: Sequence[Contender], model: FullCLIP, device: torch.device) -> list[list[Contender]]:
    """As many at a time as the memory holds; the first, which the others are compared with, is in each group."""
    each = _PER_PARAMETER * sum(tensor.numel() for tensor in model.state_dict.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    at_once = max(1, int(0.8 * free / each) - 1)
    first, others = contenders[0], contenders[1:]
    return [[first, *others[n : n + at_once]] for n in range(0, len(others), at_once)] or [[first]]


def _free_memory() -> float:
    """Bytes that are free on the host; where the system does not tell, 16 GB."""
    with contextlib.suppress(OSError), open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 16e9


def _take_turns(
    group: Sequence[Contender],
    model: FullCLIP,
    device: torch.device,
    batch: Batch,
    rounds: int,
    expected: dict[str, float],
) -> dict[str, dict[str, Any]]:
    steps, first_losses, peaks = {}, {}, {}
    for contender in group:
        before = _reset_peak(device)
        steps[contender.name] = step = contender.build(model, device, batch)
        first_losses[contender.name] = float(step(batch))
        _check_loss(contender, first_losses[contender.name], expected)
        if device.type == "cuda":  # with the optimizer's state there; elsewhere a process of its own has told it
            step(batch)
        undo_steps(step.optimizer, -_PAST_RECTIFICATION)
        peaks[contender.name] = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
    seconds: dict[str, list[float]] = {contender.name: [] for contender in group}
    cpu_seconds: dict[str, list[float]] = {contender.name: [] for contender in group}
    rates = dict.fromkeys((contender.dtype for contender in group), 0.0)
    for _ in range(rounds):
        for dtype in rates:
            rates[dtype] = max(rates[dtype], _product_rate(device, DTYPES[dtype]))
        for contender in group:
            _wait(device)
            began, worked = time.perf_counter(), time.process_time()
            steps[contender.name](batch)
            _wait(device)
            seconds[contender.name].append((time.perf_counter() - began) / contender.batches)
            cpu_seconds[contender.name].append((time.process_time() - worked) / contender.batches)
    reference, rows = seconds[group[0].name], {}
    for contender in group:
        name = contender.name
        speed = batch.pairs / statistics.median(seconds[name])
        flop = flop_per_pair(model.architecture, contender.towers)
        rows[name] = {
            "name": name,
            "dtype": contender.dtype,
            "batch": batch.pairs,
            "pairs_per_second": speed,
            "share_of_peak": flop * speed / rates[contender.dtype],
            "peak_bytes": peaks[name],
            "ratio": statistics.median(own / ours for own, ours in zip(seconds[name], reference, strict=True)),
            "first_loss": first_losses[name],
            "expected_loss": expected.get(contender.loss),
            "flop_per_pair": flop,
            "peak_flop_per_second": rates[contender.dtype],
            "seconds": seconds[name],
            "cpu_seconds": cpu_seconds[name],
        }
    return rows


def _check_loss(contender: Contender, found: float, expected: dict[str, float]) -> None:
    if contender.loss and not abs(found - expected[contender.loss]) <= _SAME_LOSS[contender.dtype] * max(1.0, found):
        raise UserError(
            f"The loss of {contender.name} on the first batch is {found:.6f} where {expected[contender.loss]:.6f} was "
            "expected: it does not do the same work, so its speed says nothing."
        )


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two large square matrices, the best of a few."""
    side = _PRODUCT.get(device.type, 2048)
    one = torch.full((side, side), 0.01, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        _wait(device)
        began = time.perf_counter()
        one @ one
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _reset_peak(device: torch.device) -> int:
    """Bytes that are allocated on the graphics card now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_of_a_process(contender: Contender, work: Work) -> int | None:
    """By how many bytes a new process grows that opens the model and makes two steps, its libraries left out."""
    context = _new_processes()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_two_steps, args=(contender, work, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise UserError(
            f"The process that measures the memory of {contender.name} ended before its time, probably for want of "
            "memory; close other programs, or choose a smaller --batch-size or --model."
        ) from None
    finally:
        process.join()


@functools.cache
def _new_processes() -> multiprocessing.context.BaseContext:
    """On Linux one process loads the libraries, which takes seconds, and all others begin as its copies."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_LIBRARIES])
    return context


def _two_steps(contender: Contender, work: Work, sender) -> None:
    torch.set_num_threads(work.threads)
    cpu = torch.device("cpu")
    small = random_full_clip(_WARM_UP, seed=0)
    contender.build(small, cpu, (few := random_batch(_WARM_UP, 2)))(few)
    before = _peak_resident()
    model = work.open_model()
    batch = random_batch(model.architecture, work.batch_size)
    step = contender.build(model, cpu, batch)
    del model
    for _ in range(2):
        step(batch)
    after = _peak_resident()
    sender.send(None if before is None or after is None else after - before)


def _peak_resident() -> int | None:
    """The most bytes that this process has had in memory; None on Windows."""
    # Linux's getrusage counts what the parent process had, too.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


# ---- the command -----------------------------------------------------------------------------------------------------


_LEGEND = """\
of peak: of the speed of a large matrix product in the same dtype; a pair counts whole, padding of captions included.
memory: the most that the step takes beyond the libraries, alone in a process. All have the same weights and batch."""


@dataclasses.dataclass(frozen=True)
class Result:
    """`rows` as `measure` gives them."""

    machine: str
    model: str
    rounds: int
    rows: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        """Under a line about the machine and one about the work."""
        shown = [
            {
                "": row["name"],
                "dtype": row["dtype"],
                "batch": str(row["batch"]),
                "pairs/s": f"{row['pairs_per_second']:,.{0 if row['pairs_per_second'] >= 100 else 2}f}",
                "of peak": f"{row['share_of_peak']:.1%}",
                "memory": "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f} GB",
                f"time / {self.rows[0]['name']}": f"{row['ratio']:.2f}",
                "speed / open_clip": "" if row["speed_to_open_clip"] is None else f"{row['speed_to_open_clip']:.2f}",
                "first loss": f"{row['first_loss']:.5f}",
            }
            for row in self.rows
        ]
        work = f"{self.model}, {self.rounds} rounds in which all take turns; ratios are medians of the rounds"
        return f"{self.machine}\n{work}\n\n{table(shown)}\n\n{_LEGEND}"


def bench(
    source: str = "ViT-B-32",
    *,
    batch_size: int = 8,
    rounds: int = 3,
    precision: str = "auto",
    threads: int | None = None,
    device: str | None = None,
    activation: str = "auto",
    say: Callable[[str], None] = lambda note: None,
) -> Result:
    """Measure our steps and the peers that are installed, on a model's file or an architecture's random weights.

    `threads` None leaves torch its own number. `activation` overrides what a file says. Raises `UserError`.
    """
    chosen = resolve_device(device)
    if batch_size < 2 or rounds < 1 or (threads is not None and threads < 1):
        raise UserError("bench needs a --batch-size of 2 at least, and --rounds and --threads of 1 at least.")
    if threads:
        torch.set_num_threads(threads)
    work = Work(source, batch_size, activation, torch.get_num_threads())
    width = work.open_model().architecture.text_width
    contenders = [*our_contenders(resolve_precision(precision, chosen, width)), *peers(chosen, say)]
    return Result(machine(chosen), source, rounds, measure(contenders, work, device=chosen, rounds=rounds, say=say))


def machine(device: torch.device) -> str:
    """The graphics card or processor, cores, instructions, and torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
