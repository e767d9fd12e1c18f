"""The forecast of memory against what torch's allocator says of a step."""

import dataclasses
import functools

import pytest
import torch
from clips import TINY, VIT_L_14, random_clip
from image_folders import labels_folder

from clip_finetune.engine import TrainConfig, UserError, load_dataset, to_gmp, train
from clip_finetune.engine.bench.workload import peak_allocation
from clip_finetune.engine.data.loader import Batch
from clip_finetune.engine.openai import END, START
from clip_finetune.engine.train import memory
from clip_finetune.engine.train.freezing import LayersConfig
from clip_finetune.engine.train.memory import activations_of
from clip_finetune.engine.train.setup import Plan
from clip_finetune.engine.train.step import TrainingStep, build_weights

CPU = torch.device("cpu")
# Wide enough that activations and weights weigh, small enough for a test.
MEDIUM = dataclasses.replace(
    TINY,
    image_size=96,
    vision_width=256,
    vision_layers=4,
    vision_heads=4,
    vision_mlp_width=1024,
    text_width=128,
    text_heads=2,
    text_layers=3,
    text_mlp_width=512,
)
LENGTH = 41


def work_of(model, pairs, precision="fp32", **settings):
    config = TrainConfig.from_flat(batch_size=pairs, **settings)
    plan = Plan(device=CPU, precision=precision, batch_size=pairs, steps_per_epoch=10, total_steps=10)
    return TrainingStep(build_weights(model, config, plan), config, plan)


def batch_of(pairs, size=MEDIUM.image_size):
    tokens = torch.zeros(pairs, 77, dtype=torch.int64)
    tokens[:, 0], tokens[:, LENGTH - 1] = START, END
    tokens[:, 1 : LENGTH - 1] = torch.randint(1, START, (pairs, LENGTH - 2))
    images = torch.randint(0, 255, (pairs, 3, size, size), dtype=torch.uint8)
    return Batch(images, tokens, torch.arange(pairs), torch.arange(pairs), list(range(pairs)))


@pytest.mark.parametrize(
    "pairs, precision, gmp, settings",
    [
        (24, "fp32", False, {}),
        (24, "bf16", True, {}),
        (12, "fp32", True, {"activation_checkpointing": True}),
        (16, "fp32", True, {"micro_batch": 4}),
        (24, "fp32", False, {"towers": "text"}),
        (24, "bf16", False, {"towers": "vision"}),
        (16, "fp32", False, {"freeze_embeddings": True, "freeze_vision_blocks": 2}),
    ],
)
def test_a_step_takes_what_was_foreseen(pairs, precision, gmp, settings):
    model = random_clip(MEDIUM)
    work = work_of(to_gmp(model) if gmp else model, pairs, precision, **settings)
    batch = batch_of(pairs)
    work(batch, 0)  # which makes the optimizer's moments
    work.optimizer.zero_grad()
    found = work.memory().forecast(pairs, work.micro_batch, LENGTH)
    foreseen = found.peak - found.weights - found.optimizer
    assert foreseen == pytest.approx(peak_allocation(lambda: work(batch, 1), CPU), rel=0.1)


@pytest.mark.parametrize("optimizer", ["adabelief", "adamw", "adafactor"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_optimizer_and_the_weights_take_what_was_foreseen(optimizer, precision):
    work = work_of(to_gmp(random_clip()), 4, precision, optimizer=optimizer)
    work(batch_of(4, TINY.image_size), 0)
    state = [value for kept in work.optimizer.state.values() for value in kept.values()]
    moments = sum(value.nbytes for value in state if isinstance(value, torch.Tensor) and value.dim())
    assert work.memory().tensors.optimizer == pytest.approx(moments, rel=0.001)
    tensors = [*work.trained.values(), *work.network.parameters(), *work.network.buffers()]
    there = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    found = work.memory().forecast(4, 4, LENGTH)
    assert found.weights == sum(there.values()) and found.gradients == sum(p.nbytes for p in work.trained.values())


def test_what_a_pair_keeps_for_backward_in_a_vit_l_14():
    """By the formula of the module: 23 blocks of 16 and one of 4 residual streams, and what comes before."""
    vision, text = activations_of(VIT_L_14, LayersConfig(), 4, 77, checkpointed=False)
    stream = 257 * 1024
    assert vision.kept == 4 * ((23 * 16 + 4 + 1) * stream + 3 * 224**2)
    assert text.kept == 4 * (11 * 16 + 4) * 77 * 768
    less, _ = activations_of(VIT_L_14, LayersConfig(), 2, 77, checkpointed=True)
    assert less.kept == 2 * (25 * stream + 3 * 224**2)


def test_the_micro_batch_is_the_largest_that_fits(monkeypatch):
    work = work_of(random_clip(), 64)
    assert work.micro_batch == 64
    each = [work.memory().forecast(64, size, 77).activations for size in (9, 10)]
    monkeypatch.setattr(memory, "free_bytes", lambda device: each[1] - 1)
    assert work.memory().fitting_micro_batch(64, CPU) == 9
    monkeypatch.setattr(memory, "free_bytes", lambda device: each[1])
    assert work.memory().fitting_micro_batch(64, CPU) == 10
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert work.memory().fitting_micro_batch(64, CPU) == 1


def test_a_process_may_have_a_part_of_a_graphics_card(monkeypatch):
    card, gb = torch.device("cuda", 0), 1e9
    told = {
        "mem_get_info": (10 * gb, 24 * gb),
        "memory_reserved": 5 * gb,
        "memory_allocated": 3 * gb,
        "get_per_process_memory_fraction": 1.0,
    }

    def answer(name, device):
        # As in torch, where these two raise ValueError for a device without an index.
        if name.endswith("per_process_memory_fraction") and device.index is None:
            raise ValueError("Expected a torch.device with a specified index")
        return told[name]

    for name in told:
        monkeypatch.setattr(torch.cuda, name, functools.partial(answer, name), raising=False)
    assert memory.total_bytes(card) == 24 * gb
    assert memory.free_bytes(card) == pytest.approx(0.9 * (10 + 5 - 3) * gb)  # 2 of the reserved ones are not in use
    told["get_per_process_memory_fraction"] = 1 / 3
    assert memory.total_bytes(card) == 8 * gb
    assert memory.free_bytes(card) == pytest.approx(0.9 * (8 - 3) * gb)
    assert memory.total_bytes(CPU) is None


def test_what_a_training_takes_is_told_and_kept(tmp_path):
    data = load_dataset(labels_folder(tmp_path / "colours", 12))
    config, folder = TrainConfig.from_flat(epochs=1, batch_size=4), tmp_path / "run"
    result = train(random_clip(), data, None, config, run_folder=folder, device="cpu")
    assert any(note.startswith("Estimated peak memory: 0.") and "GB (weights" in note for note in result.notes)
    assert '"memory_forecast_bytes"' in (folder / "config.json").read_text()


def test_a_device_that_is_too_small_is_told_before_the_first_step(tmp_path, monkeypatch):
    data = load_dataset(labels_folder(tmp_path / "colours", 12))
    monkeypatch.setattr(memory, "total_bytes", lambda device: 10**6)
    with pytest.raises(UserError, match="micro_batch 1, and the device has 0.0 GB; set towers to text, or set opti"):
        train(random_clip(), data, None, TrainConfig.from_flat(batch_size=4), run_folder=tmp_path / "run", device="cpu")
