"""The option nodes in a real ComfyUI: chained into the training node, they set what they show and nothing else."""

import pytest
from clips import random_clip
from comfyui_prompts import node, run_settings, succeed, training
from image_folders import labels_folder

from clip_finetune.engine import load_full_clip, save_full_clip
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.settings import setting_infos
from clip_finetune.engine.train.config import SECTIONS

pytestmark = pytest.mark.comfyui

NODES = {section: f"CLIPTrain{section.capitalize()}" for section in SECTIONS}
ON_TRAINING_NODE = {"loss"}


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    """The model tiny, and the dataset colours."""
    save_full_clip(random_clip(), comfyui.base / "models/full_clip/tiny.safetensors")
    labels_folder(comfyui.base / "datasets/colours", 24)


def chain(*option_nodes):
    """Number option nodes from 10 and link each to the one before; returns them and the link to the last."""
    prompt = {}
    for number, (class_type, values) in enumerate(option_nodes, 10):
        previous = {"options": [str(number - 1), 0]} if number > 10 else {}
        prompt[str(number)] = node(class_type, **values, **previous)
    return prompt, [str(number), 0]


def train_with(comfyui, run_name, *option_nodes):
    """Train with chained option nodes and return the settings that the run wrote down."""
    prompt, link = chain(*option_nodes)
    succeed(comfyui, training(run_name, options=link, epochs=1) | prompt)
    return run_settings(comfyui, run_name)


@pytest.mark.parametrize("section", SECTIONS)
def test_an_option_node_has_a_widget_for_each_setting_of_its_section(comfyui, section):
    (info,) = comfyui.get(f"/object_info/{NODES[section]}").values()
    (options, *widgets) = info["input"]["optional"].items()
    assert options[0] == "options" and not info["input"].get("required")
    assert info["output"] == ["CLIP_TRAIN_OPTIONS"]
    settings = {name: about for name, about in setting_infos(SECTIONS[section]).items() if name not in ON_TRAINING_NODE}
    assert [name for name, _ in widgets] == list(settings)
    for name, (_, about) in widgets:
        setting = settings[name]
        assert (about["default"], about["tooltip"]) == (setting.default, setting.help)
        assert about.get("options", []) == list(setting.choices)
        assert (about.get("min"), about.get("max")) == (setting.min, setting.max)


def test_chained_options_run_with_their_values_and_origins(comfyui):
    memory, layers = ("CLIPTrainMemory", {"precision": "fp32"}), ("CLIPTrainLayers", {"freeze_text_blocks": 1})
    settings = train_with(comfyui, "chained", memory, layers)
    assert settings["precision"] == {"value": "fp32", "from": "option node"}
    assert settings["freeze_text_blocks"] == {"value": 1, "from": "option node"}
    assert settings["epochs"] == {"value": 1, "from": "widget"}
    assert settings["loss"] == {"value": "infonce", "from": "preset balanced"}
    assert settings["weight_decay"] == {"value": 0.01, "from": "default"}


def test_the_later_of_two_nodes_wins_for_its_whole_section(comfyui):
    first, second = {"weight_decay": 0.5, "beta1": 0.8}, {"beta1": 0.7}
    settings = train_with(comfyui, "later", ("CLIPTrainOptimizer", first), ("CLIPTrainOptimizer", second))
    assert settings["beta1"] == {"value": 0.7, "from": "option node"}
    assert settings["weight_decay"] == {"value": 0.01, "from": "default"}


def test_the_order_of_different_sections_does_not_matter_and_defaults_change_no_bit(comfyui):
    """One run serves all three: another order, or a section at its defaults, is the same training."""
    memory, optimizer = ("CLIPTrainMemory", {"precision": "fp32"}), ("CLIPTrainOptimizer", {"beta2": 0.99})
    defaults = {name: info.default for name, info in setting_infos(SECTIONS["captions"]).items()}
    chains = {
        "one_order": [memory, optimizer],
        "other_order": [optimizer, memory],
        "with_defaults": [memory, optimizer, ("CLIPTrainCaptions", defaults)],
    }
    for name, option_nodes in chains.items():
        train_with(comfyui, name, *option_nodes)
    one, *others = (load_full_clip(comfyui.base / f"output/clip_finetune/{name}/best.safetensors") for name in chains)
    for other in others:
        assert all(same_bits(other.state_dict[name], tensor) for name, tensor in one.state_dict.items())


def test_a_value_out_of_range_from_another_node_is_refused_by_name(comfyui):
    prompt, link = chain(("CLIPTrainOptimizer", {"weight_decay": ["20", 0]}))
    prompt["20"] = node("PrimitiveFloat", value=7.0)
    result = comfyui.queue(training("out_of_range", options=link) | prompt)
    assert result["status"] == "error" and "weight_decay is 7.0; it must be between 0.0 and 1.0" in result["error"]
