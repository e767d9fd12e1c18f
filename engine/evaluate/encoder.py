"""Features of a data set's pictures and of texts, from a network, each picture once."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..clip.full_clip import FullCLIP
from ..clip.network import build_network
from ..data.dataset import ClipDataset
from ..data.decoded_images import DecodedImages, image_batches
from ..data.images.decoding import normalize
from ..data.images.image_cache import ImageCache
from ..data.images.image_files import open_bytes, stat_of
from ..data.images.transforms import Transform
from ..data.threads import in_threads
from ..data.tokenizer import Tokenizer, cut_to_longest
from ..errors import UserError

BATCH = 64
PICTURES_KEY = "pictures"  # in a model's provenance: how the pictures of its training became squares
_TOLD = ("resize_mode", "background", "resize_backend")
_ENTRY_BYTES = 1000  # about what Python needs for a tensor and its key, beside the numbers


class EncodingCache:
    """Features that this process has computed, by the model that made them and what they are of.

    At most `limit` bytes; what was not asked for longest goes first. Safe to use from several threads.
    """

    def __init__(self, limit: int = 512 * 2**20):
        self.limit, self.bytes = limit, 0
        self._kept: collections.OrderedDict[Hashable, Tensor] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Tensor | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, feature: Tensor) -> None:
        """Keeps a copy, because a row of a batch would keep the whole batch."""
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = feature.clone()
            self.bytes += feature.nbytes + _ENTRY_BYTES
            while self.bytes > self.limit:
                _, gone = self._kept.popitem(last=False)
                self.bytes -= gone.nbytes + _ENTRY_BYTES


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A network ready to encode: where it is, how it computes, and whom to tell.

    `transform` is how pictures become squares, and `cache` where they may be found decoded. `autocast` makes a context
    for each forward pass; `on_progress(done, total)` counts pictures; `check_cancelled` may raise between batches.
    `features` is where features may be found that `model`, which says which weights and how they compute, made before.
    """

    network: nn.Module
    transform: Transform
    tokenizer: Tokenizer
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    on_progress: Callable[[int, int], None] = lambda done, total: None
    check_cancelled: Callable[[], None] = lambda: None
    cache: ImageCache | None = None
    features: EncodingCache | None = None
    model: Hashable = None

    @classmethod
    def of(
        cls, full_clip: FullCLIP, *, device: torch.device | str | None = None, precision: str = "fp32", **more
    ) -> Encoder:
        """The network of a full CLIP, in fp32 or (`precision`) autocast to bf16, on CUDA where there is one. Pictures
        become squares in the way that it was trained with."""
        a = full_clip.architecture
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        network = build_network(full_clip, device=device).eval().requires_grad_(False)
        if precision == "bf16":
            more["autocast"] = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16)
        if more.get("features") is not None:
            more["model"] = (full_clip.fingerprint, device.type, precision)
        return cls(network, trained_transform(full_clip), Tokenizer(a.context_length, a.vocab_size), device, **more)

    @property
    def image_size(self) -> int:
        return self.transform.image_size

    def pictures(self, dataset: ClipDataset) -> DecodedImages:
        """The pictures of a data set; nothing is kept in memory, because each is encoded once."""
        return DecodedImages(dataset, self.transform, self.cache, memory_bytes=0)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """float32 [n, d] on the CPU, each row of length 1; a text that comes twice is encoded once. Raises
        `BrokenModel`, as `images` does."""
        keys = [self.tokenizer.key(text) for text in texts]
        named = dict(zip(keys, texts, strict=True))
        found = {key: row for key in named if (row := self.kept("text", key)) is not None}
        fresh = [key for key in named if key not in found]
        for key, row in zip(fresh, self._encoded_texts([named[key] for key in fresh]), strict=True):
            self.keep(row, "text", key)
            found[key] = row
        return torch.stack([found[key] for key in keys])

    def passing_texts(self, texts: Sequence[str]) -> Tensor:
        """As `texts`, for such as are not asked for again."""
        return torch.stack(list(self._encoded_texts(texts)))

    def raw_texts(self, texts: Sequence[str]) -> Tensor:
        """float32 [n, d] on the CPU, of the length that the model gives them."""
        return torch.stack(list(self._encoded_texts(texts, unit=False)))

    def _encoded_texts(self, texts: Sequence[str], unit: bool = True) -> Iterator[Tensor]:
        """A row for each text; of equal tokens, such as those of Dog and dog, the very same one."""
        keys = [self.tokenizer.key(text) for text in texts]
        distinct = list(dict(zip(keys, texts, strict=True)).items())
        rows: dict[bytes, Tensor] = {}
        for start in range(0, len(distinct), BATCH):
            self.check_cancelled()
            named = dict(distinct[start : start + BATCH])
            tokens = cut_to_longest(self.tokenizer(named.values())).to(self.device)
            with torch.no_grad(), self.autocast():
                features = self.network.encode_text(tokens)
            rows |= zip(named, _unit(features) if unit else _checked(features.float().cpu()), strict=True)
        return (rows[key] for key in keys)

    def kept(self, *what: Hashable) -> Tensor | None:
        """A feature that was computed before with the same model."""
        return None if self.features is None else self.features.get((self.model, *what))

    def keep(self, feature: Tensor, *what: Hashable) -> None:
        if self.features is not None:
            self.features.put((self.model, *what), feature)

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
        return Transform(image_size=full_clip.architecture.image_size, **known).deterministic
    except UserError:  # what another version, or program, wrote
        return Transform(image_size=full_clip.architecture.image_size)


def with_trained_transform(provenance: Mapping[str, Any], transform: Transform) -> dict[str, Any]:
    """A provenance that says how pictures became squares, if that is not CLIP's own way."""
    usual, found = Transform(image_size=transform.image_size), transform.deterministic
    told = {name: getattr(found, name) for name in _TOLD}
    without = {key: value for key, value in provenance.items() if key != PICTURES_KEY}
    return without if found == usual else without | {PICTURES_KEY: told}


class BrokenModel(UserError):
    """A model whose features are not numbers: compared with anything they are neither better nor worse."""


def _unit(features: Tensor) -> Tensor:
    return _checked(F.normalize(features.float(), dim=1).cpu())


def _checked(features: Tensor) -> Tensor:
    if not torch.isfinite(features).all():
        raise BrokenModel(
            "The model computes values that are not numbers (NaN or infinite), so nothing can be measured with it; its "
            "weights are damaged, or its training broke. Use a model from before that."
        )
    return features


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """The distinct pictures of a data set that could be opened: `samples[i]` are the indices of all copies of row i."""

    features: Tensor
    samples: list[list[int]]
    notes: tuple[str, ...]


def require_images(dataset: ClipDataset) -> None:
    """Raise `UserError` for an empty data set, such as the validation part of a split of 0."""
    if not len(dataset):
        raise UserError(
            f"There is no picture of {dataset.name} to measure on; set validation_split above 0, or measure on another "
            "data set."
        )


def encode_images(encoder: Encoder, dataset: ClipDataset) -> EncodedImages:
    """Encode each distinct picture once; files of the same bytes are one picture. What the encoder's cache of features
    holds is not encoded again: it knows a picture by its bytes and the transform.

    Raises `UserError` if no picture can be opened.
    """
    copies: dict[str, list[int]] = {}
    missing = set(dataset.missing())
    there = [index for index in range(len(dataset)) if index not in missing]
    digests = in_threads(lambda index: _digest(dataset, index), there)
    for index, digest in zip(there, digests, strict=True):
        copies.setdefault(digest, []).append(index)
    firsts = {indices[0]: indices for indices in copies.values()}
    named = {indices[0]: ("picture", encoder.transform.base_name, digest) for digest, indices in copies.items()}
    rows = {index: row for index, name in named.items() if (row := encoder.kept(*name)) is not None}
    pictures = encoder.pictures(dataset)
    fresh = [index for index in firsts if index not in rows]
    indices, features = encoder.images(image_batches(pictures, fresh, BATCH), len(fresh))
    for index, row in zip(indices, features, strict=True):
        encoder.keep(row, *named[index])
    if rows:
        rows |= dict(zip(indices, features, strict=True))
        indices = [index for index in firsts if index in rows]
        features = torch.stack([rows[index] for index in indices])
        encoder.on_progress(len(indices), len(indices))
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
    return EncodedImages(features, [firsts[index] for index in indices], tuple(notes))


def _digest(dataset: ClipDataset, index: int) -> str:
    path = dataset.path(index)
    try:
        found = stat_of(path)
        return _digest_of(str(path), found.st_size, found.st_mtime_ns)
    except (OSError, ValueError):  # the latter for a name with a null character, and for a row that is damaged
        return f"unreadable {path}"  # decoding it tells the reason


@functools.lru_cache(maxsize=200_000)
def _digest_of(path: str, size: int, time: int) -> str:
    """Of a file that has this size and time: each validation of a run sees the same files."""
    with open_bytes(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _old(file)


def _old(file) -> str:
    """hashlib.file_digest for Python 3.10."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
