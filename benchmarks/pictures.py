"""Pictures, side by side in one process: decoding and resizing against Pillow, the cache, and data sets of any size.

    OMP_NUM_THREADS=1 python benchmarks/pictures.py [a photograph.jpg]

The sides of a comparison take turns, and the ratio is that of their fastest calls. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clip_finetune.engine.data.dataset import ClipDataset
from clip_finetune.engine.data.decoded_images import DecodedImages
from clip_finetune.engine.data.feature_cache import FeatureCache, FeatureSpec
from clip_finetune.engine.data.images.image_cache import ImageCache
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.data.load import load_dataset
from clip_finetune.engine.data.loader import LoaderOptions, TrainLoader
from clip_finetune.engine.data.sampler import CaptionsConfig
from clip_finetune.engine.data.threads import THREADS
from clip_finetune.engine.data.tokenizer import Tokenizer

SIZE = 224
ROUNDS, SECONDS = 5, 0.6
COUNTS = (100, 1000, 10_000, 100_000, 1_000_000)
BATCH, TURNS = 64, 9  # of them; 100 samples give one batch an epoch


def pillow_alone(path: Path) -> torch.Tensor:
    """CLIP's transform as open_clip does it, up to uint8: what the engine is measured against."""
    from torchvision.transforms import functional as transforms

    with Image.open(path) as opened:
        picture = transforms.resize(opened.convert("RGB"), SIZE, transforms.InterpolationMode.BICUBIC)
    return transforms.pil_to_tensor(transforms.center_crop(picture, [SIZE, SIZE]))


def rates(sides: dict[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    """Calls a second of each, by its fastest call of several rounds in which they take turns: what else the machine
    does makes calls slower, never faster."""
    fastest = dict.fromkeys(sides, float("inf"))
    for _ in range(ROUNDS):
        for name, call in sides.items():
            until = time.perf_counter() + SECONDS
            while (began := time.perf_counter()) < until:
                call()
                fastest[name] = min(fastest[name], time.perf_counter() - began)
    return {name: 1 / seconds for name, seconds in fastest.items()}


def cold(folder: Path, photograph: Path | None) -> None:
    print(f"\nJPEG to {SIZE} px, one thread: pictures a second, and how many values differ from Pillow's pixels\n")
    print("| JPEG (kB) | Pillow | exact | fast | exact / Pillow | fast / Pillow | exact differs | fast differs |")
    print("|---|---|---|---|---|---|---|---|")
    torch.set_num_threads(1)
    for side in (1024, 2048, 4032):
        file = folder / f"{side}.jpg"
        source = Image.open(photograph).convert("RGB") if photograph else _painted(side)
        source.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(file, quality=90)
        sides: dict[str, Callable[[], torch.Tensor]] = {"Pillow": functools.partial(pillow_alone, file)}
        for name in ("exact", "fast"):
            sides[name] = functools.partial(Transform(image_size=SIZE, resize_backend=name).load, file)
        found = rates(sides)
        cells = [
            f"{side} × {side * 3 // 4} ({file.stat().st_size // 1000})",
            *(f"{rate:.0f}" for rate in found.values()),
        ]
        cells += [f"{found[name] / found['Pillow']:.2f}" for name in ("exact", "fast")]
        for name in ("exact", "fast"):
            apart = (sides[name]().int() - sides["Pillow"]().int()).abs()
            share, mean, most = (apart > 0).float().mean(), apart.float().mean(), apart.max()
            cells.append(f"{share:.2%}, by {most} of 255 at most ({mean:.4f} on average)" if most else "no value")
        print(f"| {' | '.join(cells)} |")


def _painted(side: int) -> Image.Image:
    """Smooth colours under fine grain, as a photograph has."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 24, 32, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side * 3 // 4, side), mode="bicubic").clamp(0, 1)[0]
    grain = torch.randn(smooth.shape, generator=generator) * 0.02
    return Image.fromarray(((smooth + grain).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def _loader(dataset: ClipDataset, **options: Any) -> TrainLoader:
    transform = Transform(image_size=SIZE)
    return TrainLoader(dataset, Tokenizer(77), transform, CaptionsConfig(), LoaderOptions(**options))


def from_the_cache(folder: Path) -> None:
    """The rate of whole batches, from the second epoch on."""
    count, batch = 2000, 100
    place = folder / "many"
    place.mkdir()
    picture = _painted(320)
    labels = {}
    for index in range(count):
        picture.save(place / f"{index:05}.jpg", quality=80)
        labels[f"{index:05}.jpg"] = f"a picture with the number {index}"
    (place / "labels.json").write_text(json.dumps(labels))
    cache = ImageCache(folder / "cache", say=print)
    loader = _loader(load_dataset(place), batch_size=batch, cache=cache)
    batches, steps = loader.iterate(), count // batch
    spent = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(steps):
            next(batches)
        spent.append(time.perf_counter() - began)
    loader.close()
    cache.close()
    print(
        f"\nWhole batches of {batch} at {SIZE} px, {THREADS} threads: {count / spent[0]:,.0f} pictures/s decoded "
        f"(exact), {count / min(spent[1:]):,.0f} pictures/s from the cache"
    )


def of_any_number(folder: Path) -> None:
    """What a pair costs in data sets from a hundred samples to a million: each is opened, and then they take turns at
    batches in which nothing is cached. The names of a labels JSON lead to the same 64 files."""
    place = folder / "samples"
    place.mkdir()
    for index in range(64):
        _painted(320).save(place / f"{index:02}.jpg")
    loaders, batches, cells, spent = [], {}, {}, {}
    for count in COUNTS:
        lines = (f'"{index:07}/../{index % 64:02}.jpg": "a picture with the number {index}"' for index in range(count))
        (place / "labels.json").write_text("{" + ",\n".join(lines) + "}")
        began = time.perf_counter()
        dataset = load_dataset(place)
        opened = time.perf_counter()
        loader = _loader(dataset, batch_size=BATCH)
        loader.images = DecodedImages(dataset, loader.images.transform, memory_bytes=0)
        loader.probe()
        batches[count] = loader.iterate()
        next(batches[count])
        cells[count] = [f"{opened - began:.2f} s", f"{time.perf_counter() - opened:.2f} s"]
        loaders.append(loader)
        spent[count] = []
    for _ in range(TURNS):
        for count, following in batches.items():
            next(following)  # the others waited for their turn with batches at hand
            began = time.perf_counter()
            for _ in range(4):
                next(following)
            spent[count].append((time.perf_counter() - began) / (4 * BATCH))
    for loader in loaders:
        loader.close()
    print(f"\nBatches of {BATCH} at {SIZE} px, {THREADS} threads, each picture decoded; median of {TURNS} turns\n")
    print(f"| samples | opened in | first batch later | a pair (ms) | ÷ {COUNTS[0]} samples |\n|---|---|---|---|---|")
    for count, (opened, first) in cells.items():
        pair = statistics.median(spent[count])
        ratio = statistics.median(own / base for own, base in zip(spent[count], spent[COUNTS[0]], strict=True))
        print(f"| {count:,} | {opened} | {first} | {1000 * pair:.2f} | {ratio:.2f} |")


def with_kept_features(folder: Path) -> None:
    """Batches of a text tower's training whose pictures' features are in memory, as ViT-L/14 has them in bf16."""
    count, batch, rounds = 20_000, 1024, 20
    place = folder / "kept"
    place.mkdir()
    _painted(320).save(place / "0.jpg")
    labels = {f"{index:05}/../0.jpg": f"a picture with the number {index}" for index in range(count)}
    (place / "labels.json").write_text(json.dumps(labels))
    dataset = load_dataset(place)
    kept = FeatureCache(dataset, Transform(image_size=SIZE), FeatureSpec((768,), torch.bfloat16, "benchmark"))
    for index in range(count):
        kept.put(index, 0, torch.zeros(768))
    loader = _loader(dataset, batch_size=batch, feature_cache=kept)
    batches = loader.iterate()
    spent = []
    for _ in range(4):
        began = time.perf_counter()
        for _ in range(rounds):
            torch.stack(list(next(batches)[1].features))
        spent.append(time.perf_counter() - began)
    loader.close()
    first, later = (rounds * batch / seconds for seconds in (spent[0], min(spent[1:])))
    print(
        f"\nBatches of {batch} with kept features: {first:,.0f} pairs/s while texts become tokens, {later:,.0f} from "
        "the second epoch on"
    )


def main(arguments: Sequence[str]) -> None:
    photograph = Path(arguments[0]) if arguments else None
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {capability}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, Pillow {Image.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        of_any_number(Path(folder))
        cold(Path(folder), photograph)
        from_the_cache(Path(folder))
        with_kept_features(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
