"""`clip-finetune bench`: its table and numbers, the check that all contenders do the same work, and the FLOP count."""

import dataclasses
import json
import math

import pytest
import torch
from clips import TINY, random_clip
from torch.utils.flop_counter import FlopCounterMode

from clip_finetune.engine import save_full_clip, to_gmp
from clip_finetune.engine.bench import measure as measure_module
from clip_finetune.engine.bench.contenders import Contender, OurStep, open_clip_network
from clip_finetune.engine.bench.workload import ARCHITECTURES, flop_per_pair, random_batch
from clip_finetune.engine.cli import main
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setitem(measure_module._PRODUCT_SIZE, "cpu", 512)


def test_the_command_prints_a_table_and_writes_the_same_numbers_as_json(tmp_path, capsys, one_thread):
    pytest.importorskip("transformers")
    save_full_clip(to_gmp(random_clip()), tmp_path / "tiny.safetensors")  # bench folds a GmP model
    options = ["--batch-size", "4", "--rounds", "2", "--threads", "1", "--device", "cpu"]
    files = ["--model", str(tmp_path / "tiny.safetensors"), "--json", str(tmp_path / "bench.json")]
    assert main(["bench", *options, *files]) == 0
    output, result = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
    assert result["machine"] in output and f"torch {torch.__version__}" in result["machine"]
    rows = {row["name"]: row for row in result["rows"]}
    assert sum("ours" in name for name in rows) == 3
    assert sum("open_clip" in name for name in rows) == sum("Hugging Face" in name for name in rows) == 1
    for name, row in rows.items():
        assert name in output
        assert row["dtype"] == "fp32" and row["batch"] == 4  # auto is fp32 for so narrow a model
        assert row["pairs_per_second"] > 0 and 0 < row["share_of_peak"] < 1.5
        assert row["peak_bytes"] is None or 1e6 < row["peak_bytes"] < 1e9
        assert len(row["seconds"]) == 2 and row["speed_to_open_clip"] > 0
    assert next(row for name, row in rows.items() if "open_clip" in name)["speed_to_open_clip"] == 1
    assert max(row["first_loss"] for row in rows.values()) - min(row["first_loss"] for row in rows.values()) < 1e-4


def test_a_contender_that_does_other_work_is_refused():
    contender = Contender("another", "fp32", OurStep)
    measure_module._check_loss(contender, 2.0, {"infonce": 2.00005})
    for loss in (2.01, math.nan):
        with pytest.raises(UserError, match="^The loss of another .*its speed says nothing.$"):
            measure_module._check_loss(contender, loss, {"infonce": 2.0})


@pytest.mark.parametrize("sizes", [{}, {"image_size": 48, "embed_dim": 24, "text_mlp_width": 128}])
def test_flop_equal_those_that_torch_counts_in_open_clips_forward(sizes):
    model = random_clip(dataclasses.replace(TINY, **sizes))
    network, batch = open_clip_network(model), random_batch(model.architecture, 3)
    images = normalize(batch.images)
    for tower, run in (
        ("vision", lambda: network.encode_image(images)),
        ("text", lambda: network.encode_text(batch.tokens)),
    ):
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                run()
        assert flop_per_pair(model.architecture, (tower,)) == 3 * counted.get_total_flops() / 3, tower


def test_flop_of_known_models():
    """526 GFLOP per trained pair for ViT-L/14: three times the published 175.3 GFLOP of a forward pass."""
    assert flop_per_pair(ARCHITECTURES["ViT-L-14"]) == pytest.approx(526e9, rel=2e-3)


def test_captions_end_with_the_end_token_and_differ():
    batch = random_batch(TINY, 6)
    ends = batch.tokens.argmax(dim=1)
    assert (batch.tokens[:, 0] == 49406).all() and (batch.tokens.max(dim=1).values == 49407).all()
    assert all(
        (row[end + 1 :] == 0).all() and (row[: end + 1] > 0).all() for row, end in zip(batch.tokens, ends, strict=True)
    )
    assert len({tuple(row.tolist()) for row in batch.tokens}) == 6


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "ViT-Z-99"], "ViT-Z-99 is neither a file nor one of ViT-B-32 and ViT-L-14"),
        (["--batch-size", "1"], "--batch-size of 2 or more"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_what_cannot_be_measured_gives_a_one_sentence_error(arguments, words, capsys):
    assert main(["bench", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("clip-finetune bench: ") and words in error and error.endswith(".")
