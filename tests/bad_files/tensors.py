"""Tensors that are missing, misshapen, of another dtype or not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from clips import SMALL
from safetensors.torch import save

from .corpus import (
    ANY,
    HUGGING_FACE,
    OPENAI,
    REFUSED,
    REPORTED,
    added,
    bad,
    entry,
    gmp,
    hugging_face,
    openai,
    raw_safetensors,
    text_encoder,
    without,
)


def of_shape(name: str, shape: tuple[int, ...], tensors: Callable[[], dict]) -> Callable[[], bytes]:
    return lambda: save(tensors() | {name: torch.zeros(shape)})


def family(id: str, shapes: Mapping[str, tuple], tensors: Callable[[], dict], whole_clip: bool) -> None:
    """Add files with each tensor missing, and with each in shapes that it never has."""
    for name, right in shapes.items():
        elsewhere = name.startswith(("visual", "vision", "logit_scale", "text_projection"))
        merge = ANY if elsewhere else REFUSED
        expected = dict(merge=merge) if whole_clip else dict(merge=merge, info=ANY if elsewhere else REPORTED)
        bad(f"{id}-without-{name}", lambda name=name: save(without(tensors(), name)), **expected)
        for shape in ((), (0,), (1, 2, 3, 4, 5)):
            if shape != tuple(right):
                shown = "x".join(map(str, shape)) or "scalar"
                bad(f"{id}-{name}-{shown}", of_shape(name, shape, tensors), **expected)


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
    bad(f"weight-of-{_dtype}-in-a-text-encoder", retyped(HF_FC, getattr(torch, _dtype), text_encoder), info=REPORTED)
    _query = "text_model.encoder.layers.0.self_attn.q_proj.weight"
    bad(f"query-of-{_dtype}-in-a-text-encoder", retyped(_query, getattr(torch, _dtype), text_encoder), info=REPORTED)
    bad(f"projection-of-{_dtype}", retyped("text_projection", getattr(torch, _dtype)), merge=ANY)
for _code, _bits in (("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)):
    _header = {"token_embedding.weight": entry([4, 16], [0, 8 * _bits], _code)}
    bad(f"text-encoder-of-{_code}", raw_safetensors(_header, bytes(8 * _bits)), info=ANY)
for _word in ("nan", "inf", "-inf"):
    for _name in ("ln_final.bias", "token_embedding.weight"):
        _broken = {_name: torch.full(OPENAI[_name], float(_word))}
        bad(f"{_word.replace('-', 'minus-')}-in-{_name}", added(_broken), load=ANY, info=REPORTED)
    bad(
        f"{_word.replace('-', 'minus-')}-in-a-text-encoder",
        added({HF_FC: torch.full((64, 16), float(_word))}, text_encoder),
        info=REPORTED,
    )
bad("nan-in-vision", added({"visual.proj": torch.full((16, 16), torch.nan)}), load=ANY, info=REPORTED, merge=ANY)
bad("nan-in-logit-scale", added({"logit_scale": torch.tensor(torch.nan)}), load=ANY, info=REPORTED, merge=ANY)
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
bad(
    "gmp-text-tower-alone", lambda: save({n: t for n, t in gmp().items() if not n.startswith("visual.")}), info=REPORTED
)
bad(
    "gmp-under-a-text-encoders-names",
    added(
        {
            "text_model.encoder.layers.0.mlp.fc1.r": torch.zeros(64, 1),
            "text_model.encoder.layers.0.mlp.fc1.theta": torch.zeros(64, 16),
        },
        text_encoder,
    ),
    info=REPORTED,
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
