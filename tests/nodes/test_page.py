"""The nodes in the page, handled in a browser as a user does: presets, queueing, cancel, errors, size."""

import json

import pytest
from clips import random_clip
from comfyui_page import load_graph, read, reload_page, run_from_page, set_widgets, widgets
from comfyui_server import PACK
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


def test_a_run_cancelled_in_the_page_continues_when_it_is_queued_again(comfyui, training_page, screenshot):
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
    reload_page(training_page)
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


# A maximised browser on a 1080p screen shows a page of about 945 pixels: 1080 less the task bar (48), and the browser's
# tabs and address bar (87). ComfyUI's own tabs and Run bar take the upper 85 of them.
PAGE = {"width": 1920, "height": 945}
ROOM = 945 - 85
TITLE = 30  # of a node in the classic page, above its size


@pytest.fixture
def small_screen(comfyui, browser_page):
    """Call it to reload the page on a 1080p screen at 100 % zoom, in the classic page or in Nodes 2.0."""
    before = browser_page.viewport_size

    def reload(nodes_2):
        comfyui.request("/settings", {"Comfy.VueNodes.Enabled": nodes_2})
        browser_page.set_viewport_size(PAGE)
        reload_page(browser_page)
        return browser_page

    yield reload
    comfyui.request("/settings", {"Comfy.VueNodes.Enabled": False})
    browser_page.set_viewport_size(before)
    reload_page(browser_page)


def place_at_full_zoom(page, node_type):
    """Show a node at 100 % zoom, below ComfyUI's own bars."""
    page.evaluate(
        """([type, top]) => { const { ds } = window.app.canvas;
        const node = window.app.graph.nodes.find(n => n.type === type);
        ds.scale = 1; ds.offset = [400 - node.pos[0], top - node.pos[1]];
        window.app.canvas.setDirty(true, true); }""",
        [node_type, PAGE["height"] - ROOM + TITLE],
    )
    page.wait_for_timeout(500)


def train_on_small_screen(page, run_name):
    """Train with a node of the size that it has in the template, and show it."""
    workflow = read(PACK / "workflows/finetune_clip.json")
    size = next(node["size"] for node in workflow["nodes"] if node["type"] == "TrainCLIP")
    prompt = TRAINING | {"3": {**TRAINING["3"], "class_type": "TrainCLIP"}}
    page.evaluate("async prompt => { await window.app.loadApiJson(prompt, 'training'); }", prompt)
    page.wait_for_timeout(500)
    page.evaluate("size => { window.app.graph.nodes.find(n => n.type === 'TrainCLIP').setSize(size); }", size)
    set_widgets(page, "TrainCLIP", run_name=run_name, epochs=3, batch_size=6, learning_rate=1e-3)
    assert run_from_page(page)["status"] == "execution_success"
    place_at_full_zoom(page, "TrainCLIP")


def test_a_training_node_fits_on_a_1080p_screen_in_the_classic_page(small_screen, screenshot):
    page = small_screen(nodes_2=False)
    train_on_small_screen(page, "small_screen")
    screenshot()
    height, rows = page.evaluate(
        """() => { const node = window.app.graph.nodes.find(n => n.type === 'TrainCLIP');
        return [node.size[1], Object.fromEntries(node.widgets.map(w => [w.name, [w.y, w.computedHeight]]))]; }"""
    )
    assert height + TITLE <= ROOM
    for name, least in (("$$node-text-preview", 60), ("$$canvas-image-preview", 240)):  # three lines; a readable chart
        top, rows_height = rows[name]
        assert rows_height >= least and top + rows_height <= height, name


def test_a_training_node_fits_on_a_1080p_screen_in_nodes_2(small_screen, screenshot):
    page = small_screen(nodes_2=True)
    train_on_small_screen(page, "small_screen_2")
    screenshot()
    node = page.locator("[data-node-id]", has_text="Train CLIP").first
    box, charts = node.bounding_box(), node.locator("img").all()
    assert box["height"] <= ROOM
    assert "Done: the model of step" in node.inner_text()
    (chart,) = (chart.bounding_box() for chart in charts)
    assert chart["height"] >= 240 and chart["y"] + chart["height"] <= box["y"] + box["height"]
