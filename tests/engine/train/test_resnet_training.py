"""Training of CLIPs whose vision tower is a ResNet: parameter groups, runs, memory."""

import math

import pytest
import torch
from clips import RESNET_50, TINY_RESNET, random_clip, random_resnet
from image_folders import labels_folder
from safetensors.torch import load_file

from clip_finetune.engine import (
    TrainConfig,
    UserError,
    build_network,
    eval_retrieval,
    load_dataset,
    load_full_clip,
    to_gmp,
    train,
)
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.clip.variants.resnet import resnet_values
from clip_finetune.engine.train import master_weights
from clip_finetune.engine.train.freezing import LayersConfig
from clip_finetune.engine.train.memory import activations_of
from clip_finetune.engine.train.optim.factory import (
    OptimizerConfig,
    build_optimizer,
)
from clip_finetune.engine.train.optim.gradient_norms import GradientMeter
from clip_finetune.engine.train.optim.parameter_groups import group_table, parameter_groups, set_learning_rates
from clip_finetune.engine.train.optim.parameter_info import layer_name, layers_of, parameter_info

QUICK = dict(epochs=3, learning_rate=1e-3, batch_size=4, precision="fp32")


@pytest.fixture(scope="module")
def model():
    return random_resnet()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(labels_folder(tmp_path_factory.mktemp("data") / "colours", size=64))


def run(model, data, folder, validation=None, *, progress=lambda progress: None, **changes):
    config = TrainConfig.from_flat(**(QUICK | changes))
    return train(model, data, validation, config, run_folder=folder, device="cpu", on_progress=progress)


def changed(before, after):
    assert before.state_dict.keys() == after.state_dict.keys()
    return {name for name, tensor in after.state_dict.items() if not same_bits(tensor, before.state_dict[name])}


def statistics(names):
    return {name for name in names if name.endswith((".running_mean", ".running_var"))}


# ---- parts and groups ------------------------------------------------------------------------------------------------


def named_groups(network, architecture=TINY_RESNET, **settings):
    return parameter_groups(network.named_parameters(), architecture, OptimizerConfig(**settings))


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("gmp", [False, True])
def test_every_parameter_of_a_resnet_is_in_exactly_one_group_and_no_statistic_in_any(model, gmp, layer_decay):
    network = build_network(to_gmp(model) if gmp else model)
    groups = named_groups(network, layer_decay=layer_decay)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(map(id, network.parameters()))
    assert not statistics(name for group in groups for name in group["names"])
    rows = group_table(groups, 1e-3)
    counted = sum(int(row["parameters"].replace(",", "")) for row in rows)
    assert counted == sum(parameter.numel() for parameter in network.parameters())
    vision = {row["group"] for row in rows if row["group"].startswith("vision.")}
    kinds = ("attention", "biases", "convolutions", "embeddings", "norms", "projection")
    assert vision == {f"vision.{kind}" for kind in kinds}


@pytest.mark.parametrize("optimizer", ["adabelief", "adamw"])
def test_decay_acts_on_convolutions_and_matrices_and_not_on_norms_and_biases(model, optimizer):
    """Without a gradient a decayed weight shrinks by 1 − rate · decay, and nothing else moves."""
    network = build_network(model)
    config = OptimizerConfig(optimizer=optimizer, weight_decay=0.5)
    built = build_optimizer(config, 0.1, parameter_groups(network.named_parameters(), TINY_RESNET, config))
    set_learning_rates(built, 0.1, 0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    built.step()
    for name, tensor in network.state_dict().items():
        decays = tensor.ndim >= 2 and "embedding" not in name
        expected = model.state_dict[name] * (1 - 0.05 * 0.5 if decays else 1)
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=0, msg=name)


def test_the_stages_of_a_resnet_are_its_blocks():
    depths = {
        "visual.conv1.weight": 0,
        "visual.bn3.bias": 0,
        "visual.layer1.0.conv1.weight": 1,
        "visual.layer2.1.bn2.weight": 2,
        "visual.layer4.0.downsample.0.weight": 4,
        "visual.attnpool.positional_embedding": 5,
        "visual.attnpool.c_proj.bias": 5,
    }
    assert {name: parameter_info(name, TINY_RESNET).depth for name in depths} == depths
    kinds = {
        "visual.conv1.weight": "convolutions",
        "visual.layer1.0.downsample.0.weight": "convolutions",
        "visual.layer1.0.downsample.1.weight": "norms",
        "visual.layer1.0.downsample.1.bias": "norms",
        "visual.bn1.bias": "norms",
        "visual.attnpool.q_proj.weight": "attention",
        "visual.attnpool.q_proj.bias": "biases",
        "visual.attnpool.c_proj.weight": "projection",
        "visual.attnpool.positional_embedding": "embeddings",
    }
    assert {name: parameter_info(name, TINY_RESNET).kind for name in kinds} == kinds
    assert layers_of("vision", TINY_RESNET) == 4
    words = [layer_name("vision", depth, TINY_RESNET) for depth in (0, 1, 4, 5)]
    assert words == [
        f"{layer} of the vision tower" for layer in ("the stem", "layer1", "layer4", "the attention pooling")
    ]


def test_with_layer_decay_each_stage_learns_slower_than_the_one_above(model):
    groups = {group["name"]: group["multiplier"] for group in named_groups(build_network(model), layer_decay=0.5)}
    expected = {"vision.projection.5": 1.0, "vision.embeddings.5": 1.0}
    expected |= {f"vision.convolutions.{depth}": 0.5 ** (5 - depth) for depth in range(5)}
    assert {name: groups[name] for name in expected} == expected


def test_a_gradient_that_is_not_a_number_is_found_in_its_stage(model):
    network = build_network(model)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    meter = GradientMeter(named_groups(network), TINY_RESNET)
    norms = meter.measure()
    torch.testing.assert_close(norms.total, torch.tensor(sum(p.numel() for p in network.parameters())).sqrt())
    torch.testing.assert_close(norms.by_layer.norm(), norms.total)
    network.visual.layer3[0].bn1.bias.grad[0] = torch.nan
    assert meter.nonfinite_layers(meter.measure().by_layer.tolist()) == "first in layer3 of the vision tower"


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_a_resnet_learns_its_pairs_and_says_what_batch_norm_does(data, tmp_path):
    result = run(random_clip(TINY_RESNET), data, tmp_path / "run", epochs=20, learning_rate=3e-3)
    losses = [line["loss"] for line in result.steps]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    assert sum("BatchNorm" in note for note in result.notes) == 1
    assert {"vision.convolutions", "vision.norms", "text.mlp"} <= result.steps[0]["grad_norms"].keys()


def test_everything_in_a_resnet_trains_except_its_running_statistics(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", validation=data)
    moved = model.state_dict.keys() - statistics(model.state_dict)
    assert changed(model, result.full_clip) == moved
    best = load_full_clip(tmp_path / "run" / "best.safetensors")
    state = load_file(tmp_path / "run" / "step_9.safetensors")
    found = statistics(model.state_dict)
    assert len(found) == 2 * (3 + 3 * 5 + 4)
    for name in found:
        assert same_bits(best.state_dict[name], model.state_dict[name])
        assert same_bits(state[f"model.{name}"], model.state_dict[name])
    assert not any("num_batches_tracked" in name for name in state)


def test_the_statistics_keep_the_bits_of_the_dtype_they_were_stored_in(data, tmp_path):
    model = random_resnet(dtype=torch.float16)
    result = run(model, data, tmp_path / "run", epochs=1)
    for name in statistics(model.state_dict):
        assert same_bits(result.full_clip.state_dict[name], model.state_dict[name])


@pytest.mark.parametrize("gmp", [False, True])
def test_the_gradient_of_a_resnet_does_not_depend_on_the_micro_batch(model, data, tmp_path, monkeypatch, gmp):
    """In float64, on the path of a training: from the image files to the gradients that the optimizer gets."""
    monkeypatch.setattr(master_weights, "MASTER_DTYPE", torch.float64)
    measure = GradientMeter.measure
    seen = {}

    def gradients(micro_batch):
        def recorded(meter):
            seen.setdefault(micro_batch, [parameter.grad.clone() for parameter, _ in meter.members])
            return measure(meter)

        monkeypatch.setattr(GradientMeter, "measure", recorded)
        run(model, data, tmp_path / f"run_{micro_batch}", batch_size=12, micro_batch=micro_batch, epochs=1, gmp=gmp)
        return seen[micro_batch]

    whole = gradients(12)
    for micro_batch in (1, 5):
        for one, other in zip(gradients(micro_batch), whole, strict=True):
            # The bias of the pooling's keys moves all logits of a query alike: its gradient is 0 but for rounding.
            assert one.dtype == torch.float64 and other.norm() > 0
            assert (one - other).norm() <= max(1e-10 * other.norm(), 1e-15)


class Stop(Exception):
    pass


def stop_after(step):
    def on_progress(progress):
        if progress.step == step:
            raise Stop

    return on_progress


@pytest.mark.parametrize("optimizer", ["adabelief", "adamw"])
@pytest.mark.parametrize("gmp", [False, True])
def test_a_resnets_run_stopped_and_resumed_ends_with_the_same_bits(model, data, tmp_path, optimizer, gmp):
    settings = dict(optimizer=optimizer, gmp=gmp, validation=data, micro_batch=2)
    whole = run(model, data, tmp_path / "whole", **settings)
    for step in (2, 5):
        with pytest.raises(Stop):
            run(model, data, tmp_path / "stopped", progress=stop_after(step), **settings)
    resumed = run(model, data, tmp_path / "stopped", **settings)
    assert changed(whole.full_clip, resumed.full_clip) == set()
    states = [load_file(tmp_path / folder / "step_9.safetensors") for folder in ("whole", "stopped")]
    assert states[0].keys() == states[1].keys()
    assert all(same_bits(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_validated_resnet_is_the_saved_one(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", validation=data, epochs=4)
    best = next(line for line in result.validations if line["step"] == result.best_step)
    assert eval_retrieval(load_full_clip(tmp_path / "run" / "best.safetensors"), data).loss == best["loss"]


def test_activation_checkpointing_of_a_resnet_changes_no_number_and_stores_less(model, data, tmp_path):
    plain = run(model, data, tmp_path / "plain")
    checkpointed = run(model, data, tmp_path / "checkpointed", activation_checkpointing=True)
    assert changed(plain.full_clip, checkpointed.full_clip) == set()
    from clip_finetune.engine.clip.network import checkpoint_activations

    def forwards(checkpointing):
        network = build_network(model)
        if checkpointing:
            checkpoint_activations(network)
        counted = []
        network.visual.layer2[1].conv2.register_forward_hook(lambda *_: counted.append(1))
        network.encode_image(torch.randn(1, 3, 64, 64)).sum().backward()
        return len(counted)

    assert (forwards(False), forwards(True)) == (1, 2)  # what was not stored is computed again


def test_frozen_stages_and_the_stem_keep_their_bits_and_the_rest_trains(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", towers="vision", freeze_vision_blocks=3, freeze_embeddings=True)
    expected = {
        name for name in model.state_dict if name.startswith(("visual.layer4.", "visual.attnpool.", "logit_scale"))
    }
    assert changed(model, result.full_clip) == expected - statistics(expected)


def test_the_vision_tower_keeps_every_bit_when_the_text_tower_trains_alone(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", towers="text")
    assert not any(name.startswith("visual.") for name in changed(model, result.full_clip))
    assert not any("BatchNorm" in note for note in result.notes)


def test_unfreezing_goes_down_the_stages_of_a_resnet(model, data, tmp_path):
    """Two stages of unfreezing: in the first, layer3, layer4 and the attention pooling."""
    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", epochs=4, unfreeze_stages=2, weight_decay=0.5, progress=stop_after(6))
    state = load_file(tmp_path / "run" / "step_6.safetensors")
    moved = {name for name, tensor in model.state_dict.items() if not same_bits(state[f"model.{name}"], tensor)}
    upper = ("visual.layer3.", "visual.layer4.", "visual.attnpool.")
    expected = {name for name in model.state_dict if name.startswith(upper)}
    assert {name for name in moved if name.startswith("visual.")} == expected - statistics(expected)
    whole = run(model, data, tmp_path / "run", epochs=4, unfreeze_stages=2, weight_decay=0.5)
    assert changed(model, whole.full_clip) == model.state_dict.keys() - statistics(model.state_dict)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(freeze_vision_blocks=5), "freeze_vision_blocks is 5, but the vision tower has 4 blocks"),
        (dict(scale_neurons="0:1=2"), "a ResNet, has none; leave it empty"),
    ],
)
def test_settings_that_a_resnet_does_not_fit_are_refused_before_anything_is_written(
    model, data, tmp_path, settings, words
):
    with pytest.raises(UserError, match=words):
        run(model, data, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("towers", ["both", "text"])
def test_a_resnet_trains_in_bf16_with_a_profile(model, data, tmp_path, towers):
    result = run(model, data, tmp_path / "run", epochs=1, precision="bf16", profile=True, towers=towers)
    assert all(math.isfinite(line["loss"]) for line in result.steps)
    assert any("part of a step" in note for note in result.notes)
    assert statistics(changed(model, result.full_clip)) == set()


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_memory_estimate_counts_the_outputs_of_the_stem_and_the_blocks():
    network = build_network(random_clip(TINY_RESNET))
    counted = []
    blocks = [block for stage in range(1, 5) for block in getattr(network.visual, f"layer{stage}")]
    for module in (network.visual.act3, *blocks):
        module.register_forward_hook(lambda module, inputs, output: counted.append(output.numel()))
    network.encode_image(torch.randn(1, 3, 64, 64))
    assert resnet_values(16, (1, 2, 1, 1), 2) == sum(counted)


def test_the_memory_estimate_of_a_resnet_is_what_backward_needs():
    """Measured on the CPU in fp32: 102 MB an image, or 40 MB checkpointed, for 6.3 M values."""
    plain, _ = activations_of(RESNET_50, LayersConfig(), 4, 77, checkpointed=False)
    less, _ = activations_of(RESNET_50, LayersConfig(), 4, 77, checkpointed=True)
    assert plain.kept == pytest.approx(126e6, rel=0.02) and less.kept == pytest.approx(50.4e6, rel=0.02)
