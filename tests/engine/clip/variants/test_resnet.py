"""CLIPs whose vision tower is a ResNet, compared with open_clip's own: architecture, files and features."""

import dataclasses
import json

import open_clip
import pytest
import torch
from clips import RESNET_50, TINY, TINY_RESNET, random_resnet
from safetensors.torch import load_file, save_file

from clip_finetune.engine import (
    UserError,
    build_network,
    export_text_encoder,
    fold_gmp,
    load_full_clip,
    save_full_clip,
    to_gmp,
)
from clip_finetune.engine.clip.architecture import Architecture, architecture_from_shapes
from clip_finetune.engine.clip.full_clip import METADATA_KEY
from clip_finetune.engine.clip.network import StoredNorm
from clip_finetune.engine.clip.tensor_files import same_bits

OPENAI = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")


@pytest.fixture(scope="module")
def model():
    return random_resnet()


def changed(before, after):
    assert before.state_dict.keys() == after.state_dict.keys()
    return {name for name, tensor in after.state_dict.items() if not same_bits(tensor, before.state_dict[name])}


def statistics(names):
    return {name for name in names if name.endswith((".running_mean", ".running_var"))}


def openai_shapes(name):
    """open_clip's own model of this name, without weights, and the shapes of its tensors but BatchNorm's counters."""
    with torch.device("meta"):
        theirs = open_clip.CLIP(**open_clip.get_model_config(name))
    shapes = {
        key: tuple(tensor.shape)
        for key, tensor in theirs.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    return theirs, shapes


# ---- what it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPENAI)
def test_openais_resnets_are_recognised_by_their_shapes(name):
    theirs, shapes = openai_shapes(name)
    config = open_clip.get_model_config(name)
    vision, text = config["vision_cfg"], config["text_cfg"]
    architecture, notes = architecture_from_shapes(shapes, activation="quick_gelu")
    assert architecture == Architecture(
        embed_dim=config["embed_dim"],
        image_size=vision["image_size"],
        patch_size=None,
        vision_width=vision["width"],
        vision_layers=tuple(vision["layers"]),
        vision_heads=theirs.visual.attnpool.num_heads,
        vision_mlp_width=None,
        context_length=text["context_length"],
        vocab_size=text["vocab_size"],
        text_width=text["width"],
        text_layers=text["layers"],
        text_heads=text["heads"],
        text_mlp_width=4 * text["width"],
        activation="quick_gelu",
    )
    assert notes == () and architecture.resnet
    assert architecture.shapes() == shapes
    gmp = architecture.shapes("gmp")
    assert architecture_from_shapes(gmp, activation="quick_gelu") == (architecture, ())


def test_the_assumed_heads_of_an_unknown_resnet_get_a_note():
    architecture, notes = architecture_from_shapes(TINY_RESNET.shapes(), activation="quick_gelu")
    assert architecture == dataclasses.replace(TINY_RESNET, text_heads=1)
    assert len(notes) == 1 and "heads is not in the file; 8 (vision) and 1 (text) are assumed" in notes[0]


def test_an_architecture_comes_back_from_json():
    for architecture in (TINY_RESNET, RESNET_50, TINY):
        back = Architecture.from_dict(json.loads(json.dumps(architecture.as_dict())))
        assert back == architecture and hash(back) == hash(architecture)
    assert not TINY.resnet and TINY_RESNET.resnet and (TINY_RESNET.grid, RESNET_50.grid) == (2, 7)


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(vision_layers=[1, 1, 1]), r"vision_layers are \(1, 1, 1\); a ResNet has four numbers above 0"),
        (dict(vision_layers=[1, 1, 0, 1]), "four numbers above 0"),
        (dict(vision_layers=[1, 1, "2", 1]), "four numbers above 0"),
        (dict(vision_layers=2), "patch_size is None; it must be a number above 0"),
        (dict(patch_size=16), "patch_size is 16; a ResNet has none"),
        (dict(vision_mlp_width=64), "vision_mlp_width is 64; a ResNet has none"),
        (dict(image_size=70), "image_size is 70; a ResNet's is a multiple of 32"),
        (dict(vision_heads=7), "512 wide, which 7 attention heads cannot share"),
        (dict(embed_dim=0), "embed_dim is 0"),
    ],
)
def test_sizes_that_no_resnet_has_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        Architecture.from_dict(TINY_RESNET.as_dict() | values)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            {"visual.layer3.0.conv2.weight": None},
            "1 tensor is missing.*layer3.0.conv2",
        ),
        ({"visual.attnpool.positional_embedding": None}, "ResNet.*attnpool.positional_embedding is missing"),
        ({"visual.layer1.0.conv1.weight": (16,)}, "ResNet.* do not have the shapes"),
        ({"visual.layer2.1.bn1.running_var": (16,)}, r"layer2.1.bn1.running_var has the shape \(16,\)"),
        ({"visual.ln_post.weight": (16,)}, "visual.ln_post.weight"),
    ],
)
def test_a_damaged_resnet_is_refused_with_the_tensors_name(model, tmp_path, wrong, words):
    state = dict(model.state_dict)
    for name, shape in wrong.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=words):
        load_full_clip(tmp_path / "m.safetensors")


def test_a_resnet_without_one_of_its_stages_is_refused():
    shapes = {name: shape for name, shape in TINY_RESNET.shapes().items() if not name.startswith("visual.layer4.")}
    with pytest.raises(UserError, match="the tensor visual.layer4.0.conv1.weight is missing"):
        architecture_from_shapes(shapes, activation="quick_gelu")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_resnet_opens_with_the_same_bits_and_architecture(tmp_path, dtype):
    model = random_resnet(dtype=dtype)
    opened = load_full_clip(save_full_clip(model, tmp_path / "m.safetensors"))
    assert opened.architecture == model.architecture and opened.fingerprint == model.fingerprint
    assert not opened.notes


def test_the_file_of_a_resnet_says_what_it_is(model, tmp_path):
    from safetensors import safe_open

    with safe_open(save_full_clip(model, tmp_path / "m.safetensors"), "pt") as file:
        about = json.loads(file.metadata()[METADATA_KEY])
    assert about["architecture"]["vision_layers"] == [1, 2, 1, 1] and about["architecture"]["patch_size"] is None


@pytest.mark.parametrize("suffix, prefix", [("pt", ""), ("pt", "module."), ("safetensors", "")])
def test_the_counters_of_batch_norm_are_dropped_when_a_file_is_opened(model, tmp_path, suffix, prefix):
    """As open_clip saves them, from one graphics card and from several."""
    state = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(7)
        for name in model.state_dict
        if name.endswith("running_var")
    }
    assert len(state) == 3 + 3 * 5 + 4
    state = {prefix + name: tensor for name, tensor in (state | dict(model.state_dict)).items()}
    path = tmp_path / f"theirs.{suffix}"
    torch.save(state, path) if suffix == "pt" else save_file(state, path)
    opened = load_full_clip(path)
    assert changed(model, opened) == set()


def test_open_clip_opens_our_file_of_an_rn50_and_gives_equal_features(tmp_path):
    """Its real shapes, with open_clip's own file reader and network."""
    model = random_resnet(RESNET_50)
    path = save_full_clip(model, tmp_path / "rn50.safetensors")
    theirs = open_clip.create_model("RN50-quickgelu", pretrained=str(path), precision="fp32").eval()
    same_features(model, theirs, size=224)


def test_the_features_are_open_clips_in_training_mode_too(model):
    vision = open_clip.CLIPVisionCfg(layers=[1, 2, 1, 1], width=16, image_size=64)
    text = open_clip.CLIPTextCfg(width=64, heads=2, layers=2)
    theirs = open_clip.CLIP(32, vision, text, quick_gelu=True)
    theirs.load_state_dict(dict(model.state_dict), strict=True)
    same_features(model, theirs.eval(), size=64)


def same_features(model, theirs, size):
    ours, theirs = build_network(model, dtype=torch.float64), theirs.double()
    assert ours.training and not any(isinstance(module, torch.nn.BatchNorm2d) for module in ours.modules())
    images, tokens = torch.randn(2, 3, size, size, dtype=torch.float64), torch.randint(1, 49405, (2, 77))
    with torch.no_grad():
        expected = theirs.encode_image(images)
        assert expected.std() > 0.01
        torch.testing.assert_close(ours.encode_image(images), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.eval().encode_image(images), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.encode_text(tokens), theirs.encode_text(tokens), rtol=1e-10, atol=1e-12)


def test_a_resnet_goes_to_gmp_and_back_with_the_same_bits(tmp_path):
    """In fp16, where the way back is exact; only the text tower has MLPs."""
    model = random_resnet(dtype=torch.float16)
    gmp = to_gmp(model)
    vision = {name for name in model.state_dict if name.startswith("visual.")}
    assert vision == {name for name in gmp.state_dict if name.startswith("visual.")}
    assert sum(name.endswith(".theta") for name in gmp.state_dict) == 2 * TINY.text_layers
    opened = load_full_clip(save_full_clip(gmp, tmp_path / "gmp.safetensors"))
    assert opened.parameterization == "gmp" and opened.fingerprint == gmp.fingerprint
    assert changed(model, fold_gmp(opened)) == set()
    assert dict(build_network(gmp).named_parameters()).keys() == gmp.state_dict.keys() - statistics(gmp.state_dict)


def test_the_text_encoder_of_a_resnet_is_exported(model, tmp_path):
    exported = load_file(export_text_encoder(model, tmp_path / "te.safetensors", dtype=None))
    assert same_bits(exported["text_model.final_layer_norm.weight"], model.state_dict["ln_final.weight"])


def test_a_stored_norm_is_batch_norm_in_evaluation():
    norm = torch.nn.BatchNorm2d(5)
    norm(torch.randn(8, 5, 3, 3))  # statistics that matter
    inputs = torch.randn(4, 5, 3, 3)
    expected = norm.eval()(inputs)
    stored = StoredNorm(norm).train()
    assert same_bits(stored(inputs).detach(), expected.detach())
    assert stored.state_dict().keys() == {"weight", "bias", "running_mean", "running_var"}
