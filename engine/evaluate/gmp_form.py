"""GmP form: how the lengths (r) and directions (theta) of the MLP rows are distributed, by tower and depth."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from ..clip.full_clip import FullCLIP
from ..report.comparison_charts import gmp_chart
from .drift import require_one_architecture
from .encoder import BrokenModel, default_device, ignore_progress, never_cancelled

QUANTILES = (0.05, 0.5, 0.95)  # of r, and of the angles
THETA_QUANTILES = (0.001, 0.05, 0.5, 0.95, 0.999)
# Theta is multiplied by √columns, so that it is 1 in a row of equal components.
THETA_BINS, THETA_END = 800, 10.0
PLAIN = "A plain model is shown in its GmP form: r is the length of each row, theta its direction."
_LAYER = re.compile(r"((?:visual\.)?)transformer\.resblocks\.(\d+)\.mlp\.(c_fc|c_proj)\.(?:weight|theta)$")


class _Layer(NamedTuple):
    tower: str
    depth: int
    layer: str


@dataclasses.dataclass(frozen=True)
class LayerForm:
    """One layer.

    `r`: `QUANTILES` of its rows' lengths, with their signs. `theta_histogram`: counts of the components of unit rows,
    times √columns, in `THETA_BINS` equal bins from −`THETA_END` to `THETA_END`; the end bins hold what is beyond.
    `turned`: `QUANTILES` of the angles in degrees between its rows and the baseline's, None without a baseline.
    """

    tower: str
    depth: int
    layer: str
    r: tuple[float, ...]
    theta_histogram: tuple[int, ...] = dataclasses.field(repr=False)
    turned: tuple[float, ...] | None = None

    @property
    def theta(self) -> tuple[float, ...]:
        """`THETA_QUANTILES` of the components, accurate to one bin."""
        shares = torch.tensor(self.theta_histogram, dtype=torch.float64).cumsum(0)
        bins = torch.searchsorted(shares / shares[-1], torch.tensor(THETA_QUANTILES, dtype=torch.float64))
        return tuple(((bins + 0.5) * (2 * THETA_END / THETA_BINS) - THETA_END).tolist())

    def as_dict(self) -> dict[str, Any]:
        return {
            "tower": self.tower,
            "depth": self.depth,
            "layer": self.layer,
            "r": list(self.r),
            "theta": list(self.theta),
            "turned": self.turned and list(self.turned),
        }


@dataclasses.dataclass(frozen=True)
class GmPForm:
    """Layers by tower, layer and depth; `before` are the baseline's in the same order, empty without one."""

    layers: tuple[LayerForm, ...]
    before: tuple[LayerForm, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """How far rows have turned and stretched, in words."""
        if not self.before:
            return "Rows of the MLP weights: r is their length, theta their direction"
        towers = [self._change(tower) for tower in dict.fromkeys(layer.tower for layer in self.layers)]
        return f"Median rows since the baseline: {'; '.join(towers)}"

    def _change(self, tower: str) -> str:
        pairs = [(new, old) for new, old in zip(self.layers, self.before, strict=True) if new.tower == tower]
        angles = [new.turned[1] for new, _ in pairs if new.turned is not None]
        stretches = [abs(new.r[1] / old.r[1] - 1) for new, old in pairs if old.r[1]]
        return (
            f"{tower} tower turned by {sum(angles) / len(angles):.2f}°, length changed by "
            f"{sum(stretches) / max(1, len(stretches)):.2%}"
        )

    def chart(self) -> Image:
        return gmp_chart(self.layers, self.before, theta_end=THETA_END, title=self.sentence)

    def as_dict(self) -> dict[str, Any]:
        return {"layers": [layer.as_dict() for layer in self.layers]}


def gmp_form(
    full_clip: FullCLIP,
    baseline: FullCLIP | None = None,
    *,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = ignore_progress,
    check_cancelled: Callable[[], None] = never_cancelled,
) -> GmPForm:
    """Measure one layer at a time, in fp32, so that memory holds one layer.

    Raises `UserError` for a baseline of another architecture and `BrokenModel` for weights that are not finite.
    """
    if baseline is not None:
        require_one_architecture(full_clip, baseline)
    device = default_device(device)
    baseline_names = {} if baseline is None else dict(_layers(baseline))
    layers = sorted(_layers(full_clip), key=lambda named: (named[0].tower == "text", named[0].layer, named[0].depth))
    after, before = [], []
    for done, (layer, name) in enumerate(layers):
        check_cancelled()
        on_progress(done, len(layers))
        r, theta = _row_form(full_clip, name, device)
        turned = None
        if baseline is not None:
            old_r, old_theta = _row_form(baseline, baseline_names[layer], device)
            turned = _quantiles(_angles(r, theta, old_r, old_theta))
            before.append(LayerForm(*layer, _quantiles(old_r), _histogram(old_theta)))
        after.append(LayerForm(*layer, _quantiles(r), _histogram(theta), turned))
    on_progress(len(layers), len(layers))
    plain = any(model.parameterization == "linear" for model in (full_clip, baseline) if model is not None)
    return GmPForm(tuple(after), tuple(before), (PLAIN,) if plain else ())


def _layers(full_clip: FullCLIP) -> Iterator[tuple[_Layer, str]]:
    """Yield each layer with its name in the state dict."""
    for name in full_clip.state_dict:
        if match := _LAYER.match(name):
            yield _Layer("vision" if match[1] else "text", int(match[2]), match[3]), name.rpartition(".")[0]


def _row_form(full_clip: FullCLIP, layer: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return r [out] and unit rows theta [out, in], float32."""
    state = full_clip.state_dict
    gmp = f"{layer}.theta" in state
    rows = state[f"{layer}.theta" if gmp else f"{layer}.weight"].to(device, torch.float32)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    r = state[f"{layer}.r"].to(device, torch.float32).flatten() if gmp else lengths
    if not (torch.isfinite(r).all() and torch.isfinite(lengths).all()):
        raise BrokenModel(
            f"{layer} holds values that are not numbers (NaN or infinite); use an earlier checkpoint of the model."
        )
    return r, rows / lengths.clamp_min(torch.finfo(torch.float32).tiny)[:, None]


def _angles(r: Tensor, theta: Tensor, r_before: Tensor, theta_before: Tensor) -> Tensor:
    """Return degrees between rows as they act, so that a negative length turns its row around.

    From the distance of unit rows, which is exact for small angles; the cosine is not.
    """
    signs = torch.where((r < 0) ^ (r_before < 0), -1.0, 1.0)[:, None]
    distance = torch.linalg.vector_norm(theta * signs - theta_before, dim=1)
    return torch.rad2deg(2 * torch.asin((distance / 2).clamp_max(1)))


def _quantiles(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().quantile(torch.tensor(QUANTILES, dtype=torch.float64, device=values.device)).tolist())


def _histogram(theta: Tensor) -> tuple[int, ...]:
    scaled = (theta * theta.shape[1] ** 0.5).clamp_(-THETA_END, THETA_END)
    return tuple(int(count) for count in torch.histc(scaled, THETA_BINS, -THETA_END, THETA_END).tolist())
