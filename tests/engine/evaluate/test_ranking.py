"""One image and some texts."""

import numpy
import pytest
import torch
from image_folders import load_image
from PIL import Image
from torch.nn import functional as F

from clip_finetune.engine import UserError, build_network
from clip_finetune.engine.data.images.decoding import normalize
from clip_finetune.engine.data.tokenizer import Tokenizer
from clip_finetune.engine.evaluate.comparison import notes_of
from clip_finetune.engine.evaluate.ranking import rank_captions


def features_of(model, pictures, texts, template="{}"):
    """Unit features by open_clip's own calls."""
    network, tokenizer = build_network(model).eval(), Tokenizer(77)
    with torch.no_grad():
        images = F.normalize(network.encode_image(normalize(torch.stack(pictures))), dim=1)
        return images.double(), F.normalize(network.encode_text(tokenizer(texts)), dim=1).double()


def test_texts_are_ranked_by_cosine_with_shares_at_the_models_own_scale(model, tmp_path):
    picture = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=numpy.uint8))
    picture.save(tmp_path / "picture.png")
    texts = ["a cat", "a dog", "a red square"]
    images, expected = features_of(model, [load_image(tmp_path / "picture.png", 32)], texts)
    cosines = (images @ expected.T)[0]
    found = rank_captions(model, picture, ["a cat", "", "a dog", " a cat ", "a red square"])
    assert found.texts == tuple(texts)
    assert found.cosines == pytest.approx(cosines.tolist(), abs=1e-6)
    scale = model.state_dict["logit_scale"].double().exp()
    assert found.shares == pytest.approx((cosines * scale).softmax(0).tolist(), abs=1e-5)
    assert found.logit_scale == pytest.approx(scale.item()) and sum(found.shares) == pytest.approx(1)
    assert found.order == cosines.argsort(descending=True).tolist()
    assert [line["text"] for line in found.as_dict()["texts"]] == [texts[place] for place in found.order]


def test_ranking_needs_a_text_and_notes_long_ones(model):
    picture = Image.new("RGB", (40, 40))
    for texts in ([], ["", "  "]):
        with pytest.raises(UserError, match="no text to rank; write one per line"):
            rank_captions(model, picture, texts)
    with pytest.raises(UserError, match="at most 1000"):
        rank_captions(model, picture, [str(number) for number in range(1001)])
    short, long = (rank_captions(model, picture, texts) for texts in (["one"], ["word " * 100]))
    assert "longer than the model reads" in long.notes[0]
    assert notes_of(long.notes) == notes_of(long.notes, long.notes) == list(long.notes) and notes_of(short.notes) == []
    assert notes_of(short.notes, long.notes) == [f"Baseline: {long.notes[0]}"]
    assert notes_of(long.notes, short.notes) == [f"Model: {long.notes[0]}"]
    for mode in ("L", "RGBA", "P"):
        assert rank_captions(model, Image.new(mode, (40, 40)), ["one"]).shares == (1.0,)
