"""Speed and memory of a training step, ours beside open_clip's and Hugging Face's.

The peers are trained with adabelief-pytorch's own AdaBelief, on the same weights, images and captions. All contenders
take turns in one process, step by step, so that other work on the machine slows all of them alike. `benchmarks/step.py`
measures more peers in the same way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..clip.full_clip import FullCLIP
from ..clip.network import random_full_clip
from ..data.loader import Batch
from ..errors import UserError
from ..report.tables import table
from ..train.device import DTYPES, resolve_device, resolve_precision
from ..train.optim.factory import undo_steps
from .contenders import Contender, our_contenders, peers
from .workload import Workload, flop_per_pair, openai_architecture, our_loss, random_batch

# A step of this model makes a new process load its libraries before its memory is measured.
_WARM_UP = openai_architecture(patch_size=8, vision=(64, 1), text=(64, 1), image_size=16, vocab_size=64)
# AdaBelief computes less in its first five steps (see `rectification`), which are not typical of a training.
_PAST_RECTIFICATION = 10
_PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrix product that defines peak speed
# How far first losses may differ by rounding.
_LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
_LIBRARIES = ("open_clip", "adabelief_pytorch", "transformers.models.clip.modeling_clip")
_BYTES_PER_PARAMETER = 20  # of a contender: weights, gradients, moments, copies, activations
_LEGEND = """\
of peak: share of the speed of a large matrix product in the same dtype, counting whole pairs with padded captions.
memory: peak of a step beyond the libraries, in a process of its own. All have the same weights and batch."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of the table. `seconds` and `cpu_seconds` are per batch, one entry per round."""

    name: str
    dtype: str
    batch: int
    pairs_per_second: float
    share_of_peak: float
    peak_bytes: int | None  # None if the system does not tell
    ratio: float  # time per pair over that of the first contender, the median of the rounds
    first_loss: float
    expected_loss: float | None
    flop_per_pair: int
    peak_flop_per_second: float
    seconds: list[float]
    cpu_seconds: list[float]
    speed_to_open_clip: float | None = None  # None without open_clip

    def row(self, reference: str) -> dict[str, str]:
        return {
            "": self.name,
            "dtype": self.dtype,
            "batch": str(self.batch),
            "pairs/s": f"{self.pairs_per_second:,.{0 if self.pairs_per_second >= 100 else 2}f}",
            "of peak": f"{self.share_of_peak:.1%}",
            "memory": "?" if self.peak_bytes is None else f"{self.peak_bytes / 1e9:.2f} GB",
            f"time / {reference}": f"{self.ratio:.2f}",
            "speed / open_clip": "" if self.speed_to_open_clip is None else f"{self.speed_to_open_clip:.2f}",
            "first loss": f"{self.first_loss:.5f}",
        }


@dataclasses.dataclass(frozen=True)
class BenchResult:
    machine: str
    model: str
    rounds: int
    rows: list[Measurement]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def table(self) -> str:
        workload = f"{self.model}, {self.rounds} rounds in which all take turns; ratios are medians of the rounds"
        rows = table([row.row(self.rows[0].name) for row in self.rows])
        return f"{self.machine}\n{workload}\n\n{rows}\n\n{_LEGEND}"


def bench(
    source: str = "ViT-B-32",
    *,
    batch_size: int = 8,
    rounds: int = 3,
    precision: str = "auto",
    threads: int | None = None,
    device: str | None = None,
    activation: str = "auto",
    on_note: Callable[[str], None] = lambda note: None,
) -> BenchResult:
    """Measure our steps and the installed peers on the model in a file, or on an architecture with random weights.

    `threads` None leaves torch's own number. `activation` overrides what the file says. Raises `UserError`.
    """
    chosen = resolve_device(device)
    if batch_size < 2 or rounds < 1 or (threads is not None and threads < 1):
        raise UserError("bench needs a --batch-size of 2 or more, and --rounds and --threads of 1 or more.")
    if threads:
        torch.set_num_threads(threads)
    workload = Workload(source, batch_size, activation, torch.get_num_threads())
    width = workload.open_model().architecture.text_width
    contenders = [*our_contenders(resolve_precision(precision, chosen, width)), *peers(chosen, on_note)]
    rows = measure(contenders, workload, device=chosen, rounds=rounds, on_note=on_note)
    return BenchResult(machine(chosen), source, rounds, rows)


def measure(
    contenders: Sequence[Contender],
    workload: Workload,
    *,
    device: torch.device,
    rounds: int,
    on_note: Callable[[str], None] = lambda note: None,
) -> list[Measurement]:
    """Measure all contenders, in their order. Raises `UserError` if one's first loss is not what it must be."""
    memory: dict[str, int | None] = {}
    if device.type != "cuda":  # first, while this process is small
        for contender in contenders:
            on_note(f"Measuring the memory of {contender.name}")
            memory[contender.name] = _peak_of_a_process(contender, workload)
    model = workload.open_model()
    batch = random_batch(model.architecture, workload.batch_size)
    expected = {name: our_loss(model, batch, device, name) for name in {c.loss for c in contenders} - {""}}
    rows: dict[str, Measurement] = {}
    for group in _groups(contenders, model, device):
        on_note("Measuring the speed of " + ", ".join(contender.name for contender in group))
        for row in _take_turns(group, model, batch, expected, device=device, rounds=rounds):
            rows.setdefault(row.name, row)
    peer = next((rows[c.name].ratio for c in contenders if c.name.startswith("open_clip")), None)
    return [
        dataclasses.replace(
            rows[c.name],
            peak_bytes=memory.get(c.name, rows[c.name].peak_bytes),
            speed_to_open_clip=None if peer is None else peer / rows[c.name].ratio,
        )
        for c in contenders
    ]


# ---- speed -----------------------------------------------------------------------------------------------------------


def _groups(contenders: Sequence[Contender], model: FullCLIP, device: torch.device) -> list[list[Contender]]:
    """Split the contenders into groups that fit in memory; the first, the reference for ratios, is in each group."""
    each = _BYTES_PER_PARAMETER * sum(tensor.numel() for tensor in model.state_dict.values())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    at_once = max(1, int(0.8 * free / each) - 1)
    first, others = contenders[0], contenders[1:]
    return [[first, *others[n : n + at_once]] for n in range(0, len(others), at_once)] or [[first]]


def _take_turns(
    group: Sequence[Contender],
    model: FullCLIP,
    batch: Batch,
    expected: Mapping[str, float],
    *,
    device: torch.device,
    rounds: int,
) -> list[Measurement]:
    runners = [_Runner(contender, model, batch, device) for contender in group]
    for runner in runners:
        _check_loss(runner.contender, runner.first_loss, expected)
    peaks = dict.fromkeys((contender.dtype for contender in group), 0.0)
    for _ in range(rounds):
        for dtype in peaks:
            peaks[dtype] = max(peaks[dtype], _product_flop_per_second(device, DTYPES[dtype]))
        for runner in runners:
            runner.run()
    return [runner.measurement(runners[0].seconds, peaks, expected) for runner in runners]


class _Runner:
    """A contender after its first step, and the times of the steps that it has run since."""

    def __init__(self, contender: Contender, model: FullCLIP, batch: Batch, device: torch.device) -> None:
        self.contender, self.architecture, self.batch, self.device = contender, model.architecture, batch, device
        self.peak_bytes: int | None = None
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        self.step = contender.build(model, device, batch)
        self.first_loss = float(self.step(batch))
        if device.type == "cuda":
            self.step(batch)  # the first that has the optimizer's state in memory from its beginning
            self.peak_bytes = torch.cuda.max_memory_allocated(device) - before
        undo_steps(self.step.optimizer, -_PAST_RECTIFICATION)

    def run(self) -> None:
        _wait_for(self.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        self.step(self.batch)
        _wait_for(self.device)
        self.seconds.append((time.perf_counter() - start) / self.contender.batches)
        self.cpu_seconds.append((time.process_time() - cpu_start) / self.contender.batches)

    def measurement(
        self, reference: Sequence[float], peaks: Mapping[str, float], expected: Mapping[str, float]
    ) -> Measurement:
        """Return the row; `reference` are the first contender's seconds, `peaks` the FLOP/s of each dtype."""
        flop = flop_per_pair(self.architecture, self.contender.towers)
        speed = self.batch.pairs / statistics.median(self.seconds)
        return Measurement(
            name=self.contender.name,
            dtype=self.contender.dtype,
            batch=self.batch.pairs,
            pairs_per_second=speed,
            share_of_peak=flop * speed / peaks[self.contender.dtype],
            peak_bytes=self.peak_bytes,
            ratio=statistics.median(own / theirs for own, theirs in zip(self.seconds, reference, strict=True)),
            first_loss=self.first_loss,
            expected_loss=expected.get(self.contender.loss),
            flop_per_pair=flop,
            peak_flop_per_second=peaks[self.contender.dtype],
            seconds=self.seconds,
            cpu_seconds=self.cpu_seconds,
        )


def _check_loss(contender: Contender, first_loss: float, expected: Mapping[str, float]) -> None:
    if not contender.loss:
        return
    difference = abs(first_loss - expected[contender.loss])
    if not difference <= _LOSS_TOLERANCE[contender.dtype] * max(1.0, first_loss):  # NaN fails too
        raise UserError(
            f"The loss of {contender.name} on the first batch is {first_loss:.6f}, but should be "
            f"{expected[contender.loss]:.6f}: it does not do the same work, so its speed says nothing."
        )


def _product_flop_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Return the speed of a product of two large square matrices, the best of a few."""
    size = _PRODUCT_SIZE.get(device.type, 2048)
    matrix = torch.full((size, size), 0.01, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        _wait_for(device)
        start = time.perf_counter()
        matrix @ matrix
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- memory ----------------------------------------------------------------------------------------------------------


def _peak_of_a_process(contender: Contender, workload: Workload) -> int | None:
    """Return by how many bytes a new process grows that opens the model and does two steps, without its libraries."""
    context = _process_context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_two_steps, args=(contender, workload, sender))
    process.start()
    sender.close()
    try:
        peak: int | None = receiver.recv()
        return peak
    except EOFError:
        raise UserError(
            f"The process that measures the memory of {contender.name} died, probably because the machine ran out of "
            "memory; close other programs, or choose a smaller --batch-size or --model."
        ) from None
    finally:
        process.join()


@functools.cache
def _process_context() -> Any:  # typeshed's common base class lacks Process
    """Return how to start processes: on Linux as copies of one that has loaded the libraries, which takes seconds."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_LIBRARIES])
    return context


def _two_steps(contender: Contender, workload: Workload, sender: multiprocessing.connection.Connection) -> None:
    """Send the growth of this process to its parent."""
    torch.set_num_threads(workload.threads)
    cpu = torch.device("cpu")
    small_batch = random_batch(_WARM_UP, 2)
    contender.build(random_full_clip(_WARM_UP, seed=0), cpu, small_batch)(small_batch)
    before = _peak_resident()
    model = workload.open_model()
    batch = random_batch(model.architecture, workload.batch_size)
    step = contender.build(model, cpu, batch)
    del model
    for _ in range(2):
        step(batch)
    after = _peak_resident()
    sender.send(None if before is None or after is None else after - before)


def _peak_resident() -> int | None:
    """Return the most bytes that this process has had in memory; None on Windows."""
    # Linux's getrusage would include the parent process's peak.
    if (kilobytes := _proc_value("/proc/self/status", "VmHWM")) is not None:
        return int(kilobytes.split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _free_memory() -> float:
    """Return the bytes that are free on the host; 16 GB if the system does not tell."""
    kilobytes = _proc_value("/proc/meminfo", "MemAvailable")
    return 16e9 if kilobytes is None else int(kilobytes.split()[0]) * 1024


def _proc_value(path: str, key: str) -> str | None:
    """Return the value of a "key : value" line of a file in Linux's /proc; None elsewhere."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return None


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> str:
    """Return one line with the GPU, or the CPU with its cores and instructions, and the version of torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpu = _proc_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu}, {cores} cores, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}"
