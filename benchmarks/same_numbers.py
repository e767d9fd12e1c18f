"""Compare the numbers of two revisions: train the demo's model with each and compare losses and weights bit for bit.

A change that should not alter the mathematics proves it with this script:

    python benchmarks/same_numbers.py OLD [NEW]     # git revisions; NEW is the working tree by default

Each side runs `clip-finetune demo` (pretraining, plain and GmP fine-tuning) from its own checkout, with one thread.
Exit status 1 if any loss, gradient norm, logit scale or tensor differs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ("step", "loss", "grad_norm", "logit_scale")


def checkout(revision: str | None, folder: Path) -> Path:
    """Return a folder whose `clip_finetune` is the revision, or the working tree for None."""
    folder.mkdir()
    package = folder / "clip_finetune"
    if revision is None:
        package.symlink_to(ROOT)
        return folder
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(package, filter="data")
    return folder


def run_demo(path: Path, out: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "clip_finetune.engine", "demo", "--out", str(out)], env=environment, cwd=path, check=True
    )


def compare(old: Path, new: Path) -> int:
    """Print a table of all runs and model files; return how many differ."""
    differing = 0
    for file in sorted(old.rglob("*.jsonl")):
        name = file.relative_to(old)
        rows = [[[json.loads(line).get(key) for key in NUMBERS] for line in open(side / name)] for side in (old, new)]
        same = rows[0] == rows[1]
        differing += not same
        print(f"{'same' if same else 'DIFFERENT':9} {len(rows[0]):4} lines   {name}")
    for file in sorted(old.rglob("*.safetensors")):
        name = file.relative_to(old)
        before, after = load_file(file), load_file(new / name)
        same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        differing += not same
        print(f"{'same' if same else 'DIFFERENT':9} {len(before):4} tensors {name}")
    return differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        outs = []
        for name, revision in (("old", arguments.old), ("new", arguments.new)):
            out = Path(temporary) / f"{name}_out"
            run_demo(checkout(revision, Path(temporary) / name), out)
            outs.append(out)
        differing = compare(*outs)
    print("Every number and every bit is the same." if not differing else f"{differing} files differ.")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
