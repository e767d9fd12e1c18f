"""open_clip's CLIP with a forward pass that computes only what the features depend on. Imports open_clip: slow."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class ClipNetwork(open_clip.CLIP):
    """open_clip's CLIP with the same features at a fraction of the cost (see `run_block`)."""

    # open_clip has no types. The towers' own modules are Any: there are two kinds of vision tower.
    visual: Any
    transformer: Any
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    ln_final: nn.LayerNorm
    text_projection: nn.Parameter
    logit_scale: nn.Parameter
    attn_mask: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in, and that images must have."""
        return self.positional_embedding.dtype

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        if not hasattr(self.visual, "transformer"):  # a ResNet
            return super().encode_image(image, normalize)
        features = self.image_features(self.image_states(image, 0), 0)
        return F.normalize(features, dim=-1) if normalize else features

    def image_states(self, image: Tensor, blocks: int) -> Tensor:
        """Return the states [n, t, d] after the first `blocks` blocks of a ViT, at most all except the last."""
        states = self.visual._embeds(image)
        for block in self.visual.transformer.resblocks[:blocks]:
            states = _run(self.visual.transformer, block, states, False)
        return states

    def image_features(self, states: Tensor, blocks: int) -> Tensor:
        """Return what `encode_image` does, from the result of `image_states` with the same `blocks`."""
        class_token = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        pooled = _run_blocks(self.visual.transformer, blocks, states, class_token)
        return self.visual.ln_post(pooled) @ self.visual.proj

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        states = self.token_embedding(text) + self.positional_embedding[: text.shape[1]]
        # The end token has the highest id.
        pooled = _run_blocks(self.transformer, 0, states, text.argmax(dim=1), causal=True)
        features = self.ln_final(pooled) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features


def _run_blocks(transformer: Any, done: int, states: Tensor, pooled: Tensor, causal: bool = False) -> Tensor:
    """Run all blocks except the first `done` on states [n, t, d]; return the result [n, d] at the positions `pooled`
    [n]."""
    *blocks, last = transformer.resblocks[done:]
    for block in blocks:
        states = _run(transformer, block, states, causal)
    return _run(transformer, last, states, causal, pooled)


def _run(transformer: Any, block: Any, *inputs: Any) -> Tensor:
    run = getattr(transformer, "compiled_block", run_block)
    if transformer.grad_checkpointing and torch.is_grad_enabled():
        return checkpoint(run, block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return run(block, *inputs)


def run_block(block: Any, states: Tensor, causal: bool, pooled: Tensor | None = None) -> Tensor:
    """Run one residual block, states [n, t, d] → [n, t, d]; with `pooled` [n] only at those positions, → [n, d].

    After the last block the features depend on one position only, so of the other positions the keys and values are
    enough there. A causal block never looks behind a text's end, so the zeros there may be left out. Both are exact.
    """
    attention, normed = block.attn, block.ln_1(states)
    weight, bias, heads = attention.in_proj_weight, attention.in_proj_bias, attention.num_heads
    if pooled is None:
        queries, keys, values = _split_heads(F.linear(normed, weight, bias), 3, heads)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
    else:
        width = states.shape[-1]  # rows of the query in `weight`, before those of key and value
        rows = torch.arange(len(states), device=states.device)
        states = states[rows, pooled].unsqueeze(1)
        (queries,) = _split_heads(F.linear(normed[rows, pooled].unsqueeze(1), weight[:width], bias[:width]), 1, heads)
        keys, values = _split_heads(F.linear(normed, weight[width:], bias[width:]), 2, heads)
        mask = None
        if causal:
            seen = torch.arange(normed.shape[1], device=states.device) <= pooled[:, None]
            mask = seen[:, None, None]
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    states = states + attention.out_proj(mixed.transpose(1, 2).flatten(2))
    states = states + block.mlp(block.ln_2(states))
    return states if pooled is None else states.squeeze(1)


def _split_heads(packed: Tensor, count: int, heads: int) -> tuple[Tensor, ...]:
    """Split [n, t, count · d] into `count` tensors [n, heads, t, d / heads]."""
    return packed.unflatten(-1, (count, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
