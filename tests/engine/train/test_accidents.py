"""Accidents, each of them made to happen: kills, full and read-only disks, vanished folders, two at once, no memory."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from clips import random_clip
from image_folders import labels_folder
from safetensors.torch import load_file

from clip_finetune.engine import TrainConfig, UserError, load_dataset, save_full_clip, train
from clip_finetune.engine.cli import main
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.train import step
from clip_finetune.engine.train.run.lock import lock_folder

TESTS = Path(__file__).resolve().parents[2]
QUICK = dict(epochs=3, learning_rate=1e-3, batch_size=4, precision="fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny.safetensors and a dataset of 12 images in it."""
    folder = tmp_path_factory.mktemp("accidents")
    save_full_clip(random_clip(), folder / "tiny.safetensors")
    labels_folder(folder / "colours")
    return folder


def command(folder, out, *more):
    return [
        sys.executable,
        "-c",
        "import sys; from clip_finetune.engine.cli import main; sys.exit(main())",
        "train",
        "--model",
        str(folder / "tiny.safetensors"),
        "--data",
        str(folder / "colours"),
        "--out",
        str(out),
        "--epochs",
        "20",
        "--learning-rate",
        "1e-3",
        "--batch-size",
        "4",
        "--precision",
        "fp32",
        *more,
    ]


def steps_of(folder):
    return [line["step"] for line in metrics_of(folder)]


def metrics_of(folder):
    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [line for line in lines if line["kind"] == "step"]


def identical(one, other):
    one, other = load_file(one / "best.safetensors"), load_file(other / "best.safetensors")
    return one.keys() == other.keys() and all(same_bits(tensor, other[name]) for name, tensor in one.items())


def run(folder, run_folder, data="colours", **options):
    hooks = {name: options.pop(name) for name in ("on_progress", "on_note", "check_cancelled") if name in options}
    model, config = random_clip(), TrainConfig.from_flat(**(QUICK | options))
    return train(model, load_dataset(folder / data), None, config, run_folder=run_folder, device="cpu", **hooks)


# ---- kills -----------------------------------------------------------------------------------------------------------


def test_a_run_killed_at_random_ends_with_the_same_bits_and_each_step_once(folder, tmp_path, soak):
    """kill -9 at random moments: while a step is computed, a checkpoint written, a file moved."""
    rng = random.Random(20)
    options = ("--gmp", "--save-every-steps", "2", "--validation", str(folder / "colours"), "--validate-every", "9")
    assert main(command(folder, tmp_path / "whole", *options)[3:]) == 0
    kills, at = 50 if soak else 5, []
    while len(at) < kills:
        process = subprocess.Popen(command(folder, tmp_path / "run", *options), stderr=subprocess.DEVNULL)
        before = (tmp_path / "run" / "last.json").read_text() if (tmp_path / "run" / "last.json").is_file() else ""
        while process.poll() is None:
            if (tmp_path / "run" / "last.json").is_file() and (tmp_path / "run" / "last.json").read_text() != before:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        if process.wait() != -signal.SIGKILL:  # it had finished: start anew for the kills that are left
            assert identical(tmp_path / "run", tmp_path / "whole")
            shutil.rmtree(tmp_path / "run")
            continue
        at.append(max(steps_of_a_torn_file(tmp_path / "run"), default=0))
    print(f"{kills} kills, after steps {at}")
    assert main(command(folder, tmp_path / "run", *options)[3:]) == 0
    assert steps_of(tmp_path / "run") == list(range(1, 61))
    assert identical(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run").glob(".*"))


def steps_of_a_torn_file(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


# ---- two at once -----------------------------------------------------------------------------------------------------


def test_a_second_training_of_the_same_run_is_refused_even_in_one_process(folder, tmp_path):
    refused = []

    def again(progress):
        if not refused:
            with pytest.raises(UserError, match="Another training is working in"):
                run(folder, tmp_path / "run")
            refused.append(True)

    result = run(folder, tmp_path / "run", on_progress=again)
    assert refused and result.total_steps == 9 and not (tmp_path / "run" / ".lock").exists()


def test_other_settings_train_beside_a_run_that_is_training(folder, tmp_path):
    others = []

    def beside(progress):
        if not others:
            others.append(run(folder, tmp_path / "run", seed=1).run_folder.name)

    assert run(folder, tmp_path / "run", on_progress=beside).run_folder.name == "run"
    assert others == ["run_2"]


def test_the_lock_ends_with_its_process_even_if_that_is_killed(tmp_path):
    hold = (
        "import sys, time, pathlib; from clip_finetune.engine.train.run.lock import lock_folder;"
        "held = lock_folder(pathlib.Path(sys.argv[1]), print); print(held is not None, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "True"
    assert lock_folder(tmp_path / "run", print) is None
    process.kill()
    process.wait()
    lock = lock_folder(tmp_path / "run", print)
    assert lock is not None
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []


# ---- disks -----------------------------------------------------------------------------------------------------------


def test_a_disk_that_becomes_full_loses_nothing(folder, tmp_path, small_disk):
    """A checkpoint has 41 MB, so the second has no room beside the first; with room the run ends with the same bits."""
    whole = run(folder, tmp_path / "whole", save_every_steps=2)
    disk = small_disk(70)
    with pytest.raises(UserError, match="The disk is full: .*step_4.safetensors"):
        run(folder, disk / "run", save_every_steps=2)
    assert json.loads((disk / "run" / "last.json").read_text())["step"] == 2
    small_disk(400)
    result = run(folder, disk / "run", save_every_steps=2)
    assert any("resumes from step 2" in note for note in result.notes)
    assert steps_of(disk / "run") == list(range(1, 10))
    assert identical(disk / "run", whole.run_folder)


def test_a_disk_that_is_full_to_the_last_byte_loses_nothing(folder, tmp_path, small_disk):
    """Not even a line of metrics can be written."""
    whole = run(folder, tmp_path / "whole", save_every_steps=2)
    disk = small_disk(120)

    def fill(progress):
        if progress.step == 4:
            with pytest.raises(OSError), open(disk / "other", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(UserError, match="disk is full|could not be written"):
        run(folder, disk / "run", save_every_steps=2, on_progress=fill)
    (disk / "other").unlink()
    small_disk(400)
    run(folder, disk / "run", save_every_steps=2)
    assert steps_of(disk / "run") == list(range(1, 10)) and identical(disk / "run", whole.run_folder)


def test_a_read_only_folder_is_refused_in_one_sentence(folder, small_disk):
    disk = small_disk(100, "ro")
    with pytest.raises(UserError, match=r"run could not be written \(Read-only file system\); choose a folder"):
        run(folder, disk / "run")


# ---- images ----------------------------------------------------------------------------------------------------------


def test_a_data_folder_that_vanishes_stops_the_run_which_resumes_when_it_is_back(folder, tmp_path):
    labels_folder(folder / "many", 128)  # half of them are decoded to probe them
    whole = run(folder, tmp_path / "whole", "many", epochs=1)

    def vanish(progress):
        if progress.step == 2:
            os.rename(folder / "many", folder / "away")

    with pytest.raises(UserError, match=r"\d\d\d.png was deleted during the training"):
        run(folder, tmp_path / "run", "many", epochs=1, on_progress=vanish)
    os.rename(folder / "away", folder / "many")
    assert 2 <= max(steps_of(tmp_path / "run")) < 32
    run(folder, tmp_path / "run", "many", epochs=1)
    assert steps_of(tmp_path / "run") == list(range(1, 33)) and identical(tmp_path / "run", whole.run_folder)


# ---- memory ----------------------------------------------------------------------------------------------------------

_WITH_LITTLE_MEMORY = """
import resource, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/engine/train"]
import test_accidents as here
from clip_finetune.engine import UserError
from pathlib import Path

def limit():
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]) * 2**20, resource.RLIM_INFINITY))
    limit.__code__ = (lambda: None).__code__  # once

def on_note(note):
    print(note)
    if sys.argv[4] in note:  # what follows, such as saving, has memory again
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

folder, crowd = Path(sys.argv[2]), dict(batch_size=512, micro_batch=512)
try:
    here.run(folder, folder / "memory", "crowd", check_cancelled=limit, on_note=on_note, **crowd)
except UserError as error:
    print(error)
"""


class Stop(BaseException):
    pass


@pytest.fixture
def started(folder):
    """A run of three steps of 512 pairs, stopped after the first."""
    if not (folder / "crowd").is_dir():
        labels_folder(folder / "crowd", 512)
    shutil.rmtree(folder / "memory", ignore_errors=True)

    def stop(progress):
        raise Stop

    with pytest.raises(Stop):
        run(folder, folder / "memory", "crowd", batch_size=512, micro_batch=32, on_progress=stop)


def with_little_memory(folder, megabytes, until="never") -> str:
    """Resume the run with this much more memory than it has, until a note contains `until`; return its notes."""
    done = subprocess.run(
        [sys.executable, "-c", _WITH_LITTLE_MEMORY, str(TESTS), str(folder), str(megabytes), until],
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
def test_a_step_that_finds_too_little_memory_takes_smaller_micro_batches(folder, started):
    """512 pairs at once take about 400 MB, where there are 80."""
    notes = with_little_memory(folder, 80, until="does not hold")
    assert "does not hold 512 pairs at once; the training continues with micro_batch 256" in notes, notes
    assert steps_of(folder / "memory") == [1, 2, 3]
    sizes = [line["micro_batch"] for line in metrics_of(folder / "memory")]
    assert sizes[0] == 32 and sizes[1] == sizes[2] < 512
    whole = run(folder, folder / "whole", "crowd", batch_size=512, micro_batch=32)
    losses = [[line["loss"] for line in metrics_of(one)] for one in (folder / "memory", whole.run_folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_step_without_memory_names_the_settings_that_help_and_the_run_resumes(folder, started, monkeypatch):
    tried = []

    def no_memory(sides, loss, *, micro_batch, **more):
        tried.append(micro_batch)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step, "batch_gradients", no_memory)
    with pytest.raises(UserError, match="not enough memory for step 2. Set towers to text, switch on activation_check"):
        run(folder, folder / "memory", "crowd", batch_size=512, micro_batch=20)
    assert tried == [20, 10, 5, 2, 1]
    assert json.loads((folder / "memory" / "last.json").read_text())["step"] == 1
    monkeypatch.undo()
    result = run(folder, folder / "memory", "crowd", batch_size=512, micro_batch=32)
    assert any("resumes from step 1" in note for note in result.notes) and result.run_folder.name == "memory"
    assert steps_of(folder / "memory") == [1, 2, 3]
