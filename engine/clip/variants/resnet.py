"""OpenAI's ResNet vision towers (RN50 and the like): sizes and tensor shapes.

A tower is a stem of three convolutions, four stages of bottleneck blocks, and one attention query over the last feature
map in place of an average.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

Shape = tuple[int, ...]

# Image side divided by the side of the last feature map: halved twice in the stem and once in each later stage.
DOWNSCALING = 32
STAGES = 4
# Channels of a block's output in units of its narrow width; channels of the last feature map in units of the tower's.
_EXPANSION, _FEATURES = 4, 32
_BLOCK = re.compile(r"^visual\.layer([1-4])\.(\d+)\.")


def is_resnet(names: Container[str]) -> bool:
    """Return whether tensors of these OpenAI names belong to a CLIP whose vision tower is a ResNet."""
    return "visual.layer1.0.conv1.weight" in names or "visual.attnpool.positional_embedding" in names


def feature_width(vision_width: int) -> int:
    """Return the channels of the last feature map, which the heads of the attention pooling share."""
    return _FEATURES * vision_width


def resnet_sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the vision fields of an `Architecture`, as OpenAI's code reads them from the shapes, 64 channels a head.

    Raises KeyError with the name of a missing tensor, and ValueError or IndexError for a misshapen one.
    """
    vision_width, _, _, _ = shapes["visual.layer1.0.conv1.weight"]
    cells = shapes["visual.attnpool.positional_embedding"][0] - 1
    return {
        "image_size": round(max(0, cells) ** 0.5) * DOWNSCALING,
        "patch_size": None,
        "vision_width": vision_width,
        "vision_layers": _blocks_by_stage(shapes),
        "vision_heads": feature_width(vision_width) // 64,
        "vision_mlp_width": None,
    }


def _blocks_by_stage(names: Iterable[str]) -> tuple[int, ...]:
    blocks: list[set[str]] = [set() for _ in range(STAGES)]
    for name in names:
        if match := _BLOCK.match(name):
            blocks[int(match[1]) - 1].add(match[2])
    for stage, numbers in enumerate(blocks, start=1):
        if not numbers:
            raise KeyError(f"visual.layer{stage}.0.conv1.weight")
    return tuple(map(len, blocks))


def resnet_shapes(width: int, layers: tuple[int, ...], grid: int, embed_dim: int) -> dict[str, Shape]:
    """Return the shape of every tensor of the tower by its OpenAI name; `grid` is the side of the last feature map.

    BatchNorm's counters (`num_batches_tracked`) are left out: nothing reads them.
    """
    features = feature_width(width)
    shapes = {
        **_convolution("visual.", "conv1", "bn1", width // 2, 3, 3),
        **_convolution("visual.", "conv2", "bn2", width // 2, width // 2, 3),
        **_convolution("visual.", "conv3", "bn3", width, width // 2, 3),
        "visual.attnpool.positional_embedding": (grid**2 + 1, features),
    }
    for projection, rows in (("q", features), ("k", features), ("v", features), ("c", embed_dim)):
        shapes[f"visual.attnpool.{projection}_proj.weight"] = (rows, features)
        shapes[f"visual.attnpool.{projection}_proj.bias"] = (rows,)
    channels = width
    for stage, blocks in enumerate(layers):
        narrow = width * 2**stage
        for block in range(blocks):
            shapes |= _block(f"visual.layer{stage + 1}.{block}.", channels, narrow, first=block == 0)
            channels = _EXPANSION * narrow
    return shapes


def resnet_values(width: int, layers: tuple[int, ...], grid: int) -> int:
    """Return how many values the outputs of the stem and of all blocks hold for one image."""
    side = grid * 2 ** (STAGES - 1)  # of the first stage; each later one has half the side and twice the channels
    blocks = sum(count * _EXPANSION * width * 2**stage * (side // 2**stage) ** 2 for stage, count in enumerate(layers))
    return width * (2 * side) ** 2 + blocks


def _block(block: str, channels: int, narrow: int, *, first: bool) -> dict[str, Shape]:
    """A bottleneck from `channels` to 4 · `narrow`; in a stage's first block a convolution widens the shortcut too."""
    wide = _EXPANSION * narrow
    return {
        **_convolution(block, "conv1", "bn1", narrow, channels, 1),
        **_convolution(block, "conv2", "bn2", narrow, narrow, 3),
        **_convolution(block, "conv3", "bn3", wide, narrow, 1),
        **(_convolution(block, "downsample.0", "downsample.1", wide, channels, 1) if first else {}),
    }


def _convolution(prefix: str, name: str, norm: str, rows: int, columns: int, kernel: int) -> dict[str, Shape]:
    """A convolution without bias, and the BatchNorm after it."""
    shapes: dict[str, Shape] = {f"{prefix}{name}.weight": (rows, columns, kernel, kernel)}
    for vector in ("weight", "bias", "running_mean", "running_var"):
        shapes[f"{prefix}{norm}.{vector}"] = (rows,)
    return shapes
