"""More than 77 tokens: Long-CLIP's two position tables as one, and a short table stretched as Long-CLIP did it.

Zhang et al. 2024, "Long-CLIP: Unlocking the Long-Text Capability of CLIP", arXiv:2403.15378. The first 20 positions are
well trained and stay; the others are stretched to four times as many.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import UserError

if TYPE_CHECKING:
    from ..full_clip import FullCLIP

LONG_CONTEXT = 248
_KEPT = 20
_STRETCH = 4
_TABLE = "positional_embedding"
# Its second table, which holds from position 20 on; and what the first is called beside it under Hugging Face's names.
_SECOND = (f"{_TABLE}_res", "text_model.embeddings.position_embedding_res.weight")
_FIRST = "text_model.embeddings.position_embedding_ori.weight"


def with_one_table(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under OpenAI's names, Long-CLIP's two position tables merged: 20 rows of the first, then the second's.

    Raises `UserError` if the two are not of one shape.
    """
    second = next((name for name in _SECOND if name in tensors), None)
    if second is None:
        return tensors
    merged = {name: tensor for name, tensor in tensors.items() if name not in (*_SECOND, _FIRST)}
    first = tensors.get(_FIRST, tensors.get(_TABLE))
    if first is None or first.ndim != 2 or first.shape != tensors[second].shape:
        raise UserError(
            f"it has {second}, as Long-CLIP does, but no first table of the same shape beside it; get the file anew."
        )
    return merged | {_TABLE: torch.cat([first[:_KEPT], tensors[second][_KEPT:]])}


def stretched(table: Tensor) -> Tensor:
    """A position table [n, width] as one of [4 n − 60, width], in its dtype; computed in float64.

    Row 20 + j is the table read at the place 20 + j / 4, linearly between two rows, and beyond the last row further
    along the line through the last two.
    """
    exact = table.double()
    places = _KEPT + torch.arange(_STRETCH * (len(table) - _KEPT), dtype=torch.float64) / _STRETCH
    below = places.floor().long().clamp(max=len(table) - 2)
    share = (places - below)[:, None]
    rest = exact[below] * (1 - share) + exact[below + 1] * share
    return torch.cat([exact[:_KEPT], rest]).to(table.dtype)


def stretch_context(full_clip: FullCLIP) -> FullCLIP:
    """The same model with room for 248 tokens instead of 77; one that has it already comes back as it is.

    It reads short texts as before up to 20 tokens and nearly so beyond; to make use of the room, train it on long
    captions. Raises `UserError` for a model with any other number of positions.
    """
    length = full_clip.architecture.context_length
    if length == LONG_CONTEXT:
        return full_clip
    if _STRETCH * length - (_STRETCH - 1) * _KEPT != LONG_CONTEXT:
        raise UserError(f"This model reads {length} tokens; only one that reads 77 can be stretched to {LONG_CONTEXT}.")
    longer = {_TABLE: stretched(full_clip.state_dict[_TABLE])}
    history = [*full_clip.provenance.get("history", ()), f"stretched to {LONG_CONTEXT} tokens"]
    return dataclasses.replace(
        full_clip,
        architecture=dataclasses.replace(full_clip.architecture, context_length=LONG_CONTEXT),
        state_dict=dict(full_clip.state_dict) | longer,
        provenance={**full_clip.provenance, "history": history},
    )
