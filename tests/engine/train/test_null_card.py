"""A whole training on a CUDA device without a card: torch's own CUDA code runs, the kernels compute nothing.

The null card (shared/tools/nullcard, outside the repository) shows crashes, wrong devices and wrong dtypes on any
machine with a CUDA build of torch and g++. It gives no numbers, so the checks on values are replaced here.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clips import random_clip
from image_folders import labels_folder

import clip_finetune
from clip_finetune.engine import save_full_clip

HERE = Path(__file__).resolve()


def find_null_card() -> Path | None:
    candidates = [Path(os.environ["CLIP_FINETUNE_SHARED"])] if "CLIP_FINETUNE_SHARED" in os.environ else []
    candidates += [parent / "shared" for parent in HERE.parents]
    folders = [candidate / "tools" / "nullcard" for candidate in candidates]
    return next((folder for folder in folders if (folder / "nullcard.py").is_file()), None)


def what_is_missing() -> str | None:
    if find_null_card() is None:
        return "no null card (shared/tools/nullcard)"
    if shutil.which("g++") is None:
        return "no g++ to compile the null card with"
    if torch.version.cuda is None:
        return "torch is not built for CUDA"
    return None


pytestmark = pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing()))

# Kernels compute nothing, so what decides by values is replaced: every check passes, every number is a plain one.
WITHOUT_VALUES = """
import dataclasses, os, sys, traceback
import torch
from clip_finetune.engine import cli
from clip_finetune.engine.evaluate.retrieval import Recalls, RetrievalResult
from clip_finetune.engine.train import validation
from clip_finetune.engine.train.run import metrics

item, boolean, isfinite, take = torch.Tensor.item, torch.Tensor.__bool__, torch.isfinite, metrics.PendingSteps.take
torch.Tensor.item = lambda tensor: 0.0 if tensor.is_cuda else item(tensor)
torch.Tensor.__bool__ = lambda tensor: True if tensor.is_cuda else boolean(tensor)
torch.isfinite = lambda tensor: isfinite(tensor) if tensor.is_cuda else torch.ones_like(tensor, dtype=torch.bool)

def plain(step):
    line = step.line | {"loss": 1.0, "grad_norm": 1.0, "logit_scale": 1.0}
    return dataclasses.replace(step, line=line, grad_norm=1.0, by_layer=[1.0] * len(step.by_layer), finite=True)

def encoded_only(encoder, dataset, *, images):  # the null card has no products of float64 matrices
    texts = encoder.encode_texts([caption for index in range(len(dataset)) for caption in dataset.captions[index]])
    recalls = Recalls(0.5, 0.5, 0.5, 1.0)
    return RetrievalResult(len(images.features), len(texts), recalls, recalls, 1.0, ())

metrics.PendingSteps.take = lambda pending: [plain(step) for step in take(pending)]
validation.retrieval_of = encoded_only
"""

# Some of torch's threads wait for ever, so the process ends at once.
ENDING = """
try:
    status = main()
except BaseException:
    traceback.print_exc()
    status = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""


def child(tmp_path: Path, script: str, *arguments: str, cc: int = 90) -> subprocess.CompletedProcess:
    """Run a script that sees one null card of this compute capability."""
    sys.path.insert(0, str(find_null_card()))
    try:
        from nullcard import environment
    finally:
        sys.path.pop(0)
    (tmp_path / "script.py").write_text(WITHOUT_VALUES + script + ENDING)
    variables = environment(cc=cc, gigabytes=8.0, others=0.5)
    package = Path(clip_finetune.__file__).parent.parent
    # First of all folders: the venv may know another checkout.
    variables["PYTHONPATH"] = os.pathsep.join((str(package), variables["PYTHONPATH"]))
    return subprocess.run(
        [sys.executable, tmp_path / "script.py", *arguments],
        env=variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_cuda_without_an_index_is_the_current_device(tmp_path):
    script = """
from clip_finetune.engine.train.device import resolve_device

def main():
    print(*(resolve_device(device) for device in ("cuda", None, "cuda:0", torch.device("cuda"), "cpu")))
    return 0
"""
    done = child(tmp_path, script)
    assert done.stdout.split() == ["cuda:0", "cuda:0", "cuda:0", "cuda:0", "cpu"], done.stderr


TRAIN = """
def main():
    common = ["train", "--model", "model.safetensors", "--data", "colours", "--validation", "colours",
              "--device", "cuda", "--batch-size", "4", "--out", "run", *sys.argv[1:]]
    return cli.main([*common, "--epochs", "1"]) or cli.main([*common, "--epochs", "2"])  # which resumes
"""


@pytest.mark.parametrize(
    "cc, precision, resolved, settings",
    [
        (90, "auto", "bf16", []),
        (80, "bf16", "bf16", ["--gmp", "--micro-batch", "2"]),
        (75, "auto", "fp16", []),
        (90, "fp16", "fp16", ["--gmp", "--micro-batch", "2"]),
    ],
)
def test_a_training_on_cuda_runs_and_resumes(tmp_path, cc, precision, resolved, settings):
    save_full_clip(random_clip(), tmp_path / "model.safetensors")
    labels_folder(tmp_path / "colours", 12)
    done = child(tmp_path, TRAIN, "--precision", precision, *settings, cc=cc)
    assert done.returncode == 0, done.stdout + done.stderr
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (about["precision"], about["device"]) == (resolved, "NVIDIA Null")
    assert json.loads((tmp_path / "run" / "last.json").read_text())["step"] == 6
