"""Real datasets, and a million captions."""

import csv
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from image_folders import load_image

from clip_finetune.engine import UserError, load_dataset
from clip_finetune.engine.cli.info import describe_dataset


def test_real_datasets_open(shared_data):
    flickr = load_dataset(shared_data / "flickr8k")
    with open(shared_data / "flickr8k/captions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert flickr.format == "csv" and set(flickr.names) == {row["image"] for row in rows}
    assert {len(found) for found in flickr.captions} <= {4, 5}  # five, of which a few are the same sentence
    assert flickr.missing() == [] and load_image(flickr.path(0), 224).shape == (3, 224, 224)
    cifar = load_dataset(shared_data / "cifar10-sample/train")
    assert len(cifar) == 2000 and len(cifar.class_names) == 10
    emoji = describe_dataset(load_dataset(shared_data / "twemoji"))
    assert emoji["images"] == 1559 and emoji["broken"] == [] and emoji["truncated_captions"] == 0
    with pytest.raises(UserError, match="COCO"):
        load_dataset(shared_data / "coco-mini/annotations")


_MEASURE = """
import sys, time
from clip_finetune.engine import load_dataset
def memory(field):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(field))
before, start = memory("VmRSS"), time.process_time()
data = load_dataset(sys.argv[1])
took, grown = time.process_time() - start, memory("VmHWM") - before
print(len(data), sum(map(len, data.captions)), took, grown)
"""


def write_many(folder: Path, kind: str, count: int) -> None:
    """A caption file for `count` images with a caption each; for COCO, a fifth as many with five each."""
    folder.mkdir()
    names = [f"{n // 1000:04}/{n:07}.jpg" for n in range(count)]
    texts = [f"a photo, number {n}, of a thing on a table beside a window in the evening" for n in range(count)]
    if kind == "json":
        lines = (f"{',' if n else '{'}\n {json.dumps(names[n])}: {json.dumps([texts[n]])}" for n in range(count))
        end = "}"
    elif kind == "metadata":
        lines, end = (json.dumps({"file_name": names[n], "text": texts[n]}) + "\n" for n in range(count)), ""
    elif kind == "csv":
        lines, end = itertools.chain(["image,caption\n"], (f'{names[n]},"{texts[n]}"\n' for n in range(count))), ""
    else:
        images = [{"id": n, "file_name": name, "height": 8, "width": 8} for n, name in enumerate(names[: count // 5])]
        annotations = ({"image_id": n % (count // 5), "id": n, "caption": text} for n, text in enumerate(texts))
        lines = itertools.chain(
            ['{"images": ', json.dumps(images), ', "annotations": ['],
            (f"{',' if n else ''}{json.dumps(value)}" for n, value in enumerate(annotations)),
        )
        end = "]}"
    with open(folder / {"metadata": "metadata.jsonl", "csv": "c.csv"}.get(kind, "l.json"), "w") as file:
        file.writelines(lines)
        file.write(end)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize("kind", ["json", "metadata", "csv", "coco"])
def test_a_million_captions_open_quickly_in_little_memory(tmp_path, kind, soak):
    """Ten seconds of a processor and 500 MB for a million; without -m soak a tenth of them, and twice the time."""
    count, seconds, megabytes = (1_000_000, 10, 500) if soak else (100_000, 2, 60)
    write_many(tmp_path / "many", kind, count)
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path / "many")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples, captions, took, grown = map(float, done.stdout.split())
    print(f"{kind}: {captions:.0f} captions of {samples:.0f} images in {took:.1f} s and {grown:.0f} MB")
    assert (samples, captions) == (count // 5 if kind == "coco" else count, count)
    assert took < seconds and grown < megabytes


@pytest.mark.parametrize(
    "place, kind, per_image",
    [
        ("flickr8k", "csv", 5),
        ("coco-mini", "coco", 5),
        ("coco-mini/train2017", "coco", 5),
        ("coco-mini/val2017", "coco", 5),
        ("twemoji", "csv", 1),
        ("cifar10-sample/train", "folders", 0),
        ("cifar10-sample/test", "folders", 0),
        ("coco-mini/annotations/captions_val2017.json", "coco", 5),
    ],
)
def test_real_sets_are_recognised_with_the_right_counts(shared_data, place, kind, per_image):
    """The counts are those of the files: of flickr8k, parts of different sizes are about."""
    data, folder = load_dataset(shared_data / place), shared_data / place
    if folder.is_file():
        folder = shared_data / "coco-mini/val2017"
    images = sum(name.endswith((".jpg", ".png")) for _, _, names in os.walk(folder) for name in names)
    assert (len(data), data.format) == (images, kind) and data.missing() == []
    assert {len(captions) for captions in data.captions} == {per_image}
    known = {
        "coco-mini/train2017": 80,
        "coco-mini/val2017": 79,
        "coco-mini": 159,
        "twemoji": 1559,
        "cifar10-sample/train": 2000,
        "cifar10-sample/test": 1000,
    }
    assert len(data) == known.get(place, len(data))
    assert len(data.class_names) == (10 if kind == "folders" else 0)
