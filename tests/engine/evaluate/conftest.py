"""Models and datasets that the evaluation tests share."""

import json
import shutil

import numpy
import pytest
import torch
from clips import disturbed, random_clip
from image_folders import labels_folder
from PIL import Image
from torch.nn import functional as F

from clip_finetune.engine import (
    build_network,
    load_dataset,
)
from clip_finetune.engine.evaluate import encoder as encoder_module
from clip_finetune.engine.evaluate.encoder import Encoder
from clip_finetune.engine.evaluate.zero_shot import class_features, sentences_of


@pytest.fixture(scope="module")
def model():
    return random_clip()


@pytest.fixture(scope="module")
def moved(model):
    return disturbed(model, 0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(labels_folder(tmp_path_factory.mktemp("pairs") / "a", 20))


def centred(model):
    """With the mean of images of noise at zero, so that they fall into different classes."""
    pictures = torch.randn(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    network = build_network(model).eval()
    with torch.no_grad():
        mean = network.encode_image(F.interpolate(pictures, 32)).mean(0, keepdim=True)
    projection = model.state_dict["visual.proj"]
    change = torch.linalg.lstsq(projection.T, mean.T).solution[:, 0]
    return model.derive({"visual.ln_post.bias": model.state_dict["visual.ln_post.bias"] - change}, step="centred")


@pytest.fixture(scope="module")
def planted(model, tmp_path_factory):
    """(a baseline, its model, classes that only the blend half way between them tells apart)."""
    model = centred(model)
    noise = {name: tensor - model.state_dict[name] for name, tensor in disturbed(model, 0.5).state_dict.items()}
    ends = [
        model.derive({name: tensor + sign * noise[name] for name, tensor in model.state_dict.items()}, step="end")
        for sign in (-1, 1)
    ]
    folder = tmp_path_factory.mktemp("planted")
    chance = numpy.random.default_rng(0)
    for number in range(80):
        picture = Image.fromarray(chance.integers(0, 256, (4, 4, 3), dtype=numpy.uint8)).resize((32, 32), 0)
        (folder / "all").mkdir(exist_ok=True)
        picture.save(folder / f"all/{number:02}.png")
    # Each image gets the class that the model in the middle gives it.
    names = ["ant", "boat", "cloud", "door"]
    (folder / "all/labels.json").write_text(json.dumps({f"{n:02}.png": [f"picture {n}"] for n in range(80)}))
    encoder = Encoder.of(model)
    pictures = encoder_module.encode_images(encoder, load_dataset(folder / "all"))
    scores = pictures.features @ class_features(encoder, names, sentences_of("simple")).T
    for row, samples in enumerate(pictures.samples):
        name = names[int(scores[row].argmax())]
        (folder / "classes" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"all/{samples[0]:02}.png", folder / "classes" / name)
    return *ends, load_dataset(folder / "classes")


@pytest.fixture
def passes(monkeypatch):
    """How many images and texts went through a network."""
    counts = {"images": 0, "texts": 0}
    build = encoder_module.build_network

    def counting(*arguments, **options):
        network = build(*arguments, **options)
        image, text = network.encode_image, network.encode_text

        def encode_image(pictures, **more):
            counts["images"] += len(pictures)
            return image(pictures, **more)

        def encode_text(tokens, **more):
            counts["texts"] += len(tokens)
            return text(tokens, **more)

        network.encode_image, network.encode_text = encode_image, encode_text
        return network

    monkeypatch.setattr(encoder_module, "build_network", counting)
    return counts
