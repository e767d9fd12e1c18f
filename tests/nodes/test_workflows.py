"""The shared workflows and the page: loaded, queued and cancelled in a browser as a user does."""

import json
from pathlib import Path

import pytest
import torch
from clips import CLIP_L, random_clip
from comfyui_server import PACK, load_graph, run_from_page
from image_folders import class_folder, labels_folder
from PIL import Image
from safetensors.torch import save_file

from clip_finetune.engine import load_full_clip, save_full_clip
from clip_finetune.engine.clip.encoders import text_encoder_state_dict

pytestmark = pytest.mark.comfyui

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
YOURS = "Load Full CLIP (yours)"  # what the workflows call the trained one of two models


def read(workflow: Path) -> dict:
    return json.loads(workflow.read_text(encoding="utf-8"))


def training_node(workflow: dict) -> str | None:
    """The type of the node that trains, if there is one."""
    return next((node["type"] for node in workflow["nodes"] if node["type"].startswith("TrainCLIP")), None)


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
    labels_folder(comfyui.base / "datasets/my_pictures", 20)
    class_folder(comfyui.base / "datasets/my_classes")
    Image.new("RGB", (64, 48), (40, 60, 220)).save(comfyui.base / "input/example.png")  # the host brings one


@pytest.fixture
def browser_page(browser_page):
    """The page after R, with the files, and so large that the letters of a whole workflow are drawn."""
    browser_page.set_viewport_size({"width": 2600, "height": 1700})
    browser_page.evaluate("async () => { await window.app.refreshComboInNodes(); }")
    return browser_page


def write_clip_g(file: Path) -> None:
    """A CLIP-G of zeros: a header, and a hole in place of 1.4 GB."""
    shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, 1280),
        "text_model.embeddings.position_embedding.weight": (77, 1280),
        "text_model.final_layer_norm.weight": (1280,),
        "text_model.final_layer_norm.bias": (1280,),
        "text_projection.weight": (1280, 1280),
    }
    for layer in range(32):
        block = f"text_model.encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{block}self_attn.{part}.weight": (1280, 1280), f"{block}self_attn.{part}.bias": (1280,)}
        shapes |= {
            f"{block}mlp.fc1.weight": (5120, 1280),
            f"{block}mlp.fc1.bias": (5120,),
            f"{block}mlp.fc2.weight": (1280, 5120),
            f"{block}mlp.fc2.bias": (1280,),
        }
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{block}{norm}.weight": (1280,), f"{block}{norm}.bias": (1280,)}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)


def set_widgets(page, kind, **values):
    """What a user types into the widgets of every node of a type, or of a title, that is not bypassed."""
    missing = page.evaluate(
        """([kind, values]) => { const missing = [];
        for (const node of window.app.graph.nodes.filter(n => [n.type, n.title].includes(kind) && n.mode === 0))
            for (const [name, value] of Object.entries(values)) {
                const widget = node.widgets.find(w => w.name === name);
                if (!widget) { missing.push(name); continue; }
                widget.value = value; widget.callback?.(value, window.app.canvas, node);
            }
        return missing; }""",
        [kind, values],
    )
    assert not missing


def switch_on(page) -> int:
    """What Ctrl+B does to the optional nodes; how many there are."""
    return page.evaluate(
        """() => { const bypassed = window.app.graph.nodes.filter(n => n.mode === 4);
        for (const node of bypassed) node.mode = 0;
        return bypassed.length; }"""
    )


def widgets(page, node_type):
    return page.evaluate(
        """type => { const node = window.app.graph.nodes.find(n => n.type === type);
        return Object.fromEntries(node.widgets.map(w => [w.name, w.value])); }""",
        node_type,
    )


def unknown_nodes(page):
    return page.evaluate(
        "() => window.app.graph.nodes.map(n => n.type).filter(t => !LiteGraph.registered_node_types[t])"
    )


def layout_faults(page):
    """Which nodes (with their titles) lie over others, or across the edge of a group, in words."""
    return page.evaluate(
        """() => { const faults = [], nodes = window.app.graph.nodes, titleHeight = 30;
        const box = (pos, size, above) =>
            ({left: pos[0], top: pos[1] - above, right: pos[0] + size[0], bottom: pos[1] + size[1]});
        const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
        const holds = (a, b) => a.left <= b.left && a.top <= b.top && a.right >= b.right && a.bottom >= b.bottom;
        for (const [index, node] of nodes.entries()) {
            const place = box(node.pos, node.size, titleHeight);
            for (const other of nodes.slice(index + 1))
                if (meet(place, box(other.pos, other.size, titleHeight)))
                    faults.push(`${node.title} over ${other.title}`);
            for (const group of window.app.graph._groups) {
                const area = box(group.pos, group.size, 0);
                if (meet(area, place) && !holds(area, place)) faults.push(`${node.title} leaves ${group.title}`);
            }
        }
        return faults; }"""
    )


def nodes_with_results(page):
    """The ids of the nodes that show a picture or a text."""
    return page.evaluate(
        """() => { const text = n => n.type === "PreviewAny" && n.widgets.find(w => w.name === "preview_text").value;
        return window.app.graph.nodes.filter(n => n.imgs?.length || text(n)).map(n => Number(n.id)); }"""
    )


def settings_of(workflow):
    """The widget values of all nodes, by node id."""
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


def test_the_templates_are_listed_with_their_pictures(comfyui):
    listed = comfyui.get("/workflow_templates")
    assert sorted(listed["clip-finetune"]) == [file.stem for file in WORKFLOWS] and len(WORKFLOWS) >= 3
    for file in WORKFLOWS:
        for suffix in ("json", "jpg"):
            status, content = comfyui.request(f"/api/workflow_templates/clip-finetune/{file.stem}.{suffix}")
            assert status == 200 and content == file.with_suffix("." + suffix).read_bytes()


def with_dual_clip_loader(workflow):
    """A checkpoint's CLIP from two files instead: the rest of an SDXL checkpoint is of no use here."""
    for node in workflow["nodes"]:
        if node["type"] == "CheckpointLoaderSimple":
            (links,) = [output["links"] for output in node["outputs"] if output["name"] == "CLIP"]
            node |= {
                "type": "DualCLIPLoader",
                "widgets_values": ["l.safetensors", "g.safetensors", "sdxl", "default"],
                "inputs": [],
                "properties": {},
                "outputs": [{"name": "CLIP", "type": "CLIP", "links": links}],
            }
            for link in workflow["links"]:
                if link[0] in links:
                    link[2] = 0
    return workflow


def run_all_of_it(page, screenshot):
    """Queue the workflow as it is, then with its optional nodes switched on."""
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
    set_widgets(browser_page, train, run_name=file.stem, epochs=1, batch_size=9, precision="fp32")
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


TRAINING = {
    "1": {"class_type": "LoadFullCLIP", "inputs": {"model": "tiny.safetensors"}},
    "2": {"class_type": "LoadCLIPDataset", "inputs": {"folder": "my_pictures"}},
    "3": {
        "class_type": "TrainCLIPGmP",
        "inputs": {"full_clip": ["1", 0], "train": ["2", 0], "validation": ["2", 1], "precision": "fp32"},
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
    assert "nothing holds no pictures" in seen["detail"]["exception_message"]
