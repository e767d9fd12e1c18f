"""A FullCLIP as a network that runs: open_clip's CLIP with this model's weights, and a forward pass that computes only
what the features depend on."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..errors import UserError, one_line
from .architecture import Architecture
from .full_clip import FullCLIP
from .gmp import GmPLinear
from .variants.resnet import STAGES, feature_width


def build_network(full_clip: FullCLIP, *, device="cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """An `open_clip.CLIP` holding copies of the weights in `dtype`, in training mode, every parameter with gradients.

    It has `encode_image` (pictures [n, 3, size, size], normalised, in `dtype`), `encode_text` (int64 tokens [n, t],
    t up to the context; zeros behind a text's end may be left out) and `logit_scale`. A model in GmP form gets
    `GmPLinear` layers, so its parameters bear the names in the file. A ResNet's BatchNorm layers are `StoredNorm`s,
    whose statistics are buffers under the names in the file.
    """
    weights = {name: tensor.to(device=device, dtype=dtype, copy=True) for name, tensor in full_clip.state_dict.items()}
    return network_of(full_clip.architecture, weights).requires_grad_(True)


def network_of(architecture: Architecture, weights: Mapping[str, Tensor]) -> nn.Module:
    """As `build_network`, of these tensors themselves under the names of a file; parameters stay the objects that they
    are."""
    network = skeleton(architecture, device="meta")
    for layer in [name.removesuffix(".theta") for name in weights if name.endswith(".theta")]:
        parent, _, name = layer.rpartition(".")
        out_features, in_features = weights[f"{layer}.theta"].shape
        setattr(network.get_submodule(parent), name, GmPLinear(in_features, out_features, device="meta"))
    network.load_state_dict(weights, strict=True, assign=True)
    position = network.positional_embedding
    mask = torch.full((len(position), len(position)), float("-inf"), device=position.device, dtype=position.dtype)
    network.attn_mask = mask.triu_(1)  # for who calls open_clip's own blocks
    return network.train()


def skeleton(architecture: Architecture, device: str) -> nn.Module:
    """The network as open_clip initialises it; on the meta device without weights, so that none are drawn in vain."""
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
        network = _network_class()(a.embed_dim, vision, text, quick_gelu=a.activation == "quick_gelu")
    for name, module in list(network.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.BatchNorm2d):
            setattr(network.get_submodule(parent), child, StoredNorm(module))
        elif isinstance(module, open_clip.transformer.QuickGELU):
            setattr(network.get_submodule(parent), child, QuickGELU())
    return network


@functools.cache
def _network_class() -> type[nn.Module]:
    """open_clip takes seconds to import, so it is imported when the first network is built."""
    import open_clip

    class CLIP(open_clip.CLIP):
        """open_clip's CLIP, whose features it gives, at a share of the cost (see `_block`)."""

        @property
        def dtype(self) -> torch.dtype:
            """In which it computes, and wants pictures."""
            return self.positional_embedding.dtype

        def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
            if not hasattr(self.visual, "transformer"):  # a ResNet
                return super().encode_image(image, normalize)
            features = self.image_features(self.image_states(image, 0), 0)
            return F.normalize(features, dim=-1) if normalize else features

        def image_states(self, image: Tensor, blocks: int) -> Tensor:
            """[n, t, d] behind the first `blocks` blocks of a vision transformer, at most all but the last."""
            states = self.visual._embeds(image)
            for block in self.visual.transformer.resblocks[:blocks]:
                states = _run(self.visual.transformer, block, states, False)
            return states

        def image_features(self, states: Tensor, blocks: int) -> Tensor:
            """`encode_image` from what `image_states` gave."""
            first = torch.zeros(len(states), dtype=torch.int64, device=states.device)
            pooled = _run_blocks(self.visual.transformer, blocks, states, first)
            return self.visual.ln_post(pooled) @ self.visual.proj

        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            states = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
            # The end token has the highest number.
            pooled = _run_blocks(self.transformer, 0, states, text.argmax(dim=1), causal=True)
            features = self.ln_final(pooled) @ self.text_projection
            return F.normalize(features, dim=-1) if normalize else features

    CLIP.__qualname__ = "CLIP"  # where pickle finds it, by __getattr__
    return CLIP


def __getattr__(name: str):
    if name == "CLIP":
        return _network_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- the forward pass ------------------------------------------------------------------------------------------------


def _run_blocks(
    transformer: nn.Module, done: int, states_ntd: Tensor, pooled_n: Tensor, causal: bool = False
) -> Tensor:
    """What stands [n, d] at the positions `pooled_n` after all blocks, of which the first `done` are done."""
    *blocks, last = transformer.resblocks[done:]
    for block in blocks:
        states_ntd = _run(transformer, block, states_ntd, causal)
    return _run(transformer, last, states_ntd, causal, pooled_n)


def _run(transformer: nn.Module, block: nn.Module, *inputs) -> Tensor:
    run = getattr(transformer, "compiled_block", _block)
    if transformer.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(run, block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return run(block, *inputs)


def _block(block: nn.Module, states: Tensor, causal: bool, pooled: Tensor | None = None) -> Tensor:
    """One residual block, states [n, t, d] → [n, t, d]; with `pooled` [n] only the states at those positions, [n, d].

    The features depend on one position after the last block, so that there only keys and values are needed of the
    others. A causal block never looks behind a text's end, so the zeros there can be left out. Both are exact.
    """
    attention, normed = block.attn, block.ln_1(states)
    weight, bias, heads = attention.in_proj_weight, attention.in_proj_bias, attention.num_heads
    if pooled is None:
        queries, keys, values = _heads(F.linear(normed, weight, bias), 3, heads)
        found = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
    else:
        width = states.shape[-1]
        rows = torch.arange(len(states), device=states.device)
        states = states[rows, pooled].unsqueeze(1)
        (queries,) = _heads(F.linear(normed[rows, pooled].unsqueeze(1), weight[:width], bias[:width]), 1, heads)
        keys, values = _heads(F.linear(normed, weight[width:], bias[width:]), 2, heads)
        seen = torch.arange(normed.shape[1], device=states.device) <= pooled[:, None] if causal else None
        found = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=None if seen is None else seen[:, None, None]
        )
    states = states + attention.out_proj(found.transpose(1, 2).flatten(2))
    states = states + block.mlp(block.ln_2(states))
    return states if pooled is None else states.squeeze(1)


def _heads(packed: Tensor, count: int, heads: int) -> tuple[Tensor, ...]:
    """`count` tensors [n, heads, t, d / heads] of [n, t, count · d]."""
    return packed.unflatten(-1, (count, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x) as SiLU(1.702 x) / 1.702, which keeps one tensor for backward and overwrites its input: a
    linear layer does not need its output again."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.silu(inputs.mul_(1.702)).div_(1.702)


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


def compile_blocks(network: nn.Module) -> None:
    """Let torch.compile make one program of a block of each tower; changes rounding only. A ResNet stays as it is.

    Raises `UserError` where that cannot work, such as without a compiler.
    """
    compiled = torch.compile(_block, dynamic=True)
    towers = [(network.transformer, True)]
    if hasattr(network.visual, "transformer"):
        towers.append((network.visual.transformer, False))
    for transformer, causal in towers:
        block = transformer.resblocks[0]
        width, like = block.ln_1.normalized_shape[0], block.ln_1.weight
        try:
            compiled(block, torch.zeros(2, 3, width, dtype=like.dtype, device=like.device), causal)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch's errors of compilers are such
            raise UserError(
                f"torch.compile does not work here ({one_line(error)}); switch compile off, or install a C compiler "
                "(for a graphics card Triton too)."
            ) from error
        transformer.compiled_block = compiled


def random_full_clip(architecture: Architecture, seed: int) -> FullCLIP:
    """A new model with open_clip's own initialisation (float32), a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = skeleton(architecture, device="cpu")
    return FullCLIP(architecture, network.state_dict(), {"source": f"initialised at random, seed {seed}"})
