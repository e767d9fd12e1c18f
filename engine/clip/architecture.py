"""What a CLIP is made of, read from the shapes of its tensors.

Two things are not in the shapes. The activation of the MLPs (QuickGELU or GELU) and the number of attention heads come
from metadata where a file has any; otherwise they are looked up or assumed, and every assumption is told.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ..errors import UserError, one_line, shown
from .variants.resnet import DOWNSCALING, STAGES, Shape, feature_width, is_resnet, resnet_shapes, resnet_sizes

Activation = Literal["quick_gelu", "gelu"]
Parameterization = Literal["linear", "gmp"]

ASSUMED_ACTIVATION = (
    "The file does not say which activation it was trained with; QuickGELU (OpenAI's) is assumed. "
    "If this model is one of LAION's, set the activation to gelu (on the command line: --activation gelu)."
)
_FOREIGN_CONFIG = "The config.json in its folder is that of another model; it was ignored."
_ASSUMED_HEADS = "The number of attention heads is not in the file"
# Bounds far above what any CLIP has; to list the tensors of a model that claims more would take all memory.
_MOST_LAYERS = 1000
_MOST = 10_000_000
_ANOTHER = "choose another file, or get this one anew"
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of an OpenAI-shaped CLIP. Widths in channels, `image_size` and `patch_size` in pixels.

    The vision tower is a ViT, or a ResNet with attention pooling: `vision_layers` then are the blocks of its four
    stages, `vision_width` is that of the first, `vision_heads` are the pooling's, and the two that may be None are.
    """

    embed_dim: int
    image_size: int
    patch_size: int | None
    vision_width: int
    vision_layers: int | tuple[int, int, int, int]
    vision_heads: int
    vision_mlp_width: int | None
    context_length: int
    vocab_size: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp_width: int
    activation: Activation

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "activation":
                if value not in ("quick_gelu", "gelu"):
                    raise UserError(
                        f"The activation is {shown(value)}; a CLIP has quick_gelu or gelu: choose one of them."
                    )
            elif self.resnet and field.name in ("vision_layers", "patch_size", "vision_mlp_width"):
                continue
            elif not _is_size(value, _MOST_LAYERS if field.name.endswith("_layers") else _MOST):
                raise UserError(
                    f"The model says that its {field.name} is {shown(value)}; it must be a number above 0, and not out "
                    "of all proportion."
                )
        if self.resnet:
            self._check_resnet()
        for tower, width, heads in (
            ("vision", feature_width(self.vision_width) if self.resnet else self.vision_width, self.vision_heads),
            ("text", self.text_width, self.text_heads),
        ):
            if width % heads:
                raise UserError(
                    f"The {tower} tower is {width} wide, which {heads} attention heads cannot share; set the number of "
                    "heads right in the file's metadata, or in the config beside it."
                )

    def _check_resnet(self) -> None:
        layers = self.vision_layers
        if len(layers) != STAGES or not all(_is_size(count, _MOST_LAYERS) for count in layers):
            raise UserError(
                f"The model says that its vision_layers are {shown(layers)}; a ResNet has four numbers above 0, so "
                f"{_ANOTHER}."
            )
        for name in ("patch_size", "vision_mlp_width"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"The model says that its {name} is {shown(getattr(self, name))}; a ResNet has none, so {_ANOTHER}."
                )
        if self.image_size % DOWNSCALING:
            raise UserError(
                f"The model says that its image_size is {self.image_size}; a ResNet's is a multiple of {DOWNSCALING}, "
                f"so {_ANOTHER}."
            )

    @property
    def resnet(self) -> bool:
        """Whether the vision tower is a ResNet."""
        return isinstance(self.vision_layers, tuple)

    @property
    def grid(self) -> int:
        """Patches along one side of the picture; of a ResNet, cells along one side of its last feature map."""
        return self.image_size // (DOWNSCALING if self.resnet else self.patch_size)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """The inverse of `as_dict`, also after JSON, which makes lists of tuples. Raises `UserError`."""
        layers = values.get("vision_layers")
        if isinstance(layers, list):
            values = {**values, "vision_layers": tuple(layers)}
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(
                f"The architecture in the file's metadata cannot be used ({one_line(error)}); {_ANOTHER}."
            ) from error

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def shapes(self, parameterization: Parameterization = "linear") -> dict[str, Shape]:
        """Every tensor of this CLIP under its OpenAI name, with its shape."""
        a = self
        vision = (
            resnet_shapes(a.vision_width, a.vision_layers, a.grid, a.embed_dim)
            if a.resnet
            else _vit_shapes(a, parameterization)
        )
        shapes: dict[str, Shape] = vision | {
            "token_embedding.weight": (a.vocab_size, a.text_width),
            "positional_embedding": (a.context_length, a.text_width),
            "text_projection": (a.text_width, a.embed_dim),
            "logit_scale": (),
            "ln_final.weight": (a.text_width,),
            "ln_final.bias": (a.text_width,),
        }
        for layer in range(a.text_layers):
            shapes |= _block_shapes(f"transformer.resblocks.{layer}", a.text_width, a.text_mlp_width, parameterization)
        return shapes


def _is_size(value, most: int) -> bool:
    return type(value) is int and 0 < value <= most


def _vit_shapes(a: Architecture, parameterization: Parameterization) -> dict[str, Shape]:
    width = a.vision_width
    shapes: dict[str, Shape] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (a.grid**2 + 1, width),
        "visual.conv1.weight": (width, 3, a.patch_size, a.patch_size),
        "visual.proj": (width, a.embed_dim),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes[f"visual.{norm}.weight"] = shapes[f"visual.{norm}.bias"] = (width,)
    for layer in range(a.vision_layers):
        shapes |= _block_shapes(f"visual.transformer.resblocks.{layer}", width, a.vision_mlp_width, parameterization)
    return shapes


def _block_shapes(block: str, width: int, mlp: int, parameterization: Parameterization) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"{block}.attn.in_proj_weight": (3 * width, width),
        f"{block}.attn.in_proj_bias": (3 * width,),
        f"{block}.attn.out_proj.weight": (width, width),
        f"{block}.attn.out_proj.bias": (width,),
    }
    for norm in ("ln_1", "ln_2"):
        shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (width,)
    for linear, rows, columns in (("c_fc", mlp, width), ("c_proj", width, mlp)):
        name = f"{block}.mlp.{linear}"
        if parameterization == "gmp":
            shapes[f"{name}.r"] = (rows, 1)
            shapes[f"{name}.theta"] = (rows, columns)
        else:
            shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def parameterization_of(names) -> Parameterization:
    """ "gmp" where the MLP layers hold `r` and `theta` instead of `weight`."""
    return "gmp" if any(name.endswith((".mlp.c_fc.theta", ".mlp.c_fc.r")) for name in names) else "linear"


def architecture_from_shapes(
    shapes: Mapping[str, Shape],
    *,
    activation: Activation | None = None,
    told: Mapping[str, Any] = MappingProxyType({}),
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Architecture, tuple[str, ...]]:
    """The architecture behind tensors in OpenAI's naming, and a sentence for each thing that had to be assumed.

    `activation` is what the user chose. `told` is what the file itself says of heads and activation, by the names of
    this class's fields; `beside` what a configuration file next to it says, which is not believed if its sizes are not
    those of the tensors. Raises `UserError` if these are not an OpenAI-shaped CLIP's; the sentence names what is
    missing or misshapen.
    """
    what = "a full CLIP with a ResNet vision tower" if is_resnet(shapes) else "a full CLIP"
    mlp = "theta" if parameterization_of(shapes) == "gmp" else "weight"
    try:
        vision = resnet_sizes(shapes) if is_resnet(shapes) else _vit_sizes(shapes, mlp)
        vocab_size, text_width = shapes["token_embedding.weight"]
        sizes = vision | dict(
            embed_dim=shapes["text_projection"][1],
            context_length=shapes["positional_embedding"][0],
            vocab_size=vocab_size,
            text_width=text_width,
            text_layers=_layers(shapes, ""),
            text_mlp_width=shapes[f"transformer.resblocks.0.mlp.c_fc.{mlp}"][0],
        )
    except KeyError as error:
        raise UserError(f"this is not {what}: the tensor {error.args[0]} is missing; {_ANOTHER}.") from error
    except (ValueError, IndexError) as error:
        raise UserError(f"this is not {what}: its embeddings do not have the shapes of one; {_ANOTHER}.") from error
    notes = []
    if any(beside[name] != sizes[name] for name in beside.keys() & sizes.keys() - {"vision_heads"}):
        beside = {}
        notes.append(_FOREIGN_CONFIG)
    told = {**beside, **told}
    heads = (told["vision_heads"], told["text_heads"]) if {"vision_heads", "text_heads"} <= told.keys() else None
    heads, activation = heads or _known_heads(sizes), activation or told.get("activation")
    if activation is None and "trouble" in told:
        raise UserError(told["trouble"])
    if heads is None:
        heads = (sizes["vision_heads"], max(1, text_width // 64))
        notes.append(
            f"{_ASSUMED_HEADS}; {heads[0]} (vision) and {heads[1]} (text) are assumed, one for each 64 channels."
        )
    if activation is None:
        activation = "quick_gelu"
        notes.append(ASSUMED_ACTIVATION)
    architecture = Architecture(**sizes | dict(vision_heads=heads[0]), text_heads=heads[1], activation=activation)
    return architecture, tuple(notes)


def _vit_sizes(shapes: Mapping[str, Shape], mlp: str) -> dict[str, Any]:
    """The vision part of an `Architecture`, with a head for each 64 channels; raises what `resnet_sizes` does."""
    vision_width, _, patch_size, _ = shapes["visual.conv1.weight"]
    tokens = shapes["visual.positional_embedding"][0]
    return dict(
        image_size=round(max(0, tokens - 1) ** 0.5) * patch_size,
        patch_size=patch_size,
        vision_width=vision_width,
        vision_layers=_layers(shapes, "visual."),
        vision_heads=max(1, vision_width // 64),
        vision_mlp_width=shapes[f"visual.transformer.resblocks.0.mlp.c_fc.{mlp}"][0],
    )


def is_assumption(note: str) -> bool:
    """Whether a note of a FullCLIP tells of something that had to be assumed, and may be wrong."""
    return note == ASSUMED_ACTIVATION or note.startswith(_ASSUMED_HEADS)


def _layers(shapes: Mapping[str, Shape], prefix: str) -> int:
    found = [int(match[2]) for name in shapes if (match := _BLOCK.match(name)) and (match[1] or "") == prefix]
    return max(found) + 1 if found else 0


def check_shapes(shapes: Mapping[str, Shape], architecture: Architecture) -> None:
    """Raise `UserError` unless these are exactly the tensors of that architecture."""
    expected = architecture.shapes(parameterization_of(shapes))
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    wrong = [name for name in expected if name in shapes and tuple(shapes[name]) != expected[name]]
    if missing:
        raise UserError(f"{counted(missing, 'tensor')} missing, the first is {missing[0]}; {_ANOTHER}.")
    if wrong:
        name = wrong[0]
        raise UserError(
            f"the tensor {name} has the shape {tuple(shapes[name])}, where {expected[name]} was expected"
            + (f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else "")
            + f"; {_ANOTHER}."
        )
    if "logit_bias" in extra:
        raise UserError("it was trained with SigLIP's loss (it has a logit_bias), as no CLIP is; choose another file.")
    if extra:
        raise UserError(
            f"{counted(extra, 'tensor')} there that a CLIP does not have, the first is {extra[0]}; {_ANOTHER}."
        )


def counted(names: Sequence[str], noun: str) -> str:
    """1 tensor is, 2 tensors are."""
    return f"1 {noun} is" if len(names) == 1 else f"{len(names)} {noun}s are"


def _known_heads(sizes: Mapping[str, Any]) -> tuple[int, int] | None:
    """(vision, text) heads of the model in open_clip's list that has all these sizes but the picture's."""
    return _known_models().get(_size_key(sizes))


def _size_key(sizes: Mapping[str, Any]) -> tuple:
    # The picture's size and the context length do not bear on the heads, and fine-tunes change both.
    skipped = ("image_size", "context_length", "vision_heads")
    return tuple(value for name, value in sorted(sizes.items()) if name not in skipped)


@functools.cache
def _known_models() -> dict[tuple, tuple[int, int]]:
    # Read as files: importing open_clip takes seconds, and folding a model does not need it.
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return {}
    known: dict[tuple, tuple[int, int]] = {}
    configs = Path(spec.origin).parent / "model_configs"
    for path in sorted([*configs.glob("RN*.json"), *configs.glob("ViT-*.json")]):
        config = json.loads(path.read_text(encoding="utf-8"))
        vision, text = config["vision_cfg"], config["text_cfg"]
        width, layers = vision.get("width"), vision.get("layers")
        if "hf_model_name" in text or "timm_model_name" in vision or not isinstance(layers, (int, list)):
            continue
        resnet = isinstance(layers, list)
        sizes = dict(
            embed_dim=config["embed_dim"],
            patch_size=vision["patch_size"],
            vision_width=width,
            vision_layers=tuple(layers) if resnet else layers,
            vision_mlp_width=None if resnet else int(width * vision.get("mlp_ratio", 4.0)),
            vocab_size=text.get("vocab_size", 49408),
            text_width=text["width"],
            text_layers=text["layers"],
            text_mlp_width=int(text["width"] * text.get("mlp_ratio", 4.0)),
        )
        shared = feature_width(width) if resnet else width
        known.setdefault(_size_key(sizes), (shared // vision.get("head_width", 64), text["heads"]))
    return known
