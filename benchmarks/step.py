"""Measure a training step in GmP form beside open_clip's, Hugging Face's and the published scripts'.

    PUBLISHED_SCRIPTS=CHECKOUT python benchmarks/step.py [--model ViT-B-32] [--batch-size 8] [--rounds 5]
        [--precision auto] [--threads 2] [--device cpu] [--only NAME[,NAME]] [--json FILE]

CHECKOUT is a checkout of zer0int/CLIP-fine-tune. Its training loop runs as it is, with its model, loss, optimizer,
scheduler, gradient norms, metrics and log file, on batches in memory. What today's torch needs is changed in memory, in
its syntax tree:

* The code that loads the model and the dataset is left out; our weights (through the script's own conversion to GmP)
  and our batch replace them. The call of the loop is left out too, and the loop yields after each batch, so that others
  get a turn.
* `OneCycleLR.print_lr` and `pkg_resources.packaging` are restored.

The script does an optimizer step every second batch, which is less work per pair than the others do. The row "a step a
batch" does one per batch; its gradient norms then find no gradients, so that row goes without them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_finetune.engine.bench.contenders import Contender, OurStep, our_contenders, peers
from clip_finetune.engine.bench.measure import BenchResult, machine, measure
from clip_finetune.engine.bench.workload import Workload
from clip_finetune.engine.clip.full_clip import FullCLIP
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.data.loader import Batch
from clip_finetune.engine.train.device import resolve_device, resolve_precision

SCRIPT = "exp-ft-B-GmP-finetune-OpenAI-ViT-L-14.py"
_REPLACED = {"model", "dataset1", "concatenated_dataset", "train_dataloader", "val_dataset", "val_dataloader"}


class PublishedStep:
    """The script's training loop. A call runs it over the `batches` that it takes for an optimizer step."""

    def __init__(self, model: FullCLIP, device: torch.device, batch: Batch, *, checkout: str, batches: int) -> None:
        self.batches, self.batch = batches, batch
        self.devnull = open(os.devnull, "w")
        _restore_removed_names()
        if checkout not in sys.path:
            sys.path.insert(0, checkout)
        network = importlib.import_module("gmpclip.model").build_model(dict(model.state_dict)).to(device)
        names: dict[str, Any] = {"__name__": "published", "model": network, "train_dataloader": _EndlessLoader(self)}
        with tempfile.TemporaryDirectory() as folder, self._contained(folder):
            exec(compile(_loop_that_yields(Path(checkout) / SCRIPT, batches), SCRIPT, "exec"), names)
        self.logs = tempfile.TemporaryDirectory()
        names["text_logs_folder"] = self.logs.name
        self.optimizer, self.loop = names["optimizer"], names["trainloop"]()

    def __call__(self, batch: Batch) -> Tensor:
        self.batch = batch
        with self._contained():
            for _ in range(self.batches):
                loss = next(self.loop)
        return loss.detach()

    @contextlib.contextmanager
    def _contained(self, folder: str | None = None) -> Iterator[None]:
        """Hide the script's output, and let it write its folders into `folder`."""
        before = os.getcwd()
        quiet_out, quiet_err = contextlib.redirect_stdout(self.devnull), contextlib.redirect_stderr(self.devnull)
        with quiet_out, quiet_err, warnings.catch_warnings():
            try:
                os.chdir(folder or before)
                yield
            finally:
                os.chdir(before)


class _EndlessLoader:
    """Stands in for the script's data loader: yields the measured batch as normalised images and tokens."""

    def __init__(self, step: PublishedStep) -> None:
        self.step = step

    def __len__(self) -> int:
        return 100_000

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield normalize(self.step.batch.images), self.step.batch.tokens


def _loop_that_yields(script: Path, batches: int) -> ast.Module:
    """Return the script's syntax tree with the changes that the module's docstring lists."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    tree.body = [statement for statement in tree.body if not _is_left_out(statement)]
    (loop,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "trainloop")
    for node in ast.walk(loop):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Name) and node.iter.id == "progress_bar":
            node.body.append(ast.parse("yield total_loss").body[0])
        if isinstance(node, ast.Assign) and _targets(node) == {"accumulation_steps"}:
            node.value = ast.Constant(batches)
    return ast.fix_missing_locations(tree)


def _is_left_out(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assign):
        # model = model.float() stays: that is how the script gets to fp32.
        loads = isinstance(statement.value, ast.Call) and "float" not in ast.dump(statement.value.func)
        return loads and bool(_targets(statement) & _REPLACED)
    return (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and "trainloop" in ast.dump(statement)
    )


def _targets(statement: ast.Assign) -> set[str]:
    return {node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def _restore_removed_names() -> None:
    """Give the script the names that newer versions of torch and setuptools have removed."""
    import packaging.version

    scheduler: Any = torch.optim.lr_scheduler.LRScheduler
    if not hasattr(scheduler, "print_lr"):
        scheduler.print_lr = lambda self, *arguments, **settings: None
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(importlib.import_module("pkg_resources"), "packaging"):
            return
    replacement: Any = types.SimpleNamespace(packaging=packaging)
    sys.modules["pkg_resources"] = replacement


def published(device: torch.device) -> list[Contender]:
    checkout = os.environ.get("PUBLISHED_SCRIPTS", "")
    if not (Path(checkout) / SCRIPT).is_file():
        print(f"The published scripts are skipped: PUBLISHED_SCRIPTS is not a checkout that has {SCRIPT}.")
        return []
    dtype, checkout = ("fp16" if device.type == "cuda" else "fp32"), str(Path(checkout).resolve())
    return [
        Contender(name, dtype, functools.partial(PublishedStep, checkout=checkout, batches=n), "", batches=n)
        for name, n in (("published GmP script", 2), ("published GmP script, a step a batch", 1))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device")
    parser.add_argument("--only", default="", help="rows to keep beside the first: parts of names, separated by commas")
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device, workload = resolve_device(given.device), Workload(given.model, given.batch_size)
    precision = resolve_precision(given.precision, device, workload.open_model().architecture.text_width)
    plain, first, text_tower = our_contenders(precision)
    build = functools.partial(OurStep, precision=precision, gmp=True, loss="second_order")
    same_loss = dataclasses.replace(first, name="ours, GmP, their loss", build=build, loss="second_order")
    others = [plain, text_tower, same_loss, *peers(device, print), *published(device)]
    contenders = [first, *(c for c in others if any(word in c.name for word in given.only.split(",")))]
    on_note = functools.partial(print, file=sys.stderr)
    rows = measure(contenders, workload, device=device, rounds=given.rounds, on_note=on_note)
    result = BenchResult(machine(device), given.model, given.rounds, rows)
    print(result.table())
    if given.json:
        Path(given.json).write_text(json.dumps(result.as_dict(), indent=1))


if __name__ == "__main__":
    main()
