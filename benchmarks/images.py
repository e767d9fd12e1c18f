"""Measure image loading: decoding and resizing beside Pillow, the caches, and datasets of any size.

    OMP_NUM_THREADS=1 python benchmarks/images.py [a photograph.jpg]

The sides of a comparison take turns in one process. Nothing is downloaded.
"""

from __future__ import annotations

import functools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clip_finetune.engine.bench.measure import machine
from clip_finetune.engine.data.dataset import ClipDataset
from clip_finetune.engine.data.decoded_images import DecodedImages
from clip_finetune.engine.data.feature_cache import FeatureCache, FeatureSpec
from clip_finetune.engine.data.images.image_cache import ImageCache
from clip_finetune.engine.data.images.transforms import Transform
from clip_finetune.engine.data.load import load_dataset
from clip_finetune.engine.data.loader import Batch, LoaderOptions, TrainLoader
from clip_finetune.engine.data.sampler import CaptionsConfig
from clip_finetune.engine.data.threads import THREADS
from clip_finetune.engine.data.tokenizer import Tokenizer

SIZE = 224
ROUNDS, SECONDS = 5, 0.6
COUNTS = (100, 1000, 10_000, 100_000, 1_000_000)
BATCH, TURNS = 64, 9  # 100 samples give one batch per epoch


def pillow_alone(path: Path) -> torch.Tensor:
    """Return CLIP's transform as open_clip does it, up to uint8: the reference."""
    from torchvision.transforms import functional as transforms

    with Image.open(path) as opened:
        image = transforms.resize(opened.convert("RGB"), SIZE, transforms.InterpolationMode.BICUBIC)
    return transforms.pil_to_tensor(transforms.center_crop(image, [SIZE, SIZE]))


def rates(sides: dict[str, Callable[[], torch.Tensor]]) -> dict[str, float]:
    """Return calls per second of each side, from its fastest call over several rounds in turns.

    Other work on the machine makes calls slower, never faster.
    """
    fastest = dict.fromkeys(sides, float("inf"))
    for _ in range(ROUNDS):
        for name, call in sides.items():
            until = time.perf_counter() + SECONDS
            while (start := time.perf_counter()) < until:
                call()
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return {name: 1 / seconds for name, seconds in fastest.items()}


def decoding(folder: Path, photograph: Path | None) -> None:
    print(f"\nJPEG to {SIZE} px, one thread: images per second, and how many values differ from Pillow's pixels\n")
    print("| JPEG (kB) | Pillow | exact | fast | exact / Pillow | fast / Pillow | exact differs | fast differs |")
    print("|---|---|---|---|---|---|---|---|")
    torch.set_num_threads(1)
    for side in (1024, 2048, 4032):
        file = folder / f"{side}.jpg"
        source = Image.open(photograph).convert("RGB") if photograph else synthetic_image(side)
        source.resize((side, side * 3 // 4), Image.Resampling.BICUBIC).save(file, quality=90)
        sides: dict[str, Callable[[], torch.Tensor]] = {"Pillow": functools.partial(pillow_alone, file)}
        for name in ("exact", "fast"):
            sides[name] = functools.partial(Transform(image_size=SIZE, resize_backend=name).load, file)
        speeds = rates(sides)
        cells = [f"{side} × {side * 3 // 4} ({file.stat().st_size // 1000})"]
        cells += [f"{speed:.0f}" for speed in speeds.values()]
        cells += [f"{speeds[name] / speeds['Pillow']:.2f}" for name in ("exact", "fast")]
        for name in ("exact", "fast"):
            difference = (sides[name]().int() - sides["Pillow"]().int()).abs()
            share, mean, most = (difference > 0).float().mean(), difference.float().mean(), difference.max()
            cells.append(f"{share:.2%}, by {most} of 255 at most ({mean:.4f} on average)" if most else "no value")
        print(f"| {' | '.join(cells)} |")


def synthetic_image(side: int) -> Image.Image:
    """Return smooth colours under fine grain, as in a photograph."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 24, 32, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, (side * 3 // 4, side), mode="bicubic").clamp(0, 1)[0]
    grain = torch.randn(smooth.shape, generator=rng) * 0.02
    return Image.fromarray(((smooth + grain).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def write_dataset(folder: Path, files: int, names: Iterable[str], quality: int = 75) -> Path:
    """Write that many images, 0.jpg and so on, and a labels JSON with a caption for each of the names."""
    folder.mkdir(exist_ok=True)
    image = synthetic_image(320)
    for index in range(files):
        image.save(folder / f"{index}.jpg", quality=quality)
    lines = (f'"{name}": "an image with the number {index}"' for index, name in enumerate(names))
    (folder / "labels.json").write_text("{" + ",\n".join(lines) + "}")
    return folder


def loader_of(dataset: ClipDataset, **options: Any) -> TrainLoader:
    transform = Transform(image_size=SIZE)
    return TrainLoader(dataset, Tokenizer(77), transform, CaptionsConfig(), LoaderOptions(**options))


def seconds_of(batches: Iterator[tuple[int, Batch]], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        batch = next(batches)[1]
        if batch.features[0] is not None:
            torch.stack([features for features in batch.features if features is not None])
    return time.perf_counter() - start


def image_cache(folder: Path) -> None:
    """Measure whole batches, decoded in the first epoch and from the cache afterwards."""
    count, batch = 2000, 100
    names = (f"{index}.jpg" for index in range(count))
    dataset = load_dataset(write_dataset(folder / "many", count, names, quality=80))
    cache = ImageCache(folder / "cache", on_note=print)
    loader = loader_of(dataset, batch_size=batch, cache=cache)
    batches = loader.iterate()
    decoded, *cached = (seconds_of(batches, count // batch) for _ in range(6))
    loader.close()
    cache.close()
    print(
        f"\nWhole batches of {batch} at {SIZE} px, {THREADS} threads: {count / decoded:,.0f} images/s decoded (exact), "
        f"{count / min(cached):,.0f} images/s from the cache"
    )


def feature_cache(folder: Path) -> None:
    """Measure batches for a text tower whose image features are cached in memory, as ViT-L/14 has them in bf16."""
    count, batch, rounds = 20_000, 1024, 20
    names = (f"{index:05}/../0.jpg" for index in range(count))
    dataset = load_dataset(write_dataset(folder / "features", 1, names))
    features = FeatureCache(dataset, Transform(image_size=SIZE), FeatureSpec((768,), torch.bfloat16, "benchmark"))
    for index in range(count):
        features.put(index, 0, torch.zeros(768))
    loader = loader_of(dataset, batch_size=batch, feature_cache=features)
    batches = loader.iterate()
    first, *later = (seconds_of(batches, rounds) for _ in range(4))
    loader.close()
    print(
        f"\nBatches of {batch} with cached features: {rounds * batch / first:,.0f} pairs/s while captions are "
        f"tokenized, {rounds * batch / min(later):,.0f} from the second epoch on"
    )


def dataset_sizes(folder: Path) -> None:
    """Measure what a pair costs in datasets of a hundred samples to a million, decoding every image.

    All datasets are opened first and then take turns. Their names lead to the same 64 files.
    """
    loaders: list[TrainLoader] = []
    batches: dict[int, Iterator[tuple[int, Batch]]] = {}
    opening: dict[int, str] = {}
    for count in COUNTS:
        names = (f"{index:07}/../{index % 64}.jpg" for index in range(count))
        path = write_dataset(folder / "samples", 64, names)
        start = time.perf_counter()
        dataset = load_dataset(path)
        opened = time.perf_counter()
        loader = loader_of(dataset, batch_size=BATCH)
        loader.images = DecodedImages(dataset, loader.images.transform, memory_bytes=0)
        loader.probe()
        batches[count] = loader.iterate()
        next(batches[count])
        opening[count] = f"{opened - start:.2f} s | {time.perf_counter() - opened:.2f} s"
        loaders.append(loader)
    seconds: dict[int, list[float]] = {count: [] for count in COUNTS}
    for _ in range(TURNS):
        for count in COUNTS:
            next(batches[count])  # loaders that wait for their turn have a batch ready, which costs nothing
            seconds[count].append(seconds_of(batches[count], 4) / (4 * BATCH))
    for loader in loaders:
        loader.close()
    print(f"\nBatches of {BATCH} at {SIZE} px, {THREADS} threads, each image decoded; median of {TURNS} turns\n")
    print(f"| samples | opened in | first batch later | a pair (ms) | ÷ {COUNTS[0]} samples |\n|---|---|---|---|---|")
    for count, own in seconds.items():
        ratio = statistics.median(pair / base for pair, base in zip(own, seconds[COUNTS[0]], strict=True))
        print(f"| {count:,} | {opening[count]} | {1000 * statistics.median(own):.2f} | {ratio:.2f} |")


def main(arguments: Sequence[str]) -> None:
    photograph = Path(arguments[0]) if arguments else None
    print(f"{machine(torch.device('cpu'))}, Python {platform.python_version()}, Pillow {Image.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        dataset_sizes(Path(folder))
        decoding(Path(folder), photograph)
        image_cache(Path(folder))
        feature_cache(Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
