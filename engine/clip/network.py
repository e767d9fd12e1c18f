"""A FullCLIP as a network that runs: open_clip's CLIP with this model's weights."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .architecture import Architecture
from .full_clip import FullCLIP
from .gmp import GmPLinear
from .resnet import STAGES, feature_width


def build_network(full_clip: FullCLIP, *, device="cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """An `open_clip.CLIP` holding copies of the weights in `dtype`, in training mode, every parameter with gradients.

    It has `encode_image` (pictures [n, 3, size, size], normalised), `encode_text` (int64 tokens [n, context]) and
    `logit_scale`. A model in GmP form gets `GmPLinear` layers, so its parameters bear the names in the file. A ResNet's
    BatchNorm layers are `StoredNorm`s, whose statistics are buffers under the names in the file.
    """
    network = _skeleton(full_clip.architecture, device="meta")
    if full_clip.parameterization == "gmp":
        for layer in [name for name in full_clip.state_dict if name.endswith(".theta")]:
            block = network.get_submodule(layer.rsplit(".", 2)[0])
            name = layer.rsplit(".", 2)[1]
            out_features, in_features = full_clip.state_dict[layer].shape
            setattr(block, name, GmPLinear(in_features, out_features, device="meta"))
    with torch.no_grad():
        weights = {
            name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in full_clip.state_dict.items()
        }
    network.load_state_dict(weights, strict=True, assign=True)
    mask = torch.full((network.context_length, network.context_length), float("-inf"), device=device, dtype=dtype)
    network.attn_mask = mask.triu_(1)
    return network.train().requires_grad_(True)


def _skeleton(architecture: Architecture, device: str) -> nn.Module:
    """open_clip's network as it initialises it; on the meta device without weights, so that none are drawn in vain."""
    import open_clip

    a = architecture
    if a.resnet:
        vision = dict(head_width=feature_width(a.vision_width) // a.vision_heads)
    else:
        vision = dict(
            head_width=a.vision_width // a.vision_heads,
            mlp_ratio=_ratio(a.vision_mlp_width, a.vision_width),
            patch_size=a.patch_size,
        )
    vision = open_clip.CLIPVisionCfg(layers=a.vision_layers, width=a.vision_width, image_size=a.image_size, **vision)
    text = open_clip.CLIPTextCfg(
        context_length=a.context_length,
        vocab_size=a.vocab_size,
        width=a.text_width,
        heads=a.text_heads,
        layers=a.text_layers,
        mlp_ratio=_ratio(a.text_mlp_width, a.text_width),
    )
    with torch.device(device):
        network = open_clip.CLIP(a.embed_dim, vision, text, quick_gelu=a.activation == "quick_gelu")
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, StoredNorm(module))
    return network


def _ratio(mlp_width: int, width: int) -> float:
    # open_clip truncates width · ratio; the half keeps the product on the right side of the integer.
    return (mlp_width + 0.5) / width


class StoredNorm(nn.Module):
    """BatchNorm of [n, c, h, w] by the stored statistics, which it never updates, in training mode too.

    So a picture's features depend on no other picture, which gradient caching needs, and a small batch, whose own
    statistics would be noise, does no harm. It takes over the tensors of a BatchNorm2d, but for the counter.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.batch_norm(inputs, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def checkpoint_activations(network: nn.Module) -> None:
    """Keep for backward only what enters each block, and compute the rest again; changes no number."""
    network.set_grad_checkpointing()
    # open_clip's ResNet takes no notice of that.
    stages = [getattr(network.visual, f"layer{number}", ()) for number in range(1, STAGES + 1)]
    for block in itertools.chain(*stages):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def random_full_clip(architecture: Architecture, seed: int) -> FullCLIP:
    """A new model with open_clip's own initialisation (float32), a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _skeleton(architecture, device="cpu")
    return FullCLIP(architecture, network.state_dict(), {"source": f"initialised at random, seed {seed}"})
