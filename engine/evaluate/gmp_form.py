"""How lengths (r) and directions (theta) of the MLP rows are distributed, by tower and depth."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..clip.full_clip import FullCLIP
from ..report.comparison_charts import gmp_chart
from .drift import require_one_architecture
from .encoder import BrokenModel

QUANTILES = (0.05, 0.5, 0.95)  # of r, and of the angles
THETA_QUANTILES = (0.001, 0.05, 0.5, 0.95, 0.999)
THETA_BINS, THETA_END = 800, 10.0  # of theta times the root of its row's length: one for a row of equal components
PLAIN = "A plain model is shown as its GmP form: r is each row's length, theta its direction."
_LAYER = re.compile(r"((?:visual\.)?)transformer\.resblocks\.(\d+)\.mlp\.(c_fc|c_proj)\.(?:weight|theta)$")


@dataclasses.dataclass(frozen=True)
class LayerForm:
    """One layer. `r`: `QUANTILES` of its rows' lengths, signs kept. `theta_histogram`: how many components are in each
    of `THETA_BINS` equal bins from −`THETA_END` to `THETA_END`, where components are those of a unit row times
    √columns; what is beyond counts in the end bins. `turned`: `QUANTILES` of the angles in degrees between its rows and
    the baseline's (None without a baseline)."""

    tower: str
    depth: int
    layer: str
    r: tuple[float, ...]
    theta_histogram: tuple[int, ...] = dataclasses.field(repr=False)
    turned: tuple[float, ...] | None = None

    @property
    def theta(self) -> tuple[float, ...]:
        """`THETA_QUANTILES` of the components, to a bin."""
        shares = torch.tensor(self.theta_histogram, dtype=torch.float64).cumsum(0)
        bins = torch.searchsorted(shares / shares[-1], torch.tensor(THETA_QUANTILES, dtype=torch.float64))
        return tuple(((bins + 0.5) * (2 * THETA_END / THETA_BINS) - THETA_END).tolist())


@dataclasses.dataclass(frozen=True)
class GmPForm:
    """By tower, layer and depth; `before` are the baseline's layers in the same order, empty without one."""

    layers: tuple[LayerForm, ...]
    before: tuple[LayerForm, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """How far rows have turned, or which tower has which lengths, in words."""
        if not self.before:
            return "Rows of the MLP weights: r is their length, theta their direction"
        told = []
        for tower in dict.fromkeys(found.tower for found in self.layers):
            turned = [found.turned[1] for found in self.layers if found.tower == tower]
            lengths = [
                abs(new.r[1] / old.r[1] - 1)
                for new, old in zip(self.layers, self.before, strict=True)
                if new.tower == tower and old.r[1]
            ]
            told.append(
                f"{tower} tower turned by {sum(turned) / len(turned):.2f}°, length changed by "
                f"{sum(lengths) / max(1, len(lengths)):.2%}"
            )
        return f"Median rows since the baseline: {'; '.join(told)}"

    def chart(self):
        """PIL, RGB."""
        edges = [2 * THETA_END * number / THETA_BINS - THETA_END for number in range(THETA_BINS + 1)]

        def numbers(layers: Sequence[LayerForm]) -> list[dict[str, Any]]:
            return [
                {
                    "tower": found.tower,
                    "depth": found.depth,
                    "layer": found.layer,
                    "r": found.r,
                    "theta": found.theta,
                    "turned": found.turned,
                    "histogram": (edges, found.theta_histogram),
                }
                for found in layers
            ]

        return gmp_chart(numbers(self.before) or None, numbers(self.layers), title=self.sentence)

    def as_dict(self) -> dict[str, Any]:
        return {
            "layers": [
                {
                    "tower": found.tower,
                    "depth": found.depth,
                    "layer": found.layer,
                    "r": list(found.r),
                    "theta": list(found.theta),
                    "turned": found.turned and list(found.turned),
                }
                for found in self.layers
            ]
        }


def gmp_form(
    full_clip: FullCLIP,
    baseline: FullCLIP | None = None,
    *,
    device: torch.device | str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    check_cancelled: Callable[[], None] = lambda: None,
) -> GmPForm:
    """A layer at a time, in fp32: memory is what one layer takes. Raises `UserError` for a baseline of another
    architecture and `BrokenModel` for weights that are not numbers."""
    if baseline is not None:
        require_one_architecture(full_clip, baseline)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = {} if baseline is None else dict(_layers(baseline))
    layers = sorted(_layers(full_clip), key=lambda layer: (layer[0][0] == "text", layer[0][2], layer[0][1]))
    found, before = [], []
    for done, (place, name) in enumerate(layers):
        check_cancelled()
        on_progress(done, len(layers))
        r, theta = _row_form(full_clip, name, device)
        turned = None
        if baseline is not None:
            old = _row_form(baseline, names[place], device)
            turned = _quantiles(_angles(r, theta, *old))
            before.append(LayerForm(*place, _quantiles(old[0]), _histogram(old[1])))
        found.append(LayerForm(*place, _quantiles(r), _histogram(theta), turned))
    on_progress(len(layers), len(layers))
    plain = any(model.parameterization == "linear" for model in (full_clip, baseline) if model is not None)
    return GmPForm(tuple(found), tuple(before), (PLAIN,) if plain else ())


def _layers(full_clip: FullCLIP) -> Iterator[tuple[tuple[str, int, str], str]]:
    """((tower, depth, layer), the layer's name without its last part)."""
    for name in full_clip.state_dict:
        if match := _LAYER.match(name):
            yield ("vision" if match[1] else "text", int(match[2]), match[3]), name.rpartition(".")[0]


def _row_form(full_clip: FullCLIP, layer: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """r [out] and unit rows theta [out, in], float32."""
    state = full_clip.state_dict
    gmp = f"{layer}.theta" in state
    rows = state[f"{layer}.theta" if gmp else f"{layer}.weight"].to(device, torch.float32)
    lengths = torch.linalg.vector_norm(rows, dim=1)
    r = state[f"{layer}.r"].to(device, torch.float32).flatten() if gmp else lengths
    if not (torch.isfinite(r).all() and torch.isfinite(lengths).all()):
        raise BrokenModel(
            f"{layer} holds values that are not numbers (NaN or infinite); choose a model from before its training "
            "broke."
        )
    return r, rows / lengths.clamp_min(torch.finfo(torch.float32).tiny)[:, None]


def _angles(r: Tensor, theta: Tensor, r_before: Tensor, theta_before: Tensor) -> Tensor:
    """Degrees between rows as they act, so that a length below zero turns its row round. By the distance of unit rows,
    which is exact for small angles where a cosine is not."""
    signs = torch.where((r < 0) ^ (r_before < 0), -1.0, 1.0)[:, None]
    distance = torch.linalg.vector_norm(theta * signs - theta_before, dim=1)
    return torch.rad2deg(2 * torch.asin((distance / 2).clamp_max(1)))


def _quantiles(values: Tensor) -> tuple[float, ...]:
    return tuple(values.double().quantile(torch.tensor(QUANTILES, dtype=torch.float64, device=values.device)).tolist())


def _histogram(theta: Tensor) -> tuple[int, ...]:
    scaled = (theta * theta.shape[1] ** 0.5).clamp_(-THETA_END, THETA_END)
    return tuple(int(count) for count in torch.histc(scaled, THETA_BINS, -THETA_END, THETA_END).tolist())
