"""Short trainings for tests: how they are run, stopped and compared."""

import json

import torch

from clip_finetune.engine import TrainConfig, train
from clip_finetune.engine.clip.tensor_files import same_bits

QUICK = dict(epochs=3, learning_rate=1e-3, batch_size=4, precision="fp32")


def run(
    model, data, folder, validation=None, *, device="cpu", on_existing="auto", check=None, progress=None, **changes
):
    hooks = {}
    if check:
        hooks["check_cancelled"] = check
    if progress:
        hooks["on_progress"] = progress
    config = TrainConfig.from_flat(**(QUICK | changes))
    return train(model, data, validation, config, run_folder=folder, device=device, on_existing=on_existing, **hooks)


def lines(folder, kind="step"):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def identical(one, other):
    return one.state_dict.keys() == other.state_dict.keys() and all(
        same_bits(tensor, other.state_dict[name]) for name, tensor in one.state_dict.items()
    )


def changed(before, after):
    return {name for name, tensor in after.state_dict.items() if not torch.equal(tensor, before.state_dict[name])}


class Stop(BaseException):
    """As the host's interrupt: not an Exception."""


def stop_after(step):
    def progress(progress):
        if progress.step == step:
            raise Stop

    return progress
