"""Encode a dataset's images and texts with a network, each of them once."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

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
TRANSFORM_KEY = "pictures"  # in a model's provenance: the transform that it was trained with
_TRANSFORM_FIELDS = ("resize_mode", "background", "resize_backend")
_ENTRY_BYTES = 1000  # roughly what Python needs for a tensor and its key, besides the numbers


class BrokenModel(UserError):
    """A model whose features are NaN or infinite: no comparison with them means anything."""


class EncodingCache:
    """Features that this process has computed, by model and input; the least recently used go first.

    Holds at most `limit` bytes. Thread-safe.
    """

    def __init__(self, limit: int = 512 * 2**20) -> None:
        self.limit, self.bytes = limit, 0
        self._features: collections.OrderedDict[Hashable, Tensor] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Tensor | None:
        with self._lock:
            if key in self._features:
                self._features.move_to_end(key)
            return self._features.get(key)

    def put(self, key: Hashable, feature: Tensor) -> None:
        """Store a copy, because a row of a batch would keep the whole batch alive."""
        with self._lock:
            if key in self._features:
                return
            self._features[key] = feature.clone()
            self.bytes += feature.nbytes + _ENTRY_BYTES
            while self.bytes > self.limit:
                _, oldest = self._features.popitem(last=False)
                self.bytes -= oldest.nbytes + _ENTRY_BYTES


@dataclasses.dataclass(frozen=True)
class ModelFeatures:
    """One model's part of an `EncodingCache`; without a cache it stores nothing."""

    cache: EncodingCache | None = None
    model: Hashable = None

    def get(self, *key: Hashable) -> Tensor | None:
        return None if self.cache is None else self.cache.get((self.model, *key))

    def put(self, feature: Tensor, *key: Hashable) -> None:
        if self.cache is not None:
            self.cache.put((self.model, *key), feature)


def ignore_progress(done: int, total: int) -> None:
    """The default of `on_progress`."""


def never_cancelled() -> None:
    """The default of `check_cancelled`."""


class Runtime(TypedDict, total=False):
    """Keyword arguments that every evaluation takes, all optional.

    `device`: CUDA if available. `on_progress(done, total)` counts images. `check_cancelled` may raise between batches.
    `cache` holds decoded images, `features` the features that earlier evaluations computed.
    """

    device: torch.device | str | None
    on_progress: Callable[[int, int], None]
    check_cancelled: Callable[[], None]
    cache: ImageCache | None
    features: EncodingCache | None


@dataclasses.dataclass(frozen=True)
class Host:
    """What the caller of an evaluation provides; see `Runtime`."""

    on_progress: Callable[[int, int], None] = ignore_progress
    check_cancelled: Callable[[], None] = never_cancelled
    cache: ImageCache | None = None


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A network with everything it needs to encode images and texts.

    `autocast` makes a context for each forward pass. Features are float32 on the CPU. Encoding raises `BrokenModel`
    for features that are not finite.
    """

    network: Any  # an open_clip.CLIP; the type checker cannot see its methods through nn.Module
    transform: Transform
    tokenizer: Tokenizer
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    host: Host = Host()
    features: ModelFeatures = ModelFeatures()

    @classmethod
    def of(cls, full_clip: FullCLIP, *, precision: str = "fp32", **runtime: Unpack[Runtime]) -> Encoder:
        """Build the network of a full CLIP in fp32, or with bf16 autocast, and the transform it was trained with."""
        architecture = full_clip.architecture
        device = default_device(runtime.get("device"))
        network = build_network(full_clip, device=device).eval().requires_grad_(False)
        bf16 = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16)
        return cls(
            network,
            trained_transform(full_clip),
            Tokenizer(architecture.context_length, architecture.vocab_size),
            bf16 if precision == "bf16" else contextlib.nullcontext,
            Host(
                runtime.get("on_progress", ignore_progress),
                runtime.get("check_cancelled", never_cancelled),
                runtime.get("cache"),
            ),
            ModelFeatures(runtime.get("features"), (full_clip.fingerprint, device.type, precision)),
        )

    @property
    def device(self) -> torch.device:
        return self.network.logit_scale.device

    @property
    def logit_scale(self) -> float:
        """The factor itself, such as 100."""
        return float(self.network.logit_scale.detach().exp())

    def images_of(self, dataset: ClipDataset) -> DecodedImages:
        """Return a dataset's images; none are kept in memory, because each is encoded once."""
        return DecodedImages(dataset, self.transform, self.host.cache, memory_bytes=0)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit features [n, d]; what the feature cache holds is not encoded again."""
        keys = [self.tokenizer.key(text) for text in texts]
        by_key = dict(zip(keys, texts, strict=True))
        rows = {key: row for key in by_key if (row := self.features.get("text", key)) is not None}
        new = [key for key in by_key if key not in rows]
        for key, row in zip(new, self.encode_texts_uncached([by_key[key] for key in new]), strict=True):
            self.features.put(row, "text", key)
            rows[key] = row
        return torch.stack([rows[key] for key in keys])

    def encode_texts_uncached(self, texts: Sequence[str], *, unit: bool = True) -> Tensor:
        """Return features [n, d], as long as the model makes them unless `unit`.

        Texts of equal token ids, such as Dog and dog, are encoded once, so they get the very same bits.
        """
        keys = [self.tokenizer.key(text) for text in texts]
        distinct = list(dict(zip(keys, texts, strict=True)).items())
        rows: dict[bytes, Tensor] = {}
        for start in range(0, len(distinct), BATCH):
            self.host.check_cancelled()
            batch = dict(distinct[start : start + BATCH])
            tokens = cut_to_longest(self.tokenizer(batch.values())).to(self.device)
            with torch.no_grad(), self.autocast():
                features = self.network.encode_text(tokens)
            rows |= zip(batch, _unit(features) if unit else _require_finite(features.float().cpu()), strict=True)
        return torch.stack([rows[key] for key in keys]) if keys else torch.zeros(0, 1)

    def encode_batches(self, batches: Iterable[tuple[list[int], Tensor]], total: int) -> tuple[list[int], Tensor]:
        """Return sample indices and unit features [n, d] for batches of (indices, uint8 images)."""
        indices: list[int] = []
        features = []
        for batch, images_u8 in batches:
            self.host.check_cancelled()
            with torch.no_grad(), self.autocast():
                images = normalize(images_u8.to(self.device), self.network.dtype)
                features.append(_unit(self.network.encode_image(images)))
            indices += batch
            self.host.on_progress(len(indices), total)
        return indices, torch.cat(features) if features else torch.zeros(0, 1)


def default_device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def trained_transform(full_clip: FullCLIP) -> Transform:
    """Return the transform that a model was trained with, without its random parts; CLIP's own if it names none."""
    known = full_clip.provenance.get(TRANSFORM_KEY)
    fields = known if isinstance(known, dict) else {}
    valid = {name: fields[name] for name in _TRANSFORM_FIELDS if isinstance(fields.get(name), str)}
    try:
        return Transform(image_size=full_clip.architecture.image_size, **valid).deterministic
    except UserError:  # written by another version or program
        return Transform(image_size=full_clip.architecture.image_size)


def with_trained_transform(provenance: Mapping[str, Any], transform: Transform) -> dict[str, Any]:
    """Return a provenance that names the transform, unless that is CLIP's own."""
    default, used = Transform(image_size=transform.image_size), transform.deterministic
    fields = {name: getattr(used, name) for name in _TRANSFORM_FIELDS}
    others = {key: value for key, value in provenance.items() if key != TRANSFORM_KEY}
    return others if used == default else others | {TRANSFORM_KEY: fields}


def _unit(features: Tensor) -> Tensor:
    return _require_finite(F.normalize(features.float(), dim=1).cpu())


def _require_finite(features: Tensor) -> Tensor:
    if not torch.isfinite(features).all():
        raise BrokenModel(
            "The model computes values that are not numbers (NaN or infinite), so nothing can be measured with it. Its "
            "weights are damaged, or its training diverged; use an earlier checkpoint."
        )
    return features


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """The distinct images of a dataset that could be opened: `samples[i]` are the indices of all copies of row i."""

    features: Tensor
    samples: list[list[int]]
    notes: tuple[str, ...]


def require_images(dataset: ClipDataset) -> None:
    """Raise `UserError` for an empty dataset, such as the validation part of a split of 0."""
    if not len(dataset):
        raise UserError(
            f"{dataset.name} has no images to measure on; set validation_split above 0, or measure on another dataset."
        )


def encode_images(encoder: Encoder, dataset: ClipDataset) -> EncodedImages:
    """Encode each distinct image once; files with the same bytes are one image.

    The encoder's feature cache knows an image by its bytes and the transform. Raises `UserError` if no image can be
    opened.
    """
    missing = dataset.missing()
    copies = _copies_by_digest(dataset, set(missing))
    keys = {indices[0]: ("image", encoder.transform.base_name, digest) for digest, indices in copies.items()}
    rows = {index: row for index, key in keys.items() if (row := encoder.features.get(*key)) is not None}
    images = encoder.images_of(dataset)
    new = [index for index in keys if index not in rows]
    indices, features = encoder.encode_batches(image_batches(images, new, BATCH), len(new))
    for index, row in zip(indices, features, strict=True):
        encoder.features.put(row, *keys[index])
    if rows:
        rows |= dict(zip(indices, features, strict=True))
        indices = [index for index in keys if index in rows]
        features = torch.stack([rows[index] for index in indices])
        encoder.host.on_progress(len(indices), len(indices))
    if not indices:
        raise UserError(f"No image of {dataset.name} can be opened; run clip-finetune info on it to see why.")
    notes = tuple(_notes_on_unusable(dataset, missing, images.broken))
    return EncodedImages(features, [copies[keys[index][-1]] for index in indices], notes)


def _notes_on_unusable(dataset: ClipDataset, missing: Sequence[int], broken: Mapping[str, str]) -> Iterator[str]:
    if missing:
        yield (
            f"{len(missing)} of the {len(dataset)} images named in {dataset.name} are missing (the first is "
            f"{dataset.names[min(missing)]}); they are left out."
        )
    if broken:
        name, reason = next(iter(broken.items()))
        yield f"{len(broken)} images cannot be opened and are left out (the first is {name}: {reason})."


def _copies_by_digest(dataset: ClipDataset, missing: set[int]) -> dict[str, list[int]]:
    """Return the samples that share an image, by the hash of its bytes."""
    present = [index for index in range(len(dataset)) if index not in missing]
    copies: dict[str, list[int]] = {}
    digests = in_threads(lambda index: _digest(dataset, index), present)
    for index, digest in zip(present, digests, strict=True):
        copies.setdefault(digest, []).append(index)
    return copies


def _digest(dataset: ClipDataset, index: int) -> str:
    path = dataset.path(index)
    try:
        stat = stat_of(path)
        return _digest_of(str(path), stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError):  # ValueError: a name with a null character, or a damaged row of a table
        return f"unreadable {path}"  # decoding it will tell the reason


@functools.lru_cache(maxsize=200_000)
def _digest_of(path: str, size: int, mtime_ns: int) -> str:
    """Hash a file; cached by its size and time, because each validation of a run sees the same files."""
    digest = hashlib.sha256()
    with open_bytes(path) as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
