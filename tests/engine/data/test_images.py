"""Pictures on their way into a training: how they become squares, what chance does, and what is kept on the disk."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy
import pytest
import torch
from clips import random_clip
from image_folders import class_folder, labels_folder
from PIL import Image, features

from clip_finetune.engine import TrainConfig, UserError, eval_retrieval, load_dataset, load_full_clip, train
from clip_finetune.engine.clip.tensor_files import same_bits
from clip_finetune.engine.data import loader as loader_module
from clip_finetune.engine.data.decoded_images import DecodedImages
from clip_finetune.engine.data.images.decoding import BrokenImage, decode, decode_plain_jpeg, load_image
from clip_finetune.engine.data.images.image_cache import ImageCache
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.data.loader import LoaderOptions, TrainLoader
from clip_finetune.engine.data.sampler import CaptionsConfig, Sampler
from clip_finetune.engine.data.tokenizer import Tokenizer

QUICK = dict(epochs=3, learning_rate=1e-3, batch_size=4, precision="fp32")
CHANCE = dict(resize_mode="random_crop", horizontal_flip=True, color_jitter=0.3)


def noise(width, height, seed=0):
    """A picture of coloured blocks: nothing in it is equal to its mirror image or its neighbour."""
    blocks = numpy.random.default_rng(seed).integers(0, 256, (-(-height // 5), -(-width // 5), 3), dtype=numpy.uint8)
    return Image.fromarray(blocks.repeat(5, 0).repeat(5, 1)[:height, :width])


def noisy_folder(folder, count=12, size=(70, 50)):
    """A labelled folder of JPEGs that are all different."""
    folder.mkdir(parents=True)
    for index in range(count):
        noise(*size, seed=index).save(folder / f"{index:03}.jpg", quality=95)
    (folder / "labels.json").write_text(json.dumps({f"{i:03}.jpg": [f"one {i}", f"two {i}"] for i in range(count)}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(noisy_folder(tmp_path_factory.mktemp("data") / "noise"))


def run(data, folder, validation=None, progress=None, cache=None, **changes):
    hooks = {"on_progress": progress} if progress else {}
    config = TrainConfig.from_flat(**(QUICK | changes))
    return train(random_clip(), data, validation, config, run_folder=folder, device="cpu", cache_folder=cache, **hooks)


def loader_of(data, transform=None, **options):
    transform = transform or Transform(image_size=32)
    return TrainLoader(data, Tokenizer(77), transform, CaptionsConfig(), LoaderOptions(**options))


def identical(one, other):
    one, other = one.full_clip.state_dict, other.full_clip.state_dict
    return one.keys() == other.keys() and all(same_bits(tensor, other[name]) for name, tensor in one.items())


class Stop(BaseException):
    pass


def stop_after(step):
    def progress(progress):
        if progress.step == step:
            raise Stop

    return progress


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("size", [(120, 80), (33, 61), (97, 97)])
def test_the_fast_decoder_gives_pillows_bits(tmp_path, size, subsampling, progressive):
    for quality in (30, 75, 95):
        file = tmp_path / f"{quality}.jpg"
        noise(*size).save(file, quality=quality, subsampling=subsampling, progressive=progressive)
        theirs = torch.from_numpy(numpy.array(decode(file))).permute(2, 0, 1)
        assert torch.equal(decode_plain_jpeg(file), theirs)


def test_what_is_no_plain_jpeg_is_left_to_pillow(tmp_path):
    picture, exif = noise(60, 40), Image.Exif()
    exif[0x0112] = 6
    picture.convert("L").save(tmp_path / "grey.jpg")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.save(tmp_path / "other.png")
    (tmp_path / "text.jpg").write_text("hello")
    for file in tmp_path.iterdir():
        assert decode_plain_jpeg(file) is None
    fast = Transform(image_size=32, resize_backend="fast")
    for name in ("grey.jpg", "cmyk.jpg", "turned.jpg", "other.png"):
        apart = fast.load(tmp_path / name).int() - load_image(tmp_path / name, 32).int()
        assert apart.abs().max() <= 2


def test_fast_pixels_are_those_of_pillow_but_for_a_value_in_a_hundred(shared_data):
    different = []
    for file in sorted((shared_data / "flickr8k/images").glob("*.jpg"))[:40]:
        apart = (Transform(image_size=224, resize_backend="fast").load(file).int() - load_image(file, 224).int()).abs()
        different.append((apart > 0).float().mean().item())
        assert apart.max() <= 3
    assert sum(different) / len(different) < 0.01


@pytest.mark.parametrize("cut", [2, 300, 0.5, -2, -1])
def test_a_cut_jpeg_is_refused_for_the_same_reason_either_way(tmp_path, cut):
    noise(120, 90).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: cut if isinstance(cut, int) else len(content) // 2])
    reasons = []
    for resize in ("exact", "fast"):
        with pytest.raises(BrokenImage) as refusal:
            Transform(image_size=32, resize_backend=resize).load(tmp_path / "a.jpg")
        reasons.append(str(refusal.value))
    assert reasons[0] == reasons[1]


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "avif"])
def test_of_an_animation_the_first_picture_counts(tmp_path, kind):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / f"a.{kind}", save_all=True, append_images=frames[1:], duration=100)
    pixel = load_image(tmp_path / f"a.{kind}", 32)[:, 16, 16].int()
    assert pixel[0] > 240 and pixel[1:].max() < 15


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_clear_shows_the_chosen_background(tmp_path, mode):
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    clear.convert(mode).save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    for background, expected in (("white", [255] * 3), ("#102030", [16, 32, 48])):
        for resize in ("exact", "fast"):
            image = Transform(image_size=32, background=background, resize_backend=resize).load(tmp_path / "a.png")
            assert image[:, 16, 16].tolist() == expected


# ---- squares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_pad_shows_all_on_the_background_and_squash_presses(tmp_path, resize):
    wide = Image.new("RGB", (80, 40), "red")
    wide.paste("blue", (60, 0, 80, 40))
    wide.save(tmp_path / "a.png")
    padded = Transform(image_size=32, resize_mode="pad", background="lime", resize_backend=resize).load(
        tmp_path / "a.png"
    )
    assert padded[:, 4, 16].tolist() == padded[:, 28, 16].tolist() == [0, 255, 0]
    assert padded[:, 16, 2].tolist() == [255, 0, 0] and padded[:, 16, 30].tolist() == [0, 0, 255]
    squashed = Transform(image_size=32, resize_mode="squash", resize_backend=resize).load(tmp_path / "a.png")
    assert squashed[:, 1, 2].tolist() == [255, 0, 0] and squashed[:, 30, 30].tolist() == [0, 0, 255]
    middle = Transform(image_size=32, resize_backend=resize).load(tmp_path / "a.png")
    assert middle[:, 16, 2].tolist() == [255, 0, 0] and middle[:, 16, 29].tolist() == [255, 0, 0]


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_chance_decides_everything_random_and_nothing_else_does(tmp_path, resize):
    noise(300, 200).save(tmp_path / "a.jpg")
    transform = Transform(image_size=32, resize_backend=resize, **CHANCE)
    seen = {transform.load(tmp_path / "a.jpg", random.Random(seed)).numpy().tobytes() for seed in range(20)}
    assert len(seen) == 20
    again = transform.load(tmp_path / "a.jpg", random.Random(3))
    assert again.shape == (3, 32, 32) and torch.equal(again, transform.load(tmp_path / "a.jpg", random.Random(3)))
    assert torch.equal(
        transform.deterministic.load(tmp_path / "a.jpg"),
        Transform(image_size=32, resize_backend=resize).load(tmp_path / "a.jpg"),
    )


def test_a_random_part_has_the_least_share_that_was_asked_for():
    from clip_finetune.engine.data.images.transforms import _random_part

    chance = random.Random(0)
    for share in (0.2, 0.5, 0.9):
        parts = [_random_part(300, 240, share, chance) for _ in range(500)]
        shares = [width * height / (300 * 240) for _, _, width, height in parts]
        assert min(shares) > share * 0.98 and max(shares) <= 1 and len(set(parts)) > 100
        assert all(left + width <= 300 and top + height <= 240 for left, top, width, height in parts)
    assert _random_part(1000, 10, 1.0, chance) == (493, 0, 13, 10)


def test_half_of_the_pictures_are_mirrored_and_only_if_asked(data):
    transform = Transform(image_size=32, horizontal_flip=True)
    plain = Transform(image_size=32).load(data.path(0))
    mirrored = 0
    for seed in range(200):
        found = transform.load(data.path(0), random.Random(seed))
        assert torch.equal(found, plain) or torch.equal(found, plain.flip(2))
        mirrored += torch.equal(found, plain.flip(2))
    assert 70 < mirrored < 130 and TrainConfig().images.horizontal_flip is False


def test_a_background_that_is_no_colour_is_told(data, tmp_path):
    with pytest.raises(UserError, match="background is 'snow white'"):
        run(data, tmp_path / "run", background="snow white")
    assert not (tmp_path / "run").exists()


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, CHANCE, {"resize_mode": "pad", "resize_backend": "fast", "horizontal_flip": True}]
)
def test_a_run_with_the_cache_has_the_bits_of_one_without(data, tmp_path, monkeypatch, changes):
    without = run(data, tmp_path / "without", data, **changes)
    first = run(data, tmp_path / "first", data, cache=tmp_path / "cache", **changes)
    decoded = []
    base = Transform.base
    monkeypatch.setattr(Transform, "base", lambda self, path: decoded.append(path) or base(self, path))
    second = run(data, tmp_path / "second", data, cache=tmp_path / "cache", **changes)
    assert identical(without, first) and identical(without, second) and decoded == []
    for one, other in zip(without.validations, second.validations, strict=True):
        assert one == other


@pytest.mark.parametrize("cached", [False, True])
def test_a_stopped_run_meets_the_same_chance_when_it_goes_on(data, tmp_path, cached):
    """Stopped in the middle of an epoch: random parts, flips, colours, captions, dropout and tags."""
    changes = CHANCE | dict(caption_dropout=0.3, shuffle_tags=True, save_every_steps=1)
    cache = tmp_path / "cache" if cached else None
    whole = run(data, tmp_path / "whole", **changes)
    for step in (1, 4, 8):
        with pytest.raises(Stop):
            run(data, tmp_path / "stopped", progress=stop_after(step), cache=cache, **changes)
    resumed = run(data, tmp_path / "stopped", cache=cache, **changes)
    assert identical(resumed, whole)
    assert not identical(whole, run(data, tmp_path / "other", **(changes | dict(seed=1))))


def test_batches_do_not_depend_on_how_many_threads_there_are_or_which_is_first(data, monkeypatch):
    base = Transform.base

    def slow(self, path):
        time.sleep(random.random() * 0.01)
        return base(self, path)

    monkeypatch.setattr(Transform, "base", slow)
    seen = []
    for threads in (1, 3, 16):
        monkeypatch.setattr(loader_module, "THREADS", threads)
        loader = loader_of(data, Transform(image_size=32, **CHANCE), batch_size=5)
        batches = loader.iterate(1)
        seen.append([next(batches) for _ in range(6)])
        loader.close()
    for other in seen[1:]:
        for (step, one), (other_step, two) in zip(seen[0], other, strict=True):
            assert step == other_step and one.indices == two.indices
            assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4], strict=True))


def test_a_trained_model_is_measured_with_the_squares_it_was_trained_with(data, tmp_path):
    result = run(data, tmp_path / "run", data, resize_mode="pad", background="black")
    best = next(line for line in result.validations if line["step"] == result.best_step)
    model = load_full_clip(tmp_path / "run" / "best.safetensors")
    assert model.provenance["pictures"] == {"resize_mode": "pad", "background": "black", "resize_backend": "exact"}
    assert eval_retrieval(model, data).loss == best["loss"]
    again = train(model, data, data, TrainConfig.from_flat(**QUICK), run_folder=tmp_path / "again", device="cpu")
    assert "pictures" not in again.full_clip.provenance


# ---- the cache -------------------------------------------------------------------------------------------------------

SQUARE = Transform(image_size=32)


@contextlib.contextmanager
def opened(folder, limit=10**9, said=None):
    cache = ImageCache(folder, limit, (said if said is not None else []).append)
    try:
        yield cache
    finally:
        cache.close()


def fill(cache, folder, numbers):
    """Keep a picture of 3 × 32 × 32 bytes for each number, whose file exists; gives their keys."""
    keys = {}
    for number in numbers:
        file = folder / f"{number}.bin"
        file.write_bytes(bytes(number))
        keys[number] = cache.key(file, SQUARE)
        cache.put(keys[number], torch.full((3, 32, 32), number % 256, dtype=torch.uint8))
    return keys


def test_what_is_kept_is_found_by_the_next_one(tmp_path):
    with opened(tmp_path / "cache") as cache:
        keys = fill(cache, tmp_path, range(30))
        assert all(int(cache.get(key).float().mean()) == number for number, key in keys.items())
    with opened(tmp_path / "cache") as cache:
        assert cache.entries == 30
        assert all(int(cache.get(key).float().mean()) == number for number, key in keys.items())
        odd = torch.arange(3 * 5 * 7, dtype=torch.uint8).view(3, 5, 7)
        assert cache.put(b"k" * 16, odd) and torch.equal(cache.get(b"k" * 16), odd)
        assert cache.get(b"n" * 16) is None and cache.get(None) is None


def test_a_changed_picture_and_another_transform_are_not_mixed_up_and_a_deleted_one_is_not_found(tmp_path):
    data = load_dataset(labels_folder(tmp_path / "colours", 2))
    with opened(tmp_path / "cache") as cache:
        pictures = DecodedImages(data, SQUARE, cache, memory_bytes=0)
        before = pictures.base(0)
        assert torch.equal(before, pictures.base(0)) and cache.entries == 1
        stamp = os.stat(data.path(0))
        Image.new("RGB", (32, 32), "white").save(data.path(0))
        os.utime(data.path(0), ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 10**9))
        assert pictures.base(0).min() == 255 and cache.entries == 2
        DecodedImages(data, Transform(image_size=16), cache).base(0)
        assert cache.entries == 3
        data.path(0).unlink()
        with pytest.raises(BrokenImage, match="not there"):
            pictures.base(0)


def test_a_cache_stays_in_its_bounds_and_the_oldest_goes_first(tmp_path):
    limit = 100 * (3 * 32 * 32 + 40)
    with opened(tmp_path / "cache", limit) as cache:
        old = fill(cache, tmp_path, range(80))
    for file in (tmp_path / "cache").iterdir():
        os.utime(file, (1, 1))
    with opened(tmp_path / "cache", limit) as cache:
        assert cache.get(old[0]) is not None  # what is in use stays
        new = fill(cache, tmp_path, range(1000, 1050))
        assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= limit
        assert all(cache.get(key) is not None for key in new.values()) and cache.get(old[0]) is not None
        assert sum(cache.get(key) is not None for key in old.values()) < 80
        fill(cache, tmp_path, range(2000, 2500))  # more than there is room for: the rest is not kept
        assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= limit


def test_damaged_files_of_the_cache_are_not_believed(tmp_path):
    with opened(tmp_path / "cache") as cache:
        keys = fill(cache, tmp_path, range(10))
    (data,) = (tmp_path / "cache").glob("*.u8")
    (index,) = (tmp_path / "cache").glob("*.index")
    content = bytearray(data.read_bytes())
    content[3 * 3072 + 100] ^= 1  # in picture 3
    data.write_bytes(content[: 9 * 3072 + 100])  # 9 is cut
    records = bytearray(index.read_bytes())
    records[5 * 40 + 20] ^= 1  # the place of picture 5
    index.write_bytes(records + b"half a record")
    with opened(tmp_path / "cache") as cache:
        found = {number for number, key in keys.items() if cache.get(key) is not None}
        assert found == {0, 1, 2, 4, 6, 7, 8}
        assert cache.put(keys[3], torch.full((3, 32, 32), 3, dtype=torch.uint8)) and cache.get(keys[3]).max() == 3


_WRITE_FOR_EVER = """
import sys, time, torch
from clip_finetune.engine.data.images.image_cache import ImageCache
cache = ImageCache(sys.argv[1], 10**9)
number = cache.entries
print("ready", flush=True)
sys.stdin.readline()
while True:
    number += 1
    cache.put(number.to_bytes(16, "big"), torch.full((3, 100, 100), number % 251, dtype=torch.uint8))
    time.sleep(0.0002)  # or a quick disk would be past the limit before the last kill, and the first pictures gone
"""


def test_processes_that_are_killed_while_they_write_leave_only_whole_pictures(tmp_path):
    """Two at a time, kill -9 at random moments; nothing that is found then is half written."""
    chance = random.Random(3)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for _ in range(3):
        writers = [subprocess.Popen([sys.executable, "-c", _WRITE_FOR_EVER, str(tmp_path)], **pipes) for _ in range(2)]
        assert all(writer.stdout.readline().strip() == b"ready" for writer in writers)
        for writer in writers:
            writer.stdin.write(b"go\n")
            writer.stdin.flush()
        time.sleep(chance.uniform(0.1, 0.3))
        for writer in writers:
            writer.kill()
            assert writer.wait() == -signal.SIGKILL
    with opened(tmp_path) as cache:
        assert cache.entries >= 20
        for number in range(1, cache.entries + 1):
            picture = cache.get(number.to_bytes(16, "big"))
            assert picture is not None and torch.equal(picture, torch.full_like(picture, number % 251))


def test_a_full_disk_ends_the_keeping_and_not_the_run(data, tmp_path, small_disk):
    disk, said = small_disk(1), []
    with opened(disk, said=said) as cache:
        cache.limit = 10**9  # another program takes what was free
        (disk / "other").write_bytes(bytes(2**20 - 100_000))
        keys = fill(cache, tmp_path, range(60))
        kept = [number for number, key in keys.items() if cache.get(key) is not None]
        assert 5 < len(kept) < 40 and kept == list(range(len(kept)))
        assert len(said) == 1 and "cannot be kept" in said[0] and "No space left" in said[0]
    result = run(data, tmp_path / "run", cache=disk)
    assert identical(result, run(data, tmp_path / "without"))


@pytest.mark.skipif(os.name == "nt", reason="a file in the way of a folder")
def test_a_cache_that_cannot_be_written_is_told_and_the_run_goes_on(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run(data, tmp_path / "run", cache=tmp_path / "file")
    assert sum("Decoded pictures cannot be kept" in note for note in result.notes) == 1
    assert identical(result, run(data, tmp_path / "without"))


# ---- epochs and captions ---------------------------------------------------------------------------------------------


def test_an_epoch_is_the_sum_of_the_repeats(data, tmp_path):
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


def test_the_policies_draw_what_they_say(tmp_path):
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


def test_tags_are_reordered_behind_those_that_stay(tmp_path):
    folder = labels_folder(tmp_path / "colours", 6)
    tags = ["me", "style", "a", "b", "c", "d", "e"]
    (folder / "labels.json").write_text(json.dumps({f"{i:03}.png": ", ".join(tags) for i in range(6)}))
    pairs = pairs_of(load_dataset(folder), shuffle_tags=True, keep_tokens=2)
    orders = {pair.caption for pair in pairs}
    assert len(orders) > 3 and {pair.meaning for pair in pairs} == {", ".join(tags)}
    for order in orders:
        assert order.split(", ")[:2] == ["me", "style"] and sorted(order.split(", ")) == sorted(tags)


def test_all_captions_make_an_epoch_longer(data, tmp_path):
    result = run(data, tmp_path / "run", caption_policy="all", epochs=1)
    assert result.total_steps == 24 // 4


def test_the_template_is_the_caption_of_what_has_only_a_class(tmp_path):
    data = load_dataset(class_folder(tmp_path / "classes"))
    from clip_finetune.engine.data.sampler import with_template

    changed = with_template(data, "this is {}")
    assert {text for index in range(len(changed)) for text in changed.training_captions(index)} == {
        f"this is {name}" for name in ("blue", "green", "red", "yellow")
    }
    assert with_template(data, "a photo of a {}.") is data
    with pytest.raises(UserError, match="label_template is 'a photo'"):
        run(data, tmp_path / "run", label_template="a photo")


def test_a_long_caption_is_cut_at_a_word_with_the_end_kept(data, tmp_path):
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


def test_an_epoch_of_a_million_begins_at_once():
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


# ---- broken ones -----------------------------------------------------------------------------------------------------


def damage(folder, names, how="cut"):
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"hello " * 9}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "text", "gone"])
def test_a_run_with_too_many_broken_pictures_does_not_begin(tmp_path, how):
    folder = noisy_folder(tmp_path / "noise", 20)
    if how == "gone":
        for name in ("003.jpg", "007.jpg"):
            (folder / name).unlink()
    else:
        damage(folder, ("003.jpg", "007.jpg"), how)
    data = load_dataset(folder)
    with pytest.raises(UserError, match=r"2 of 20 images of noise cannot be used \(00[37].jpg: .*max_broken") as told:
        run(data, tmp_path / "run")
    assert "\n" not in str(told.value) and not list((tmp_path / "run").glob("*.safetensors"))
    result = run(data, tmp_path / "run", max_broken=0.1)
    assert result.total_steps > 0 and any("003.jpg" in note or "007.jpg" in note for note in result.notes)


def test_one_broken_picture_is_left_out_unless_none_may_be(tmp_path):
    folder = noisy_folder(tmp_path / "noise", 12)
    damage(folder, ["005.jpg"])
    data = load_dataset(folder)
    assert any("005.jpg" in note for note in run(data, tmp_path / "run").notes)
    with pytest.raises(UserError, match="1 of 12"):
        run(data, tmp_path / "none", max_broken=0.0)


def test_broken_pictures_that_are_met_later_stop_the_run_which_can_go_on(tmp_path, monkeypatch):
    """Of a large set a part is looked at first; here none of it is broken."""
    monkeypatch.setattr(loader_module, "_PROBED", 4)
    folder = noisy_folder(tmp_path / "noise", 40)
    damage(folder, [f"{index:03}.jpg" for index in (3, 13, 23, 33)])  # 0, 10, 20 and 30 are looked at
    with pytest.raises(UserError, match="of 40 images of noise cannot be used"):
        run(load_dataset(folder), tmp_path / "run")
    result = run(load_dataset(folder), tmp_path / "run", max_broken=0.1)
    assert result.total_steps == 30 and any("4 training pictures cannot be opened" in note for note in result.notes)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_a_file_that_is_open_gives_what_its_path_gives_and_stays_open(tmp_path, form, resize):
    noise(40, 60).save(tmp_path / "a", form)
    file, transform = io.BytesIO((tmp_path / "a").read_bytes()), Transform(image_size=32, resize_backend=resize)
    for _ in range(2):
        assert torch.equal(transform.load(file), transform.load(tmp_path / "a"))


def test_a_picture_that_may_not_be_read_is_named(ordinary_user):
    folder, rights = ordinary_user
    noise(40, 40).save(folder / "a.jpg")
    load_image(folder / "a.jpg", 32)
    (folder / "a.jpg").chmod(0)
    with rights(), pytest.raises(BrokenImage, match="Permission denied"):
        load_image(folder / "a.jpg", 32)


@pytest.mark.skipif(os.name == "nt", reason="links and long names are POSIX's here")
def test_odd_names_and_a_folder_inside_its_own_link_train(tmp_path):
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    for name in ("ünï 猫 😀", "n" * 246, "two  spaces", 'quote\'s "name"', "semi;colon,comma", "hash#and%percent"):
        noise(40, 40, seed=len(name)).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(f"a caption of {len(name)}")
    (folder / "itself").symlink_to(folder)
    data = load_dataset(folder)
    assert len(data) == 6
    result = run(data, tmp_path / "run", cache=tmp_path / "cache", batch_size=3)
    assert result.total_steps == 6 and not any("cannot be opened" in note for note in result.notes)


def test_nothing_is_written_beside_the_pictures(tmp_path):
    folder = noisy_folder(tmp_path / "noise")
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()} | {folder: folder.stat().st_mtime_ns}
    run(load_dataset(folder), tmp_path / "run", cache=tmp_path / "cache", **CHANCE)
    assert {file: file.stat().st_mtime_ns for file in (*folder.iterdir(), folder)} == before
    assert list((tmp_path / "cache").iterdir())
