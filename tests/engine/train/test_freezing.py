"""Frozen layers and stages of unfreezing: what must not move keeps its bits."""

import json

import pytest
import torch
from clips import TINY, random_clip
from safetensors.torch import load_file
from train_runs import Stop, changed, identical, run, stop_after

from clip_finetune.engine import UserError
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.train.optim.parameter_info import parameter_info


def test_a_frozen_tower_and_unused_token_rows_keep_their_bits(data, tmp_path):
    model = random_clip(dtype=torch.float16)
    result = run(model, data, tmp_path / "run", towers="text", weight_decay=0.5)
    from clip_finetune.engine.data.tokenizer import Tokenizer

    used = torch.unique(Tokenizer(77, 49408)([text for texts in data.captions for text in texts]))
    unused = torch.ones(49408, dtype=torch.bool)
    unused[used] = False
    rows = result.full_clip.state_dict["token_embedding.weight"]
    assert torch.equal(rows[unused], model.state_dict["token_embedding.weight"][unused].float())
    assert not torch.equal(rows[used], model.state_dict["token_embedding.weight"][used].float())
    for name, tensor in model.state_dict.items():
        if name.startswith("visual."):
            assert same_bits(result.full_clip.state_dict[name], tensor), name


def test_frozen_blocks_and_embeddings_keep_their_bits_and_the_rest_trains(model, data, tmp_path):
    result = run(model, data, tmp_path / "run", freeze_text_blocks=1, freeze_vision_blocks=2, freeze_embeddings=True)
    expected = {name for name in model.state_dict if name.startswith("transformer.resblocks.1.")}
    expected |= {"ln_final.weight", "ln_final.bias", "text_projection", "logit_scale"}
    expected |= {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}
    assert changed(model, result.full_clip) == expected
    groups = {row["group"] for row in json.loads((tmp_path / "run" / "config.json").read_text())["groups"]}
    assert "text.embeddings" not in groups and "vision.attention" not in groups and "vision.projection" in groups


def test_stages_unfreeze_from_the_top_down_and_the_rest_stays_frozen(model, data, tmp_path):
    """Two stages of two blocks each: until half of the steps are done, neither the lower blocks nor what is before them
    have moved, or have moments, even with weight decay."""
    with pytest.raises(Stop):
        run(model, data, tmp_path / "run", epochs=4, unfreeze_stages=2, weight_decay=0.5, progress=stop_after(6))
    state = load_file(tmp_path / "run" / "step_6.safetensors")
    moved = {name for name, tensor in model.state_dict.items() if not torch.equal(state[f"model.{name}"], tensor)}
    lower = {name for name in model.state_dict if parameter_info(name, TINY).depth < 2 and name != "logit_scale"}
    assert moved == model.state_dict.keys() - lower
    with_moments = {name.split(".", 1)[1].rsplit(".", 1)[0] for name in state if name.startswith("optimizer.")}
    assert with_moments == moved
    stopped = run(model, data, tmp_path / "run", epochs=4, unfreeze_stages=2, weight_decay=0.5)
    whole = run(model, data, tmp_path / "whole", epochs=4, unfreeze_stages=2, weight_decay=0.5)
    assert identical(stopped.full_clip, whole.full_clip)
    assert changed(model, whole.full_clip) == model.state_dict.keys()
    assert any("Stage 2 of 2" in note for note in whole.notes)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(freeze_text_blocks=3), "freeze_text_blocks is 3, but the text tower has 2 blocks"),
        (dict(unfreeze_stages=3), "unfreeze_stages is 3"),
        (dict(scale_neurons="5:1=2"), "blocks 0 to 1"),
        (dict(lr_multipliers="up=2"), "lr_multipliers has the entry 'up=2'"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_at_once(model, data, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        run(model, data, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
