"""Where in a CLIP a parameter stands: which tower, what kind, how deep. Groups, freezing and diagnoses speak of it."""

from __future__ import annotations

import dataclasses
import re

from ...clip.architecture import Architecture
from ...clip.variants.resnet import STAGES

# The kinds, and whether weight decay acts on them.
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
# Belong to neither tower; each is a group of its own.
SCALARS = ("logit_scale", "logit_bias")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
# In a ResNet a stage counts as a block, the stem comes before the first and the attention pooling after the last.
_STAGE = re.compile(r"^visual\.layer(\d)\.")
_BATCH_NORM = re.compile(r"\.(bn\d|downsample\.1)\.")


@dataclasses.dataclass(frozen=True, order=True)
class Part:
    """`depth` is 0 for what comes before the first block, n for block n - 1, and one more than that after the last."""

    tower: str  # "text" or "vision"; for a scalar its name
    kind: str  # one of KINDS; "" for a scalar
    depth: int

    @property
    def group(self) -> str:
        """text.attention, vision.r, …, logit_scale."""
        return f"{self.tower}.{self.kind}" if self.kind else self.tower

    @property
    def decays(self) -> bool:
        return KINDS.get(self.kind, False)


def parameter_info(name: str, architecture: Architecture) -> Part:
    """The part that a parameter of the network is, by its name."""
    if name in SCALARS:
        return Part(name, "", 0)
    tower = "vision" if name.startswith("visual.") else "text"
    if tower == "vision" and architecture.resnet:
        return Part(tower, _resnet_kind(name), _resnet_depth(name))
    return Part(tower, _kind(name), _depth(name, layers_of(tower, architecture)))


def _kind(name: str) -> str:
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


def _depth(name: str, layers: int) -> int:
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
    """The blocks of a tower; those of a ResNet are its stages."""
    vision = STAGES if architecture.resnet else architecture.vision_layers
    return {"text": architecture.text_layers, "vision": vision}.get(tower, 0)


def layer_in_words(tower: str, depth: int, architecture: Architecture) -> str:
    """block 3 of the text tower, the embeddings of the vision tower, …; blocks count from 0 and a ResNet's stages from
    1, as in the file."""
    if tower in SCALARS:
        return tower
    if tower == "vision" and architecture.resnet:
        places = ("the stem", *(f"layer{number}" for number in range(1, STAGES + 1)), "the attention pooling")
        return f"{places[depth]} of the vision tower"
    if depth == 0:
        return f"the embeddings of the {tower} tower"
    if depth > layers_of(tower, architecture):
        return f"the last norm and projection of the {tower} tower"
    return f"block {depth - 1} of the {tower} tower"
