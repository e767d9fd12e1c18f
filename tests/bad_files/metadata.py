"""Metadata under our key that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable

from safetensors.torch import save

from clip_finetune.engine.clip.full_clip import file_metadata

from .corpus import ANY, bad, openai, small_clip


def about(**changes) -> dict:
    return json.loads(file_metadata(small_clip())["clip_finetune"]) | changes


def with_metadata(text) -> Callable[[], bytes]:
    """Return a function for a whole file with this text under our key."""
    made = text if callable(text) else lambda: text
    return lambda: save(openai(), {"clip_finetune": made()})


def claims(**sizes) -> Callable[[], bytes]:
    """Return a function for a whole file whose metadata gives other sizes."""
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
