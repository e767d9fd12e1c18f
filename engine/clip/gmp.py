"""Geometric Parameterization (GmP): each output row of an MLP layer as a length and a direction.

W = r · theta / ‖theta‖ by row, in the layers `c_fc` and `c_proj` of both towers. This is weight normalisation
(Salimans and Kingma 2016, arXiv:1602.07868) in Cartesian form, not hyperspherical angles. Conversions compute in
float64 and round once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..notes import OnNote, ignore_note
from .full_clip import FullCLIP
from .health import not_finite, require_finite

FOLDED = "The model was in GmP form; it was folded to plain weights."
NOTHING_TO_FOLD = "This model is not in GmP form; there was nothing to fold."
_LAYERS = (".mlp.c_fc", ".mlp.c_proj")


def weight_to_gmp(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return r [out, 1] ≥ 0 and theta [out, in] with rows of length 1 for a weight [out, in].

    Half precision gives float32, so that folding returns the same bits. A row of zeros gives r = 0 and the direction
    of equal components.
    """
    exact = weight.double()
    r = exact.norm(dim=1, keepdim=True)
    direction = torch.where(r > 0, exact / r.clamp_min(torch.finfo(torch.float64).tiny), exact.shape[1] ** -0.5)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return r.to(dtype), direction.to(dtype)


def gmp_to_weight(r: Tensor, theta: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the weight [out, in] for r [out, 1] and theta [out, in]; the sign of r counts."""
    exact = theta.double()
    length = exact.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (r.double() * (exact / length)).to(dtype or theta.dtype)


def to_gmp(full_clip: FullCLIP) -> FullCLIP:
    """Return the model in GmP form; the model itself if it is in that form already.

    Raises `UserError` for weights that are not finite.
    """
    require_finite(full_clip, "The model was not converted to GmP")
    if full_clip.parameterization == "gmp":
        return full_clip
    changed, dropped = {}, []
    for name, tensor in full_clip.state_dict.items():
        layer = name.removesuffix(".weight")
        if layer != name and layer.endswith(_LAYERS):
            changed[f"{layer}.r"], changed[f"{layer}.theta"] = weight_to_gmp(tensor)
            dropped.append(name)
    return full_clip.derive(changed, dropped=dropped, step="converted to GmP")


def fold_gmp(full_clip: FullCLIP, *, matters: Callable[[str], bool] = lambda name: True) -> FullCLIP:
    """Return the model with plain weights, each in its bias's dtype; a plain model comes back with a note.

    Raises `UserError` for weights that are not finite, before or after, unless their names do not matter.
    """
    require_finite(full_clip, "The model was not folded", matters=matters)
    if full_clip.parameterization == "linear":
        if NOTHING_TO_FOLD in full_clip.notes:
            return full_clip
        return full_clip.derive({}, step="fold: nothing to do", notes=[NOTHING_TO_FOLD])
    state, changed, dropped = full_clip.state_dict, {}, []
    for name in state:
        layer = name.removesuffix(".theta")
        if layer != name:
            r, theta, bias = state[f"{layer}.r"], state[name], state[f"{layer}.bias"]
            changed[f"{layer}.weight"] = gmp_to_weight(r, theta, bias.dtype)
            dropped += [f"{layer}.r", name]
    if overflowed := [name for name in not_finite(changed) if matters(name)]:
        raise UserError(
            f"The model was not folded: {overflowed[0]} would hold values too large for its dtype; save the model as "
            "fp32 first (SaveFullCLIP with format gmp, or clip-finetune export --format gmp --dtype fp32)."
        )
    return full_clip.derive(changed, dropped=dropped, step="GmP folded")


def plain_weights(
    full_clip: FullCLIP, on_note: OnNote = ignore_note, *, matters: Callable[[str], bool] = lambda name: True
) -> FullCLIP:
    """Return the model with plain weights: folded, with a note, if it is in GmP form, else the model itself, unchecked.

    `matters` and errors are those of `fold_gmp`.
    """
    if full_clip.parameterization == "linear":
        return full_clip
    on_note(FOLDED)
    return fold_gmp(full_clip, matters=matters)


class GmPLinear(nn.Module):
    """A linear layer [.., in] → [.., out] with the parameters `r`, `theta` and `bias`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.r = nn.Parameter(torch.empty(out_features, 1, device=device, dtype=dtype))
        self.theta = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    @property
    def weight(self) -> Tensor:
        """The plain weight [out, in]; open_clip also reads the dtype that the tower computes in from it."""
        return self.r * F.normalize(self.theta, dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.bias)
