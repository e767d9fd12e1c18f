"""Features of a data set's pictures and of texts, from a network, each picture once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip.full_clip import FullCLIP
from ..clip.network import build_network
from ..data.cache import PictureCache
from ..data.dataset import ClipDataset
from ..data.images import normalize
from ..data.loader import Pictures, image_batches, in_threads
from ..data.tokens import Tokenizer, cut_to_longest
from ..data.transform import Transform
from ..errors import UserError

BATCH = 64
PICTURES_KEY = "pictures"  # in a model's provenance: how the pictures of its training became squares
_TOLD = ("square", "background", "resize")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A network ready to encode: where it is, how it computes, and whom to tell.

    `transform` is how pictures become squares, and `cache` where they may be found decoded. `autocast` makes a context
    for each forward pass; `on_progress(done, total)` counts pictures; `check_cancelled` may raise between batches.
    """

    network: nn.Module
    transform: Transform
    tokenizer: Tokenizer
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    on_progress: Callable[[int, int], None] = lambda done, total: None
    check_cancelled: Callable[[], None] = lambda: None
    cache: PictureCache | None = None

    @classmethod
    def of(cls, full_clip: FullCLIP, *, device: torch.device | str | None = None, **more) -> Encoder:
        """The network of a full CLIP, in fp32, on CUDA where there is one. Pictures become squares in the way that it
        was trained with."""
        a = full_clip.architecture
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = build_network(full_clip, device=device).eval().requires_grad_(False)
        return cls(network, trained_transform(full_clip), Tokenizer(a.context_length, a.vocab_size), device, **more)

    @property
    def image_size(self) -> int:
        return self.transform.image_size

    def pictures(self, dataset: ClipDataset) -> Pictures:
        """The pictures of a data set; nothing is kept in memory, because each is encoded once."""
        return Pictures(dataset, self.transform, self.cache, memory_bytes=0)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """float32 [n, d] on the CPU, each row of length 1. Raises `BrokenModel`, as `images` does."""
        parts = []
        for start in range(0, len(texts), BATCH):
            self.check_cancelled()
            tokens = cut_to_longest(self.tokenizer(texts[start : start + BATCH])).to(self.device)
            with torch.no_grad(), self.autocast():
                parts.append(_unit(self.network.encode_text(tokens)))
        return torch.cat(parts)

    def images(self, batches: Iterable[tuple[list[int], Tensor]], total: int) -> tuple[list[int], Tensor]:
        """Sample indices and float32 [n, d] on the CPU, each row of length 1, of uint8 batches."""
        indices: list[int] = []
        parts = []
        for found, images_u8 in batches:
            self.check_cancelled()
            with torch.no_grad(), self.autocast():
                parts.append(_unit(self.network.encode_image(normalize(images_u8.to(self.device), self.network.dtype))))
            indices += found
            self.on_progress(len(indices), total)
        return indices, torch.cat(parts) if parts else torch.zeros(0, 1)


def trained_transform(full_clip: FullCLIP) -> Transform:
    """How the pictures of a model's training became squares, as its provenance says, without chance; else as CLIP's."""
    told = full_clip.provenance.get(PICTURES_KEY)
    told = told if isinstance(told, dict) else {}
    known = {name: told[name] for name in _TOLD if isinstance(told.get(name), str)}
    try:
        return Transform(image_size=full_clip.architecture.image_size, **known).without_chance
    except UserError:  # what another version, or program, wrote
        return Transform(image_size=full_clip.architecture.image_size)


def with_trained_transform(provenance: Mapping[str, Any], transform: Transform) -> dict[str, Any]:
    """A provenance that says how pictures became squares, if that is not CLIP's own way."""
    usual, found = Transform(image_size=transform.image_size), transform.without_chance
    told = {name: getattr(found, name) for name in _TOLD}
    without = {key: value for key, value in provenance.items() if key != PICTURES_KEY}
    return without if found == usual else without | {PICTURES_KEY: told}


class BrokenModel(UserError):
    """A model whose features are not numbers: compared with anything they are neither better nor worse."""


def _unit(features: Tensor) -> Tensor:
    unit = F.normalize(features.float(), dim=1).cpu()
    if not torch.isfinite(unit).all():
        raise BrokenModel(
            "The model computes values that are not numbers (NaN or infinite), so nothing can be measured with it; its "
            "weights are damaged, or its training broke. Use a model from before that."
        )
    return unit


@dataclasses.dataclass(frozen=True)
class EncodedPictures:
    """The distinct pictures of a data set that could be opened: `samples[i]` are the indices of all copies of row i."""

    features: Tensor
    samples: list[list[int]]
    notes: tuple[str, ...]


def require_pictures(dataset: ClipDataset) -> None:
    """Raise `UserError` for an empty data set, such as the validation part of a split of 0."""
    if not len(dataset):
        raise UserError(
            f"There is no picture of {dataset.name} to measure on; set validation_split above 0, or measure on another "
            "data set."
        )


def encode_pictures(encoder: Encoder, dataset: ClipDataset) -> EncodedPictures:
    """Encode each distinct picture once; files of the same bytes are one picture.

    Raises `UserError` if no picture can be opened.
    """
    copies: dict[str, list[int]] = {}
    missing = set(dataset.missing())
    there = [index for index in range(len(dataset)) if index not in missing]
    digests = in_threads(lambda index: _digest(dataset, index), there)
    for index, digest in zip(there, digests, strict=True):
        copies.setdefault(digest, []).append(index)
    firsts = {indices[0]: indices for indices in copies.values()}
    pictures = encoder.pictures(dataset)
    indices, features = encoder.images(image_batches(pictures, list(firsts), BATCH), len(firsts))
    broken = pictures.broken
    notes = []
    if missing:
        notes.append(
            f"{len(missing)} of the {len(dataset)} pictures named in {dataset.name} are not there (the first is "
            f"{dataset.names[min(missing)]}); they are left out."
        )
    if broken:
        name, reason = next(iter(broken.items()))
        notes.append(f"{len(broken)} pictures cannot be opened and are left out (the first is {name}: {reason}).")
    if not indices:
        raise UserError(f"No picture of {dataset.name} can be opened; run clip-finetune info on it to see why.")
    return EncodedPictures(features, [firsts[index] for index in indices], tuple(notes))


def _digest(dataset: ClipDataset, index: int) -> str:
    path = dataset.path(index)
    try:
        found = os.stat(path)
        return _digest_of(str(path), found.st_size, found.st_mtime_ns)
    except (OSError, ValueError):  # the latter for a name with a null character
        return f"unreadable {path}"  # decoding it tells the reason


@functools.lru_cache(maxsize=200_000)
def _digest_of(path: str, size: int, time: int) -> str:
    """Of a file that has this size and time: each validation of a run sees the same files."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _old(file)


def _old(file) -> str:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
