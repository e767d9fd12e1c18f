"""The corpus, what is expected of a bad file, and whole model files to start from."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from clips import SMALL, random_clip
from safetensors.torch import save
from torch import Tensor

from clip_finetune.engine import build_network, to_gmp
from clip_finetune.engine.clip.encoders import text_encoder_state_dict
from clip_finetune.engine.clip.full_clip import file_metadata
from clip_finetune.engine.clip.names import to_hf

REFUSED = "refused"
REPORTED = "reported"  # it opens as another kind than a full CLIP, or `info` reports a problem
ANY = "any"  # what is wrong with it does not matter for this
RAN = "ran"  # the name of the folder that every bomb tries to make


@dataclasses.dataclass(frozen=True)
class BadFile:
    """A bad file and what should become of it.

    `write` makes the file `name` in a folder; if it returns a path, that is opened instead.
    """

    id: str
    name: str
    write: Callable[[Path], str | None]
    load: str = REFUSED
    info: str = REFUSED
    merge: str | None = REFUSED  # None: it is not offered as a text encoder


BAD_FILES: list[BadFile] = []


def bad(id: str, content: bytes | Callable[[], bytes], suffix: str = ".safetensors", **expected) -> None:
    """Add a bad file with these bytes."""

    def write(folder: Path) -> None:
        (folder / f"{id}{suffix}").write_bytes(content() if callable(content) else content)

    BAD_FILES.append(BadFile(id, f"{id}{suffix}", write, **expected))


def bad_tree(id: str, files: Callable[[], Mapping[str, bytes]], opened: str, **expected) -> None:
    """Add a folder with these files; `opened` is the one that is opened ("": the folder itself)."""

    def write(folder: Path) -> str:
        for name, content in files().items():
            (folder / id / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / id / name).write_bytes(content)
        return f"{id}/{opened}" if opened else id

    BAD_FILES.append(BadFile(id, id, write, **expected))


def without(tensors: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@functools.cache
def small_clip():
    return random_clip(SMALL)


def openai() -> dict[str, Tensor]:
    return dict(small_clip().state_dict)


def hugging_face() -> dict[str, Tensor]:
    return to_hf(small_clip().state_dict)


def text_encoder() -> dict[str, Tensor]:
    return text_encoder_state_dict(small_clip())


def gmp() -> dict[str, Tensor]:
    return dict(to_gmp(small_clip()).state_dict)


def zipped(value) -> bytes:
    """Return a value as torch.save writes it."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def legacy(value) -> bytes:
    """Return a value as torch.save wrote it before version 1.6."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@functools.cache
def script() -> bytes:
    """Return a TorchScript archive of a whole CLIP, as OpenAI published theirs."""
    network = build_network(small_clip()).eval()
    inputs = torch.zeros(1, 3, SMALL.image_size, SMALL.image_size), torch.zeros(1, SMALL.context_length).long()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, inputs, check_trace=False, strict=False), file)
    return file.getvalue()


@functools.cache
def module() -> bytes:
    """Return a whole pickled module."""
    return zipped(build_network(small_clip()).eval())


@functools.cache
def whole(kind: str) -> bytes:
    """Return a sound file of this kind."""
    made = {
        "openai": lambda: save(openai(), {"format": "pt"}),
        "ours": lambda: save(openai(), file_metadata(small_clip())),
        "hugging_face": lambda: save(hugging_face()),
        "zip": lambda: zipped(openai()),
        "legacy": lambda: legacy(openai()),
        "module": module,
        "script": script,
    }
    return made[kind]()


def cut(kind: str, length: int) -> Callable[[], bytes]:
    """Return a function for the first bytes of a whole file; a negative length drops as many at its end."""
    return lambda: whole(kind)[:length]


def raw_safetensors(header: Mapping | bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a safetensors file with exactly this header, which may say anything."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape, offsets, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TB = 1 << 40


def renamed(old: str, new: str, tensors: Callable[[], dict] = openai) -> Callable[[], bytes]:
    return lambda: save({new if name == old else name: tensor for name, tensor in tensors().items()})


def added(extra: Mapping[str, Tensor], tensors: Callable[[], dict] = openai) -> Callable[[], bytes]:
    return lambda: save(tensors() | dict(extra))


ONE = torch.zeros(1)
OPENAI = SMALL.shapes()
HUGGING_FACE = {
    name: t.shape for name, t in to_hf({n: torch.empty(s, device="meta") for n, s in OPENAI.items()}).items()
}
