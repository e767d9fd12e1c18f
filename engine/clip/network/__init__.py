"""A FullCLIP as a network that runs: open_clip's CLIP with this model's weights, and a cheaper forward pass.

Importing open_clip takes seconds, so only `forward`, which is imported when a network is made, imports it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...errors import UserError, one_line
from ..architecture import Architecture
from ..full_clip import FullCLIP
from ..gmp import GmPLinear
from ..variants.resnet import STAGES, feature_width

if TYPE_CHECKING:
    from .forward import ClipNetwork


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), computed as SiLU(1.702 x) / 1.702, which keeps one tensor for backward instead of two.

    It overwrites its input, which is allowed: the linear layer before it does not need its output again.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        return F.silu(inputs.mul_(1.702)).div_(1.702)


class StoredNorm(nn.Module):
    """BatchNorm of [n, c, h, w] by the stored statistics, which it never updates, in training mode too.

    So an image's features do not depend on other images, which gradient caching needs, and a small batch, whose own
    statistics would be noise, does no harm. It takes over the tensors of a BatchNorm2d except its counter.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def build_network(
    full_clip: FullCLIP, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> ClipNetwork:
    """Return an `open_clip.CLIP` with copies of the weights in `dtype`, in training mode, all parameters trainable.

    It has `encode_image` (images [n, 3, size, size], normalised, in `dtype`), `encode_text` (int64 token ids [n, t], t
    up to the context length; zeros behind a text's end may be left out) and `logit_scale`. A GmP model gets `GmPLinear`
    layers, so its parameters have the names in the file. A ResNet's BatchNorm layers are `StoredNorm`s, whose
    statistics are buffers under the names in the file.
    """
    weights = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in full_clip.state_dict.items()}
    return network_of(full_clip.architecture, weights).requires_grad_(True)


def network_of(architecture: Architecture, weights: Mapping[str, Tensor]) -> ClipNetwork:
    """Return a network that holds these tensors themselves, under the names of a file; parameters stay the same
    objects."""
    network = skeleton(architecture, device="meta")
    for layer in [name.removesuffix(".theta") for name in weights if name.endswith(".theta")]:
        out_features, in_features = weights[f"{layer}.theta"].shape
        _replace(network, layer, GmPLinear(in_features, out_features, device="meta"))
    network.load_state_dict(weights, strict=True, assign=True)
    position = network.positional_embedding
    mask = torch.full((len(position), len(position)), float("-inf"), device=position.device, dtype=position.dtype)
    network.attn_mask = mask.triu_(1)  # for callers of open_clip's own blocks
    return network.train()


def skeleton(architecture: Architecture, device: str) -> ClipNetwork:
    """Return the network as open_clip initialises it; on the meta device without weights, which costs no random
    draws."""
    import open_clip

    from .forward import ClipNetwork

    vision, text = open_clip_configs(architecture)
    quick_gelu = architecture.activation == "quick_gelu"
    with torch.device(device):
        network = ClipNetwork(architecture.embed_dim, vision, text, quick_gelu=quick_gelu)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            _replace(network, name, StoredNorm(module))
        elif isinstance(module, open_clip.transformer.QuickGELU):
            _replace(network, name, QuickGELU())
    return network


def open_clip_configs(a: Architecture) -> tuple[Any, Any]:
    """Return open_clip's configs of the vision and of the text tower."""
    import open_clip

    sizes: dict[str, Any] = {"layers": a.vision_layers, "width": a.vision_width, "image_size": a.image_size}
    if a.resnet:
        sizes["head_width"] = feature_width(a.vision_width) // a.vision_heads
    else:
        sizes["head_width"] = a.vision_width // a.vision_heads
        sizes["mlp_ratio"] = _ratio(a.vit.mlp_width, a.vision_width)
        sizes["patch_size"] = a.patch_size
    text = open_clip.CLIPTextCfg(
        context_length=a.context_length,
        vocab_size=a.vocab_size,
        width=a.text_width,
        heads=a.text_heads,
        layers=a.text_layers,
        mlp_ratio=_ratio(a.text_mlp_width, a.text_width),
    )
    return open_clip.CLIPVisionCfg(**sizes), text


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _ratio(mlp_width: int, width: int) -> float:
    # open_clip truncates width · ratio; the half keeps the product on the right side of the integer.
    return (mlp_width + 0.5) / width


def random_full_clip(architecture: Architecture, seed: int) -> FullCLIP:
    """Return a new model with open_clip's own initialisation (float32), which depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = skeleton(architecture, device="cpu")
    return FullCLIP(architecture, network.state_dict(), {"source": f"initialised at random, seed {seed}"})


def checkpoint_activations(network: ClipNetwork) -> None:
    """Keep only the input of each block for backward, and compute the rest again; changes no number."""
    network.set_grad_checkpointing()
    # open_clip's ResNet ignores that.
    stages = [getattr(network.visual, f"layer{number}", ()) for number in range(1, STAGES + 1)]
    for block in itertools.chain(*stages):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(network: ClipNetwork) -> None:
    """Let torch.compile make one program of a block of each transformer; changes rounding only, and no ResNet.

    Raises `UserError` where that cannot work, for example without a compiler.
    """
    from .forward import run_block

    compiled = torch.compile(run_block, dynamic=True)
    transformers = [(network.transformer, True)]
    if hasattr(network.visual, "transformer"):
        transformers.append((network.visual.transformer, False))
    for transformer, causal in transformers:
        block = transformer.resblocks[0]
        width, like = block.ln_1.normalized_shape[0], block.ln_1.weight
        try:
            compiled(block, torch.zeros(2, 3, width, dtype=like.dtype, device=like.device), causal)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the base of torch's compiler errors
            raise UserError(
                f"torch.compile does not work here ({one_line(error)}); switch compile off, or install a C compiler "
                "(for a GPU, Triton too)."
            ) from error
        transformer.compiled_block = compiled
