"""A training step in GmP form beside open_clip's, Hugging Face's and the published scripts' (zer0int/CLIP-fine-tune).

    PUBLISHED_SCRIPTS=CHECKOUT python benchmarks/step.py [--model ViT-B-32] [--batch-size 8] [--rounds 5]
        [--precision auto] [--threads 2] [--device cpu] [--only NAME[,NAME]] [--json FILE]

The published training loop runs as it stands, with its model, loss, optimizer, scheduler, gradient norms, metrics and
log file, on batches that are in memory. What it needs for today's torch is changed in memory, on its syntax tree:

* What loads the model and the data set is left out; our weights (by its own conversion to GmP) and our batch take the
  place. The call of the loop at the end is left out, and the loop yields after each batch, so that others get a turn.
* `OneCycleLR.print_lr` is there again, and so is `pkg_resources.packaging`.

It takes an optimizer step every second batch: less work for a pair than the others do. The row "a step a batch" makes
it one for each; its gradient norms find no gradients then, so that row is without them.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import json
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from clip_finetune.engine.bench.contenders import Contender, OurStep, our_contenders, peers
from clip_finetune.engine.bench.measure import Result, machine, measure
from clip_finetune.engine.bench.work import Work
from clip_finetune.engine.clip.full_clip import FullCLIP
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.data.loader import Batch
from clip_finetune.engine.train.device import resolve_device, resolve_precision

SCRIPT = "exp-ft-B-GmP-finetune-OpenAI-ViT-L-14.py"
_REPLACED = {"model", "dataset1", "concatenated_dataset", "train_dataloader", "val_dataset", "val_dataloader"}


class PublishedStep:
    """The loop of the script, a call for as many batches as it takes for an optimizer step."""

    def __init__(self, model: FullCLIP, device: torch.device, batch: Batch, *, checkout: str, batches: int):
        self.device, self.batches, self.batch = device, batches, batch
        self.quiet = open(os.devnull, "w")
        _bring_back_what_torch_left_out()
        if checkout not in sys.path:
            sys.path.insert(0, checkout)
        import gmpclip.model

        network = gmpclip.model.build_model(dict(model.state_dict)).to(device)
        names = {"__name__": "published", "model": network, "train_dataloader": _Endless(self)}
        with tempfile.TemporaryDirectory() as folder, self._aside(folder):
            exec(compile(_loop_that_yields(Path(checkout) / SCRIPT, batches), SCRIPT, "exec"), names)
        self.logs = tempfile.TemporaryDirectory()
        names["text_logs_folder"] = self.logs.name
        self.optimizer, self.loop = names["optimizer"], names["trainloop"]()

    def __call__(self, batch: Batch) -> Tensor:
        self.batch = batch
        with self._aside():
            for _ in range(self.batches):
                loss = next(self.loop)
        return loss.detach()

    @contextlib.contextmanager
    def _aside(self, folder: str | None = None) -> Iterator[None]:
        """Without its words on the screen, and with its folders in a place that goes away."""
        before = os.getcwd()
        with contextlib.redirect_stdout(self.quiet), contextlib.redirect_stderr(self.quiet), warnings.catch_warnings():
            try:
                os.chdir(folder or before)
                yield
            finally:
                os.chdir(before)


class _Endless:
    """What the script's data loader gives, normalised pictures and tokens, of the batch that is measured."""

    def __init__(self, step: PublishedStep):
        self.step = step

    def __len__(self) -> int:
        return 100_000

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield normalize(self.step.batch.images), self.step.batch.tokens


def _loop_that_yields(script: Path, batches: int) -> ast.Module:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    tree.body = [line for line in tree.body if not _left_out(line)]
    (loop,) = (line for line in tree.body if isinstance(line, ast.FunctionDef) and line.name == "trainloop")
    for node in ast.walk(loop):
        if isinstance(node, ast.For) and isinstance(node.iter, ast.Name) and node.iter.id == "progress_bar":
            node.body.append(ast.parse("yield total_loss").body[0])
        if isinstance(node, ast.Assign) and _targets(node) == {"accumulation_steps"}:
            node.value = ast.Constant(batches)
    return ast.fix_missing_locations(tree)


def _left_out(line: ast.stmt) -> bool:
    if isinstance(line, ast.Assign):
        # model = model.float() stays: that is how the script gets to fp32.
        loads = isinstance(line.value, ast.Call) and "float" not in ast.dump(line.value.func)
        return loads and bool(_targets(line) & _REPLACED)
    return isinstance(line, ast.Expr) and "trainloop" in ast.dump(line) and isinstance(line.value, ast.Call)


def _targets(line: ast.Assign) -> set[str]:
    return {node.id for target in line.targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def _bring_back_what_torch_left_out() -> None:
    import packaging.version

    scheduler = torch.optim.lr_scheduler.LRScheduler
    if not hasattr(scheduler, "print_lr"):
        scheduler.print_lr = lambda self, *arguments, **settings: None
    with contextlib.suppress(ImportError), warnings.catch_warnings(action="ignore"):
        import pkg_resources

        if hasattr(pkg_resources, "packaging"):
            return
    sys.modules["pkg_resources"] = types.SimpleNamespace(packaging=packaging)


def published(device: torch.device) -> list[Contender]:
    checkout = os.environ.get("PUBLISHED_SCRIPTS", "")
    if not (Path(checkout) / SCRIPT).is_file():
        print(f"The published scripts are skipped: PUBLISHED_SCRIPTS names no checkout with {SCRIPT}.")
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
    parser.add_argument("--only", default="", help="words that the rows contain, by comma; the first row always comes")
    parser.add_argument("--json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device, work = resolve_device(given.device), Work(given.model, given.batch_size)
    precision = resolve_precision(given.precision, device, work.open_model().architecture.text_width)
    ours = functools.partial(OurStep, precision=precision, gmp=True)
    first = Contender("ours, GmP", precision, ours)
    same_loss = Contender(
        "ours, GmP, their loss", precision, functools.partial(ours, loss="second_order"), "second_order"
    )
    others = [c for c in our_contenders(precision) if c.name != first.name]
    found = [*others, same_loss, *peers(device, print), *published(device)]
    found = [first, *(c for c in found if any(word in c.name for word in given.only.split(",")))]
    rows = measure(found, work, device=device, rounds=given.rounds, say=lambda note: print(note, file=sys.stderr))
    result = Result(machine(device), given.model, given.rounds, rows)
    print(result.table())
    if given.json:
        Path(given.json).write_text(json.dumps(result.as_dict(), indent=1))


if __name__ == "__main__":
    main()
