"""What a parameter of a CLIP is, read from its name: its tower, kind and depth.

Parameter groups, freezing, frozen features and gradient warnings are all defined in these terms.
"""

from __future__ import annotations

import dataclasses
import re

from ...clip.architecture import Architecture
from ...clip.variants.resnet import STAGES

# The kinds of parameters, and whether weight decay applies to them.
KINDS = {
    "attention": True,
    "mlp": True,
    "r": False,
    "theta": False,
    "embeddings": False,
    "patches": True,
    "convolutions": True,
    "norms": False,
    "biases": False,
    "projection": True,
}
# These belong to neither tower; each is a group of its own.
SCALARS = ("logit_scale", "logit_bias")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
# In a ResNet a stage counts as a block; the stem comes before the first and the attention pooling after the last.
_STAGE = re.compile(r"^visual\.layer(\d)\.")
_BATCH_NORM = re.compile(r"\.(bn\d|downsample\.1)\.")


@dataclasses.dataclass(frozen=True, order=True)
class ParameterInfo:
    """`depth` is 0 before the first block, n in the n-th block, and one more than the last block's after the blocks."""

    tower: str  # "text" or "vision"; the name of a scalar
    kind: str  # one of KINDS; "" for a scalar
    depth: int

    @property
    def group(self) -> str:
        """Such as text.attention, vision.r, logit_scale."""
        return f"{self.tower}.{self.kind}" if self.kind else self.tower

    @property
    def decays(self) -> bool:
        return KINDS.get(self.kind, False)


def parameter_info(name: str, architecture: Architecture) -> ParameterInfo:
    """Return what the parameter of this name is."""
    if name in SCALARS:
        return ParameterInfo(name, "", 0)
    tower = "vision" if name.startswith("visual.") else "text"
    if tower == "vision" and architecture.resnet:
        return ParameterInfo(tower, _resnet_kind(name), _resnet_depth(name))
    return ParameterInfo(tower, _transformer_kind(name), _transformer_depth(name, layers_of(tower, architecture)))


def _transformer_kind(name: str) -> str:
    if name.endswith((".r", ".theta")):
        return name.rsplit(".", 1)[1]
    if name.endswith(("_embedding", "token_embedding.weight")):
        return "embeddings"
    if ".ln_" in f".{name}":
        return "norms"
    if name.endswith("bias"):
        return "biases"
    if name.endswith("conv1.weight"):
        return "patches"
    return "attention" if ".attn." in name else "mlp" if ".mlp." in name else "projection"


def _transformer_depth(name: str, layers: int) -> int:
    if block := _BLOCK.search(name):
        return int(block[1]) + 1
    return 0 if "embedding" in name or "conv1" in name or "ln_pre" in name else layers + 1


def _resnet_kind(name: str) -> str:
    if _BATCH_NORM.search(name):
        return "norms"
    if name.endswith("bias"):
        return "biases"
    if name.startswith("visual.attnpool."):
        return {"positional_embedding": "embeddings", "c_proj": "projection"}.get(name.split(".")[2], "attention")
    return "convolutions"


def _resnet_depth(name: str) -> int:
    if stage := _STAGE.match(name):
        return int(stage[1])
    return STAGES + 1 if name.startswith("visual.attnpool.") else 0


def layers_of(tower: str, architecture: Architecture) -> int:
    """Return the number of blocks of a tower (the stages of a ResNet); 0 for a scalar."""
    vision = architecture.vision_layers
    return {"text": architecture.text_layers, "vision": vision if isinstance(vision, int) else STAGES}.get(tower, 0)


def layer_name(tower: str, depth: int, architecture: Architecture) -> str:
    """Return a layer's name for messages, such as "block 3 of the text tower".

    Blocks count from 0 and a ResNet's stages from 1, as in the names of the parameters.
    """
    if tower in SCALARS:
        return tower
    if tower == "vision" and architecture.resnet:
        names = ("the stem", *(f"layer{stage}" for stage in range(1, STAGES + 1)), "the attention pooling")
        return f"{names[depth]} of the vision tower"
    if depth == 0:
        return f"the embeddings of the {tower} tower"
    if depth > layers_of(tower, architecture):
        return f"the last norm and projection of the {tower} tower"
    return f"block {depth - 1} of the {tower} tower"
