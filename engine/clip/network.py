"""A FullCLIP as a network that runs: open_clip's CLIP with this model's weights."""

from __future__ import annotations

import torch
from torch import nn

from .architecture import Architecture
from .full_clip import FullCLIP
from .gmp import GmPLinear


def build_network(full_clip: FullCLIP, *, device="cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """An `open_clip.CLIP` holding copies of the weights in `dtype`, in training mode, every parameter with gradients.

    It has `encode_image` (pictures [n, 3, size, size], normalised), `encode_text` (int64 tokens [n, context]) and
    `logit_scale`. A model in GmP form gets `GmPLinear` layers, so its parameters bear the names in the file.
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
    # open_clip truncates width · ratio; the half keeps the product on the right side of the integer.
    vision = open_clip.CLIPVisionCfg(
        layers=a.vision_layers,
        width=a.vision_width,
        head_width=a.vision_width // a.vision_heads,
        mlp_ratio=(a.vision_mlp_width + 0.5) / a.vision_width,
        patch_size=a.patch_size,
        image_size=a.image_size,
    )
    text = open_clip.CLIPTextCfg(
        context_length=a.context_length,
        vocab_size=a.vocab_size,
        width=a.text_width,
        heads=a.text_heads,
        layers=a.text_layers,
        mlp_ratio=(a.text_mlp_width + 0.5) / a.text_width,
    )
    with torch.device(device):
        return open_clip.CLIP(a.embed_dim, vision, text, quick_gelu=a.activation == "quick_gelu")


def random_full_clip(architecture: Architecture, seed: int) -> FullCLIP:
    """A new model with open_clip's own initialisation (float32), a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _skeleton(architecture, device="cpu")
    return FullCLIP(architecture, network.state_dict(), {"source": f"initialised at random, seed {seed}"})
