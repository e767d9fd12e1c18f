"""The settings of a training and its presets."""

import math

import pytest

from clip_finetune.engine import UserError
from clip_finetune.engine.train.config import DEFAULT_PRESET, GMP_PRESETS, PRESETS, TrainConfig


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(batch_size=1), "at least two pairs"),
        (dict(epochs=0), "epochs is 0"),
        (dict(learning_rate=math.nan), "learning_rate is nan"),
        (dict(towers="left"), "both or text or vision"),
        (dict(epochs=1.5), "whole number"),
    ],
)
def test_a_value_out_of_range_is_told(values, words):
    with pytest.raises(UserError, match=words):
        TrainConfig.from_flat(**values)


def test_the_default_preset_holds_the_defaults_and_all_presets_set_the_same_fields():
    for presets in (PRESETS, GMP_PRESETS):
        default = presets[DEFAULT_PRESET].values
        assert default.items() <= TrainConfig().flat().items()
        for preset in presets.values():
            assert preset.values.keys() == default.keys()
            TrainConfig.from_flat(**preset.values)
