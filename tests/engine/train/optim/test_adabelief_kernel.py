"""AdaBelief's Triton kernel: its bits in Triton's interpreter, its compiled code, and trainings without it."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from adabelief_pytorch import AdaBelief
from torch.overrides import TorchFunctionMode

from clip_finetune.engine.train.optim import adabelief
from clip_finetune.engine.train.optim.adabelief import ChunkedAdaBelief, verified_kernel

CPU = torch.device("cpu")
STATE = ("exp_avg", "exp_avg_var")
# A block of the kernel has 2048 values: fewer, one, more, exactly a block, and one more than two blocks.
SHAPES = [(3,), (1,), (64, 65), (2048,), (5, 7, 11), (), (4097,)]


def random_parameters(device=CPU):
    """The kernel refuses the last two: one is not contiguous, the other not aligned."""
    rng = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=rng).to(device) for shape in (*SHAPES, (5, 6), (9,))]
    return [torch.nn.Parameter(value) for value in (*values[:-2], values[-2].t(), values[-1][1:])]


def groups_of(parameters):
    return [
        dict(params=parameters[:2], weight_decay=0.1),
        dict(params=parameters[2:4], weight_decay=0.0, eps=1e-8),
        dict(params=parameters[4:], weight_decay=0.3, betas=(0.8, 0.99)),
    ]


def steps(parameters, optimizer, count):
    """Before each step, set gradients of all sizes, subnormal ones included, and the learning rates of the groups.

    One parameter joins late and one misses steps.
    """
    for step in range(count):
        rng = torch.Generator().manual_seed(step)
        for number, parameter in enumerate(parameters):
            size = 10.0 ** (torch.rand(parameter.shape, generator=rng) * 44 - 42)
            gradient = torch.randn(parameter.shape, generator=rng) * size
            missing = (number == 3 and step < 4) or (number == 4 and step % 3 == 1)
            parameter.grad = None if missing else gradient.to(parameter.device)
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = 1e-3 * (step + 1) * (number + 1)
        yield step


def assert_the_librarys_bits(optimizer, ours, count):
    theirs = random_parameters(ours[0].device)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its options
        library = AdaBelief(groups_of(theirs), lr=1e-3, print_change_log=False)
    for step, _ in zip(steps(theirs, library, count), steps(ours, optimizer, count), strict=True):
        if step % 2:
            optimizer.found_inf = torch.zeros((), device=ours[0].device)
        library.step()
        optimizer.step()
        for one, other in zip(theirs, ours, strict=True):
            assert torch.equal(one, other), step
            for name in STATE if one.grad is not None else ():
                assert torch.equal(library.state[one][name], optimizer.state[other][name]), step


# ---- in Triton's interpreter, in a process of its own, because it is chosen before Triton is imported ----------------


class RoundedAsOnCUDA(TorchFunctionMode):
    """Makes torch's operations on a CPU round as on CUDA: three are one fma each, and a root is the nearest number.

    On a CPU the order is another, and a root is not always the nearest number. The sources are cuobjdump of torch
    2.15's machine code for sm_90 and ATen/native/cuda/DeviceAddCmulCdiv.cuh. An old Triton's interpreter rounds an fma
    twice; then so does this.
    """

    def __init__(self):
        super().__init__()
        from triton._C.libtriton import interpreter

        self.fused = hasattr(interpreter, "fma_fp32")

    def __torch_function__(self, called, types, arguments=(), options=None):
        name, options = getattr(called, "__name__", "").strip("_"), options or {}
        name, many = name.removeprefix("foreach_"), name.startswith("foreach_")
        if name == "sqrt":
            roots = [value.double().sqrt().float() for value in (arguments[0] if many else arguments)]
            return roots if many else roots[0]
        factor = options.get("alpha" if name == "add" else "value")
        if name not in ("add", "addcmul", "addcdiv") or factor in (None, 1):
            return called(*arguments, **options)
        factor = torch.tensor(factor, dtype=torch.float32)
        for own, one, *other in zip(*arguments, strict=True) if many else [arguments]:
            term = one if name == "add" else one * other[0] if name == "addcmul" else one / other[0]
            # The product of two float32 fits a float64 without rounding.
            moved = factor.double() * term.double() + own.double() if self.fused else factor * term + own
            own.copy_(moved.float())
        return None if many else arguments[0]


def with_kernel(parameters):
    from clip_finetune.engine.train.optim.adabelief_kernel import AdaBeliefKernel

    optimizer = ChunkedAdaBelief(groups_of(parameters), lr=1e-3)
    optimizer._kernel = AdaBeliefKernel(CPU)
    return optimizer


def interpreted_bits():
    ours = random_parameters()
    with RoundedAsOnCUDA():
        assert_the_librarys_bits(with_kernel(ours), ours, 9)
        assert verified_kernel(CPU)
    with pytest.raises(RuntimeError, match="last bits"):  # because a CPU has no fma here
        verified_kernel(CPU)


def interpreted_skipping():
    parameters = random_parameters()
    optimizer = with_kernel(parameters)
    for step in steps(parameters, optimizer, 9):
        skipped = step in (0, 3, 7)  # the first, one before rectification starts and one after
        moved = [parameter for parameter in parameters if parameter.grad is not None]
        before = [
            (p.detach().clone(), *(optimizer.state[p].get(name, torch.tensor(0.0)).clone() for name in STATE))
            for p in moved
        ]
        for parameter in moved if skipped else ():
            parameter.grad.fill_(torch.nan)
        optimizer.found_inf = torch.tensor(float(skipped))
        optimizer.step()
        for parameter, values in zip(moved, before, strict=True):
            now = (parameter.detach(), *(optimizer.state[parameter][name] for name in STATE))
            assert all(bool((one == other).all()) for one, other in zip(now, values, strict=True)) == skipped, step


def interpreted_launches():
    from clip_finetune.engine.train.optim import adabelief_kernel

    launches, launched = [], adabelief_kernel.adabelief_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return launched[grid]

    adabelief_kernel.adabelief_kernel = Counted()  # not restored: this is the last check of its process
    parameters = random_parameters()
    optimizer = with_kernel(parameters)
    tables = []
    for _ in steps(parameters, optimizer, 3):
        parameters[3].grad, parameters[4].grad = torch.ones(2048), torch.ones(5, 7, 11)
        for _ in range(2):  # twice with the same gradients
            optimizer.step()
            tables.append((optimizer._kernel._tensors, optimizer._kernel._owners))
    assert len(launches) == 6
    for first, second, third in zip(tables[::2], tables[1::2], tables[2::2], strict=False):
        assert first[0] is second[0] and second[0] is not third[0]
        assert first[1] is second[1] is third[1]


def interpreted():
    """Run all checks in the process, and print the traceback of each, "" if it passed."""
    failures = {}
    for check in (interpreted_bits, interpreted_skipping, interpreted_launches):
        try:
            check()
            failures[check.__name__] = ""
        except Exception:
            failures[check.__name__] = traceback.format_exc()
    print(json.dumps(failures))


@pytest.fixture(scope="module")
def failures():
    pytest.importorskip("triton", reason="Triton is not installed")
    done = subprocess.run(
        [sys.executable, "-c", "import test_adabelief_kernel as tests; tests.interpreted()"],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernel_has_the_librarys_bits_over_nine_steps(failures):
    assert failures["interpreted_bits"] == ""


def test_a_skipped_step_of_the_kernel_changes_nothing(failures):
    assert failures["interpreted_skipping"] == ""


def test_a_step_is_one_launch_and_its_tables_stay_while_sizes_and_addresses_do(failures):
    assert failures["interpreted_launches"] == ""


# ---- compiled for a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [80, 90])
def test_the_compiled_kernel_rounds_where_torch_does(capability):
    """Each value has its three fma; nothing else is fused, approximate or flushed to zero."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from clip_finetune.engine.train.optim.adabelief_kernel import BLOCK, OPTIONS, adabelief_kernel

    types = dict(tensors="*i64", numbers="*fp32", owners="*i32", found_inf="*fp32", BLOCK="constexpr")
    source = ASTSource(adabelief_kernel, types, constexprs=dict(BLOCK=BLOCK))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS)
    assert compiled.asm["cubin"]
    counts = Counter(re.findall(r"\b((?!selp|setp)[a-z]+\.[a-z0-9.]*f32)\s", compiled.asm["ptx"]))
    values = 2 * BLOCK // (32 * OPTIONS["num_warps"])  # of a thread, in a whole block and in a last one
    once = dict.fromkeys(("div.rn.f32", "sqrt.rn.f32", "sub.rn.f32"), values)
    assert counts == once | {"fma.rn.f32": 3 * values, "mul.rn.f32": 4 * values, "add.rn.f32": 2 * values}
    assert len(re.findall(r"ld\.global\.v4\.b32", compiled.asm["ptx"])) == 4 * values // 2 // 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_kernel_has_the_librarys_bits_on_a_gpu():
    pytest.importorskip("triton", reason="Triton is not installed")
    ours = random_parameters(torch.device("cuda"))
    notes = []
    optimizer = ChunkedAdaBelief(groups_of(ours), lr=1e-3, on_note=notes.append)
    assert_the_librarys_bits(optimizer, ours, 12)
    assert optimizer._kernel and not notes


# ---- without it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [True, False])
def test_without_a_working_triton_the_steps_are_torchs_and_a_note_says_so(missing, monkeypatch):
    """Missing as on Windows; or installed, but unable to run anything, as on a machine without a GPU driver."""
    monkeypatch.setattr(adabelief, "_cuda_device", lambda groups: CPU)
    notes, ours = [], random_parameters()
    optimizer = ChunkedAdaBelief(groups_of(ours), lr=1e-3, on_note=notes.append)
    with monkeypatch.context() as patch:
        if missing:
            patch.delitem(sys.modules, adabelief.__name__ + "_kernel", raising=False)
            patch.setitem(sys.modules, "triton", None)
        else:
            pytest.importorskip("triton", reason="Triton is not installed")
        optimizer.step()  # before there is any gradient
    assert_the_librarys_bits(optimizer, ours, 9)
    (note,) = notes
    assert "torch's own operations" in note and "\n" not in note
    assert ("ModuleNotFoundError: import of triton halted" in note) == missing


def test_a_training_passes_the_note_on(monkeypatch):
    from clips import random_clip

    from clip_finetune.engine.notes import Notes
    from clip_finetune.engine.train.config import TrainConfig
    from clip_finetune.engine.train.run.results import Callbacks
    from clip_finetune.engine.train.setup import Plan
    from clip_finetune.engine.train.step import TrainingStep, build_weights

    def fails(device):
        raise OSError("no C compiler\nfound")

    monkeypatch.setattr(adabelief, "_cuda_device", lambda groups: CPU)
    monkeypatch.setattr(adabelief, "verified_kernel", fails)
    notes, config = [], TrainConfig.from_flat(batch_size=2)
    plan = Plan(device=CPU, precision="fp32", batch_size=2, steps_per_epoch=9, total_steps=9)
    weights = build_weights(random_clip(), config, plan)
    step = TrainingStep(weights, config, plan, callbacks=Callbacks(Notes(notes.append)))
    for parameter in step.trained.values():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(2):
        step._move(torch.tensor(0.0))
    assert [note for note in notes if "OSError: no C compiler)" in note] == notes and len(notes) == 1
