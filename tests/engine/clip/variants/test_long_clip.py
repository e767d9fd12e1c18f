"""Long-CLIP: two position tables as one, and a short table stretched."""

import pytest
import torch
from clips import random_clip
from safetensors.torch import save_file

from clip_finetune.engine import UserError, build_network, load_full_clip, save_full_clip
from clip_finetune.engine.clip import names
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.clip.variants.long_clip import stretch_context, stretched


@pytest.fixture(scope="module")
def model():
    return random_clip()


def test_long_clips_two_tables_become_one(tmp_path):
    model = random_clip(context_length=248)
    table, second = model.state_dict["positional_embedding"], torch.randn(248, 64)
    expected = torch.cat([table[:20], second[20:]])
    state = dict(model.state_dict) | {"positional_embedding_res": second}
    save_file(state, tmp_path / "openai.safetensors")
    hf = names.to_hf(model.state_dict) | {"text_model.embeddings.position_embedding_res.weight": second}
    save_file(hf, tmp_path / "hf.safetensors")
    for name in ("openai", "hf"):
        opened = load_full_clip(tmp_path / f"{name}.safetensors")
        assert opened.architecture.context_length == 248
        assert same_bits(opened.state_dict["positional_embedding"], expected)


def test_stretching_is_long_clips_by_hand_in_float64():
    """Between two rows by quarters, and beyond the last one by quarters of the last step."""
    table = torch.randn(77, 3, dtype=torch.float64)
    rows = [table[position] for position in range(20)]
    for position in range(20, 76):
        rows += [table[position] * (4 - quarter) / 4 + table[position + 1] * quarter / 4 for quarter in range(4)]
    rows += [table[76] + (table[76] - table[75]) * quarter / 4 for quarter in range(4)]
    torch.testing.assert_close(stretched(table), torch.stack(rows), rtol=1e-14, atol=1e-15)
    assert stretched(table.half()).dtype == torch.float16


def test_a_stretched_model_reads_long_texts_and_short_ones_as_before(model, tmp_path):
    path = save_full_clip(model, tmp_path / "m.safetensors")
    long = load_full_clip(path, context_length=248)
    assert long.architecture.context_length == 248 and long.provenance["history"] == ["stretched to 248 tokens"]
    tokens = torch.zeros(2, 77, dtype=torch.long)
    tokens[:, :18], tokens[:, 18] = torch.randint(1, 49405, (2, 18)), 49407
    with torch.no_grad():
        short = build_network(model).encode_text(tokens)
        torch.testing.assert_close(build_network(long).encode_text(torch.nn.functional.pad(tokens, (0, 171))), short)
    assert stretch_context(long) is long
    with pytest.raises(UserError, match="reads 50 tokens; only one that reads 77"):
        stretch_context(random_clip(context_length=50))
