"""Folders for Hugging Face's transformers: what it opens is what we saved."""

import dataclasses
import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import TINY, random_clip
from image_folders import load_image
from PIL import Image
from safetensors import safe_open

from clip_finetune.engine import UserError, build_network, fold_gmp, load_full_clip, to_gmp
from clip_finetune.engine.clip.huggingface import save_huggingface
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.data.tokenizer import Tokenizer
from clip_finetune.engine.files import remove_parts
from clip_finetune.engine.openai import END, START

transformers = pytest.importorskip("transformers")

TEXTS = [
    "a photo of a cat",
    "A Photo of THE Eiffel Tower, at night.",
    "don't stop; it's what they'll do, we've said & I'm sure I'd",
    "3.14159 and 2026: #1 (50% off!) -- $9.99 / a_b\\c",
    "tabs\tand\nnew   lines  ",
    "naïve café, crème brûlée, straße, ¿Qué?",
    "a decomposed e\u0301 is composed",
    "привет, мир",
    "日本語のテキスト",
    "हिन्दी مرحبا",
    "İstanbul x² Ⅷ ½ — …",
    "😀👍🏽 party!",
    "antidisestablishmentarianismwithoutanyspaces" * 3,
    "",
]
LONG = "a very long caption, " * 40


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No connection can be made, whatever transformers has read from the environment by now."""

    def refuse(*_):
        raise OSError("this test is offline")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model():
    return random_clip()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    notes = []
    folder = save_huggingface(model, tmp_path_factory.mktemp("saved") / "clip", on_note=notes.append)
    assert notes == []
    return folder


def images_and_tokens(architecture):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, architecture.image_size, architecture.image_size, generator=generator)
    tokens = torch.randint(1, architecture.vocab_size - 2, (3, architecture.context_length), generator=generator)
    for row, length in zip(tokens, (4, 9, architecture.context_length), strict=True):
        row[0], row[length - 1], row[length:] = architecture.vocab_size - 2, architecture.vocab_size - 1, 0
    return images, tokens


def features_agree(folder, full_clip):
    """Asserts that transformers' features, before and after normalisation, and its logits are our network's."""
    theirs, network = transformers.CLIPModel.from_pretrained(folder).eval(), build_network(full_clip)
    images, tokens = images_and_tokens(full_clip.architecture)
    with torch.no_grad():
        ours_image, ours_text = network.encode_image(images), network.encode_text(tokens)
        image = theirs.visual_projection(theirs.vision_model(images).pooler_output)
        text = theirs.text_projection(theirs.text_model(tokens).pooler_output)
        logits = theirs(pixel_values=images, input_ids=tokens).logits_per_image
        unit_image, unit_text = (torch.nn.functional.normalize(x, dim=-1) for x in (ours_image, ours_text))
        ours_logits = network.logit_scale.exp() * unit_image @ unit_text.T
    torch.testing.assert_close(image, ours_image, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text, ours_text, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, ours_logits, rtol=1e-5, atol=1e-4)  # of cosines multiplied by about 14


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu"},
        {"vision_heads": 4, "text_heads": 1},
        # Nothing here equals transformers' default, and the towers differ in everything.
        {
            "embed_dim": 24,
            "image_size": 28,
            "patch_size": 7,
            "vision_width": 48,
            "vision_layers": 3,
            "vision_heads": 3,
            "vision_mlp_width": 100,
            "context_length": 20,
            "text_width": 32,
            "text_layers": 1,
            "text_heads": 8,
            "text_mlp_width": 72,
        },
    ],
    ids=["tiny", "gelu", "heads", "sizes"],
)
def test_transformers_computes_the_same_features_offline(tmp_path, changes):
    model = random_clip(**changes)
    folder = save_huggingface(model, tmp_path / "clip")
    features_agree(folder, model)


@pytest.mark.parametrize(
    "name",
    [
        "CLIPModel",
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "CLIPConfig",
        "CLIPTokenizer",
        "CLIPTokenizerFast",
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPImageProcessorPil",
        "CLIPProcessor",
        "AutoModel",
        "AutoConfig",
        "AutoTokenizer",
        "AutoImageProcessor",
        "AutoProcessor",
    ],
)
def test_every_class_of_transformers_opens_the_folder_offline(folder, name):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    opened = getattr(transformers, name).from_pretrained(folder)
    assert "CLIP" in type(opened).__name__


def test_transformers_misses_no_weight_and_finds_none_too_many(folder):
    _, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# ---- tokenizer and image processor --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CLIPProcessor", "AutoProcessor", "CLIPTokenizer", "AutoTokenizer"])
def test_texts_become_the_same_tokens_up_to_padding(folder, name):
    """For texts without HTML entities, curly quotes and letters of odd width, which ours mends and theirs does not."""
    theirs = getattr(transformers, name).from_pretrained(folder)
    texts = [*TEXTS, LONG]
    found = theirs(text=texts, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    ours = Tokenizer(TINY.context_length)(texts)
    assert found.shape == ours.shape and (found[-1] == ours[-1]).all() and found[-1, -1] == END
    for text, row, expected in zip(texts, found, ours, strict=True):
        length = expected.tolist().index(END) + 1
        assert row[:length].tolist() == expected[:length].tolist(), text
        assert row[0] == START and (row[length:] == END).all() and (expected[length:] == 0).all()


def test_padding_does_not_change_the_features(folder, model):
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    inputs = processor(text=TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        ours = build_network(model).encode_text(Tokenizer(TINY.context_length)(TEXTS))
        found = theirs.text_projection(theirs.text_model(**inputs).pooler_output)
    torch.testing.assert_close(found, ours, rtol=1e-5, atol=1e-5)


def test_the_tokenizer_cuts_at_this_models_context(tmp_path):
    folder = save_huggingface(random_clip(context_length=20), tmp_path / "clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    assert tokenizer([LONG], truncation=True)["input_ids"] == Tokenizer(20)([LONG]).tolist()


def save_image(path, width, height):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (97, 64), (40, 50), (20, 30), (300, 211), (33, 32), (32, 37)])
def test_images_become_the_same_pixels(folder, tmp_path, size):
    path = save_image(tmp_path / "image.png", *size)
    ours = load_image(path, TINY.image_size)
    with Image.open(path) as opened:
        processor = transformers.CLIPProcessor.from_pretrained(folder)
        found = processor(images=opened, return_tensors="pt")["pixel_values"]
        pillow = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        exact = pillow.from_pretrained(folder)(opened, return_tensors="pt")["pixel_values"]
    # Resized by Pillow, as we do, the pixels are the same; the rest is the rounding of the normalisation.
    torch.testing.assert_close(exact, normalize(ours[None]), rtol=0, atol=1e-6)
    # transformers 5 resizes with torchvision, whose bicubic filter rounds to another of the 256 levels here and there.
    one_level = 1 / 255 / 0.26130258
    torch.testing.assert_close(found, normalize(ours[None]), rtol=0, atol=1.01 * one_level)


def test_an_odd_margin_may_move_the_centre_crop_by_one_pixel(folder, tmp_path):
    """35 − 32 leaves 3 to cut: transformers rounds the margin of 1.5 down, torchvision (and we) to the even 2."""
    path = save_image(tmp_path / "image.png", 35, 32)
    with Image.open(path) as opened:
        processor = transformers.CLIPImageProcessor.from_pretrained(folder)
        found = processor(opened, return_tensors="pt")["pixel_values"]
    ours = normalize(load_image(path, 32)[None])
    torch.testing.assert_close(found[..., 1:], ours[..., :-1], rtol=0, atol=1e-6)


# ---- the file and the config ----------------------------------------------------------------------------------------


def mixed(model):
    """As OpenAI's own files: matrices in fp16, the rest in fp32; one bf16 among them."""
    halves = {name: tensor.half() for name, tensor in model.state_dict.items() if tensor.ndim >= 2}
    return model.derive(halves | {"ln_final.bias": model.state_dict["ln_final.bias"].bfloat16()}, step="mixed")


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "mixed"])
def test_saved_and_opened_again_every_bit_is_the_same(model, tmp_path, kind):
    saved = mixed(model) if kind == "mixed" else random_clip(dtype=getattr(torch, kind))
    folder = save_huggingface(saved, tmp_path / "clip")
    opened = load_full_clip(folder)
    assert opened.architecture == saved.architecture and opened.notes == ()
    assert opened.state_dict.keys() == saved.state_dict.keys()
    assert all(same_bits(opened.state_dict[name], tensor) for name, tensor in saved.state_dict.items())
    # The mixture opens in the widest, so that nothing is rounded.
    widest = "float32" if kind == "mixed" else kind
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == widest
    theirs = transformers.AutoModel.from_pretrained(folder, torch_dtype="auto")
    assert theirs.dtype == theirs.text_projection.weight.dtype == getattr(torch, widest)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_weights_are_saved_in_the_chosen_dtype(model, tmp_path, dtype):
    chosen = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    folder = save_huggingface(mixed(model), tmp_path / "clip", dtype=dtype)
    opened = load_full_clip(folder).state_dict
    assert all(same_bits(opened[name], tensor.to(chosen)) for name, tensor in mixed(model).state_dict.items())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and "logit_scale" in file.keys()  # noqa: SIM118 (not a dict)


def test_gmp_is_folded_with_a_note(model, tmp_path):
    gmp = to_gmp(model)
    notes = []
    folder = save_huggingface(gmp, tmp_path / "clip", on_note=notes.append)
    assert len(notes) == 1 and "GmP" in notes[0] and "folded" in notes[0]
    assert load_full_clip(folder).fingerprint == fold_gmp(gmp).fingerprint
    features_agree(folder, gmp)


def test_a_model_with_another_vocabulary_gets_no_tokenizer_and_a_note(tmp_path):
    model = random_clip(vocab_size=1000)
    notes = []
    folder = save_huggingface(model, tmp_path / "clip", on_note=notes.append)
    assert len(notes) == 1 and "1000 tokens" in notes[0] and "no tokenizer" in notes[0]
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json"}
    features_agree(folder, model)  # taken at the highest token, as open_clip does


def test_the_files_have_the_mode_that_the_umask_gives(folder, tmp_path):
    (tmp_path / "plain").write_text("")
    assert {file.stat().st_mode for file in folder.iterdir()} == {(tmp_path / "plain").stat().st_mode}


# ---- refused, failed, killed ----------------------------------------------------------------------------------------


def refused(model, folder, words, **options):
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        save_huggingface(model, folder, **options)
    text = str(error.value)
    assert str(folder) in text and re.search(words, text) and "\n" not in text and ".part" not in text, text
    assert sorted(folder.parent.rglob("*")) == before


def test_a_folder_that_holds_something_is_refused_and_kept(model, tmp_path):
    folder = save_huggingface(model, tmp_path / "clip")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    refused(random_clip(seed=5), folder, "already there; choose a folder")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    refused(model, tmp_path / "file", "already there")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_and_a_link_to_one_are_filled(model, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert load_full_clip(save_huggingface(model, tmp_path / "empty")).fingerprint == model.fingerprint
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert load_full_clip(save_huggingface(model, tmp_path / "link")).fingerprint == model.fingerprint
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert load_full_clip(save_huggingface(model, "new/folder")).fingerprint == model.fingerprint


def test_weights_that_are_not_finite_are_refused(model, tmp_path):
    for name in ("ln_final.bias", "visual.ln_post.bias"):
        broken = model.state_dict[name].clone()
        broken[3] = float("nan")
        refused(model.derive({name: broken}, step="broken"), tmp_path / "clip", f"{name} holds values .* not numbers")


def test_values_too_large_for_fp16_are_refused(model, tmp_path):
    large = model.derive({"ln_final.bias": torch.full((64,), 1e6)}, step="made large")
    refused(large, tmp_path / "clip", "too large for fp16; choose bf16 or fp32", dtype="fp16")
    save_huggingface(large, tmp_path / "clip", dtype="bf16")


def test_a_resnet_is_refused(tmp_path):
    resnet = random_clip(vision_layers=(1, 1, 1, 1), patch_size=None, vision_mlp_width=None, image_size=64)
    refused(resnet, tmp_path / "clip", "is a ResNet, and Hugging Face's CLIP has only ViTs")


def test_a_model_that_would_open_as_another_is_refused(tmp_path):
    """Four whole patches in 35 pixels: the file's shapes tell of 32."""
    odd = random_clip(dataclasses.replace(TINY, image_size=35))
    refused(odd, tmp_path / "clip", "its image_size is 32, not 35")


@pytest.mark.parametrize("when", ["weights", "texts"])
def test_a_full_disk_leaves_nothing(model, tmp_path, monkeypatch, when):
    import safetensors.torch

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "weights":
        monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    else:
        monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    refused(model, tmp_path / "clip", "disk is full")


def test_a_folder_that_cannot_be_written_to_is_refused(model, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refused(model, tmp_path / "file" / "clip", "could not be written")


def test_weights_that_read_back_differently_leave_nothing(model, tmp_path, monkeypatch):
    import safetensors.torch

    save_file = safetensors.torch.save_file
    monkeypatch.setattr(
        safetensors.torch,
        "save_file",
        lambda tensors, *rest: save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, *rest),
    )
    refused(model, tmp_path / "clip", "reading it back gave other values")


def test_a_killed_process_leaves_no_folder(model, tmp_path):
    script = (
        "import os, safetensors.torch\n"
        "from clips import random_clip\n"
        "from clip_finetune.engine.clip.huggingface import save_huggingface\n"
        "def killed(tensors, file, metadata):\n"
        "    file.write_bytes(b'half')\n"
        "    os._exit(9)\n"
        "safetensors.torch.save_file = killed\n"
        f"save_huggingface(random_clip(), {str(tmp_path / 'clip')!r})\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 9
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".clip.") and path.name.endswith(".part") for path in left] == [True]
    remove_parts(tmp_path)
    assert not list(tmp_path.iterdir())
    save_huggingface(model, tmp_path / "clip")
