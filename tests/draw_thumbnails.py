"""Draws the pictures beside the workflows: each is run in a real ComfyUI on the demo's pictures, with a small model.

    python tests/draw_thumbnails.py [NAME ...]

Without names, all. Run it when a workflow or a node's widgets change. Needs what the ComfyUI tests need.
"""

from __future__ import annotations

import io
import json
import sys

from clips import CLIP_L, random_clip
from comfyui_server import PACK, Server, load_graph, run_from_page
from PIL import Image
from safetensors.torch import save_file
from test_workflows import set_widgets, with_dual_clip_loader, write_clip_g

from clip_finetune.engine import save_full_clip
from clip_finetune.engine.clip.export import text_encoder_state_dict
from clip_finetune.engine.data.demo_pictures import draw_demo_classes, draw_demo_dataset

WIDTH = 1120


def prepare(server: Server) -> None:
    models = server.base / "models"
    save_full_clip(random_clip(CLIP_L), models / "full_clip/vit_l_14.safetensors")
    save_file(text_encoder_state_dict(random_clip(CLIP_L), dtype="fp16")[0], models / "text_encoders/l.safetensors")
    write_clip_g(models / "text_encoders/g.safetensors")
    draw_demo_dataset(server.base / "datasets/my_pictures", count=180, seed=0, style="plain", split="train")
    draw_demo_classes(server.base / "datasets/my_classes", count=48, seed=0, style="plain", split="held_out")


def draw(page, workflow: dict, name: str) -> Image.Image:
    """The page after the workflow ran in it, without what is around the graph."""
    train = next(node["type"] for node in workflow["nodes"] if node["type"].startswith("TrainCLIP"))
    load_graph(page, with_dual_clip_loader(workflow))
    set_widgets(page, "LoadFullCLIP", model="vit_l_14.safetensors")
    set_widgets(page, train, run_name=name, epochs=7, learning_rate=3e-4, batch_size=32)
    seen = run_from_page(page, timeout=1200)
    assert seen["status"] == "execution_success", seen
    page.evaluate("() => { window.app.canvas.deselectAll?.(); window.app.canvas.setDirty(true, true); }")
    page.wait_for_timeout(1500)
    left, top, right, bottom = page.evaluate("""() => {
        const { ds } = window.app.canvas, box = [Infinity, Infinity, -Infinity, -Infinity];
        const items = [...window.app.graph.nodes.map(n => n.boundingRect ?? n.getBounding()),
                       ...window.app.graph._groups.map(g => [...g._pos, ...g._size])];
        for (const [x, y, w, h] of items) {
            box[0] = Math.min(box[0], x); box[1] = Math.min(box[1], y);
            box[2] = Math.max(box[2], x + w); box[3] = Math.max(box[3], y + h);
        }
        return [0, 1, 2, 3].map(i => (box[i] + ds.offset[i % 2]) * ds.scale);
    }""")
    area = {"x": left - 15, "y": top - 15, "width": right - left + 30, "height": bottom - top + 30}
    return Image.open(io.BytesIO(page.screenshot(clip=area))).convert("RGB")


def main() -> None:
    with Server() as server:
        prepare(server)
        for file in sorted((PACK / "workflows").glob("*.json")):
            if sys.argv[1:] and file.stem not in sys.argv[1:]:
                continue
            with server.page(size=(2000, 1300)) as page:
                picture = draw(page, json.loads(file.read_text(encoding="utf-8")), file.stem)
            picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
            picture.save(file.with_suffix(".jpg"), quality=85)
            print(file.with_suffix(".jpg").name, picture.size)


if __name__ == "__main__":
    main()
