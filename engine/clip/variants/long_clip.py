"""More than 77 tokens: merge Long-CLIP's two position tables, and stretch a short table as Long-CLIP did.

Zhang et al. 2024, "Long-CLIP: Unlocking the Long-Text Capability of CLIP", arXiv:2403.15378. The first 20 positions are
well trained and stay as they are; the others are stretched to four times as many.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...errors import UserError
from ..full_clip import FullCLIP

LONG_CONTEXT = 248
_KEPT = 20
_STRETCH = 4
_TABLE = "positional_embedding"
# Long-CLIP's second table, which holds from position 20 on; and the first one beside it under Hugging Face's names.
_SECOND = (f"{_TABLE}_res", "text_model.embeddings.position_embedding_res.weight")
_FIRST = "text_model.embeddings.position_embedding_ori.weight"


def with_one_table(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge Long-CLIP's two position tables, where there are two: 20 rows of the first, then the rows of the second.

    The tensors are under OpenAI's names. Raises `UserError` if the two tables differ in shape.
    """
    second = next((name for name in _SECOND if name in tensors), None)
    if second is None:
        return tensors
    others = {name: tensor for name, tensor in tensors.items() if name not in (*_SECOND, _FIRST)}
    first = tensors.get(_FIRST, tensors.get(_TABLE))
    if first is None or first.ndim != 2 or first.shape != tensors[second].shape:
        raise UserError(
            f"it has {second}, as Long-CLIP does, but no first table of the same shape beside it; download it again."
        )
    return others | {_TABLE: torch.cat([first[:_KEPT], tensors[second][_KEPT:]])}


def stretched(table: Tensor) -> Tensor:
    """Stretch a position table [n, width] to [4 n − 60, width], in its dtype; computed in float64.

    Row 20 + j is the table at position 20 + j / 4, linearly between two rows; beyond the last row, the line through the
    last two goes on.
    """
    exact = table.double()
    positions = _KEPT + torch.arange(_STRETCH * (len(table) - _KEPT), dtype=torch.float64) / _STRETCH
    below = positions.floor().long().clamp(max=len(table) - 2)
    weight = (positions - below)[:, None]
    rest = exact[below] * (1 - weight) + exact[below + 1] * weight
    return torch.cat([exact[:_KEPT], rest]).to(table.dtype)


def stretch_context(full_clip: FullCLIP) -> FullCLIP:
    """Return the model with room for 248 tokens instead of 77; the model itself if it has the room already.

    It reads texts of up to 20 tokens as before, and longer ones nearly so; to make use of the room, train it on long
    captions. Raises `UserError` for any other number of positions.
    """
    length = full_clip.architecture.context_length
    if length == LONG_CONTEXT:
        return full_clip
    if _STRETCH * length - (_STRETCH - 1) * _KEPT != LONG_CONTEXT:
        raise UserError(f"This model reads {length} tokens; only one that reads 77 can be stretched to {LONG_CONTEXT}.")
    return full_clip.derive(
        {_TABLE: stretched(full_clip.state_dict[_TABLE])},
        step=f"stretched to {LONG_CONTEXT} tokens",
        architecture=dataclasses.replace(full_clip.architecture, context_length=LONG_CONTEXT),
    )
