"""The disk cache of decoded images: what is stored, found again, dropped, and survives accidents."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from image_folders import labels_folder
from image_runs import RANDOM, blocks_folder, identical, run
from PIL import Image

from clip_finetune.engine import load_dataset
from clip_finetune.engine.data.decoded_images import DecodedImages
from clip_finetune.engine.data.images.decoding import BrokenImage
from clip_finetune.engine.data.images.image_cache import ImageCache
from clip_finetune.engine.data.images.transforms import Transform


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(blocks_folder(tmp_path_factory.mktemp("data") / "noise"))


SQUARE = Transform(image_size=32)


@contextlib.contextmanager
def opened_cache(folder, limit=10**9, notes=None):
    cache = ImageCache(folder, limit, (notes if notes is not None else []).append)
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


def test_a_cache_finds_what_an_earlier_one_stored(tmp_path):
    with opened_cache(tmp_path / "cache") as cache:
        keys = fill(cache, tmp_path, range(30))
        assert all(int(cache.get(key).float().mean()) == number for number, key in keys.items())
    with opened_cache(tmp_path / "cache") as cache:
        assert cache.entries == 30
        assert all(int(cache.get(key).float().mean()) == number for number, key in keys.items())
        odd = torch.arange(3 * 5 * 7, dtype=torch.uint8).view(3, 5, 7)
        assert cache.put(b"k" * 16, odd) and torch.equal(cache.get(b"k" * 16), odd)
        assert cache.get(b"n" * 16) is None and cache.get(None) is None


def test_a_changed_file_and_another_transform_are_entries_of_their_own_and_a_deleted_file_is_missing(tmp_path):
    data = load_dataset(labels_folder(tmp_path / "colours", 2))
    with opened_cache(tmp_path / "cache") as cache:
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


def test_a_cache_stays_within_its_limit_and_drops_the_oldest_first(tmp_path):
    limit = 100 * (3 * 32 * 32 + 40)
    with opened_cache(tmp_path / "cache", limit) as cache:
        old = fill(cache, tmp_path, range(80))
    for file in (tmp_path / "cache").iterdir():
        os.utime(file, (1, 1))
    with opened_cache(tmp_path / "cache", limit) as cache:
        assert cache.get(old[0]) is not None  # what is in use stays
        new = fill(cache, tmp_path, range(1000, 1050))
        assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= limit
        assert all(cache.get(key) is not None for key in new.values()) and cache.get(old[0]) is not None
        assert sum(cache.get(key) is not None for key in old.values()) < 80
        fill(cache, tmp_path, range(2000, 2500))  # more than there is room for: the rest is not kept
        assert sum(file.stat().st_size for file in (tmp_path / "cache").iterdir()) <= limit


def test_damaged_entries_of_a_cache_are_ignored(tmp_path):
    with opened_cache(tmp_path / "cache") as cache:
        keys = fill(cache, tmp_path, range(10))
    (data,) = (tmp_path / "cache").glob("*.u8")
    (index,) = (tmp_path / "cache").glob("*.index")
    content = bytearray(data.read_bytes())
    content[3 * 3072 + 100] ^= 1  # in picture 3
    data.write_bytes(content[: 9 * 3072 + 100])  # 9 is cut
    records = bytearray(index.read_bytes())
    records[5 * 40 + 20] ^= 1  # the place of picture 5
    index.write_bytes(records + b"half a record")
    with opened_cache(tmp_path / "cache") as cache:
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


def test_processes_killed_while_writing_leave_only_whole_images(tmp_path):
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
    with opened_cache(tmp_path) as cache:
        assert cache.entries >= 20
        for number in range(1, cache.entries + 1):
            picture = cache.get(number.to_bytes(16, "big"))
            assert picture is not None and torch.equal(picture, torch.full_like(picture, number % 251))


def test_a_full_disk_ends_the_caching_and_not_the_run(data, tmp_path, small_disk):
    disk, notes = small_disk(1), []
    with opened_cache(disk, notes=notes) as cache:
        cache.limit = 10**9  # another program takes what was free
        (disk / "other").write_bytes(bytes(2**20 - 100_000))
        keys = fill(cache, tmp_path, range(60))
        kept = [number for number, key in keys.items() if cache.get(key) is not None]
        assert 5 < len(kept) < 40 and kept == list(range(len(kept)))
        assert len(notes) == 1 and "cannot be cached" in notes[0] and "No space left" in notes[0]
    result = run(data, tmp_path / "run", cache=disk)
    assert identical(result, run(data, tmp_path / "without"))


@pytest.mark.skipif(os.name == "nt", reason="a file in the way of a folder")
def test_a_cache_that_cannot_be_written_gives_a_note_and_the_run_goes_on(data, tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run(data, tmp_path / "run", cache=tmp_path / "file")
    assert sum("Decoded images cannot be cached" in note for note in result.notes) == 1
    assert identical(result, run(data, tmp_path / "without"))


@pytest.mark.parametrize(
    "changes", [{}, RANDOM, {"resize_mode": "pad", "resize_backend": "fast", "horizontal_flip": True}]
)
def test_a_run_with_the_image_cache_has_the_bits_of_a_run_without(data, tmp_path, monkeypatch, changes):
    without = run(data, tmp_path / "without", data, **changes)
    first = run(data, tmp_path / "first", data, cache=tmp_path / "cache", **changes)
    decoded = []
    base = Transform.base
    monkeypatch.setattr(Transform, "base", lambda self, path: decoded.append(path) or base(self, path))
    second = run(data, tmp_path / "second", data, cache=tmp_path / "cache", **changes)
    assert identical(without, first) and identical(without, second) and decoded == []
    for one, other in zip(without.validations, second.validations, strict=True):
        assert one == other
