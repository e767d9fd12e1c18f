"""The nodes in the page, handled in a browser as a user does: presets, queueing, cancel, errors, size."""

import json

import pytest
from clips import random_clip
from comfyui_page import load_graph, run_from_page, set_widgets, widgets
from image_folders import labels_folder

from clip_finetune.engine import save_full_clip

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    """The model tiny, and the dataset my_images."""
    save_full_clip(random_clip(), comfyui.base / "models/full_clip/tiny.safetensors")
    labels_folder(comfyui.base / "datasets/my_images", 20)


@pytest.fixture
def browser_page(browser_page):
    """The page after R."""
    browser_page.evaluate("async () => { await window.app.refreshComboInNodes(); }")
    return browser_page


TRAINING = {
    "1": {"class_type": "LoadFullCLIP", "inputs": {"model": "tiny.safetensors"}},
    "2": {"class_type": "LoadCLIPDataset", "inputs": {"folder": "my_images"}},
    "3": {
        "class_type": "TrainCLIPGmP",
        "inputs": {"full_clip": ["1", 0], "train": ["2", 0], "validation": ["2", 1]},
    },
}


@pytest.fixture
def training_page(browser_page):
    """The page with a small training graph in it."""
    browser_page.evaluate("async prompt => { await window.app.loadApiJson(prompt, 'training'); }", TRAINING)
    browser_page.wait_for_timeout(500)
    set_widgets(browser_page, "TrainCLIPGmP", learning_rate=1e-3, batch_size=6, epochs=2)
    return browser_page


def test_queueing_twice_from_the_page_does_not_train_twice(comfyui, training_page):
    set_widgets(training_page, "TrainCLIPGmP", run_name="page_twice")
    assert run_from_page(training_page)["status"] == "execution_success"
    before = widgets(training_page, "TrainCLIPGmP"), widgets(training_page, "LoadCLIPDataset")
    metrics = (comfyui.base / "output/clip_finetune/page_twice/metrics.jsonl").read_bytes()
    assert run_from_page(training_page)["status"] == "execution_success"
    assert (widgets(training_page, "TrainCLIPGmP"), widgets(training_page, "LoadCLIPDataset")) == before
    assert (comfyui.base / "output/clip_finetune/page_twice/metrics.jsonl").read_bytes() == metrics
    assert not (comfyui.base / "output/clip_finetune/page_twice_2").exists()


def test_a_chosen_preset_fills_the_widgets_and_a_loaded_workflow_keeps_its_own(comfyui, training_page):
    about = comfyui.get("/object_info/TrainCLIPGmP")["TrainCLIPGmP"]["input"]["optional"]["preset"][1]
    presets = list(about["clip_finetune_presets"].items())
    for name, values in (*presets[1:], presets[0]):  # the first is chosen already
        training_page.evaluate(
            """value => { const node = window.app.graph.nodes.find(n => n.type === 'TrainCLIPGmP');
            const widget = node.widgets.find(w => w.name === 'preset');
            widget.setValue(value, {e: {}, node, canvas: window.app.canvas}); }""",
            name,
        )
        found = widgets(training_page, "TrainCLIPGmP")
        assert {key: found[key] for key in values} == values and found["preset"] == name
    set_widgets(training_page, "TrainCLIPGmP", epochs=77)
    saved = training_page.evaluate("() => window.app.graph.serialize()")
    load_graph(training_page, saved)
    assert widgets(training_page, "TrainCLIPGmP")["epochs"] == 77


def test_a_run_cancelled_in_the_page_goes_on_when_it_is_queued_again(comfyui, training_page, screenshot):
    set_widgets(training_page, "TrainCLIPGmP", run_name="page_cancel", epochs=20)
    file = comfyui.base / "output/clip_finetune/page_cancel/metrics.jsonl"
    training_page.evaluate(
        """() => { const cancel = () => window.app.api.interrupt(null);
        window.app.api.addEventListener('progress', e => { if (e.detail.value >= 5) cancel(); }, {once: false});
        window.__stop = cancel; }"""
    )
    seen = run_from_page(training_page)
    assert seen["status"] == "execution_interrupted", seen
    steps = [line for line in map(json.loads, file.read_text().splitlines()) if line["kind"] == "step"]
    assert 5 <= len(steps) < 50
    screenshot("cancelled")
    training_page.reload(wait_until="domcontentloaded")
    training_page.wait_for_function("() => Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100")
    training_page.wait_for_timeout(1500)
    training_page.evaluate("async prompt => { await window.app.loadApiJson(prompt, 'training'); }", TRAINING)
    training_page.wait_for_timeout(500)
    set_widgets(training_page, "TrainCLIPGmP", learning_rate=1e-3, batch_size=6, epochs=20, run_name="page_cancel")
    assert run_from_page(training_page)["status"] == "execution_success"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(1, 61))
    screenshot("resumed")


def test_an_error_is_one_sentence_in_the_page(comfyui, training_page):
    (comfyui.base / "datasets/nothing").mkdir(exist_ok=True)
    set_widgets(training_page, "LoadCLIPDataset", folder="nothing")
    seen = run_from_page(training_page)
    assert seen["status"] == "execution_error"
    assert "nothing holds no" in seen["detail"]["exception_message"]
