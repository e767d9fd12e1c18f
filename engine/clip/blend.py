"""Interpolation between two CLIPs in weight space (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903)."""

from __future__ import annotations

import math

import torch

from ..errors import UserError
from .full_clip import FullCLIP
from .gmp import plain_weights
from .health import not_finite, require_finite


def blend(full_clip: FullCLIP, baseline: FullCLIP, alpha: float) -> FullCLIP:
    """Return baseline + alpha · (full_clip − baseline) of the plain weights; above 1 it extrapolates.

    Computed in float64 and rounded once to `full_clip`'s dtypes. At 0 and 1 the input's own tensors come back. Models
    in GmP form are folded first. Raises `UserError` if the two differ in architecture, and for weights that are not
    finite, before or after.
    """
    if not math.isfinite(alpha):
        raise UserError(f"alpha is {alpha}; give a number, such as 0.5.")
    ours, theirs = full_clip.architecture.as_dict(), baseline.architecture.as_dict()
    if different := [f"{name} {value} and {theirs[name]}" for name, value in ours.items() if value != theirs[name]]:
        raise UserError(f"Two different models cannot be blended ({', '.join(different)}); choose two of one kind.")
    for name, model in (("full_clip", full_clip), ("baseline", baseline)):
        require_finite(model, f"The models were not blended, because of the {name}")
    plain, base = plain_weights(full_clip), plain_weights(baseline)
    if alpha in (0, 1):
        return plain if alpha == 1 else base
    blended = {
        name: torch.lerp(base.state_dict[name].double(), tensor.double(), float(alpha)).to(tensor.dtype)
        for name, tensor in plain.state_dict.items()
    }
    if overflowed := not_finite(blended):
        raise UserError(
            f"The models were not blended: at alpha {alpha:g}, {overflowed[0]} would hold values too large for its "
            "dtype; choose an alpha from 0 to 1."
        )
    return plain.derive(blended, step=f"blended with its baseline at {alpha:g}")
