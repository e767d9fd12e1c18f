"""The settings of a training, their sections, and the presets."""

import dataclasses
import math

import pytest

from clip_finetune.engine import TrainConfig, UserError
from clip_finetune.engine.settings import Settings, setting_infos
from clip_finetune.engine.train.config import DEFAULT_PRESET, GMP_PRESETS, PRESETS, SECTIONS, all_settings


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(batch_size=1), "at least two pairs"),
        (dict(epochs=0), "epochs is 0"),
        (dict(learning_rate=math.nan), "learning_rate is nan"),
        (dict(towers="left"), "both or text or vision"),
        (dict(epochs=1.5), "whole number"),
        (dict(loss="cosine"), "loss is 'cosine'; choose infonce or"),
        (dict(layer_decay=2), "layer_decay is 2.0; it must be between 0.05 and 1.0"),
        (dict(background="no colour"), "background is 'no colour'"),
        (dict(label_template="a photo"), "label_template is 'a photo'"),
        (dict(learning_rte=1e-3), "learning_rte is not a setting; choose from: epochs, learning_rate"),
    ],
)
def test_a_wrong_name_or_value_is_refused(values, words):
    with pytest.raises(UserError, match=words):
        TrainConfig.from_flat(**values)


def test_flat_values_reach_their_sections_and_come_back():
    config = TrainConfig.from_flat(epochs=3, loss="siglip", optimizer="adamw", warmup=0, micro_batch=4)
    assert (config.epochs, config.loss.loss, config.memory.micro_batch) == (3, "siglip", 4)
    assert (config.optimizer.optimizer, config.optimizer.warmup) == ("adamw", 0.0)
    assert TrainConfig.from_flat(**config.flat()) == config
    assert config == TrainConfig(
        epochs=3,
        loss=dataclasses.replace(config.loss, loss="siglip"),
        optimizer=SECTIONS["optimizer"](optimizer="adamw", warmup=0.0),
        memory=SECTIONS["memory"](micro_batch=4),
    )
    assert TrainConfig.from_flat() == TrainConfig()


def test_every_setting_is_described_and_has_one_name():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert fields - SECTIONS.keys() == {name for name, info in all_settings().items() if not info.section}
    assert fields >= SECTIONS.keys() and all(issubclass(cls, Settings) for cls in SECTIONS.values())
    counted = len(setting_infos(TrainConfig)) + sum(len(dataclasses.fields(cls)) for cls in SECTIONS.values())
    assert len(all_settings()) == counted
    assert all(info.help.endswith(".") for info in all_settings().values())
    assert TrainConfig().flat() == {name: info.default for name, info in all_settings().items()}


def test_the_identity_leaves_out_epochs_and_what_does_not_change_the_result():
    identity = TrainConfig().identity
    assert {"seed", "weight_decay", "cached_views", "precision"} <= identity.keys()
    assert not {"epochs", "micro_batch", "image_cache_gb", "keep_checkpoints"} & identity.keys()
    assert TrainConfig.from_flat(epochs=3, micro_batch=2, profile=True).identity == identity


def test_the_origins_say_where_each_value_came_from():
    config = TrainConfig.from_flat(epochs=3, seed=1, temperature=0.1)
    origins = config.origins({"epochs": "preset gentle", "seed": "command line"})
    assert origins["epochs"] == {"value": 3, "from": "preset gentle"}
    assert origins["seed"] == {"value": 1, "from": "command line"}
    assert origins["temperature"] == {"value": 0.1, "from": "given"}
    assert origins["beta1"] == {"value": 0.9, "from": "default"} and origins.keys() == all_settings().keys()


def test_the_default_preset_holds_the_defaults_and_all_presets_set_the_same_fields():
    for presets in (PRESETS, GMP_PRESETS):
        default = presets[DEFAULT_PRESET].values
        assert default.items() <= TrainConfig().flat().items()
        for preset in presets.values():
            assert preset.values.keys() == default.keys()
            TrainConfig.from_flat(**preset.values)
