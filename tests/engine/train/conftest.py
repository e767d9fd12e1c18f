"""A tiny model and a small dataset for the tests of trainings; none of them writes into the dataset."""

import pytest
from clips import random_clip
from image_folders import labels_folder

from clip_finetune.engine import load_dataset


@pytest.fixture(scope="session")
def model():
    return random_clip()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return load_dataset(labels_folder(tmp_path_factory.mktemp("data") / "colours"))
