"""A step never waits for the device: it asks for no value of a tensor that would lie there."""

import pytest
import torch
from clips import random_clip
from torch.utils._python_dispatch import TorchDispatchMode

from clip_finetune.engine import TrainConfig, to_gmp
from clip_finetune.engine.data.loader import Batch
from clip_finetune.engine.openai import END, START
from clip_finetune.engine.train import step as step_module
from clip_finetune.engine.train.device import to_device
from clip_finetune.engine.train.losses import LOSSES
from clip_finetune.engine.train.setup import Plan
from clip_finetune.engine.train.step import TrainingStep, build_weights

# On CUDA the host waits for each of these: for a value, or for how many there are.
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2"}


class Watch(TorchDispatchMode):
    """Notes the operations of a step for which the host would wait."""

    def __init__(self):
        super().__init__()
        self.count, self.waited = 0, []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name, named = function.overloadpacket.__name__, named or {}
        self.count += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in arguments[1]
        )
        if by_mask or name in WAITS:
            self.waited.append(name)
        return function(*arguments, **named)


def batch_of(pairs):
    tokens = torch.zeros(pairs, 77, dtype=torch.int64)
    tokens[:, 0], tokens[:, 8] = START, END
    tokens[:, 1:8] = torch.randint(1, START, (pairs, 7))
    images = torch.randint(0, 255, (pairs, 3, 32, 32), dtype=torch.uint8)
    return Batch(images, tokens, torch.arange(pairs), torch.arange(pairs), list(range(pairs)))


@pytest.mark.parametrize(
    "gmp, precision, settings",
    [
        (False, "fp32", {}),
        (True, "bf16", {"micro_batch": 3}),
        (True, "fp32", {"optimizer": "adamw"}),
        (False, "bf16", {"towers": "text", "activation_checkpointing": True}),
        (False, "fp32", {"unfreeze_stages": 3, "layer_decay": 0.8}),
        (True, "fp32", {"micro_batch": 2, "max_grad_norm": 0}),
        *((False, "fp32", {"loss": loss}) for loss in LOSSES),
    ],
)
def test_a_step_waits_for_nothing(gmp, precision, settings, monkeypatch):
    model = to_gmp(random_clip()) if gmp else random_clip()
    config = TrainConfig.from_flat(batch_size=6, **settings)
    plan = Plan(device=torch.device("cpu"), precision=precision, batch_size=6, steps_per_epoch=9, total_steps=9)
    step = TrainingStep(build_weights(model, config, plan), config, plan)
    step(batch_of(6), 0)
    monkeypatch.setattr(step_module, "cut_to_longest", lambda tokens, multiple: tokens[:, :9])  # they are on the host
    with Watch() as watch:
        for done in range(1, 9):
            outcome = step(batch_of(6), done)
    clipped = (
        8 if config.optimizer.max_grad_norm else 0
    )  # clipping asks once where the device is the host, and only there
    assert watch.count > 1000 and watch.waited == ["_local_scalar_dense"] * clipped
    assert outcome.finite


def test_the_watch_sees_what_waits():
    with Watch() as watch:
        values = torch.arange(4.0)
        float(values[2])
        values[values > 1]
        values[torch.tensor([1, 2])]
        values.unique()
        bool(values.sum() > 0)
    assert watch.waited == ["_local_scalar_dense", "index", "_unique2", "_local_scalar_dense"]


def test_a_copy_for_the_device_has_the_same_values():
    tensor = torch.arange(12).view(3, 4)[:, :2]
    assert torch.equal(to_device(tensor, torch.device("cpu")), tensor)
    if torch.cuda.is_available():
        assert torch.equal(to_device(tensor, torch.device("cuda")).cpu(), tensor)
