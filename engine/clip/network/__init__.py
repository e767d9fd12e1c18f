"""A FullCLIP as a network that runs: open_clip's CLIP with this model's weights, and a cheaper forward pass.

`build` makes networks and imports open_clip, which takes seconds, only when it makes one; `forward` has the class.
"""

from .build import (
    build_network,
    checkpoint_activations,
    compile_blocks,
    network_of,
    random_full_clip,
    skeleton,
)
from .layers import QuickGELU, StoredNorm

__all__ = [
    "QuickGELU",
    "StoredNorm",
    "build_network",
    "checkpoint_activations",
    "compile_blocks",
    "network_of",
    "random_full_clip",
    "skeleton",
]
