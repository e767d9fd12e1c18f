"""The demo is honest: what it measures was not shown to the training, and only true captions teach it."""

import dataclasses
import random
import statistics

import pytest

from clip_finetune.engine import load_dataset, train
from clip_finetune.engine.cli import demo
from clip_finetune.engine.clip.network import random_full_clip
from clip_finetune.engine.data.readers.parsed import Captions
from clip_finetune.engine.data.tools.demo_images import combinations, draw_demo_classes, draw_demo_dataset


def captions_of(dataset):
    return {text for captions in dataset.captions for text in captions}


def test_held_out_combinations_share_no_caption_with_training(tmp_path):
    pictures = demo.draw_images(tmp_path, seed=0)
    shown = captions_of(pictures.plain) | captions_of(pictures.shifted)
    assert not shown & captions_of(pictures.held_out)
    assert not set(combinations("train")) & set(combinations("held_out"))
    seen = " ".join(shown).split()
    assert all(word in seen for text in captions_of(pictures.held_out) for word in text.split())


def test_the_same_seed_draws_the_same_pictures_and_another_others(tmp_path):
    def drawn(name, seed):
        folder = draw_demo_dataset(tmp_path / name, count=12, seed=seed, style="shifted", split="train")
        return [file.read_bytes() for file in sorted(folder.rglob("*.*"))]

    assert drawn("a", 0) == drawn("b", 0) != drawn("c", 1)


def test_the_class_folders_hold_the_same_pictures(tmp_path):
    captioned = draw_demo_dataset(tmp_path / "a", count=24, seed=0, style="plain", split="held_out")
    classes = load_dataset(draw_demo_classes(tmp_path / "b", count=24, seed=0, style="plain", split="held_out"))
    assert {file.read_bytes() for file in captioned.rglob("*.png")} == {
        classes.path(index).read_bytes() for index in range(len(classes))
    }
    assert len(classes.class_names) == len(combinations("held_out"))


@pytest.mark.soak
def test_three_seeds_learn_and_the_fine_tuned_beat_the_pretrained_outside_their_spread(tmp_path):
    results = [demo.run_demo(tmp_path / str(seed), seed=seed) for seed in range(3)]
    for what in ("zero-shot, new style", "image to text R@5", "text to image R@5"):
        before = [found["models"]["pretrained"][what] for found in results]
        for name in ("fine-tuned", "fine-tuned with GmP"):
            after = [found["models"][name][what] for found in results]
            print(f"{what}: pretrained {before}, {name} {after}")
            assert min(after) > max(before)
            assert statistics.mean(after) - statistics.mean(before) > 2 * max(
                statistics.stdev(before), statistics.stdev(after)
            )
            assert max(after) < 0.95
    for found in results:
        chance = found["chance_zero_shot"]
        assert found["models"]["fine-tuned"]["zero-shot, new style"] > 3 * chance


@pytest.mark.soak
def test_shuffled_captions_teach_nothing(tmp_path):
    pictures = demo.draw_images(tmp_path, seed=0)
    order = list(range(len(pictures.shifted)))
    random.Random(0).shuffle(order)
    captions = Captions(["\n".join(pictures.shifted.captions[index]) for index in order])
    shuffled = dataclasses.replace(pictures.shifted, captions=captions)
    model = random_full_clip(demo.SMALL_CLIP, 0)
    result = train(model, shuffled, None, demo.PRETRAINING, run_folder=tmp_path / "run", device="cpu")
    measured = demo.measure(result.full_clip, pictures)
    print(measured)
    # 240 pictures of 12 classes: three standard deviations of guessing are 5.4 points.
    assert abs(measured["zero-shot, new style"] - 1 / 12) < 0.054
