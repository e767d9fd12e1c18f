"""The page of a real ComfyUI as a user handles it (a Playwright page): graphs, widgets, runs, layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch

YOURS = "Load Full CLIP (yours)"  # title of the loader of the trained model, beside the original


def load_graph(page, workflow: dict) -> None:
    """Load a workflow (UI format) into the page and fit all of it into the window."""
    page.evaluate("async graph => { await window.app.loadGraphData(graph, true, true, 'test'); }", workflow)
    page.wait_for_timeout(800)
    page.evaluate("""() => { const c = window.app.canvas; c.selectItems?.(window.app.graph.nodes);
        c.fitViewToSelectionAnimated?.({duration: 1}); c.deselectAll?.(); }""")
    page.wait_for_timeout(400)


def reload_page(page) -> None:
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function("() => Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100")
    page.wait_for_timeout(1500)


def run_from_page(page, timeout: float = 600) -> dict:
    """Queue the graph, as the Run button does, and return {"status", "detail", "previews": number received}."""
    page.evaluate("""() => {
        const seen = window.__seen = {status: null, detail: null, previews: 0};
        for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
            window.app.api.addEventListener(kind, e => { seen.status = kind; seen.detail = e.detail; });
        for (const kind of ['b_preview', 'b_preview_with_metadata'])
            window.app.api.addEventListener(kind, () => { seen.previews += 1; });
    }""")
    with page.expect_response(lambda r: r.request.method == "POST" and r.url.endswith("/prompt")) as answer:
        page.evaluate("async () => { await window.app.queuePrompt(0); }")
    if answer.value.status != 200:
        return {"status": "rejected", "detail": answer.value.json(), "previews": 0}
    page.wait_for_function("() => window.__seen.status", timeout=timeout * 1000)
    page.wait_for_timeout(1000)
    return page.evaluate("() => window.__seen")


def read(workflow: Path) -> dict:
    return json.loads(workflow.read_text(encoding="utf-8"))


def training_node(workflow: dict) -> str | None:
    """Return the type of the node that trains, if there is one."""
    return next((node["type"] for node in workflow["nodes"] if node["type"].startswith("TrainCLIP")), None)


def set_widgets(page, kind, **values):
    """Set widgets, as a user does, in every node of a type, or of a title, that is not bypassed."""
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
    """Switch the bypassed nodes on, as Ctrl+B does, and return how many there are."""
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
    """Return which nodes overlap others or cross the edge of a group, in words."""
    return page.evaluate(
        """() => { const faults = [], nodes = window.app.graph.nodes, titleHeight = 30;
        const box = (pos, size, above) =>
            ({left: pos[0], top: pos[1] - above, right: pos[0] + size[0], bottom: pos[1] + size[1]});
        const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
        const holds = (a, b) => a.left <= b.left && a.top <= b.top && a.right >= b.right && a.bottom >= b.bottom;
        for (const [index, node] of nodes.entries()) {
            const outline = box(node.pos, node.size, titleHeight);
            for (const other of nodes.slice(index + 1))
                if (meet(outline, box(other.pos, other.size, titleHeight)))
                    faults.push(`${node.title} over ${other.title}`);
            for (const group of window.app.graph._groups) {
                const area = box(group.pos, group.size, 0);
                if (meet(area, outline) && !holds(area, outline)) faults.push(`${node.title} leaves ${group.title}`);
            }
        }
        return faults; }"""
    )


def nodes_with_results(page):
    """Return the ids of the nodes that show an image or a text."""
    return page.evaluate(
        """() => { const text = n => n.type === "PreviewAny" && n.widgets.find(w => w.name === "preview_text").value;
        return window.app.graph.nodes.filter(n => n.imgs?.length || text(n)).map(n => Number(n.id)); }"""
    )


def with_dual_clip_loader(workflow):
    """Replace the checkpoint loader by one of two text encoder files: nothing else of an SDXL checkpoint is used."""
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


def write_clip_g(file: Path) -> None:
    """Write a CLIP-G of zeros: a header, and a sparse hole instead of 1.4 GB."""
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
