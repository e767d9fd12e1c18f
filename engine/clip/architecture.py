"""The sizes of a CLIP, read from the shapes of its tensors.

Two facts are not in the shapes: the activation of the MLPs (QuickGELU or GELU) and the number of attention heads. They
come from metadata or a config file where there is one; otherwise they are looked up or assumed, with a note.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import UserError, one_line, shown
from .variants.resnet import DOWNSCALING, STAGES, Shape, feature_width, is_resnet, resnet_shapes, resnet_sizes

Activation = Literal["quick_gelu", "gelu"]
ACTIVATIONS: tuple[Activation, ...] = ("quick_gelu", "gelu")
Parameterization = Literal["linear", "gmp"]

ASSUMED_ACTIVATION = (
    "The file does not say which activation it was trained with; QuickGELU (OpenAI's) is assumed. "
    "If this model is one of LAION's, set the activation to gelu (on the command line: --activation gelu)."
)
_FOREIGN_CONFIG = "The config.json in its folder is that of another model; it was ignored."
_ASSUMED_HEADS = "The number of attention heads is not in the file"
# Far above any CLIP. Listing the tensors of a model that claims more would fill the memory.
_MAX_LAYERS = 1000
_MAX_SIZE = 10_000_000
_CHOOSE_ANOTHER = "choose another file, or download this one again"
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.")


class VitSizes(NamedTuple):
    """The sizes that only a ViT vision tower has."""

    patch_size: int
    layers: int
    mlp_width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of an OpenAI-shaped CLIP. Widths in channels, `image_size` and `patch_size` in pixels.

    The vision tower is a ViT, or a ResNet with attention pooling. Of a ResNet, `vision_layers` are the blocks of its
    four stages, `vision_width` is that of the first stage, `vision_heads` are the pooling's, and `patch_size` and
    `vision_mlp_width` are None.
    """

    embed_dim: int
    image_size: int
    patch_size: int | None
    vision_width: int
    vision_layers: int | tuple[int, ...]
    vision_heads: int
    vision_mlp_width: int | None
    context_length: int
    vocab_size: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp_width: int
    activation: Activation

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"The activation is {shown(self.activation)}; a CLIP has quick_gelu or gelu: choose one of them."
            )
        skipped = ("activation", "patch_size", "vision_layers", "vision_mlp_width") if self.resnet else ("activation",)
        for name in (field.name for field in dataclasses.fields(self) if field.name not in skipped):
            if not _is_size(name, getattr(self, name)):
                raise UserError(
                    f"The model says that its {name} is {shown(getattr(self, name))}; it must be a number above 0, and "
                    "not out of all proportion."
                )
        if self.resnet:
            self._check_resnet()
        vision_width = feature_width(self.vision_width) if self.resnet else self.vision_width
        for tower, width, heads in (
            ("vision", vision_width, self.vision_heads),
            ("text", self.text_width, self.text_heads),
        ):
            if width % heads:
                raise UserError(
                    f"The {tower} tower is {width} wide, which {heads} attention heads cannot share; correct the "
                    "number of heads in the file's metadata, or in the config beside it."
                )

    def _check_resnet(self) -> None:
        if len(self.stages) != STAGES or not all(_is_size("vision_layers", count) for count in self.stages):
            problem = f"vision_layers are {shown(self.stages)}; a ResNet has four numbers above 0"
        elif self.patch_size is not None:
            problem = f"patch_size is {shown(self.patch_size)}; a ResNet has none"
        elif self.vision_mlp_width is not None:
            problem = f"vision_mlp_width is {shown(self.vision_mlp_width)}; a ResNet has none"
        elif self.image_size % DOWNSCALING:
            problem = f"image_size is {self.image_size}; a ResNet's is a multiple of {DOWNSCALING}"
        else:
            return
        raise UserError(f"The model says that its {problem}, so {_CHOOSE_ANOTHER}.")

    @property
    def resnet(self) -> bool:
        """Whether the vision tower is a ResNet."""
        return isinstance(self.vision_layers, tuple)

    @property
    def vit(self) -> VitSizes:
        """The sizes that only a ViT has; TypeError for a ResNet."""
        if isinstance(self.vision_layers, tuple) or self.patch_size is None or self.vision_mlp_width is None:
            raise TypeError("a ResNet has no patches and no MLP")
        return VitSizes(self.patch_size, self.vision_layers, self.vision_mlp_width)

    @property
    def stages(self) -> tuple[int, ...]:
        """The number of blocks in each stage of a ResNet; TypeError for a ViT."""
        if not isinstance(self.vision_layers, tuple):
            raise TypeError("a ViT has no stages")
        return self.vision_layers

    @property
    def grid(self) -> int:
        """Patches along one side of the image; of a ResNet, cells along one side of its last feature map."""
        return self.image_size // (DOWNSCALING if self.resnet else self.vit.patch_size)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Architecture:
        """Invert `as_dict`, also after JSON, which turns tuples into lists. Raises `UserError`."""
        layers = values.get("vision_layers")
        if isinstance(layers, list):
            values = {**values, "vision_layers": tuple(layers)}
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(
                f"The architecture in the file's metadata cannot be used ({one_line(error)}); {_CHOOSE_ANOTHER}."
            ) from error

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def shapes(self, parameterization: Parameterization = "linear") -> dict[str, Shape]:
        """Return the shape of every tensor of this CLIP by its OpenAI name."""
        if self.resnet:
            shapes = resnet_shapes(self.vision_width, self.stages, self.grid, self.embed_dim)
        else:
            shapes = _vit_shapes(self, parameterization)
        shapes |= {
            "token_embedding.weight": (self.vocab_size, self.text_width),
            "positional_embedding": (self.context_length, self.text_width),
            "text_projection": (self.text_width, self.embed_dim),
            "logit_scale": (),
            "ln_final.weight": (self.text_width,),
            "ln_final.bias": (self.text_width,),
        }
        for layer in range(self.text_layers):
            block = f"transformer.resblocks.{layer}"
            shapes |= _block_shapes(block, self.text_width, self.text_mlp_width, parameterization)
        return shapes


def _is_size(name: str, value: object) -> bool:
    return type(value) is int and 0 < value <= (_MAX_LAYERS if name.endswith("_layers") else _MAX_SIZE)


def _vit_shapes(architecture: Architecture, parameterization: Parameterization) -> dict[str, Shape]:
    width, (patch_size, layers, mlp_width) = architecture.vision_width, architecture.vit
    shapes: dict[str, Shape] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (architecture.grid**2 + 1, width),
        "visual.conv1.weight": (width, 3, patch_size, patch_size),
        "visual.proj": (width, architecture.embed_dim),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes[f"visual.{norm}.weight"] = shapes[f"visual.{norm}.bias"] = (width,)
    for layer in range(layers):
        shapes |= _block_shapes(f"visual.transformer.resblocks.{layer}", width, mlp_width, parameterization)
    return shapes


def _block_shapes(block: str, width: int, mlp_width: int, parameterization: Parameterization) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"{block}.attn.in_proj_weight": (3 * width, width),
        f"{block}.attn.in_proj_bias": (3 * width,),
        f"{block}.attn.out_proj.weight": (width, width),
        f"{block}.attn.out_proj.bias": (width,),
    }
    for norm in ("ln_1", "ln_2"):
        shapes[f"{block}.{norm}.weight"] = shapes[f"{block}.{norm}.bias"] = (width,)
    for linear, rows, columns in (("c_fc", mlp_width, width), ("c_proj", width, mlp_width)):
        name = f"{block}.mlp.{linear}"
        if parameterization == "gmp":
            shapes[f"{name}.r"] = (rows, 1)
            shapes[f"{name}.theta"] = (rows, columns)
        else:
            shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)
    return shapes


def parameterization_of(names: Iterable[str]) -> Parameterization:
    """Return "gmp" if MLP layers hold `r` and `theta` instead of `weight`."""
    return "gmp" if any(name.endswith((".mlp.c_fc.theta", ".mlp.c_fc.r")) for name in names) else "linear"


def check_shapes(shapes: Mapping[str, Shape], architecture: Architecture) -> None:
    """Raise `UserError` unless these are exactly the tensors of that architecture."""
    expected = architecture.shapes(parameterization_of(shapes))
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    wrong = [name for name in expected if name in shapes and tuple(shapes[name]) != expected[name]]
    if missing:
        problem = f"{counted(missing, 'tensor')} missing, the first is {missing[0]}"
    elif wrong:
        others = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
        shape = tuple(shapes[wrong[0]])
        problem = f"the tensor {wrong[0]} has the shape {shape}, where {expected[wrong[0]]} was expected{others}"
    elif "logit_bias" in extra:
        problem = "it was trained with SigLIP's loss (it has a logit_bias), as no CLIP is"
    elif extra:
        problem = f"{counted(extra, 'tensor')} there that a CLIP does not have, the first is {extra[0]}"
    else:
        return
    raise UserError(f"{problem}; {_CHOOSE_ANOTHER}.")


def counted(names: Sequence[str], noun: str) -> str:
    """Return "1 tensor is", "2 tensors are"."""
    return f"1 {noun} is" if len(names) == 1 else f"{len(names)} {noun}s are"


@dataclasses.dataclass(frozen=True)
class Hints:
    """What a file, or a config beside it, says about its model; not checked against the tensors.

    `sizes` goes by the field names of `Architecture`, heads among them. `problem` is a sentence on why the activation
    that is named there cannot be used.
    """

    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    activation: Activation | None = None
    problem: str | None = None


NO_HINTS = Hints()


def architecture_from_shapes(
    shapes: Mapping[str, Shape],
    *,
    activation: Activation | None = None,
    hints: Hints = NO_HINTS,
    config: Hints = NO_HINTS,
) -> tuple[Architecture, tuple[str, ...]]:
    """Return the architecture behind tensors under OpenAI's names, and a note for each fact that was assumed.

    `activation` is the user's choice. `hints` come from the file itself; `config` from a config file beside it, which
    is ignored if its sizes are not those of the tensors. Raises `UserError` that names the missing or misshapen tensor
    if this is not an OpenAI-shaped CLIP.
    """
    sizes = _sizes(shapes)
    notes = []
    if any(config.sizes[name] != sizes[name] for name in config.sizes.keys() & sizes.keys() - {"vision_heads"}):
        config = NO_HINTS
        notes.append(_FOREIGN_CONFIG)
    given = {**config.sizes, **hints.sizes}
    activation = activation or hints.activation or config.activation
    if activation is None and config.problem:
        raise UserError(config.problem)
    if {"vision_heads", "text_heads"} <= given.keys():
        vision_heads, text_heads = given["vision_heads"], given["text_heads"]
    elif known := _heads_of_known_models().get(_size_key(sizes)):
        vision_heads, text_heads = known
    else:
        vision_heads, text_heads = sizes["vision_heads"], max(1, sizes["text_width"] // 64)
        notes.append(
            f"{_ASSUMED_HEADS}; {vision_heads} (vision) and {text_heads} (text) are assumed, one for each 64 channels."
        )
    if activation is None:
        activation = "quick_gelu"
        notes.append(ASSUMED_ACTIVATION)
    sizes |= {"vision_heads": vision_heads, "text_heads": text_heads}
    return Architecture(**sizes, activation=activation), tuple(notes)


def is_assumption(note: str) -> bool:
    """Return whether a note of a FullCLIP is about a fact that was assumed and may be wrong."""
    return note == ASSUMED_ACTIVATION or note.startswith(_ASSUMED_HEADS)


def _sizes(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Return the fields of an `Architecture` that are in the shapes, with one vision head for each 64 channels."""
    what = "a full CLIP with a ResNet vision tower" if is_resnet(shapes) else "a full CLIP"
    mlp = "theta" if parameterization_of(shapes) == "gmp" else "weight"
    try:
        vision = resnet_sizes(shapes) if is_resnet(shapes) else _vit_sizes(shapes, mlp)
        vocab_size, text_width = shapes["token_embedding.weight"]
        return vision | {
            "embed_dim": shapes["text_projection"][1],
            "context_length": shapes["positional_embedding"][0],
            "vocab_size": vocab_size,
            "text_width": text_width,
            "text_layers": _layers(shapes, ""),
            "text_mlp_width": shapes[f"transformer.resblocks.0.mlp.c_fc.{mlp}"][0],
        }
    except (KeyError, ValueError, IndexError) as error:
        missing = f"the tensor {error.args[0]} is missing" if isinstance(error, KeyError) else None
        problem = missing or "its embeddings do not have the shapes of one"
        raise UserError(f"this is not {what}: {problem}; {_CHOOSE_ANOTHER}.") from error


def _vit_sizes(shapes: Mapping[str, Shape], mlp: str) -> dict[str, Any]:
    """Return the vision fields of an `Architecture`; raises what `resnet_sizes` does."""
    vision_width, _, patch_size, _ = shapes["visual.conv1.weight"]
    tokens = shapes["visual.positional_embedding"][0]
    return {
        "image_size": round(max(0, tokens - 1) ** 0.5) * patch_size,
        "patch_size": patch_size,
        "vision_width": vision_width,
        "vision_layers": _layers(shapes, "visual."),
        "vision_heads": max(1, vision_width // 64),
        "vision_mlp_width": shapes[f"visual.transformer.resblocks.0.mlp.c_fc.{mlp}"][0],
    }


def _layers(shapes: Iterable[str], prefix: str) -> int:
    blocks = [int(match[2]) for name in shapes if (match := _BLOCK.match(name)) and (match[1] or "") == prefix]
    return max(blocks, default=-1) + 1


def _size_key(sizes: Mapping[str, Any]) -> tuple[Any, ...]:
    # Heads do not depend on the image size and the context length, and fine-tunes change both.
    skipped = ("image_size", "context_length", "vision_heads")
    return tuple(value for name, value in sorted(sizes.items()) if name not in skipped)


@functools.cache
def _heads_of_known_models() -> dict[tuple[Any, ...], tuple[int, int]]:
    """Return (vision heads, text heads) of the models in open_clip's list, by their other sizes."""
    # The configs are read as files: importing open_clip takes seconds, and folding a model does not need it.
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        return {}
    heads: dict[tuple[Any, ...], tuple[int, int]] = {}
    configs = Path(spec.origin).parent / "model_configs"
    for path in sorted([*configs.glob("RN*.json"), *configs.glob("ViT-*.json")]):
        config = json.loads(path.read_text(encoding="utf-8"))
        vision, text = config["vision_cfg"], config["text_cfg"]
        width, layers = vision.get("width"), vision.get("layers")
        if "hf_model_name" in text or "timm_model_name" in vision or not isinstance(layers, (int, list)):
            continue
        resnet = isinstance(layers, list)
        sizes = {
            "embed_dim": config["embed_dim"],
            "patch_size": vision["patch_size"],
            "vision_width": width,
            "vision_layers": tuple(layers) if isinstance(layers, list) else layers,
            "vision_mlp_width": None if resnet else int(width * vision.get("mlp_ratio", 4.0)),
            "vocab_size": text.get("vocab_size", 49408),
            "text_width": text["width"],
            "text_layers": text["layers"],
            "text_mlp_width": int(text["width"] * text.get("mlp_ratio", 4.0)),
        }
        shared = feature_width(width) if resnet else width
        heads.setdefault(_size_key(sizes), (shared // vision.get("head_width", 64), text["heads"]))
    return heads
