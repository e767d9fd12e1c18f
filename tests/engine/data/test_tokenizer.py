"""Captions as token ids."""

import json
import time

import pytest
from image_folders import labels_folder
from image_runs import blocks_folder, run

from clip_finetune.engine import load_dataset
from clip_finetune.engine.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(blocks_folder(tmp_path_factory.mktemp("data") / "noise"))


def test_a_long_caption_is_truncated_after_a_word_and_keeps_its_end_token(data, tmp_path):
    from clip_finetune.engine.data.tokenizer import encode
    from clip_finetune.engine.openai import END, START

    text = "word " * 73 + "supercalifragilisticexpialidocious end"
    (row,) = Tokenizer(77)([text]).tolist()
    assert row[0] == START and row[1:74] == encode("word " * 73) and row[74] == END and not any(row[75:])
    (row,) = Tokenizer(77)(["q" * 1000]).tolist()  # one word that does not fit: as much of it as does
    assert row[76] == END and all(row)
    began = time.perf_counter()
    assert Tokenizer(77).truncated("z" * 1_000_000) and Tokenizer(77)(["x y " * 250_000])[0, 76] == END
    assert time.perf_counter() - began < 10
    folder = labels_folder(tmp_path / "long")
    (folder / "labels.json").write_text(json.dumps({f"{i:03}.png": f"{i} " + "word " * 90 for i in range(12)}))
    result = run(load_dataset(folder), tmp_path / "run")
    assert any("12 captions are longer than the 77 tokens" in note for note in result.notes)
