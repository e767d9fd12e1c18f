"""What an epoch consists of: samples, repeats and captions."""

import json
import time

import pytest
from image_folders import class_folder, labels_folder
from image_runs import blocks_folder, run

from clip_finetune.engine import UserError, load_dataset
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.data.loader import LoaderOptions, TrainLoader
from clip_finetune.engine.data.sampler import CaptionsConfig, Sampler
from clip_finetune.engine.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(blocks_folder(tmp_path_factory.mktemp("data") / "noise"))


def loader_of(data, transform=None, **options):
    transform = transform or Transform(image_size=32)
    return TrainLoader(data, Tokenizer(77), transform, CaptionsConfig(), LoaderOptions(**options))


def test_an_epoch_has_every_sample_as_often_as_it_repeats(data, tmp_path):
    import dataclasses

    repeated = dataclasses.replace(data, repeats=[3, 0] + [1] * 10)
    epochs = Sampler(repeated, 0)
    assert epochs.length == 13
    pairs = [epochs.epoch(0)[place] for place in range(13)]
    assert sorted(pair.sample for pair in pairs) == [0, 0, 0, *range(2, 12)] and len({p.entry for p in pairs}) == 13
    assert run(repeated, tmp_path / "run").total_steps == 9
    loader = loader_of(repeated, batch_size=13)
    _, batch = next(loader.iterate())
    loader.close()
    (same,) = [batch.originals[row].item() for row in range(13) if batch.indices[row] == 0][:1]
    assert (batch.originals == same).sum() == 3


def pairs_of(data, epoch=0, seed=0, **policy):
    epochs = Sampler(data, seed, CaptionsConfig(**policy))
    return [epochs.epoch(epoch)[place] for place in range(epochs.length)]


def test_each_caption_policy_draws_as_described(tmp_path):
    folder = labels_folder(tmp_path / "colours", 40)
    long, short = "a caption that is rather long", "short"
    (folder / "labels.json").write_text(
        json.dumps({f"{i:03}.png": [f"{short} {i}", f"{long} {i}", f"{short}er {i}"] for i in range(40)})
    )
    data = load_dataset(folder)
    assert {pair.caption for pair in pairs_of(data, caption_policy="first")} == {f"short {i}" for i in range(40)}
    everything = pairs_of(data, caption_policy="all")
    assert len(everything) == 120 == len({pair.caption for pair in everything})
    for share, low, high in ((0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)):
        drawn = [
            p for epoch in range(5) for p in pairs_of(data, epoch, caption_policy="mixed", long_caption_ratio=share)
        ]
        assert low <= sum(pair.caption.startswith(long) for pair in drawn) <= high
    drawn = [p.caption for epoch in range(5) for p in pairs_of(data, epoch, caption_dropout=0.25)]
    assert 25 <= drawn.count("") <= 75
    assert pairs_of(data, 3, caption_policy="mixed", caption_dropout=0.2) == pairs_of(
        data, 3, caption_policy="mixed", caption_dropout=0.2
    )


def test_shuffle_tags_leaves_the_first_tags_in_place(tmp_path):
    folder = labels_folder(tmp_path / "colours", 6)
    tags = ["me", "style", "a", "b", "c", "d", "e"]
    (folder / "labels.json").write_text(json.dumps({f"{i:03}.png": ", ".join(tags) for i in range(6)}))
    pairs = pairs_of(load_dataset(folder), shuffle_tags=True, keep_tokens=2)
    orders = {pair.caption for pair in pairs}
    assert len(orders) > 3 and {pair.meaning for pair in pairs} == {", ".join(tags)}
    for order in orders:
        assert order.split(", ")[:2] == ["me", "style"] and sorted(order.split(", ")) == sorted(tags)


def test_using_all_captions_makes_an_epoch_longer(data, tmp_path):
    result = run(data, tmp_path / "run", caption_policy="all", epochs=1)
    assert result.total_steps == 24 // 4


def test_the_label_template_is_the_caption_of_samples_with_only_a_class(tmp_path):
    data = load_dataset(class_folder(tmp_path / "classes"))
    from clip_finetune.engine.data.sampler import with_template

    changed = with_template(data, "this is {}")
    assert {text for index in range(len(changed)) for text in changed.training_captions(index)} == {
        f"this is {name}" for name in ("blue", "green", "red", "yellow")
    }
    assert with_template(data, "a photo of a {}.") is data
    with pytest.raises(UserError, match="label_template is 'a photo'"):
        run(data, tmp_path / "run", label_template="a photo")


def test_an_epoch_of_a_million_samples_begins_at_once():
    class Many:
        repeats = ()

        def __len__(self):
            return 1_000_000

        def training_captions(self, index):
            return (str(index),)

    began = time.perf_counter()
    epoch = Sampler(Many(), 0).epoch(7)
    assert epoch[0].caption == str(epoch[0].sample) and epoch[999_999].sample != epoch[0].sample
    assert time.perf_counter() - began < 1
