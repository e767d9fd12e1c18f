"""The shared workflows, loaded and run in a browser as a user does."""

import json

import pytest
from clips import CLIP_L, random_clip
from comfyui_page import (
    YOURS,
    layout_faults,
    load_graph,
    nodes_with_results,
    read,
    run_from_page,
    set_widgets,
    switch_on,
    training_node,
    unknown_nodes,
    with_dual_clip_loader,
    write_clip_g,
)
from comfyui_server import PACK
from image_folders import class_folder, labels_folder
from PIL import Image
from safetensors.torch import save_file

from clip_finetune.engine import load_full_clip, save_full_clip
from clip_finetune.engine.clip.encoders import text_encoder_state_dict

pytestmark = pytest.mark.comfyui

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))


TRAINING_WORKFLOWS = [file for file in WORKFLOWS if training_node(read(file))]
MEASURING_NODES = (
    "EvalRetrieval",
    "EvalZeroShot",
    "EvalTypographic",
    "RankCaptions",
    "CompareFullCLIP",
    "PlotGmP",
    "BlendSweep",
)
LISTED_BY = {"ExportClipL": ("CLIPLoader", "clip_name"), "SaveFullCLIP": ("LoadFullCLIP", "model")}
MEASURING_WORKFLOWS = [file for file in WORKFLOWS if file not in TRAINING_WORKFLOWS]


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    models = comfyui.base / "models"
    save_full_clip(random_clip(), models / "full_clip/tiny.safetensors")
    save_full_clip(random_clip(CLIP_L), models / "full_clip/clip_l.safetensors")
    save_full_clip(random_clip(CLIP_L, seed=1), models / "full_clip/clip_l_trained.safetensors")
    save_file(
        text_encoder_state_dict(random_clip(CLIP_L, seed=7), dtype="fp16"), models / "text_encoders/l.safetensors"
    )
    write_clip_g(models / "text_encoders/g.safetensors")
    labels_folder(comfyui.base / "datasets/my_images", 20)
    class_folder(comfyui.base / "datasets/my_classes")
    Image.new("RGB", (64, 48), (40, 60, 220)).save(comfyui.base / "input/example.png")  # ComfyUI comes with one


@pytest.fixture
def browser_page(browser_page):
    """The page after R, and so large that it draws the text of a whole workflow."""
    browser_page.set_viewport_size({"width": 2600, "height": 1700})
    browser_page.evaluate("async () => { await window.app.refreshComboInNodes(); }")
    return browser_page


def settings_of(workflow):
    """Return the widget values of all nodes, by node id."""
    return {node["id"]: node.get("widgets_values") or [] for node in workflow["nodes"]}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_loads_as_it_was_saved(comfyui, browser_page, screenshot, file):
    workflow = read(file)
    load_graph(browser_page, workflow)
    assert unknown_nodes(browser_page) == []
    loaded = browser_page.evaluate("() => window.app.graph.serialize()")
    assert settings_of(loaded) == settings_of(workflow)
    assert len(loaded["links"]) == len(workflow["links"])
    assert layout_faults(browser_page) == []
    screenshot()


def test_the_templates_are_listed_with_their_thumbnails(comfyui):
    listed = comfyui.get("/workflow_templates")
    assert sorted(listed["clip-finetune"]) == [file.stem for file in WORKFLOWS] and len(WORKFLOWS) >= 3
    for file in WORKFLOWS:
        for suffix in ("json", "jpg"):
            status, content = comfyui.request(f"/api/workflow_templates/clip-finetune/{file.stem}.{suffix}")
            assert status == 200 and content == file.with_suffix("." + suffix).read_bytes()


def run_all_of_it(page, screenshot):
    """Queue the workflow as it is, and then with its optional nodes switched on."""
    seen = run_from_page(page)
    screenshot()
    assert seen["status"] == "execution_success", seen
    assert layout_faults(page) == []
    if switch_on(page):
        set_widgets(page, "EvalZeroShot", templates="simple")
        seen = run_from_page(page)
        screenshot("all")
        assert seen["status"] == "execution_success", seen
        assert layout_faults(page) == []


@pytest.mark.parametrize("file", TRAINING_WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_that_trains_runs_from_the_page(comfyui, browser_page, screenshot, file):
    workflow = with_dual_clip_loader(read(file))
    load_graph(browser_page, workflow)
    train = training_node(workflow)
    set_widgets(browser_page, "LoadFullCLIP", model="clip_l.safetensors")
    set_widgets(browser_page, train, run_name=file.stem, epochs=1, batch_size=9)
    set_widgets(browser_page, "ExportClipL", filename_prefix=f"clip/{file.stem}")
    run_all_of_it(browser_page, screenshot)
    run = comfyui.base / "output/clip_finetune" / file.stem
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2]
    assert f"{file.stem}_00001_.safetensors" in comfyui.choices("CLIPLoader", "clip_name")
    best = load_full_clip(run / "best.safetensors")
    assert best.parameterization == ("gmp" if train == "TrainCLIPGmP" else "linear")


@pytest.mark.parametrize("file", MEASURING_WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_that_measures_runs_from_the_page(comfyui, browser_page, screenshot, file):
    workflow = read(file)
    load_graph(browser_page, workflow)
    set_widgets(browser_page, "LoadFullCLIP", model="clip_l.safetensors")
    set_widgets(browser_page, YOURS, model="clip_l_trained.safetensors")
    set_widgets(browser_page, "EvalZeroShot", templates="simple")
    set_widgets(browser_page, "BlendSweep", templates="simple", steps=3)
    run_all_of_it(browser_page, screenshot)
    expected = {node["id"] for node in workflow["nodes"] if node["type"] in (*MEASURING_NODES, "PreviewAny")}
    assert expected <= set(nodes_with_results(browser_page))
    for node in workflow["nodes"]:
        if node["type"] in LISTED_BY:
            name = node["widgets_values"][0].split("/")[1]
            assert f"{name}_00001_.safetensors" in comfyui.choices(*LISTED_BY[node["type"]])


def test_every_node_that_measures_or_blends_is_in_a_workflow():
    shown = {node["type"] for file in WORKFLOWS for node in read(file)["nodes"]}
    assert {*MEASURING_NODES, "BlendFullCLIP"} <= shown


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_has_no_option_node(file):
    """They are for beginners: the training node's own widgets are enough."""
    types = {node["type"] for node in read(file)["nodes"]}
    assert not {name for name in types if name.startswith("CLIPTrain")}
