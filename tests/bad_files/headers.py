"""safetensors files whose headers or names are wrong."""

from __future__ import annotations

import torch
from safetensors.torch import save

from .corpus import ANY, ONE, REFUSED, REPORTED, TB, added, bad, entry, hugging_face, raw_safetensors, text_encoder

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
        info=REPORTED if _id == "nothing-times-large" else REFUSED,
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
    """Return a file with `count` tensors of one byte."""
    return raw_safetensors({name.format(n): entry([1], [n, n + 1], "U8") for n in range(count)}, bytes(count))


bad("100000-tensors", lambda: many_tensors("tensor.{}", 100_000), merge=None)
bad("20000-token-embeddings", lambda: many_tensors("{}.token_embedding.weight"), info=ANY)
bad("20000-layers", lambda: many_tensors("text_model.encoder.layers.{}.mlp.fc1.bias"), info=ANY)
bad("20000-layers-of-a-vision-tower", lambda: many_tensors("visual.transformer.resblocks.{}.ln_1.bias"), info=ANY)
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
    "names-with-line-breaks-in-a-text-encoder",
    added({"text_model.encoder.layers.0\n.x": ONE}, text_encoder),
    info=REPORTED,
)
bad(
    "names-with-line-breaks-before-a-text-encoder",
    lambda: save({f"a\nb.{n}": t for n, t in text_encoder().items()}),
    info=REPORTED,
)
