"""From captions to batches: tokens, one caption per epoch, and the order of samples."""

import collections
import json

import torch
from image_folders import labels_folder

from clip_finetune.engine import load_dataset
from clip_finetune.engine.cli.info import describe_dataset
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.data.loader import LoaderOptions, TrainLoader
from clip_finetune.engine.data.sampler import CaptionsConfig, epoch_order
from clip_finetune.engine.data.tokenizer import Tokenizer


def test_token_ids_equal_open_clips():
    import open_clip

    texts = ["a photo of a cat", "", "Ünïcödé & <html> 😀", "word " * 200, "one\ntwo"]
    assert torch.equal(Tokenizer(77)(texts), open_clip.SimpleTokenizer(context_length=77)(texts))


def test_a_long_caption_is_cut_and_counted(tmp_path):
    folder = labels_folder(tmp_path / "colours", 2, captions=1)
    (folder / "labels.json").write_text(json.dumps({"000.png": ["word " * 75, "word " * 76], "001.png": ["short"]}))
    facts = describe_dataset(load_dataset(folder))
    assert facts["truncated_captions"] == 1 and facts["captions"] == 3 and facts["broken"] == []


def test_each_epoch_draws_one_caption_per_image_and_all_are_drawn_in_time(tmp_path):
    data = load_dataset(labels_folder(tmp_path / "colours", 10, captions=3))
    loader = TrainLoader(data, Tokenizer(77), Transform(image_size=32), CaptionsConfig(), LoaderOptions(batch_size=3))
    drawn = collections.defaultdict(set)
    batches = loader.iterate()
    for epoch in range(30):
        seen = []
        for _ in range(3):
            step, batch = next(batches)
            assert step == epoch * 3 + len(seen) // 3
            seen += batch.indices
            for index, tokens in zip(batch.indices, batch.tokens, strict=True):
                drawn[index].add(tuple(tokens.tolist()))
        assert len(set(seen)) == 9  # floor(10 / 3) steps; one image is left over
    loader.close()
    for index, captions in enumerate(data.captions):
        assert drawn[index] == {tuple(row.tolist()) for row in Tokenizer(77)(captions)}


def test_the_order_of_batches_depends_on_seed_and_step_alone(tmp_path):
    data = load_dataset(labels_folder(tmp_path / "colours", 10))

    def batches(start, count, seed=0):
        options = LoaderOptions(batch_size=4, seed=seed)
        loader = TrainLoader(data, Tokenizer(77), Transform(image_size=32), CaptionsConfig(), options)
        found = [
            (step, batch.indices, batch.tokens.tolist())
            for _, (step, batch) in zip(range(count), loader.iterate(start), strict=False)
        ]
        loader.close()
        return found

    assert batches(0, 9)[5:] == batches(5, 4) and batches(0, 9) != batches(0, 9, seed=1)
    assert sorted(epoch_order(10, 0, 0).tolist()) == list(range(10))
    assert epoch_order(100, 0, 0).tolist() != epoch_order(100, 0, 1).tolist() != epoch_order(100, 1, 0).tolist()
