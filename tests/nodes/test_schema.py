"""What ComfyUI knows of every node: ids, inputs, outputs, help. schema.json pins what saved graphs rely on."""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui

PINNED = Path(__file__).with_name("schema.json")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
LISTS_OF_FILES = ("model", "folder")  # their choices depend on the computer


@pytest.fixture(scope="module")
def nodes(comfyui):
    """What ComfyUI tells the page about the pack's nodes, by id."""
    return {
        name: info for name, info in comfyui.get("/object_info").items() if "clip-finetune" in info["python_module"]
    }


def inputs(info):
    """Yield (name, kind, type, options) of each input in order; kind is required or optional."""
    for kind in ("required", "optional"):
        for name, (type_, *options) in info["input"].get(kind, {}).items():
            yield name, kind, type_, (options or [{}])[0]


def pinned_input(name, kind, type_, options):
    """Return one line that says what a graph relies on: place, name, type, default, choices."""
    facts = [kind, type_]
    if type_ in WIDGETS and "default" in options:
        facts.append(f"default {json.dumps(options['default'])}")
    if type_ == "COMBO" and name not in LISTS_OF_FILES:
        facts.append("of " + " | ".join(options["options"]))
    return f"{name}: {', '.join(facts)}"


def test_no_error_when_comfyui_starts(comfyui):
    log = comfyui.log.read_text()
    assert "IMPORT FAILED" not in log and "Cannot import" not in log


def test_ids_inputs_and_outputs_are_what_saved_graphs_rely_on(nodes):
    """Workflows store widgets by position: append, never reorder. UPDATE_SCHEMA=1 rewrites the file, on purpose."""
    schema = {
        name: {
            "inputs": [pinned_input(*facts) for facts in inputs(info)],
            "outputs": [f"{name}: {type_}" for name, type_ in zip(info["output_name"], info["output"], strict=True)],
            "output_node": info["output_node"],
        }
        for name, info in sorted(nodes.items())
    }
    if os.environ.get("UPDATE_SCHEMA"):
        PINNED.write_text(json.dumps(schema, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert schema == json.loads(PINNED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["TrainCLIP", "TrainCLIPGmP"])
def test_a_training_node_has_the_inputs_of_the_design_and_no_other(nodes, name):
    expected = [
        *("full_clip", "train", "validation", "options"),
        *("run_name", "preset", "epochs", "learning_rate", "batch_size", "towers", "loss", "seed", "if_run_exists"),
    ]
    assert [facts[0] for facts in inputs(nodes[name])] == expected
    required = {input_name for input_name, kind, *_ in inputs(nodes[name]) if kind == "required"}
    assert required == {"full_clip", "train"}, "a preset fills the others, so an API prompt may leave them out"


def test_presets_fill_only_widgets_of_their_own_node(nodes):
    for name in ("TrainCLIP", "TrainCLIPGmP"):
        widgets = {facts[0]: facts[3] for facts in inputs(nodes[name])}
        for values in widgets["preset"]["clip_finetune_presets"].values():
            assert values.keys() <= widgets.keys()


def test_every_node_has_a_help_page_and_every_widget_a_tooltip(comfyui, nodes, pytestconfig):
    for name, info in nodes.items():
        page = (pytestconfig.rootpath / f"web/docs/{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {info['display_name']}\n") and info["description"]
        status, served = comfyui.request(f"/extensions/clip-finetune/docs/{name}.md")
        assert status == 200 and served.decode() == page
        for widget, _, type_, options in inputs(info):
            assert type_ not in WIDGETS or options.get("tooltip"), f"{name}.{widget}"


def test_the_help_page_of_an_option_node_explains_each_of_its_widgets(nodes, pytestconfig):
    for name in (name for name in nodes if name.startswith("CLIPTrain")):
        page = (pytestconfig.rootpath / f"web/docs/{name}.md").read_text(encoding="utf-8")
        missing = [
            widget for widget, _, type_, _ in inputs(nodes[name]) if type_ in WIDGETS and f"`{widget}`" not in page
        ]
        assert not missing, name


def test_no_seed_changes_by_itself(nodes):
    for info in nodes.values():
        for widget, _, _, options in inputs(info):
            assert widget != "seed" or options["control_after_generate"] is False


def test_the_search_box_finds_every_node_by_finetune(nodes):
    for name, info in nodes.items():
        assert {"fine-tune", "finetune"} <= set(info["search_aliases"]), name
        assert info["category"].startswith("CLIP fine-tuning/")
