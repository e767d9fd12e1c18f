"""Draw the thumbnails of the workflows: run each in a real ComfyUI on the demo's images, with a small model.

    python tests/nodes/draw_thumbnails.py [NAME ...]

Without names, all. Run it when a workflow or a node's widgets change. Needs what the ComfyUI tests need, and half an
hour on two cores, half of it to train a model on the demo's images: thumbnails should show what users will see.
"""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the test helpers

from clips import CLIP_L, random_clip
from comfyui_page import (
    YOURS,
    load_graph,
    read,
    run_from_page,
    set_widgets,
    switch_on,
    training_node,
    with_dual_clip_loader,
    write_clip_g,
)
from comfyui_server import PACK, Server
from PIL import Image
from safetensors.torch import save_file

from clip_finetune.engine import TrainConfig, load_dataset, save_full_clip, split_dataset, train
from clip_finetune.engine.cli import demo
from clip_finetune.engine.clip.encoders import text_encoder_state_dict
from clip_finetune.engine.data.tools.demo_images import draw_demo_classes, draw_demo_dataset

WIDTH = 1120
FINE_TUNING = {"epochs": 6, "learning_rate": 3e-4, "batch_size": 32}
GENTLE = FINE_TUNING | {"learning_rate": 1e-4}  # so that neither end of the blend is the best
TEXTS = ("four cyan rings", "four pink rings", "one red triangle", "two red squares", "one yellow square")
# CLIP-L's text tower with the vision tower of the demo.
SMALL = dataclasses.replace(
    CLIP_L,
    **{
        name: getattr(demo.SMALL_CLIP, name)
        for name in ("image_size", "vision_width", "vision_layers", "vision_heads", "vision_mlp_width")
    },
)


def prepare(server: Server) -> None:
    """Write the models and datasets: a small CLIP trained on plain shapes, and fine-tuned on shifted ones."""
    models, datasets = server.base / "models", server.base / "datasets"
    save_file(text_encoder_state_dict(random_clip(CLIP_L), dtype="fp16"), models / "text_encoders/l.safetensors")
    write_clip_g(models / "text_encoders/g.safetensors")
    plain = draw_demo_dataset(server.base / "pretraining", count=720, seed=0, style="plain", split="train")
    draw_demo_dataset(datasets / "my_images", count=240, seed=0, style="shifted", split="train")
    draw_demo_classes(datasets / "my_classes", count=96, seed=0, style="plain", split="held_out")
    ranked = draw_demo_dataset(server.base / "ranked", count=24, seed=0, style="shifted", split="held_out")
    Image.open(ranked / "images/0011.png").resize((384, 384)).save(server.base / "input/example.png")

    settings = demo.PRETRAINING.flat() | {"epochs": 16, "learning_rate": 5e-4, "precision": "auto"}
    pretraining = TrainConfig.from_flat(**settings)
    trained = train(random_clip(SMALL), load_dataset(plain), None, pretraining, run_folder=server.base / "pretrained")
    save_full_clip(trained.full_clip, models / "full_clip/vit_l_14.safetensors")
    mine, validation = split_dataset(load_dataset(datasets / "my_images"), 0.1)
    run = server.base / "output/clip_finetune/my_clip"
    train(trained.full_clip, mine, validation, TrainConfig.from_flat(**GENTLE), run_folder=run)


def fill_in(page, workflow: dict, name: str) -> None:
    """Set the widgets for the small model, in a workflow that trains or in one that measures."""
    set_widgets(page, "LoadFullCLIP", model="vit_l_14.safetensors")
    if train_node := training_node(workflow):
        set_widgets(page, train_node, run_name=name, **FINE_TUNING)
        return
    switch_on(page)
    set_widgets(page, YOURS, model="clip_finetune/my_clip/best.safetensors")
    set_widgets(page, "RankCaptions", texts="\n".join(f"a picture of {text}" for text in TEXTS))
    for kind in ("EvalZeroShot", "BlendSweep"):
        set_widgets(page, kind, templates="simple")


def draw(page, workflow: dict, name: str) -> Image.Image:
    """Run the workflow in the page and return a screenshot of its graph."""
    load_graph(page, with_dual_clip_loader(workflow))
    fill_in(page, workflow, name)
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
            with server.page(size=(2600, 1700)) as page:
                image = draw(page, read(file), file.stem)
            image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
            image.save(file.with_suffix(".jpg"), quality=85)
            print(file.with_suffix(".jpg").name, image.size)


if __name__ == "__main__":
    main()
