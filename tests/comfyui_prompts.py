"""API prompts for the tests in a real ComfyUI, and what their nodes wrote."""

import json

import torch
from comfyui_server import Server
from PIL import Image
from safetensors.torch import load_file

from clip_finetune.engine import load_full_clip
from clip_finetune.engine.data.tokenizer import encode
from clip_finetune.engine.openai import END, START

TEXT, PLAIN_TEXT = "a photo of a (red:1.0) cat on a mat", "a photo of a red cat on a mat"  # the same tokens


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def succeed(comfyui: Server, prompt, **options):
    result = comfyui.queue(prompt, **options)
    assert result["status"] == "success" and not result["node_errors"], result
    return result


def training(run_name, model="tiny.safetensors", gmp=False, folder="colours", options=None, **settings):
    """Load, train and save: the nodes 1 to 4, and the memory options as node 0, which other `options` replace."""
    quick = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 4}
    prompt = {
        "0": node("CLIPTrainMemory", precision="fp32"),
        "1": node("LoadFullCLIP", model=model),
        "2": node("LoadCLIPDataset", folder=folder, captions="auto", validation_split=0.2, seed=0),
        "3": node(
            "TrainCLIPGmP" if gmp else "TrainCLIP",
            full_clip=["1", 0],
            train=["2", 0],
            validation=["2", 1],
            options=options or ["0", 0],
            run_name=run_name,
            preset="balanced",
            **(quick | settings),
        ),
        "4": node(
            "SaveFullCLIP", full_clip=["3", 0], filename_prefix=f"full_clip/{run_name}", format="openai", dtype="fp32"
        ),
    }
    return prompt


def metrics(comfyui: Server, run_name, kind="step"):
    lines = (comfyui.base / "output/clip_finetune" / run_name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def run_settings(comfyui: Server, run_name):
    """The settings of a run with where each came from."""
    return json.loads((comfyui.base / "output/clip_finetune" / run_name / "config.json").read_text())["settings"]


def encoded(clip, file):
    """The nodes that write what a CLIP socket makes of TEXT."""
    return {
        f"{file} encode": node("CLIPTextEncode", clip=clip, text=TEXT),
        f"{file} probe": node("ProbeConditioning", conditioning=[f"{file} encode", 0], file=file),
    }


def conditioning(comfyui: Server, file):
    return load_file(comfyui.base / f"output/{file}.safetensors")


def saved(comfyui: Server, name):
    return load_full_clip(comfyui.base / "output/full_clip" / name)


def shown_image(comfyui: Server, result, number):
    """The image that a node shows in the page."""
    (image, *_) = result["outputs"][number]["images"]
    return Image.open(comfyui.base / image["type"] / image["subfolder"] / image["filename"])


def clip_l_by_transformers(file):
    """Return the last hidden state for TEXT, with the padding that ComfyUI uses."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        hidden_act="quick_gelu",
        eos_token_id=END,
        bos_token_id=START,
        pad_token_id=END,
    )
    model = CLIPTextModel(config).eval()
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    wanted = model.state_dict().keys()
    if not any(name.startswith("text_model.") for name in wanted):
        weights = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name in wanted}, strict=True)
    row = [START, *encode(PLAIN_TEXT), END]
    with torch.no_grad():
        return model(torch.tensor([row + [END] * (77 - len(row))])).last_hidden_state


def clip_g_by_transformers(file):
    """Return the penultimate hidden state and the projected pooled output for TEXT, with ComfyUI's padding."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
        eos_token_id=END,
        bos_token_id=START,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config).eval()
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    row = [START, *encode(PLAIN_TEXT), END]
    tokens = torch.tensor([row + [0] * (77 - len(row))])
    model.load_state_dict(weights, strict=False, assign=True)
    for module in model.modules():  # not in the file, so still on the meta device
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(77)[None]
    with torch.no_grad():
        output = model(tokens, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds
