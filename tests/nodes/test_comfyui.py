"""The nodes in a real ComfyUI, queued through its interface."""

import dataclasses
import json
import shutil
import threading
import time

import pytest
import torch
from clips import CLIP_L, VIT_L_14, random_clip
from image_folders import class_folder, labels_folder
from safetensors.torch import load_file, save_file

from clip_finetune.engine import load_full_clip, save_full_clip
from clip_finetune.engine.clip.exports import text_encoder_state_dict
from clip_finetune.engine.clip.full_clip import cast
from clip_finetune.engine.files import same_bits

pytestmark = pytest.mark.comfyui

NODES = [
    "BlendFullCLIP",
    "BlendSweep",
    "CLIPDatasetFromImages",
    "CombineCLIPDatasets",
    "CompareFullCLIP",
    "ConvertCLIPCaptions",
    "EvalRetrieval",
    "EvalTypographic",
    "EvalZeroShot",
    "ExportClipG",
    "ExportClipL",
    "ExportClipLoRA",
    "FoldGmP",
    "InspectCLIPDataset",
    "LoadCLIPDataset",
    "LoadFullCLIP",
    "MergeTEWithVision",
    "PlotGmP",
    "PrepareCLIPImages",
    "RankCaptions",
    "SaveFullCLIP",
    "TrainCLIP",
    "TrainCLIPGmP",
    "TransplantTower",
]


@pytest.fixture(scope="module", autouse=True)
def files(comfyui):
    """What the tests choose from: models tiny and clip_l, and folders of pictures."""
    models = comfyui.base / "models/full_clip"
    save_full_clip(random_clip(), models / "tiny.safetensors")
    save_full_clip(random_clip(CLIP_L, dtype=torch.float16), models / "clip_l.safetensors")
    labels_folder(comfyui.base / "datasets/colours", 24)
    class_folder(comfyui.base / "datasets/classes")


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def training(run_name, model="tiny.safetensors", gmp=False, **settings):
    """Load, train and save: the nodes 1 to 4."""
    quick = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 4, "precision": "fp32"}
    return {
        "1": node("LoadFullCLIP", model=model),
        "2": node("LoadCLIPDataset", folder="colours", captions="auto", validation_split=0.2, seed=0),
        "3": node(
            "TrainCLIPGmP" if gmp else "TrainCLIP",
            full_clip=["1", 0],
            train=["2", 0],
            validation=["2", 1],
            run_name=run_name,
            preset="balanced",
            **(quick | settings),
        ),
        "4": node(
            "SaveFullCLIP", full_clip=["3", 0], filename_prefix=f"full_clip/{run_name}", format="openai", dtype="fp32"
        ),
    }


def metrics(comfyui, run_name, kind="step"):
    lines = (comfyui.base / "output/clip_finetune" / run_name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == kind]


def succeed(comfyui, prompt, **options):
    result = comfyui.queue(prompt, **options)
    assert result["status"] == "success" and not result["node_errors"], result
    return result


# ---- what the host sees ----------------------------------------------------------------------------------------------


def test_all_nodes_are_there_and_nothing_was_wrong_at_the_start(comfyui):
    found = [name for name, about in comfyui.get("/object_info").items() if "clip-finetune" in about["python_module"]]
    assert sorted(found) == NODES
    log = comfyui.log.read_text()
    assert "IMPORT FAILED" not in log and "Cannot import" not in log


def test_the_graph_sees_the_inputs_and_outputs_that_shared_workflows_rely_on(comfyui, pytestconfig):
    """Widgets are stored by place: they are appended, never reordered. schema.json changes by hand and on purpose."""
    about = comfyui.get("/object_info")
    found = {
        name: {
            "inputs": {kind: list(about[name]["input"].get(kind, {})) for kind in ("required", "optional")},
            "outputs": list(zip(about[name]["output_name"], about[name]["output"], strict=True)),
        }
        for name in NODES
    }
    expected = json.loads((pytestconfig.rootpath / "tests/schema.json").read_text())
    assert json.loads(json.dumps(found)) == expected


def test_every_node_has_a_help_page_and_every_widget_a_tooltip(comfyui, pytestconfig):
    about = comfyui.get("/object_info")
    for name in NODES:
        page = (pytestconfig.rootpath / f"web/docs/{name}.md").read_text()
        assert about[name]["display_name"] in page and about[name]["description"]
        status, served = comfyui.request(f"/extensions/clip-finetune/docs/{name}.md")
        assert status == 200 and served.decode() == page
        for kind in ("required", "optional"):
            for widget, spec in about[name]["input"].get(kind, {}).items():
                if isinstance(spec[0], list) or spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                    assert spec[1].get("tooltip"), f"{name}.{widget}"


def test_no_seed_changes_by_itself(comfyui):
    about = comfyui.get("/object_info")
    for name in NODES:
        for kind in ("required", "optional"):
            for widget, spec in about[name]["input"].get(kind, {}).items():
                if widget == "seed":
                    assert spec[1]["control_after_generate"] is False


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_training_shows_its_chart_and_saves_what_it_says(comfyui):
    result = succeed(comfyui, training("shown", epochs=20))
    assert len(result["previews"]) >= 2 and result["previews"][0] != result["previews"][-1]
    assert all(preview[:2] == b"\xff\xd8" for preview in result["previews"])  # JPEG, so never an alpha channel
    assert "Done: the model of step" in result["texts"]["3"]
    assert "All about it: clip_finetune/shown/report.html in the output folder." in result["texts"]["3"]
    folder = comfyui.base / "output/clip_finetune/shown"
    assert (folder / "report.html").is_file()
    saved = load_full_clip(comfyui.base / "output/full_clip/shown_00001_.safetensors")
    best = load_full_clip(folder / "best.safetensors")
    assert all(same_bits(saved.state_dict[name], tensor) for name, tensor in best.state_dict.items())
    assert "clip_finetune/shown/best.safetensors" in comfyui.choices("LoadFullCLIP", "model")


def test_queued_again_nothing_is_trained_again(comfyui):
    prompt = training("twice")
    succeed(comfyui, prompt)
    before = metrics(comfyui, "twice")
    again = succeed(comfyui, prompt)
    assert set(again["cached"]) >= {"1", "2", "3"} and "3" not in again["executed"]
    # Even where the host forgot it, the finished run is returned.
    comfyui.forget()
    prompt["3"]["inputs"]["save_every_minutes"] = 3.0
    result = succeed(comfyui, prompt)
    assert "3" in result["executed"] and metrics(comfyui, "twice") == before


def test_a_cancelled_training_stops_within_a_step_and_goes_on_to_the_same_bits(comfyui):
    whole, stopped = training("whole", gmp=True, epochs=8), training("stopped", gmp=True, epochs=8)
    succeed(comfyui, whole)
    seen = []

    def cancel(message):
        if message["type"] == "progress_state" and message["data"]["nodes"].get("3", {}).get("value", 0) >= 3:
            if not seen:
                threading.Thread(target=comfyui.interrupt).start()
            seen.append(message["data"]["nodes"]["3"]["value"])

    assert comfyui.queue(stopped, on_message=cancel)["status"] == "interrupted"
    done = len(metrics(comfyui, "stopped"))
    assert 3 <= done < 40 and done - seen[0] <= 3  # the message takes its way while steps of milliseconds go on
    succeed(comfyui, stopped)
    assert [line["step"] for line in metrics(comfyui, "stopped")] == list(range(1, 41))
    bests = [comfyui.base / f"output/clip_finetune/{name}/best.safetensors" for name in ("whole", "stopped")]
    one, other = (load_full_clip(file) for file in bests)
    assert all(same_bits(other.state_dict[name], tensor) for name, tensor in one.state_dict.items())


def test_what_an_api_prompt_leaves_out_comes_from_the_preset(comfyui):
    prompt = training("preset")
    for name in ("epochs", "learning_rate", "batch_size"):
        del prompt["3"]["inputs"][name]
    prompt["3"]["inputs"] |= {"preset": "text encoder only", "epochs": 1}
    succeed(comfyui, prompt)
    settings = json.loads((comfyui.base / "output/clip_finetune/preset/config.json").read_text())["settings"]
    assert settings["epochs"] == {"value": 1, "from": "widget"}
    assert settings["towers"] == {"value": "text", "from": "preset text encoder only"}


def test_a_changed_data_set_gets_a_new_run_folder(comfyui):
    labels_folder(comfyui.base / "datasets/growing", 12)
    prompt = training("grown", epochs=1)
    prompt["2"]["inputs"]["folder"] = "growing"
    succeed(comfyui, prompt)
    labels_folder(comfyui.base / "datasets/growing", 16)
    result = succeed(comfyui, prompt)
    assert "grown is left as it is (the training data changed" in result["texts"]["3"]
    assert (comfyui.base / "output/clip_finetune/grown_2/best.safetensors").is_file()


def test_zero_shot_and_retrieval_are_measured_against_the_baseline(comfyui):
    prompt = training("measured", epochs=10) | {
        "5": node("LoadCLIPDataset", folder="classes", captions="auto", validation_split=0.0, seed=0),
        "6": node("EvalZeroShot", full_clip=["3", 0], dataset=["5", 0], baseline=["1", 0], templates="simple"),
        "7": node("EvalRetrieval", full_clip=["3", 0], dataset=["2", 1], baseline=["1", 0]),
        "8": node("PreviewAny", source=["6", 1]),
        "9": node("PreviewAny", source=["7", 1]),
    }
    result = succeed(comfyui, prompt)
    for number in ("8", "9"):
        heading, _, *rows = result["outputs"][number]["text"][0].splitlines()
        assert heading.split()[-2:] == ["baseline", "model"] and all(row.count("%") == 2 for row in rows)
    assert "Zero-shot accuracy: " in result["texts"]["6"] and "baseline" in result["texts"]["6"]


# ---- text encoders ---------------------------------------------------------------------------------------------------

PROMPT = "a photo of a (red:1.0) cat on a mat"


def encoded(comfyui, clip, file):
    """The nodes that write what a CLIP socket makes of the prompt."""
    return {
        f"{file} encode": node("CLIPTextEncode", clip=clip, text=PROMPT),
        f"{file} probe": node("ProbeConditioning", conditioning=[f"{file} encode", 0], file=file),
    }


def conditioning(comfyui, file):
    return load_file(comfyui.base / f"output/{file}.safetensors")


def test_the_saved_text_encoder_is_the_clip_socket_and_transformers_agrees(comfyui):
    prompt = {
        "1": node("LoadFullCLIP", model="clip_l.safetensors"),
        "2": node("ExportClipL", full_clip=["1", 0], filename_prefix="clip/te", dtype="fp16", save=True, strength=1.0),
        **encoded(comfyui, ["2", 0], "socket"),
    }
    succeed(comfyui, prompt)
    assert "te_00001_.safetensors" in comfyui.choices("CLIPLoader", "clip_name")
    loaded = {
        "1": node("CLIPLoader", clip_name="te_00001_.safetensors", type="stable_diffusion"),
        **encoded(comfyui, ["1", 0], "loaded"),
    }
    succeed(comfyui, loaded)
    socket, file = conditioning(comfyui, "socket"), conditioning(comfyui, "loaded")
    assert torch.equal(socket["hidden"], file["hidden"]) and torch.equal(socket["pooled"], file["pooled"])
    expected = _by_transformers(comfyui.base / "output/clip/te_00001_.safetensors")
    torch.testing.assert_close(file["hidden"], expected, rtol=1e-4, atol=1e-4)
    assert "clip missing" not in comfyui.log.read_text()


def _by_transformers(file):
    """The last hidden state of the same file and tokens, with the padding that ComfyUI uses."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from clip_finetune.engine.data.tokenizer import encode
    from clip_finetune.engine.openai import END, START

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
    row = [START, *encode("a photo of a red cat on a mat"), END]
    with torch.no_grad():
        return model(torch.tensor([row + [END] * (77 - len(row))])).last_hidden_state


def test_an_unfolded_gmp_model_is_folded_by_the_export_which_says_so(comfyui):
    prompt = {
        "1": node("LoadFullCLIP", model="clip_l.safetensors"),
        "2": node("SaveFullCLIP", full_clip=["1", 0], filename_prefix="full_clip/gmp", format="gmp", dtype="fp32"),
    }
    succeed(comfyui, prompt)
    prompt = {
        "1": node("LoadFullCLIP", model="gmp_00001_.safetensors"),
        "2": node("ExportClipL", full_clip=["1", 0], filename_prefix="clip/folded", dtype="fp16"),
    }
    result = succeed(comfyui, prompt)
    assert "was folded" in result["texts"]["2"]
    folded = load_file(comfyui.base / "output/clip/folded_00001_.safetensors")
    plain = load_full_clip(comfyui.base / "models/full_clip/clip_l.safetensors")
    for name, tensor in text_encoder_state_dict(plain, dtype="fp16")[0].items():
        assert same_bits(folded[name], tensor), name


def test_a_swap_replaces_the_clip_l_of_a_clone_and_leaves_the_original_alone(comfyui):
    other = random_clip(CLIP_L, seed=5)
    save_file(text_encoder_state_dict(other, dtype="fp32")[0], comfyui.base / "models/text_encoders/other.safetensors")
    prompt = {
        "1": node("CLIPLoader", clip_name="other.safetensors", type="stable_diffusion"),
        "2": node("LoadFullCLIP", model="clip_l.safetensors"),
        "3": node("ExportClipL", full_clip=["2", 0], clip=["1", 0], filename_prefix="clip/swap", dtype="fp16"),
        "4": node("ExportClipL", full_clip=["2", 0], clip=["1", 0], save=False, dtype="fp32", strength=0.0),
        "5": node("ExportClipL", full_clip=["2", 0], save=False, dtype="fp16"),
        "6": node("CLIPLoader", clip_name="other.safetensors", type="stable_diffusion", device="cpu"),
        **encoded(comfyui, ["3", 0], "swapped"),
        **encoded(comfyui, ["4", 0], "zero"),
        **encoded(comfyui, ["5", 0], "alone"),
        **encoded(comfyui, ["1", 0], "original"),
        **encoded(comfyui, ["6", 0], "fresh"),
    }
    succeed(comfyui, prompt)
    found = {name: conditioning(comfyui, name) for name in ("swapped", "zero", "alone", "original", "fresh")}
    assert torch.equal(found["original"]["hidden"], found["fresh"]["hidden"])
    assert torch.equal(found["swapped"]["hidden"], found["alone"]["hidden"])
    torch.testing.assert_close(found["zero"]["hidden"], found["original"]["hidden"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["swapped"]["hidden"], found["original"]["hidden"], atol=1e-2)


def test_a_lora_on_the_clip_is_merged_into_the_full_clip(comfyui):
    base = random_clip(CLIP_L, seed=6)
    tower = text_encoder_state_dict(base, dtype="fp32")[0]
    save_file(tower, comfyui.base / "models/text_encoders/base.safetensors")
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(768, 4, generator=generator) * 0.1, torch.randn(4, 3072, generator=generator) * 0.1
    key = "lora_te_text_model_encoder_layers_3_mlp_fc2"
    lora = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(4.0)}
    save_file(lora, comfyui.base / "models/loras/te.safetensors")
    prompt = {
        "1": node("CLIPLoader", clip_name="base.safetensors", type="stable_diffusion"),
        "2": node("ProbeLora", clip=["1", 0], lora_name="te.safetensors", strength=0.5),
        "3": node("LoadFullCLIP", model="clip_l.safetensors"),
        "4": node("MergeTEWithVision", clip=["2", 0], full_clip=["3", 0]),
        "5": node("SaveFullCLIP", full_clip=["4", 0], filename_prefix="full_clip/lora", format="openai", dtype="fp32"),
    }
    succeed(comfyui, prompt)
    merged = load_full_clip(comfyui.base / "output/full_clip/lora_00001_.safetensors").state_dict
    plain = load_full_clip(comfyui.base / "models/full_clip/clip_l.safetensors").state_dict
    name = "transformer.resblocks.3.mlp.c_proj.weight"
    expected = base.state_dict[name].double() + 0.5 * up.double() @ down.double()
    # ComfyUI keeps text encoders in fp16.
    torch.testing.assert_close(merged[name].double(), expected, rtol=2e-3, atol=1e-4)
    assert (merged[name].double() - base.state_dict[name].double()).abs().max() > 0.01
    for name in ("text_projection", "logit_scale", "visual.conv1.weight"):
        assert torch.equal(merged[name], plain[name].float())


def saved(comfyui, name):
    return load_full_clip(comfyui.base / "output/full_clip" / name)


def test_a_hugging_face_folder_is_saved_listed_and_opened_again(comfyui):
    succeed(
        comfyui,
        {
            "1": node("LoadFullCLIP", model="tiny.safetensors"),
            "2": node("SaveFullCLIP", full_clip=["1", 0], filename_prefix="full_clip/hf", format="huggingface"),
        },
    )
    name = "hf_00001_/model.safetensors"
    assert name in comfyui.choices("LoadFullCLIP", "model")
    succeed(
        comfyui,
        {
            "1": node("LoadFullCLIP", model=name),
            "2": node(
                "SaveFullCLIP", full_clip=["1", 0], filename_prefix="full_clip/back", format="openai", dtype="mixed"
            ),
        },
    )
    found, expected = (
        saved(comfyui, "back_00001_.safetensors"),
        load_full_clip(comfyui.base / "models/full_clip/tiny.safetensors"),
    )
    assert found.architecture == expected.architecture
    for name, tensor in cast(expected.state_dict, "mixed", "").items():
        assert same_bits(found.state_dict[name], tensor), name


def test_a_model_that_reads_77_tokens_is_stretched_when_it_is_asked_for(comfyui):
    prompt = {
        "1": node("LoadFullCLIP", model="clip_l.safetensors", context_length="248"),
        "2": node("ExportClipL", full_clip=["1", 0], filename_prefix="clip/long", dtype="fp16"),
        "3": node("CLIPLoader", clip_name="short.safetensors", type="stable_diffusion"),
        "4": node("ExportClipL", full_clip=["1", 0], clip=["3", 0], save=False),
        **encoded(comfyui, ["2", 0], "long"),
        **encoded(comfyui, ["4", 0], "long_swapped"),
        **encoded(comfyui, ["3", 0], "short"),
    }
    short = random_clip(CLIP_L, seed=7)
    save_file(text_encoder_state_dict(short, dtype="fp16")[0], comfyui.base / "models/text_encoders/short.safetensors")
    succeed(comfyui, prompt)
    assert conditioning(comfyui, "long")["hidden"].shape == (1, 248, 768)
    assert conditioning(comfyui, "short")["hidden"].shape == (1, 77, 768)
    assert torch.equal(conditioning(comfyui, "long")["hidden"], conditioning(comfyui, "long_swapped")["hidden"])


def test_towers_are_transplanted(comfyui):
    other = random_clip(seed=8, vision_layers=3)
    save_full_clip(other, comfyui.base / "models/full_clip/other_tiny.safetensors")
    succeed(
        comfyui,
        {
            "1": node("LoadFullCLIP", model="tiny.safetensors"),
            "2": node("LoadFullCLIP", model="other_tiny.safetensors"),
            "3": node("TransplantTower", text_from=["1", 0], vision_from=["2", 0]),
            "4": node(
                "SaveFullCLIP", full_clip=["3", 0], filename_prefix="full_clip/both", format="openai", dtype="fp32"
            ),
        },
    )
    found, text = (
        saved(comfyui, "both_00001_.safetensors"),
        load_full_clip(comfyui.base / "models/full_clip/tiny.safetensors"),
    )
    assert found.architecture == dataclasses.replace(text.architecture, vision_layers=3)
    for name, tensor in found.state_dict.items():
        assert same_bits(tensor, (other if name.startswith("visual.") else text).state_dict[name]), name


def test_the_change_of_a_training_is_a_lora_that_comfyui_lists_and_applies(comfyui):
    base = load_full_clip(comfyui.base / "models/full_clip/clip_l.safetensors")
    name = "transformer.resblocks.3.mlp.c_proj.weight"
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(768, 2, generator=generator) @ torch.randn(2, 3072, generator=generator) * 0.02
    changed = base.derive({name: (base.state_dict[name].float() + change).half()}, step="trained")
    save_full_clip(changed, comfyui.base / "models/full_clip/changed.safetensors")
    text, _ = text_encoder_state_dict(base, dtype="fp32")
    save_file(text, comfyui.base / "models/text_encoders/plain.safetensors")
    result = succeed(
        comfyui,
        {
            "1": node("LoadFullCLIP", model="changed.safetensors"),
            "2": node("LoadFullCLIP", model="clip_l.safetensors"),
            "3": node("ExportClipLoRA", full_clip=["1", 0], baseline=["2", 0], rank=4, filename_prefix="loras/change"),
        },
    )
    assert "Rank 4 keeps 100.0%" in result["texts"]["3"], result["texts"]
    assert "change_00001_.safetensors" in comfyui.choices("LoraLoader", "lora_name")
    succeed(
        comfyui,
        {
            "1": node("CLIPLoader", clip_name="plain.safetensors", type="stable_diffusion"),
            "2": node("ProbeLora", clip=["1", 0], lora_name="change_00001_.safetensors", strength=1.0),
            "3": node("LoadFullCLIP", model="clip_l.safetensors"),
            "4": node("MergeTEWithVision", clip=["2", 0], full_clip=["3", 0]),
            "5": node("SaveFullCLIP", full_clip=["4", 0], filename_prefix="full_clip/with_lora", dtype="fp32"),
        },
    )
    found = saved(comfyui, "with_lora_00001_.safetensors").state_dict[name].double()
    torch.testing.assert_close(found, changed.state_dict[name].double(), rtol=2e-3, atol=2e-4)  # held in fp16
    assert (found - base.state_dict[name].double()).abs().max() > 0.05


def test_a_vision_file_is_listed_by_comfyui_and_merged_back(comfyui):
    """Real shapes, because ComfyUI knows vision towers by them."""
    one, other = (random_clip(VIT_L_14, seed=seed, dtype=torch.float16) for seed in (1, 2))
    save_full_clip(one, comfyui.base / "models/full_clip/one_l14.safetensors")
    save_full_clip(other, comfyui.base / "models/full_clip/other_l14.safetensors")
    text, _ = text_encoder_state_dict(one, dtype="fp16")
    save_file(text, comfyui.base / "models/text_encoders/one_te.safetensors")
    succeed(
        comfyui,
        {
            "1": node("LoadFullCLIP", model="one_l14.safetensors"),
            "2": node(
                "SaveFullCLIP", full_clip=["1", 0], filename_prefix="clip_vision/one", format="vision", dtype="fp16"
            ),
        },
    )
    assert "one_00001_.safetensors" in comfyui.choices("CLIPVisionLoader", "clip_name")
    result = succeed(
        comfyui,
        {
            "1": node("CLIPVisionLoader", clip_name="one_00001_.safetensors"),
            "2": node("CLIPLoader", clip_name="one_te.safetensors", type="stable_diffusion"),
            "3": node("LoadFullCLIP", model="other_l14.safetensors"),
            "4": node("MergeTEWithVision", clip=["2", 0], full_clip=["3", 0], clip_vision=["1", 0]),
            "5": node("SaveFullCLIP", full_clip=["4", 0], filename_prefix="full_clip/merged", dtype="fp16"),
        },
    )
    assert "projection is of no use" in result["texts"]["4"]  # that of another model
    for name, tensor in saved(comfyui, "merged_00001_.safetensors").state_dict.items():
        kept = name in ("visual.proj", "text_projection", "logit_scale")
        assert same_bits(tensor, (other if kept else one).state_dict[name]), name


@pytest.mark.soak
def test_a_clip_g_is_swapped_into_an_sdxl_clip(comfyui):
    """A text tower of ViT-bigG/14's size: what SDXL's CLIP makes of it is what transformers does."""
    sizes = dict(embed_dim=1280, text_width=1280, text_layers=32, text_heads=20, text_mlp_width=5120, activation="gelu")
    one, other = (random_clip(CLIP_L, seed=seed, dtype=torch.float16, **sizes) for seed in (1, 2))
    save_full_clip(one, comfyui.base / "models/full_clip/big_g.safetensors")
    encoders = comfyui.base / "models/text_encoders"
    save_file(text_encoder_state_dict(other, dtype="fp16")[0], encoders / "other_g.safetensors")
    plain = load_full_clip(comfyui.base / "models/full_clip/clip_l.safetensors")
    save_file(text_encoder_state_dict(plain, dtype="fp16")[0], encoders / "plain_l.safetensors")
    prompt = {
        "1": node("DualCLIPLoader", clip_name1="plain_l.safetensors", clip_name2="other_g.safetensors", type="sdxl"),
        "2": node("LoadFullCLIP", model="big_g.safetensors"),
        "3": node("ExportClipG", full_clip=["2", 0], clip=["1", 0], filename_prefix="clip/g", dtype="fp16"),
        "4": node("ExportClipG", full_clip=["2", 0], clip=["1", 0], save=False, dtype="fp16", strength=0.0),
        **encoded(comfyui, ["1", 0], "sdxl"),
        **encoded(comfyui, ["3", 0], "sdxl_swapped"),
        **encoded(comfyui, ["4", 0], "sdxl_zero"),
    }
    succeed(comfyui, prompt, timeout=1800)
    succeed(
        comfyui,
        {
            "1": node(
                "DualCLIPLoader", clip_name1="plain_l.safetensors", clip_name2="g_00001_.safetensors", type="sdxl"
            ),
            **encoded(comfyui, ["1", 0], "sdxl_loaded"),
        },
        timeout=1800,
    )
    names = ("sdxl", "sdxl_swapped", "sdxl_zero", "sdxl_loaded")
    found = {name: conditioning(comfyui, name) for name in names}
    for what in ("hidden", "pooled"):
        assert torch.equal(found["sdxl_swapped"][what], found["sdxl_loaded"][what])
        torch.testing.assert_close(found["sdxl_zero"][what], found["sdxl"][what], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found["sdxl_swapped"][what], found["sdxl"][what], atol=1e-2)
    assert torch.equal(found["sdxl_swapped"]["hidden"][..., :768], found["sdxl"]["hidden"][..., :768])  # the CLIP-L
    hidden, pooled = _clip_g_by_transformers(comfyui.base / "output/clip/g_00001_.safetensors")
    print(f"largest difference to transformers: {(found['sdxl_loaded']['pooled'] - pooled).abs().max():.1e}")
    torch.testing.assert_close(found["sdxl_loaded"]["hidden"][..., 768:], hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["sdxl_loaded"]["pooled"], pooled, rtol=1e-4, atol=1e-4)


def _clip_g_by_transformers(file):
    """The hidden state before the last block, and the projected pooled one, with the padding that ComfyUI uses."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    from clip_finetune.engine.data.tokenizer import encode
    from clip_finetune.engine.openai import END, START

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
    row = [START, *encode("a photo of a red cat on a mat"), END]
    tokens = torch.tensor([row + [0] * (77 - len(row))])
    model.load_state_dict(weights, strict=False, assign=True)
    for module in model.modules():  # what is not in the file was made without memory
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(77)[None]
    with torch.no_grad():
        found = model(tokens, output_hidden_states=True)
    return found.hidden_states[-2], found.text_embeds


@pytest.mark.soak
def test_a_vit_l_14_goes_through_the_whole_graph(comfyui):
    """Of random weights: trained, cancelled, gone on, folded, exported, and opened by ComfyUI's own loader."""
    save_full_clip(random_clip(VIT_L_14, dtype=torch.float16), comfyui.base / "models/full_clip/vit_l_14.safetensors")
    prompt = training("large", model="vit_l_14.safetensors", gmp=True, epochs=6, learning_rate=1e-5)
    prompt["2"]["inputs"]["folder"] = "few"
    labels_folder(comfyui.base / "datasets/few", 6, size=224)
    prompt["3"]["inputs"] |= {"batch_size": 4, "micro_batch": 2}
    prompt["4"] = node("FoldGmP", full_clip=["3", 0])
    prompt["5"] = node("ExportClipL", full_clip=["4", 0], filename_prefix="clip/large")
    prompt |= encoded(comfyui, ["5", 0], "large_socket")

    def cancel(message):
        if message["type"] == "progress_state" and message["data"]["nodes"].get("3", {}).get("value", 0) >= 2:
            comfyui.interrupt()

    began = time.monotonic()
    assert comfyui.queue(prompt, on_message=cancel, timeout=1800)["status"] == "interrupted"
    done = metrics(comfyui, "large")
    print(f"cancelled after step {done[-1]['step']}, {time.monotonic() - began:.0f} s after it was queued")
    assert done[-1]["step"] in (2, 3)
    result = succeed(comfyui, prompt, timeout=1800)
    assert f"resumes from step {done[-1]['step']} of 6" in result["texts"]["3"]
    assert [line["step"] for line in metrics(comfyui, "large")] == list(range(1, 7))
    loaded = {
        "1": node("CLIPLoader", clip_name="large_00001_.safetensors", type="stable_diffusion"),
        **encoded(comfyui, ["1", 0], "large_loaded"),
    }
    succeed(comfyui, loaded)
    socket, file = conditioning(comfyui, "large_socket"), conditioning(comfyui, "large_loaded")
    expected = _by_transformers(comfyui.base / "output/clip/large_00001_.safetensors")
    print(f"largest difference to transformers: {(file['hidden'] - expected).abs().max():.2e}")
    assert torch.equal(socket["hidden"], file["hidden"])
    torch.testing.assert_close(file["hidden"], expected, rtol=1e-4, atol=1e-4)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def _empty_folder(comfyui):
    (comfyui.base / "datasets/empty").mkdir(exist_ok=True)
    return {"2": {"folder": "empty"}}, "empty holds no pictures"


def _captions_without_pictures(comfyui):
    folder = labels_folder(comfyui.base / "datasets/no_pictures", 6)
    for picture in folder.glob("*.png"):
        picture.unlink()
    return {"2": {"folder": "no_pictures"}}, "no_pictures"


def _one_picture(comfyui):
    labels_folder(comfyui.base / "datasets/one", 1)
    return {"2": {"folder": "one", "validation_split": 0.0}}, "at least 2 are needed"


def _not_a_clip(comfyui):
    save_file({"weight": torch.zeros(3)}, comfyui.base / "models/full_clip/other.safetensors")
    return {"1": {"model": "other.safetensors"}}, "is not a CLIP"


def _not_a_model(comfyui):
    (comfyui.base / "models/full_clip/text.safetensors").write_text("hello")
    return {"1": {"model": "text.safetensors"}}, "is not a whole safetensors file"


def _run_outside(comfyui):
    return {"3": {"run_name": "../../escape"}}, "run_name is '../../escape'"


def _file_outside(comfyui):
    return {"4": {"filename_prefix": "../escape"}}, "filename_prefix is '../escape'"


def _too_high_a_rate(comfyui):
    broken = random_clip().derive({"ln_final.bias": torch.full((64,), torch.nan)}, step="broken")
    save_full_clip(broken, comfyui.base / "models/full_clip/nan.safetensors")
    return {"1": {"model": "nan.safetensors"}, "2": {"validation_split": 0.0}}, "step 1"


@pytest.mark.parametrize(
    "case",
    [
        _empty_folder,
        _captions_without_pictures,
        _one_picture,
        _not_a_clip,
        _not_a_model,
        _run_outside,
        _file_outside,
        _too_high_a_rate,
    ],
)
def test_bad_input_gets_one_clear_sentence(comfyui, case):
    changes, words = case(comfyui)
    prompt = training(case.__name__)
    for number, inputs in changes.items():
        prompt[number]["inputs"] |= inputs
    result = comfyui.queue(prompt)
    assert result["status"] == "error" and words in result["error"]
    assert "\n" not in result["error"].strip() and "Traceback" not in result["error"]
    assert not (comfyui.base / "escape").exists() and not (comfyui.base.parent / "escape").exists()


def test_a_text_tower_that_is_not_clip_l_is_not_exported_and_its_widths_are_told(comfyui):
    prompt = {
        "1": node("LoadFullCLIP", model="tiny.safetensors"),
        "2": node("ExportClipL", full_clip=["1", 0], filename_prefix="clip/tiny"),
    }
    result = comfyui.queue(prompt)
    assert result["status"] == "error" and "64 wide with 2 layers" in result["error"] and "768" in result["error"]
    assert not list((comfyui.base / "output").glob("clip/tiny*"))


def test_only_what_is_listed_is_opened(comfyui):
    save_full_clip(random_clip(), comfyui.base / "secret.safetensors")
    for number, inputs in (("1", {"model": "../../secret.safetensors"}), ("2", {"folder": "../custom_nodes"})):
        prompt = training("listed")
        prompt[number]["inputs"] |= inputs
        assert comfyui.queue(prompt)["status"] == "rejected"


def test_a_folder_that_went_away_is_told(comfyui):
    labels_folder(comfyui.base / "datasets/going", 8)
    prompt = training("going")
    prompt["2"]["inputs"]["folder"] = "going"
    succeed(comfyui, prompt)
    shutil.rmtree(comfyui.base / "datasets/going")
    assert comfyui.queue(prompt)["status"] == "rejected"
