"""Bad model files, each made from nothing or from a small whole one, for test_bad_files.py.

A `BadFile` says what may become of it. None of them is one that some program writes on purpose.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
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
TOLD = "told"  # it opens, but what is wrong with it is told: another kind than a full CLIP, or problems
ANY = "any"  # what is bad about it does not bear on this
RAN = "ran"  # the folder that every bomb tries to make


@dataclasses.dataclass(frozen=True)
class BadFile:
    """`write` makes the file called `name` in a folder; what it gives is opened instead, if it gives anything."""

    id: str
    name: str
    write: Callable[[Path], str | None]
    load: str = REFUSED
    info: str = REFUSED
    merge: str | None = REFUSED  # None: it is not offered as a text encoder


BAD_FILES: list[BadFile] = []


def bad(id: str, content: bytes | Callable[[], bytes], suffix: str = ".safetensors", **expected) -> None:
    """A bad file of these bytes."""

    def write(folder: Path) -> None:
        (folder / f"{id}{suffix}").write_bytes(content() if callable(content) else content)

    BAD_FILES.append(BadFile(id, f"{id}{suffix}", write, **expected))


def bad_tree(id: str, files: Callable[[], Mapping[str, bytes]], opened: str, **expected) -> None:
    """A folder of these files, and which of them is opened ("": the folder)."""

    def write(folder: Path) -> str:
        for name, content in files().items():
            (folder / id / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / id / name).write_bytes(content)
        return f"{id}/{opened}" if opened else id

    BAD_FILES.append(BadFile(id, id, write, **expected))


def without(tensors: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


# ---- whole ones to start from ----------------------------------------------------------------------------------------


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
    """As torch.save writes it."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def legacy(value) -> bytes:
    """As torch.save wrote it before version 1.6."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@functools.cache
def script() -> bytes:
    """A TorchScript archive of a whole CLIP, as OpenAI published theirs."""
    network = build_network(small_clip()).eval()
    inputs = torch.zeros(1, 3, SMALL.image_size, SMALL.image_size), torch.zeros(1, SMALL.context_length).long()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, inputs, check_trace=False, strict=False), file)
    return file.getvalue()


@functools.cache
def module() -> bytes:
    """A whole pickled module."""
    return zipped(build_network(small_clip()).eval())


@functools.cache
def whole(kind: str) -> bytes:
    """A file that opens, of each kind there is."""
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


# ---- cut off, and no model files at all ------------------------------------------------------------------------------


def cut(kind: str, length: int) -> Callable[[], bytes]:
    """The first bytes of a whole file; a negative length leaves out as many at its end."""
    return lambda: whole(kind)[:length]


for _length in (0, 1, 7, 8, 9, 10, 100, 2000, 4000, 20_000, -1):
    bad(f"cut-safetensors-{_length}", cut("openai", _length))
for _kind, _lengths in (
    ("zip", (1, 3, 4, 30, 64, 1000, 5000, 30_000, -22, -1)),
    ("legacy", (1, 2, 10, 30, 600, 3000, 20_000, -1)),
    ("module", (5000, 40_000, -1)),
    ("script", (4, 500, 50_000, -23, -1)),
):
    for _length in _lengths:
        bad(f"cut-{_kind}-{_length}", cut(_kind, _length), ".pt")

bad("longer-than-it-says", lambda: whole("openai") + b"\0")
bad("random-bytes", lambda: torch.randint(0, 256, (5000,), generator=torch.manual_seed(0)).byte().numpy().tobytes())
bad("random-bytes-after-the-mark-of-a-pickle", b"\x80\x02" + bytes(range(256)) * 9, ".pt")
bad("random-bytes-after-the-mark-of-a-zip", b"PK\x03\x04" + bytes(range(256)) * 9, ".pt")
bad("zeros", bytes(10_000))
bad("text", b"these are not weights at all\n" * 20)
bad("web-page", b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n")
bad("web-page-without-doctype", b"\n\n  <HTML><head></head></HTML>")
bad("lfs-pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
bad("gguf", b"GGUF\x03\0\0\0" + bytes(500))
bad("png", b"\x89PNG\r\n\x1a\n" + bytes(500), ".pt")
bad("gzip", b"\x1f\x8b\x08\0" + bytes(500), ".bin")
bad("numpy", b"\x93NUMPY\x01\0v\0" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }\n" + bytes(12))
bad("json-object", b'{"text_model": [1, 2, 3]}')


def packed_zip(method: int, **files: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return made.getvalue()


def tar(name: str = "archive/pickle") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"\x80\x02K."))
    return made.getvalue()


bad("zip-of-texts", lambda: packed_zip(zipfile.ZIP_STORED, readme=b"hello"), ".pt")
bad("zip-of-a-model", lambda: packed_zip(zipfile.ZIP_STORED, model=whole("openai")))
bad("zip-without-entries", lambda: b"PK\x03\x04" + packed_zip(zipfile.ZIP_STORED), ".pt")
bad("tar", tar, ".pt")
bad("tar-with-the-mark-of-a-pickle", lambda: tar("\x80\x02entry"), ".pt")


# ---- safetensors -----------------------------------------------------------------------------------------------------


def raw_safetensors(header: Mapping | bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    """A header as it is given, which may say anything."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape, offsets, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


TB = 1 << 40
for _id, _header in {
    "terabytes": {"visual.proj": entry([TB], [0, 4 * TB])},
    "offset-beyond-the-file": {"visual.proj": entry([2], [0, 8]), "b": entry([2], [800, 808])},
    "overlapping": {"a": entry([2], [0, 8]), "b": entry([2], [4, 12])},
    "same-place-twice": {"a": entry([4], [0, 16]), "b": entry([4], [0, 16])},
    "backwards": {"a": entry([2], [8, 0])},
    "negative-offset": {"a": entry([2], [-8, 0])},
    "negative-shape": {"a": entry([-2], [0, 8])},
    "fraction-in-shape": {"a": entry([1.5], [0, 8])},
    "shape-of-words": {"a": entry(["2"], [0, 8])},
    "huge-shape": {"a": entry([1 << 63], [0, 16])},
    "overflowing-product": {"a": entry([1 << 32, 1 << 32, 4], [0, 16])},
    "nothing-times-huge": {"token_embedding.weight": entry([0, (1 << 64) - 1], [0, 0]), "a": entry([4], [0, 16])},
    "nothing-times-large": {"token_embedding.weight": entry([0, 1 << 62], [0, 0]), "a": entry([4], [0, 16])},
    "many-dimensions": {"token_embedding.weight": entry([1] * 2000, [0, 4]), "a": entry([3], [4, 16])},
    "too-small-for-its-shape": {"a": entry([5], [0, 16])},
    "unknown-dtype": {"a": entry([4], [0, 16], "F33")},
    "no-dtype": {"a": {"shape": [4], "data_offsets": [0, 16]}},
    "metadata-of-numbers": {"__metadata__": {"a": 5}, "a": entry([4], [0, 16])},
    "metadata-only": {"__metadata__": {"format": "pt"}},
    "nothing-in-it": {},
    "hole": {"a": entry([1], [0, 4]), "b": entry([1], [12, 16])},
}.items():
    bad(
        f"safetensors-{_id}",
        raw_safetensors(_header, bytes(16)),
        info=TOLD if _id == "nothing-times-large" else REFUSED,
    )
for _id, _text in {
    "nan": '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}',
    "list": '["a"]',
    "unfinished": '{"a": {"dtype"',
    "nested-lists": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "nested-objects": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "same-name-twice": '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
    '"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
    "huge-number": '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 16]}}',
}.items():
    bad(f"safetensors-json-{_id}", raw_safetensors(_text, bytes(16)))
bad("safetensors-not-utf8", raw_safetensors(b'{"\xff\xfe": {}}', bytes(16)))
bad("safetensors-header-as-long-as-can-be", raw_safetensors(b'{"a": 1}', length=(1 << 64) - 1))
bad("safetensors-header-longer-than-the-file", raw_safetensors(b'{"a": 1}', length=9000))
bad("safetensors-header-shorter-than-json", raw_safetensors(b'{"a": 1}     ', length=3))
bad("safetensors-header-of-length-zero", raw_safetensors(b'{"a": 1}', length=0))
bad("safetensors-header-of-30-mb", lambda: raw_safetensors(b"{" + b" " * (30 << 20) + b"}", bytes(16)))


def many_tensors(name: str, count: int = 20_000) -> bytes:
    """So many tensors of one byte."""
    return raw_safetensors({name.format(n): entry([1], [n, n + 1], "U8") for n in range(count)}, bytes(count))


bad("100000-tensors", lambda: many_tensors("tensor.{}", 100_000), merge=None)
bad("20000-token-embeddings", lambda: many_tensors("{}.token_embedding.weight"), info=ANY)
bad("20000-layers", lambda: many_tensors("text_model.encoder.layers.{}.mlp.fc1.bias"), info=ANY)
bad("20000-layers-of-a-vision-tower", lambda: many_tensors("visual.transformer.resblocks.{}.ln_1.bias"), info=ANY)


def renamed(old: str, new: str, tensors: Callable[[], dict] = openai) -> Callable[[], bytes]:
    return lambda: save({new if name == old else name: tensor for name, tensor in tensors().items()})


def added(extra: Mapping[str, Tensor], tensors: Callable[[], dict] = openai) -> Callable[[], bytes]:
    return lambda: save(tensors() | dict(extra))


ONE = torch.zeros(1)
bad("layer-999999999", added({"transformer.resblocks.999999999.ln_1.bias": torch.zeros(16)}))
bad("layer-999999999-of-vision", added({"visual.transformer.resblocks.999999999.ln_1.bias": ONE}), merge=ANY)
bad("layer-of-5000-digits", added({f"transformer.resblocks.{'9' * 5000}.ln_1.bias": ONE}))
bad("layer-of-90-digits", added({f"transformer.resblocks.{'9' * 90}.ln_1.bias": ONE}))
bad("layer-of-arabic-digits", added({"transformer.resblocks.١٢.ln_1.bias": ONE}))
bad("layer-below-zero", added({"transformer.resblocks.-1.ln_1.bias": ONE}))
bad(
    "layers-of-hugging-face-999999999",
    added({"text_model.encoder.layers.999999999.layer_norm1.bias": ONE}, hugging_face),
)
bad("name-of-a-million-letters", added({"a" * 1_000_000: ONE}), merge=ANY)
bad("name-of-a-million-wrappers", lambda: save({"module." * 300_000 + "token_embedding.weight": ONE}))
bad("name-with-line-breaks", added({"first\nsecond\r\nthird": ONE}), merge=ANY)
bad("name-with-line-breaks-in-the-text-tower", added({"transformer.resblocks.0.a\nb": ONE}))
bad("name-with-line-separators", added({"first\u2028second\u0085third\x0b": ONE}), merge=ANY)
bad("name-with-terminal-codes", added({"transformer.resblocks.0.\x1b[2Ja": ONE}))
bad("name-with-a-null", added({"a\0b": ONE}), merge=ANY)
bad("name-that-is-empty", added({"": ONE}), merge=ANY)
bad("name-that-is-only-a-wrapper", lambda: save({"model.": ONE}))
bad(
    "names-with-line-breaks-in-a-text-encoder", added({"text_model.encoder.layers.0\n.x": ONE}, text_encoder), info=TOLD
)
bad(
    "names-with-line-breaks-before-a-text-encoder",
    lambda: save({f"a\nb.{n}": t for n, t in text_encoder().items()}),
    info=TOLD,
)


# ---- metadata of ours ------------------------------------------------------------------------------------------------


def about(**changes) -> dict:
    return json.loads(file_metadata(small_clip())["clip_finetune"]) | changes


def with_metadata(text) -> Callable[[], bytes]:
    """A whole file with this under our key."""
    made = text if callable(text) else lambda: text
    return lambda: save(openai(), {"clip_finetune": made()})


def claims(**sizes) -> Callable[[], bytes]:
    """Metadata in which some sizes are others."""
    return with_metadata(lambda: json.dumps(about(architecture=small_clip().architecture.as_dict() | sizes)))


for _id, _text in {
    "not-json": "{abc",
    "list": "[]",
    "null": "null",
    "nested": "[" * 200_000,
    "number": "9" * 5000,
    "empty": "{}",
    "architecture-a-list": '{"architecture": []}',
    "architecture-empty": '{"architecture": {}, "activation": "gelu"}',
    "architecture-of-something-else": json.dumps({"architecture": {"layers\nof\nwords " * 200: 3}}),
}.items():
    bad(f"metadata-{_id}", with_metadata(_text), merge=ANY)
for _id, _changes in {
    "provenance-a-word": {"provenance": "abc"},
    "history-a-number": {"provenance": {"history": 5}},
    "notes-a-word": {"notes": "abc"},
    "notes-of-numbers": {"notes": [1, {"a": 2}]},
    "activation-a-list": {"activation": ["gelu"]},
    "activation-a-novel": {"activation": "gelu\n" * 10_000},
}.items():
    bad(f"metadata-{_id}", with_metadata(lambda changes=_changes: json.dumps(about(**changes))), merge=ANY)
for _name, _value in (
    ("text_layers", 10**12),
    ("text_layers", -1),
    ("text_layers", 2),
    ("text_layers", 0),
    ("text_layers", True),
    ("text_layers", 1.0),
    ("text_layers", "1"),
    ("text_layers", None),
    ("vision_layers", 10**12),
    ("vision_layers", [10**12, 1, 1, 1]),
    ("vision_layers", [1, 1]),
    ("vision_layers", [[1], 1, 1, 1]),
    ("vision_layers", [1] * 100_000),
    ("text_width", 10**9),
    ("text_width", -16),
    ("text_width", 10**4000),
    ("vision_width", 10**9),
    ("vision_width", 0),
    ("vocab_size", 10**18),
    ("context_length", 10**30),
    ("image_size", 10**9),
    ("image_size", 3),
    ("patch_size", None),
    ("patch_size", 10**9),
    ("embed_dim", 10**9),
    ("text_heads", 0),
    ("text_heads", 3),
    ("text_heads", 10**4000),
    ("vision_heads", -1),
    ("vision_heads", "1"),
    ("vision_mlp_width", 10**12),
    ("text_mlp_width", [64]),
    ("depth", 3),
):
    _shown = str(_value)[:12].replace(" ", "").replace("[", "(").replace("]", ")")
    bad(f"metadata-{_name}-{_shown}", claims(**{_name: _value}), merge=ANY)


# ---- tensors of another shape or kind --------------------------------------------------------------------------------


def of_shape(name: str, shape: tuple[int, ...], tensors: Callable[[], dict]) -> Callable[[], bytes]:
    return lambda: save(tensors() | {name: torch.zeros(shape)})


def family(id: str, shapes: Mapping[str, tuple], tensors: Callable[[], dict], whole_clip: bool) -> None:
    """Each tensor missing, and in shapes that it never has."""
    for name, right in shapes.items():
        elsewhere = name.startswith(("visual", "vision", "logit_scale", "text_projection"))
        merge = ANY if elsewhere else REFUSED
        expected = dict(merge=merge) if whole_clip else dict(merge=merge, info=ANY if elsewhere else TOLD)
        bad(f"{id}-without-{name}", lambda name=name: save(without(tensors(), name)), **expected)
        for shape in ((), (0,), (1, 2, 3, 4, 5)):
            if shape != tuple(right):
                shown = "x".join(map(str, shape)) or "scalar"
                bad(f"{id}-{name}-{shown}", of_shape(name, shape, tensors), **expected)


OPENAI = SMALL.shapes()
HUGGING_FACE = {
    name: t.shape for name, t in to_hf({n: torch.empty(s, device="meta") for n, s in OPENAI.items()}).items()
}
family("openai", OPENAI, openai, True)
family("hf", HUGGING_FACE, hugging_face, True)
family("te", {n: s for n, s in HUGGING_FACE.items() if n.startswith("text_model.")}, text_encoder, False)
family("gmp", {n: s for n, s in SMALL.shapes("gmp").items() if ".mlp." in n}, gmp, True)


def retyped(name: str, dtype: torch.dtype, tensors: Callable[[], dict] = openai) -> Callable[[], bytes]:
    return lambda: save(tensors() | {name: tensors()[name].to(dtype)})


FC = "transformer.resblocks.0.mlp.c_fc"
HF_FC = "text_model.encoder.layers.0.mlp.fc1.weight"
ODD = ("int8", "int64", "uint8", "bool", "complex64", "float8_e8m0fnu")
for _dtype in ODD:
    bad(f"weight-of-{_dtype}", retyped(f"{FC}.weight", getattr(torch, _dtype)))
    bad(f"weight-of-{_dtype}-in-vision", retyped("visual.proj", getattr(torch, _dtype)), merge=ANY)
    bad(f"weight-of-{_dtype}-in-a-text-encoder", retyped(HF_FC, getattr(torch, _dtype), text_encoder), info=TOLD)
    _query = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    bad(f"query-of-{_dtype}-in-a-text-encoder", retyped(_query, getattr(torch, _dtype), text_encoder), info=TOLD)
    bad(f"projection-of-{_dtype}", retyped("text_projection", getattr(torch, _dtype)), merge=ANY)
for _code, _bits in (("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)):
    _header = {"token_embedding.weight": entry([4, 16], [0, 8 * _bits], _code)}
    bad(f"text-encoder-of-{_code}", raw_safetensors(_header, bytes(8 * _bits)), info=ANY)

for _word in ("nan", "inf", "-inf"):
    for _name in ("ln_final.bias", "token_embedding.weight"):
        _broken = {_name: torch.full(OPENAI[_name], float(_word))}
        bad(f"{_word.replace('-', 'minus-')}-in-{_name}", added(_broken), load=ANY, info=TOLD)
    bad(
        f"{_word.replace('-', 'minus-')}-in-a-text-encoder",
        added({HF_FC: torch.full((64, 16), float(_word))}, text_encoder),
        info=TOLD,
    )
bad("nan-in-vision", added({"visual.proj": torch.full((16, 16), torch.nan)}), load=ANY, info=TOLD, merge=ANY)
bad("nan-in-logit-scale", added({"logit_scale": torch.tensor(torch.nan)}), load=ANY, info=TOLD, merge=ANY)

bad("gmp-without-r", lambda: save(without(gmp(), f"{FC}.r")))
bad("gmp-without-theta", lambda: save(without(gmp(), f"{FC}.theta")))
bad(
    "gmp-in-one-layer-only",
    lambda: save(
        without(openai(), f"{FC}.weight") | {f"{FC}.{part}": gmp()[f"{FC}.{part}"] for part in ("r", "theta")}
    ),
)
bad("gmp-and-weight", lambda: save(gmp() | {f"{FC}.weight": openai()[f"{FC}.weight"]}))
bad(
    "gmp-in-the-text-tower-only",
    lambda: save(
        {n: t for n, t in gmp().items() if not n.startswith("visual.")}
        | {n: t for n, t in openai().items() if n.startswith("visual.")}
    ),
)
bad("gmp-text-tower-alone", lambda: save({n: t for n, t in gmp().items() if not n.startswith("visual.")}), info=TOLD)
bad(
    "gmp-under-a-text-encoders-names",
    added(
        {
            "text_model.encoder.layers.0.mlp.fc1.r": torch.zeros(64, 1),
            "text_model.encoder.layers.0.mlp.fc1.theta": torch.zeros(64, 16),
        },
        text_encoder,
    ),
    info=TOLD,
)

RESIDUAL = "positional_embedding_res"
bad("long-clip-tables-of-two-shapes", added({RESIDUAL: torch.zeros(9, 16)}))
bad("long-clip-second-table-a-scalar", added({RESIDUAL: torch.tensor(1.0)}))
bad("long-clip-tables-scalars", added({RESIDUAL: torch.tensor(1.0), "positional_embedding": torch.tensor(1.0)}))
bad(
    "long-clip-without-the-first-table",
    lambda: save(without(openai(), "positional_embedding") | {RESIDUAL: torch.zeros(8, 16)}),
)
bad(
    "long-clip-tables-of-hugging-face",
    added({"text_model.embeddings.position_embedding_res.weight": torch.zeros(7, 16)}, hugging_face),
)

for _tower in ("text_model", "vision_model"):
    for _part, _kinds in (("q", ("weight",)), ("k", ("weight", "bias")), ("v", ("bias",))):
        for _kind in _kinds:
            bad(
                f"only-{_part}-{_kind}-of-{_tower}",
                lambda t=_tower, p=_part, k=_kind: save(
                    {
                        n: v
                        for n, v in hugging_face().items()
                        if not n.startswith(t) or f"self_attn.{'qkv'.replace(p, '')[0]}_proj.{k}" not in n
                    }
                ),
                merge=ANY if _tower == "vision_model" else REFUSED,
            )
bad(
    "thirds-of-different-widths",
    added({"text_model.encoder.layers.0.self_attn.k_proj.weight": torch.zeros(16, 17)}, hugging_face),
)
bad(
    "openais-thirds-of-different-widths",
    lambda: save(
        without(openai(), "transformer.resblocks.0.attn.in_proj_weight")
        | {
            f"transformer.resblocks.0.attn.{p}_proj.weight": torch.zeros(16, n)
            for p, n in (("q", 16), ("k", 16), ("v", 3))
        }
    ),
)
bad("openais-query-alone", added({"transformer.resblocks.0.attn.q_proj.weight": torch.zeros(16, 16)}))

RESNET = {"visual.layer1.0.conv1.weight": (4, 4, 1, 1), "visual.attnpool.positional_embedding": (2, 128)}
for _name in RESNET:
    for _shape in ((), (0,), (0, 4), (1, 2, 3, 4, 5), (3, 128), RESNET[_name]):
        bad(
            f"resnet-{_name}-{'x'.join(map(str, _shape)) or 'scalar'}",
            added(
                {n: torch.zeros(s) for n, s in RESNET.items()}
                | {_name: torch.zeros(_shape)}
                | {f"visual.layer{n}.0.bn1.bias": torch.zeros(4) for n in (2, 3, 4)}
            ),
            merge=ANY,
        )
bad(
    "resnet-block-999999999",
    added(
        {f"visual.layer{n}.999999999.bn1.bias": torch.zeros(1) for n in (1, 2, 3, 4)}
        | {n: torch.zeros(s) for n, s in RESNET.items()}
    ),
    merge=ANY,
)


# ---- other kinds of models -------------------------------------------------------------------------------------------

SDXL = "conditioner.embedders.0.transformer."


def checkpoint() -> dict[str, Tensor]:
    return {SDXL + n: t for n, t in text_encoder().items()} | {"model.diffusion_model.out.2.bias": torch.zeros(4)}


bad("sdxl-checkpoint", lambda: save(checkpoint()), info=TOLD, merge=ANY)
bad(
    "checkpoint-with-a-scalar-for-tokens",
    added({f"{SDXL}text_model.embeddings.token_embedding.weight": torch.tensor(1.0)}, checkpoint),
    info=TOLD,
)
bad("checkpoint-without-text-encoder", lambda: save({"model.diffusion_model.out.2.bias": torch.zeros(4)}), info=TOLD)
bad(
    "lora",
    lambda: save(
        {
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(64, 2),
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 16),
        }
    ),
    info=TOLD,
)
bad("text-encoder", lambda: save(text_encoder()), info=TOLD, merge=ANY)
bad("vision-encoder", lambda: save({n: t for n, t in hugging_face().items() if n.startswith("vis")}), info=TOLD)
bad(
    "training-state",
    lambda: save({f"model.{n}": t for n, t in openai().items()} | {"optimizer.0.exp_avg": ONE}),
    info=TOLD,
)
bad("vae", lambda: save({"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)}))
bad(
    "siglip",
    lambda: save(
        {n: t for n, t in hugging_face().items() if n != "logit_scale" and "class_emb" not in n}
        | {"logit_bias": ONE, "vision_model.head.probe": torch.zeros(1, 1, 16)}
    ),
    merge=ANY,
)
bad("other-text-encoder-wider", lambda: save(text_encoder_state_dict(random_clip(SMALL, text_width=32))), info=TOLD)
bad(
    "half-hugging-face",
    lambda: save(
        {n: t for n, t in openai().items() if n.startswith("visual.")}
        | {n: t for n, t in hugging_face().items() if n.startswith("text_model.")}
    ),
    merge=ANY,
)


# ---- pickles ---------------------------------------------------------------------------------------------------------


class Call:
    """Pickled, it asks its reader to call something."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def program(module: str, name: str, *arguments, protocol: int = 2) -> bytes:
    """A pickle that calls what is named so, which need not be there."""
    given = pickle.dumps(arguments, protocol).removesuffix(b".")[2 if protocol > 1 else 0 :]
    return (bytes([0x80, protocol]) if protocol > 1 else b"") + f"c{module}\n{name}\n".encode() + given + b"R."


MAKE = f"__import__('os').mkdir('{RAN}')"
BOMBS = {
    "os.system": program("os", "system", f"mkdir {RAN}"),
    "posix.system": program("posix", "system", f"mkdir {RAN}"),
    "os.mkdir": program("os", "mkdir", RAN),
    "builtins.eval": program("builtins", "eval", MAKE),
    "py2-eval": program("__builtin__", "eval", MAKE),
    "builtins.exec": program("builtins", "exec", MAKE),
    "subprocess.call": program("subprocess", "call", ["mkdir", RAN]),
    "subprocess.Popen": program("subprocess", "Popen", ["mkdir", RAN]),
    "importlib": program("importlib", "import_module", "antigravity"),
    "runpy": program("runpy", "run_path", f"{RAN}.py"),
    "getattr": program("builtins", "getattr", OrderedDict, "fromkeys"),
    "torch.load": program("torch.serialization", "load", f"{RAN}.pt"),
    "torch.hub": program("torch.hub", "load", "owner/name", "model"),
    "torch.jit": program("torch.jit", "load", f"{RAN}.pt"),
    "numpy.load": program("numpy", "load", f"{RAN}.npy"),
    "torch.ops": program("torch._ops", "load_library", f"{RAN}.so"),
    "name-that-begins-like-a-clips": program("clip_evil", "run", RAN),
    "name-that-ends-like-a-clips": program("os.open_clip", "system", f"mkdir {RAN}"),
    "name-in-two-parts": program("collections", "OrderedDict.fromkeys", [1]),
    "name-with-a-space": program("os system", "OrderedDict", [1]),
    "name-of-a-novel": program("os" * 10_000, "system", RAN),
    "name-that-is-not-ascii": program("оs", "system", RAN),
}
for _id, _bomb in BOMBS.items():
    bad(f"bomb-{_id}", _bomb, ".pt")


class Bomb:
    """What torch.save and pickle make of it calls os.mkdir."""

    def __reduce__(self):
        return os.mkdir, (RAN,)


def nested(value, depth: int = 40):
    """Inside of many dicts, lists and tuples."""
    for _ in range(depth):
        value = OrderedDict(a=[{"b": (value,)}])
    return value


for _protocol in range(6):
    bad(f"bomb-of-protocol-{_protocol}", pickle.dumps({"a": Bomb()}, _protocol), ".pt")
    bad(f"bomb-of-protocol-{_protocol}-called-safetensors", pickle.dumps(Bomb(), _protocol))
for _id, _value in {
    "plain": Bomb(),
    "in-a-dict": {"visual.proj": ONE, "bomb": Bomb()},
    "in-a-list": [Bomb()],
    "deep-inside": nested(Bomb(), 10),
    "very-deep-inside": nested(Bomb(), 60),
    "behind-the-weights": {"state_dict": {"visual.proj": ONE}, "optimizer": [Bomb()]},
}.items():
    bad(f"bomb-in-a-zip-{_id}", lambda v=_value: zipped(v), ".pt")
    bad(f"bomb-in-a-legacy-file-{_id}", lambda v=_value: legacy(v), ".bin")
bad("bomb-in-a-zip-called-safetensors", lambda: zipped({"a": Bomb()}))
bad("bomb-in-a-legacy-file-called-safetensors", lambda: legacy({"a": Bomb()}))


def rebuilt(archive: bytes, replaced: Mapping[str, bytes]) -> bytes:
    """A zip with the contents of the entries of these last names replaced (or added), nothing packed."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(made, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            if name.removeprefix(f"{root}/") not in replaced:
                new.writestr(name, old.read(name))
        for name, content in replaced.items():
            new.writestr(f"{root}/{name}", content)
    return made.getvalue()


def in_zip(data: bytes) -> Callable[[], bytes]:
    """A state dict's file with another pickle in it."""
    return lambda: rebuilt(whole("zip"), {"data.pkl": data})


def in_script(data: bytes) -> Callable[[], bytes]:
    """A TorchScript archive with another pickle in it."""
    return lambda: rebuilt(whole("script"), {"data.pkl": data})


def in_legacy(data: bytes) -> Callable[[], bytes]:
    """A file of torch before 1.6 with other objects in it, and no data."""

    def make() -> bytes:
        empty, nothing = legacy({}), pickle.dumps({}, 2)
        return empty.replace(nothing, data, 1)

    return make


def everywhere(id: str, data: bytes, **expected) -> None:
    for where, make in (("a-zip", in_zip), ("a-script", in_script), ("a-legacy-file", in_legacy)):
        merge = {} if make is in_zip else {"merge": None}  # to merge it is to read it as before
        bad(f"{id}-in-{where}", make(data), ".pt", **merge, **expected)


for _id in ("posix.system", "builtins.eval", "getattr", "name-in-two-parts"):
    everywhere(f"bomb-{_id}", BOMBS[_id])

HEAD, CLIP = b"\x80\x02", b"cclip.model\nCLIP\n"
SYSTEM = b"cposix\nsystem\n"


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


FLOATS = b"(" + word("storage") + b"ctorch\nFloatStorage\n"
PERSISTENT = {
    "of-a-number": number(5),
    "of-nothing": b")",
    "of-a-word": word("storage"),
    "of-a-list": b"]",
    "module": b"(" + word("module") + CLIP + word("/etc/passwd") + word("source") + b"t",
    "module-of-nothing": b"(" + word("module") + b"NNNt",
    "storage-without-type": b"(" + word("storage") + b"N" + word("0") + word("cpu") + number(4) + b"t",
    "storage-not-there": FLOATS + word("no") + word("cpu") + number(4) + b"t",
    "storage-outside": FLOATS + word("../code/x") + word("cpu") + number(4) + b"t",
    "storage-of-another-kind": b"(" + word("storage") + CLIP + word("0") + word("cpu") + number(4) + b"t",
    "storage-of-terabytes": FLOATS + word("0") + word("cpu") + number(TB) + b"t",
    "storage-of-words": FLOATS + word("0") + word("cpu") + word("4") + b"t",
}
for _id, _pid in PERSISTENT.items():
    everywhere(f"persistent-{_id}", HEAD + _pid + b"Q.")


def storage(elements: int, key: str = "0") -> bytes:
    return FLOATS + word(key) + word("cpu") + number(elements) + b"tQ"


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(elements: int, size: tuple, stride: tuple, offset: int = 0, key: str = "0") -> bytes:
    """The operations that make a tensor over a storage."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage(elements, key)
        + number(offset)
        + numbers(*size)
        + numbers(*stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def in_dict(*items: tuple[str, bytes]) -> bytes:
    return HEAD + b"}(" + b"".join(word(name) + value for name, value in items) + b"u."


PROJ = "visual.proj"
everywhere("stride-0-of-terabytes", in_dict((PROJ, tensor(1, (1 << 40,), (0,)))))
everywhere("stride-0-in-two-dimensions", in_dict((PROJ, tensor(4, (1 << 20, 1 << 20, 4), (0, 0, 1)))))
everywhere("shape-beyond-its-storage", in_dict((PROJ, tensor(4, (1000, 1000, 1000), (1000000, 1000, 1)))))
everywhere("shape-of-terabytes", in_dict((PROJ, tensor(4, (10000, 10000, 10000), (100000000, 10000, 1)))))
everywhere("shape-that-overflows", in_dict((PROJ, tensor(4, (1 << 40, 1 << 40), (1 << 40, 1)))))
everywhere("shape-below-zero", in_dict((PROJ, tensor(4, (-4,), (1,)))))
everywhere("shape-of-nothing-times-below-zero", in_dict((PROJ, tensor(0, (0, -1), ()))))
everywhere("shape-below-zero-twice", in_dict((PROJ, tensor(4, (-3, -4), (1, 1)))))
everywhere("stride-below-zero", in_dict((PROJ, tensor(4, (4,), (-1,), 3))))
everywhere("offset-below-zero", in_dict((PROJ, tensor(4, (4,), (1,), -8))))
everywhere("offset-beyond-its-storage", in_dict((PROJ, tensor(4, (4,), (1,), 1 << 60))))
everywhere("shape-and-stride-of-two-lengths", in_dict((PROJ, tensor(4, (2, 2), (1,)))))
everywhere("shape-of-words", in_dict((PROJ, tensor(4, (), ()).replace(numbers(), b"(" + word("a") + b"t", 1))))
everywhere("call-of-a-storage", in_dict((PROJ, b"ctorch.storage\nUntypedStorage\n" + number(1 << 41) + b"\x85R")))
everywhere("call-of-a-typed-storage", in_dict((PROJ, b"ctorch\nFloatStorage\n" + number(1 << 40) + b"\x85R")))
everywhere(
    "storages-of-one-remembered-number",
    HEAD
    + b"}("
    + number(30_000_000)
    + b"q\0"
    + b"".join(
        word(str(n)) + tensor(1, (1,), (1,), key=str(n)).replace(number(1) + b"tQ", b"h\0tQ") for n in range(300)
    )
    + b"u.",
)

for _id, _data in {
    "call-of-a-clip": HEAD + CLIP + word(f"mkdir {RAN}") + b"\x85R.",
    "state-for-a-clip": HEAD + CLIP + b")\x81}" + word("__setstate__") + SYSTEM + b"sb.",
    "class-of-a-clip-changed": HEAD + CLIP + b"}" + word("x") + number(1) + b"sb.",
    "clip-that-is-its-own-part": HEAD + CLIP + b")\x81q\0}" + word("self") + b"h\0sb.",
    "clip-with-odd-parts": HEAD
    + CLIP
    + b")\x81}("
    + word("_modules")
    + number(5)
    + word("_parameters")
    + b"]"
    + word("_buffers")
    + b"N"
    + b"ub.",
    "clip-with-state-of-words": HEAD + CLIP + b")\x81" + word("state") + b"b.",
    "dict-with-items-of-its-own": HEAD
    + b"ccollections\nOrderedDict\n)R}("
    + word("items")
    + number(5)
    + word("get")
    + number(5)
    + word("values")
    + number(5)
    + word("keys")
    + number(5)
    + b"ub.",
    "newobj-ex": b"\x80\x04" + CLIP + b")}\x92.",
    "inst": HEAD + b"(" + word(f"mkdir {RAN}") + b"iposix\nsystem\n.",
    "obj": HEAD + b"(" + SYSTEM + word(f"mkdir {RAN}") + b"o.",
    "ext1": HEAD + b"\x82\x01.",
    "ext4": HEAD + b"\x84\x01\0\0\0.",
    "stack-global": b"\x80\x04" + word("posix") + word("system") + b"\x93" + word(f"mkdir {RAN}") + b"\x85R.",
    "dup-and-pop": HEAD + b"N20.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "newobj-of-eval": HEAD + b"cbuiltins\neval\n" + word(MAKE) + b"\x85\x81.",
    "nothing": HEAD + b"N.",
    "number": HEAD + b"K\x05.",
    "set": HEAD + b"cbuiltins\nset\n]\x85R.",
    "list-that-holds-itself": HEAD + b"]q\0h\0a.",
    "dict-that-holds-itself": HEAD + b"}q\0" + word("a") + b"h\0s.",
    "dict-that-is-its-own-state-dict": HEAD + b"}q\0" + word("state_dict") + b"h\0s.",
    "nothing-on-the-stack": HEAD + b".",
    "more-taken-than-put-down": HEAD + b"R.",
    "mark-without-end": HEAD + b"(" * 1000 + b".",
    "tuple-without-mark": HEAD + b"Nt.",
    "memo-of-nothing": HEAD + b"h\x05.",
    "memo-of-4-billion": HEAD + b"}r\xff\xff\xff\xff.",
    "memo-of-100-million": HEAD + b"}r\xff\xff\xff\x05.",
    "string-of-4-billion": HEAD + b"X\xff\xff\xff\xffabc.",
    "bytes-of-4-billion": HEAD + b"T\xff\xff\xff\xffabc.",
    "long-of-2-billion": HEAD + b"\x8b\xff\xff\xff\x7fabc.",
    "long-in-words": HEAD + b"L" + b"9" * 100_000 + b"L\n.",
    "int-in-words": HEAD + b"I" + b"9" * 100_000 + b"\n.",
    "list-for-a-key": HEAD + b"}]Ns.",
    "protocol-200": b"\x80\xc8}.",
    "tuple-in-tuple-as-key": HEAD + b"})" + b"\x85" * 1_000_000 + b"Ns.",
    "list-in-list": HEAD + b"]" * 150_000 + b"a" * 149_999 + b".",
    "laughing-tuple-as-key": HEAD + b"})" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(90)) + b"Ns.",
    "laughing-tuple-of-many-as-key": HEAD
    + b"})"
    + b"".join(b"q%c(%st" % (n, b"h%c" % n * 200) for n in range(9))
    + b"Ns.",
    "laughing-lists": HEAD + b"]" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(90)) + b".",
    "laughing-sets": HEAD
    + b"]("
    + b"".join(map(number, range(50_000)))
    + b"eq\0"
    + b"("
    + b"cbuiltins\nset\nh\0\x85R" * 3000
    + b"l."[1:],
    "laughing-dicts": HEAD
    + b"]("
    + b"".join(b"]" + b"(" + number(n) + b"Ne" for n in range(20_000))
    + b"eq\0"
    + b"]q\1"
    + b"ccollections\nOrderedDict\nh\0\x85Ra" * 3000
    + b".",
    "laughing-state": HEAD
    + b"}("
    + b"".join(word(str(n)) + b"N" for n in range(50_000))
    + b"uq\0]"
    + (CLIP + b")\x81h\0ba") * 3000
    + b".",
    "same-long-key-again-and-again": HEAD + b"(" + b"N" * 100_000 + b"tq\0}(" + b"h\0N" * 50_000 + b"u.",
    "endless-operations": HEAD + b"](" + b"N" * 16_000_000 + b"e.",
    "pickle-of-20-mb": HEAD + word("a" * (20 << 20)) + b".",
}.items():
    everywhere(f"pickle-{_id}", _data)


bad("pickle-endless-calls", in_zip(HEAD + b"](" + (CLIP + b")\x81") * 110_000 + b"e."), ".pt", merge=None)


def laughing_modules(levels: int, name: str, entries: int = 0) -> bytes:
    """A module in which one module is reached in 2 ** levels ways, by long names, each with many entries."""
    more = b"".join(word(f"n{n}") + b"N" for n in range(entries))
    data = CLIP + b")\x81}(" + more + b"ub"
    for level in range(levels):
        again = b"q%c" % level + b"0"
        data += again[:2] + CLIP + b")\x81}(" + word(f"{name}a") + b"h%c" % level + word(f"{name}b") + b"h%c" % level
        data += more + b"ub"
    return HEAD + data + b"."


everywhere("pickle-laughing-modules", laughing_modules(90, "n" * 180))
everywhere("pickle-laughing-modules-with-many-entries", laughing_modules(20, "n", 2000))


# ---- zip files -------------------------------------------------------------------------------------------------------


def raw_zip(entries: Iterable[tuple[str, bytes]], **said) -> bytes:
    """A zip of stored entries; `said` changes what its headers say."""
    content, directory, count = bytearray(), bytearray(), 0
    for name, data in entries:
        told = {"flags": 0, "method": 0, "packed": len(data), "size": len(data), "offset": len(content), "extra": b""}
        told |= said.get(name, {})
        middle = struct.pack(
            "<HHHHIIIHH",
            told["flags"],
            told["method"],
            0,
            33,
            zipfile.crc32(data),
            told["packed"],
            told["size"],
            len(name.encode()),
            len(told["extra"]),
        )
        directory += b"PK\1\2" + struct.pack("<HH", 20, 20) + middle + struct.pack("<HHHII", 0, 0, 0, 0, told["offset"])
        directory += name.encode() + told["extra"]
        content += b"PK\3\4" + struct.pack("<H", 20) + middle + name.encode() + told["extra"] + data
        count += 1
    end = {"count": count & 0xFFFF, "length": len(directory), "offset": len(content)} | said.get("end", {})
    finish = struct.pack("<HHHHIIH", 0, 0, end["count"], end["count"], end["length"], end["offset"], 0)
    return bytes(content + directory) + said.get("end64", b"") + b"PK\5\6" + finish


def state_entries(root: str = "archive") -> list[tuple[str, bytes]]:
    """The entries of a state dict's file."""
    with zipfile.ZipFile(io.BytesIO(whole("zip"))) as archive:
        return [(f"{root}/{name.split('/', 1)[1]}", archive.read(name)) for name in archive.namelist()]


def said_of(name: str, **told) -> Callable[[], bytes]:
    return lambda: raw_zip(state_entries(), **{f"archive/{name}": told})


def end64(**told) -> bytes:
    """The two records that end a zip of many or large entries."""
    said = {"count": 1, "length": 50, "offset": 0, "at": 0} | told
    record = struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, said["count"], said["count"], said["length"], said["offset"])
    return b"PK\6\6" + record + b"PK\6\7" + struct.pack("<IQI", 0, said["at"], 1)


BIG = 0xFFFFFFFF
bad("zip-deflated-pickle", said_of("data.pkl", method=8), ".pt")
bad("zip-deflated-data", said_of("data/0", method=8), ".pt")
bad("zip-of-a-method-that-is-not-known", said_of("data/0", method=77), ".pt")
bad("zip-encrypted-pickle", said_of("data.pkl", flags=1), ".pt")
bad("zip-encrypted-data", said_of("data/3", flags=1), ".pt")
bad("zip-larger-than-packed", said_of("data/0", size=1 << 31), ".pt")
bad("zip-entry-larger-than-the-file", said_of("data/0", size=1 << 31, packed=1 << 31), ".pt")
bad("zip-pickle-larger-than-the-file", said_of("data.pkl", size=1 << 31, packed=1 << 31), ".pt")
bad("zip-entry-beyond-the-file", said_of("data/0", offset=1 << 31), ".pt")
bad("zip-pickle-beyond-the-file", said_of("data.pkl", offset=1 << 31), ".pt")
bad("zip-pickle-in-the-middle-of-data", said_of("data.pkl", offset=9000), ".pt")
bad(
    "zip64-entry-of-exabytes",
    said_of("data/0", size=BIG, packed=BIG, extra=struct.pack("<HHQQ", 1, 16, 1 << 60, 1 << 60)),
    ".pt",
)
bad("zip64-pickle-at-exabytes", said_of("data.pkl", offset=BIG, extra=struct.pack("<HHQ", 1, 8, 1 << 62)), ".pt")
bad(
    "zip64-extra-that-is-too-short", said_of("data/0", size=BIG, packed=BIG, extra=struct.pack("<HHI", 1, 16, 1)), ".pt"
)
bad("zip-two-entries-of-one-name", lambda: raw_zip([*state_entries(), ("archive/data.pkl", BOMBS["os.mkdir"])]), ".pt")
bad("zip-two-pickles", lambda: raw_zip([*state_entries(), ("other/data.pkl", BOMBS["os.mkdir"])]), ".pt")
bad(
    "zip-claims-many-entries",
    lambda: raw_zip(state_entries(), end={"count": 0xFFFE}),
    ".pt",
    load=ANY,
    info=ANY,
    merge=ANY,
)
bad(
    "zip64-claims-2-to-the-31-entries",
    lambda: raw_zip(
        state_entries(),
        end={"count": 0xFFFF, "length": BIG, "offset": BIG},
        end64=end64(count=1 << 31, length=(1 << 31) * 46),
    ),
    ".pt",
)
bad("zip-directory-longer-than-the-file", lambda: raw_zip(state_entries(), end={"length": 1 << 30}), ".pt")
bad("zip-directory-beyond-the-file", lambda: raw_zip(state_entries(), end={"offset": 1 << 30}), ".pt")
bad("zip-really-many-entries", lambda: raw_zip((f"archive/data/{n}", b"") for n in range(300_000)), ".pt")
bad("zip-no-data", lambda: raw_zip([e for e in state_entries() if "/data/" not in e[0]]), ".pt")
bad("zip-one-storage-missing", lambda: raw_zip([e for e in state_entries() if not e[0].endswith("/data/4")]), ".pt")
bad(
    "zip-names-that-lead-out",
    lambda: raw_zip([*state_entries("../../up"), (f"../{RAN}", b"x")]),
    ".pt",
    load=ANY,
    info=ANY,
    merge=ANY,
)
bad(
    "zip-absolute-names",
    lambda: raw_zip([*state_entries(), (f"/tmp/{RAN}", b"x")]),
    ".pt",
    load=ANY,
    info=ANY,
    merge=ANY,
)
bad(
    "zip-in-which-all-data-are-one-entry",
    lambda: raw_zip(state_entries(), **{f"archive/data/{n}": {"offset": 1000} for n in range(40)}),
    ".pt",
    load=ANY,
    info=ANY,
    merge=ANY,
)


def script_of_clones() -> bytes:
    """A TorchScript archive that names one large misaligned storage very often."""
    items = ((f"visual.n{n}", tensor(1_000_000, (1_000_000,), (1,))) for n in range(3000))
    return raw_zip([("x/data.pkl", in_dict(*items)), ("x/data/0", bytes(4_000_000)), ("x/constants.pkl", b"")])


def script_of_overlapping_storages() -> bytes:
    """A TorchScript archive in which very many entries are the same place in the file."""
    count, size = 2000, 4_000_000
    items = ((f"visual.n{n}", tensor(size // 4, (size // 4,), (1,), key=str(n))) for n in range(count))
    same = {f"x/data/{n}": {"offset": 1, "packed": size, "size": size} for n in range(1, count)}
    data = [("x/data/0", bytes(size)), *((name, b"") for name in same)]
    moved = {name: told | {"offset": 0} for name, told in same.items()}
    return raw_zip([*data, ("x/data.pkl", in_dict(*items)), ("x/constants.pkl", b"")], **moved)


bad("script-of-one-misaligned-storage-very-often", script_of_clones, ".pt")
bad("script-of-overlapping-storages", script_of_overlapping_storages, ".pt")
bad(
    "script-packed-pickle",
    lambda: raw_zip([("x/data.pkl", b"N."), ("x/constants.pkl", b"")], **{"x/data.pkl": {"method": 8}}),
    ".pt",
)
bad("script-without-data", lambda: raw_zip([("x/data.pkl", HEAD + b"N."), ("x/constants.pkl", b"")]), ".pt")
for _id, _name, _bomb in (("constants", "constants.pkl", "posix.system"), ("code", "code/__torch__.py", "os.mkdir")):
    bad(
        f"script-with-a-bomb-for-{_id}",
        lambda n=_name, b=_bomb: rebuilt(whole("script"), {n: BOMBS[b]}),
        ".pt",
        load=ANY,
        info=ANY,
        merge=ANY,
    )


# ---- models in several files, and folders ----------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


def index(**weight_map) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def whole_index(shard: str = SHARD) -> bytes:
    return index(**dict.fromkeys(OPENAI, shard))


def sharded(id: str, index: Callable[[], bytes] | bytes, shards: Callable[[], Mapping] = dict, **expected) -> None:
    """An index, opened by itself and by its folder."""
    made = index if callable(index) else lambda: index
    for opened in (INDEX, ""):
        bad_tree(
            f"{id}{'-by-its-folder' if not opened else ''}", lambda: {INDEX: made(), **shards()}, opened, **expected
        )


sharded("index-of-a-missing-shard", whole_index)
for _id, _name in {
    "up": "../up.safetensors",
    "absolute": "/etc/passwd",
    "up-on-windows": "..\\up.safetensors",
    "folder": "a/b",
    "nothing": "",
    "dot": ".",
    "null": "a\0b",
    "itself": INDEX,
    "line-breaks": "a\nb.safetensors",
    "half-a-letter": "\ud800.safetensors",
    "very-long": "a" * 5000,
    "longer-than-a-name": "a" * 300,
    "drive": "c:x",
}.items():
    sharded(f"index-that-names-{_id}", lambda name=_name: whole_index(name))
for _id, _text in {
    "not-json": b"{abc",
    "empty": b"",
    "list": b"[]",
    "no-map": b'{"metadata": {}}',
    "map-a-list": b'{"weight_map": ["a"]}',
    "map-empty": b'{"weight_map": {}}',
    "map-of-numbers": b'{"weight_map": {"a": 5}}',
    "not-utf8": b"\xff\xfe\x00",
    "nested": b'{"weight_map": ' + b"[" * 100_000,
    "map-of-null": b'{"weight_map": null}',
    "nan": b"NaN",
    "map-of-maps": b'{"weight_map": {"a": {"b": "c"}}}',
}.items():
    sharded(f"index-{_id}", _text)
sharded("index-of-30-mb", lambda: b'{"weight_map": {' + b" " * (30 << 20) + b"}}")
sharded("index-whose-shard-lacks-a-tensor", whole_index, lambda: {SHARD: save(without(openai(), "ln_final.bias"))})
sharded("index-whose-shard-is-cut", whole_index, lambda: {SHARD: cut("openai", 20_000)()})
sharded("index-whose-shard-is-a-bomb", whole_index, lambda: {SHARD: zipped({"ln_final.bias": Bomb()})})
sharded("index-whose-shard-is-text", whole_index, lambda: {SHARD: b"hello"})
sharded("index-of-a-name-with-line-breaks", lambda: index(**{"a\nb": SHARD}), lambda: {SHARD: whole("openai")})
sharded("index-of-a-name-that-is-not-there", lambda: index(**{"a" * 5000: SHARD}), lambda: {SHARD: whole("openai")})
sharded(
    "index-of-half-the-tensors",
    lambda: index(**{n: SHARD for n in OPENAI if n.startswith("visual.")}),
    lambda: {SHARD: whole("openai")},
    info=TOLD,
)
bad_tree("shard-whose-index-is-damaged", lambda: {INDEX: b"{", SHARD: whole("openai")}, SHARD)


def configured(id: str, config: bytes | dict, name: str = "config.json", **expected) -> None:
    """A whole model beside a config that cannot be true of it."""
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    bad_tree(
        f"config-{id}",
        lambda: {name: text, "model.safetensors": whole("hugging_face")},
        "model.safetensors",
        merge=ANY,
        **expected,
    )


def sections(**changes) -> dict:
    """A config of Hugging Face's with this in both of its sections."""
    said = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 1}
    said |= {"hidden_act": "quick_gelu"} | changes
    return {"model_type": "clip", "text_config": said, "vision_config": said}


for _id, _value in {"3": 3, "17": 17}.items():
    configured(f"of-{_id}-heads", sections(num_attention_heads=_value))
for _id, _value in {"relu": "relu", "list": ["gelu"], "novel": "gelu\n" * 10_000, "null": None, "number": 5}.items():
    configured(f"of-activation-{_id}", sections(hidden_act=_value))
for _id, _value in {
    "0": 0,
    "huge": 10**4000,
    "word": "12",
    "null": None,
    "list": [1],
    "true": True,
    "fraction": 1.5,
}.items():
    # Not believed; they are as if they were not there.
    configured(f"of-heads-{_id}", sections(num_attention_heads=_value), load=ANY, info=TOLD)
for _id, _text in {
    "damaged": b"{abc",
    "empty": b"",
    "list": b"[1]",
    "nested": b"[" * 100_000,
    "not-utf8": b"\xff\xfe",
    "huge-number": b'{"model_type": ' + b"9" * 5000 + b"}",
    "siglip": b'{"model_type": "siglip"}',
    "sections-of-words": b'{"model_type": "clip", "text_config": "a", "vision_config": 5}',
}.items():
    configured(_id, _text, load=ANY, info=ANY)
for _id, _cfg in {
    "head-width-0": {"vision_cfg": {"width": 16, "head_width": 0}},
    "words": {"vision_cfg": "a"},
    "layers-a-list": {"vision_cfg": {"width": 16, "layers": [1], "head_width": 16}},
}.items():
    configured(f"open-clip-{_id}", {"model_cfg": _cfg}, "open_clip_config.json", load=ANY, info=ANY)
configured(
    "open-clip-huge-width",
    {"model_cfg": {"vision_cfg": {"width": 10**4000}}},
    "open_clip_config.json",
    load=ANY,
    info=TOLD,
)
bad_tree(
    "config-of-siglip-beside-siglip",
    lambda: {
        "config.json": b'{"model_type": "siglip"}',
        "model.safetensors": save(without(hugging_face(), "vision_model.embeddings.class_embedding")),
    },
    "",
    merge=ANY,
)

bad_tree("folder-called.safetensors", lambda: {"nothing.txt": b""}, "")
bad_tree("folder-of-two-models", lambda: {f"{n}.safetensors": whole("openai") for n in "ab"}, "")
bad_tree("folder-in-place-of-a-model", lambda: {"model.safetensors/x": b""}, "")
bad_tree("folder-in-place-of-a-shard", lambda: {INDEX: whole_index(), f"{SHARD}/x": b""}, INDEX)
bad_tree("folder-of-a-damaged-run", lambda: {"config.json": b"{", "metrics.jsonl": b"{"}, "")
bad_tree(
    "folder-of-a-run-of-lists", lambda: {"config.json": b'{"identity": 1, "model": []}', "metrics.jsonl": b"[]\n"}, ""
)
bad_tree("folder-of-a-run-of-nests", lambda: {"config.json": b"[" * 100_000, "metrics.jsonl": b"[" * 100_000}, "")
bad_tree("folder-of-a-run-that-is-not-utf8", lambda: {"config.json": b"\xff\xfe", "metrics.jsonl": b""}, "")


def other(id: str, name: str, write: Callable[[Path], str | None], **expected) -> None:
    BAD_FILES.append(BadFile(id, name, write, **expected))


def unreadable(folder: Path) -> None:
    (folder / "unreadable.safetensors").write_bytes(whole("openai"))
    (folder / "unreadable.safetensors").chmod(0)


other("not-there", "not-there.safetensors", lambda folder: None)
other("not-there-in-a-folder", "no/such.safetensors", lambda folder: None)
other("in-a-file", "zeros.safetensors/model.safetensors", lambda folder: None)
other("name-longer-than-can-be", "a" * 300 + ".safetensors", lambda folder: None)
other("null-in-the-name", "a\0b.safetensors", lambda folder: None)
other("dangling-link", "dangling.safetensors", lambda folder: (folder / "dangling.safetensors").symlink_to("nowhere"))
other("link-to-itself", "loop.safetensors", lambda folder: (folder / "loop.safetensors").symlink_to("loop.safetensors"))
other("link-that-leads-out-to-nothing", "out.pt", lambda folder: (folder / "out.pt").symlink_to("../../../nowhere"))
if not hasattr(os, "geteuid") or os.geteuid() != 0:  # root may read anything
    other("unreadable", "unreadable.safetensors", unreadable)
for _id, _name in {
    "of-other-scripts": "модель 模型 🎈.safetensors",
    "long": "n" * 200 + ".safetensors",
    "of-marks": "a 'b' \"c\" {d} %s.pt",
}.items():
    other(f"name-{_id}", _name, lambda folder, name=_name: (folder / name).write_bytes(cut("openai", 500)()) and None)
