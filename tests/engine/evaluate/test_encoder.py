"""Encoding: each image and text once, whatever measures it."""

import torch
from clips import random_clip
from image_folders import class_folder, labelled_and_captioned
from PIL import Image

from clip_finetune.engine import (
    eval_retrieval,
    eval_typographic,
    eval_zero_shot,
    load_dataset,
)
from clip_finetune.engine.evaluate import encoder as encoder_module
from clip_finetune.engine.evaluate.encoder import Encoder, EncodingCache


def test_evaluators_that_share_a_cache_encode_each_image_and_text_once(model, tmp_path, passes):
    data, cache = load_dataset(labelled_and_captioned(tmp_path / "both")), EncodingCache()
    alone = [eval_zero_shot(model, data).as_dict(), eval_retrieval(model, data).as_dict()]
    alone.append(eval_typographic(model, data))
    passes.update(images=0, texts=0)
    counted, progress = [], []

    def total():
        counted.append(dict(passes))

    shared = [eval_zero_shot(model, data, features=cache).as_dict()]
    total()
    shared.append(eval_retrieval(model, data, features=cache, on_progress=lambda *n: progress.append(n)).as_dict())
    total()
    shared.append(eval_typographic(model, data, features=cache))
    total()
    assert shared == alone and progress[-1] == (12, 12)
    assert [count["images"] for count in counted] == [12, 12, 24]  # those with words are drawn anew
    assert [count["texts"] for count in counted] == [320, 324, 324 + 28]
    assert eval_zero_shot(model, data, features=cache).as_dict() == alone[0] and passes["images"] == 24
    # Another model, another image, or the same name with other bytes is encoded.
    eval_zero_shot(random_clip(seed=4), data, features=cache)
    assert passes["images"] == 36
    Image.new("RGB", (32, 32), "white").save(tmp_path / "both/red/0.png")
    eval_zero_shot(model, data, features=cache)
    assert passes["images"] == 37
    eval_zero_shot(model.derive({}, step="the same"), data, features=cache)
    assert passes["images"] == 37


def test_texts_of_equal_tokens_have_the_same_bits_in_any_batch_and_from_the_cache(model):
    from clip_finetune.engine.evaluate.encoder import EncodingCache

    encoder = Encoder.of(model, device="cpu", features=EncodingCache())
    first = encoder.encode_texts([*(f"thing {number}" for number in range(70)), "A Dog  on grass"])[-1]
    assert torch.equal(encoder.encode_texts(["a dog on grass"])[0], first)
    rows = encoder.encode_texts_uncached(
        ["Dog", *(f"a much longer text of number {number}" for number in range(70)), "dog"]
    )
    assert torch.equal(rows[0], rows[-1]) and not torch.equal(rows[0], rows[1])


def test_the_cache_knows_the_transform_and_the_activation(model, tmp_path, passes):
    import dataclasses

    from clip_finetune.engine.data.images.transforms import Transform
    from clip_finetune.engine.evaluate.encoder import with_trained_transform

    data, cache = load_dataset(class_folder(tmp_path / "classes")), EncodingCache()
    padded = with_trained_transform(model.provenance, Transform(image_size=32, resize_mode="pad"))
    other = dataclasses.replace(model.architecture, activation="gelu")
    kinds = (model, dataclasses.replace(model, provenance=padded), dataclasses.replace(model, architecture=other))
    for number, kind in enumerate(kinds, 1):
        eval_zero_shot(kind, data, features=cache, templates="none")
        assert passes["images"] == 12 * number


def test_the_cache_is_bounded_and_keeps_what_was_used_last():
    cache = EncodingCache(limit=10 * (4000 + encoder_module._ENTRY_BYTES))
    for number in range(25):
        cache.put(number, torch.full((1000,), float(number)))
        assert cache.get(0) is not None
    assert cache.bytes <= cache.limit and cache.get(24)[0] == 24 and cache.get(5) is None
    batch = torch.zeros(100, 10)
    cache.put("row", batch[3])
    assert cache.get("row").untyped_storage().nbytes() == 40
