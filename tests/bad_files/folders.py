"""Models in several files, configs beside a model, folders, and odd names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save

from .corpus import (
    ANY,
    BAD_FILES,
    OPENAI,
    REPORTED,
    BadFile,
    bad_tree,
    cut,
    hugging_face,
    openai,
    whole,
    without,
    zipped,
)
from .pickle_parts import Bomb

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"


def index(**weight_map) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


def whole_index(shard: str = SHARD) -> bytes:
    return index(**dict.fromkeys(OPENAI, shard))


def sharded(id: str, index: Callable[[], bytes] | bytes, shards: Callable[[], Mapping] = dict, **expected) -> None:
    """Add an index, opened by itself and by its folder."""
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
    info=REPORTED,
)
bad_tree("shard-whose-index-is-damaged", lambda: {INDEX: b"{", SHARD: whole("openai")}, SHARD)


def configured(id: str, config: bytes | dict, name: str = "config.json", **expected) -> None:
    """Add a whole model beside a config that cannot be true of it."""
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    bad_tree(
        f"config-{id}",
        lambda: {name: text, "model.safetensors": whole("hugging_face")},
        "model.safetensors",
        merge=ANY,
        **expected,
    )


def sections(**changes) -> dict:
    """Return a config of Hugging Face's with these changes in both sections."""
    section = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 1}
    section |= {"hidden_act": "quick_gelu"} | changes
    return {"model_type": "clip", "text_config": section, "vision_config": section}


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
    configured(f"of-heads-{_id}", sections(num_attention_heads=_value), load=ANY, info=REPORTED)
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
    info=REPORTED,
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
