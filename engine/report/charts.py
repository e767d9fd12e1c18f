"""Charts from numbers: pictures (PIL, RGB) that stay readable at the size of a node in a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SIZE, _DPI = (7.68, 4.8), 100
_GROUND, _INK, _FAINT = "#20232a", "#e8e8e8", "#4a4f5a"
_BLUE, _ORANGE, _GREEN, _GREY = "#5aa9f0", "#f2a541", "#7bc96f", "#9aa0ab"
_POINTS = 1500  # a curve of more steps is thinned to this many


def loss_chart(steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]], *, title: str = ""):
    """The lines of metrics.jsonl as a chart: the loss of each step and its running mean, validations as points with the
    best one marked, the learning rate faint behind them."""
    figure, axes = _figure(title or "training")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    thin = steps[:: max(1, len(steps) // _POINTS)]
    known = [(line["step"], line["loss"]) for line in thin if math.isfinite(line["loss"])]
    if known:
        xs, losses = zip(*known, strict=True)
        axes.plot(xs, losses, color=_BLUE, alpha=0.35, linewidth=1)
        axes.plot(xs, _running_mean(losses), color=_BLUE, linewidth=2.5, label="training loss")
        rates = axes.twinx()
        rates.plot([line["step"] for line in thin], [max(line["learning_rate"].values()) for line in thin],
                   color=_GREY, linewidth=1, linestyle=":")  # fmt: skip
        rates.set_axis_off()
    else:
        axes.text(0.5, 0.5, "no step yet", transform=axes.transAxes, ha="center", va="center", color=_GREY, fontsize=16)
    points = [(line["step"], line["loss"]) for line in validations if math.isfinite(line["loss"])]
    if points:
        xs, losses = zip(*points, strict=True)
        axes.plot(xs, losses, color=_ORANGE, marker="o", linewidth=2, markersize=6, label="validation loss")
        best = min(points, key=lambda point: point[1])
        axes.plot(*best, color=_GREEN, marker="*", markersize=16, linestyle="none", label=f"best: step {best[0]}")
    if known or points:
        _legend(axes)
    return _picture(figure)


def bar_chart(groups: Mapping[str, Mapping[str, float]], *, title: str = ""):
    """Shares (0 to 1) as bars in percent: `groups[label][name]`, a group of bars for each label and a colour for each
    name, the value written on each bar."""
    figure, axes = _figure(title)
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    colours = [_GREY, _BLUE, _ORANGE, _GREEN] if len(names) > 1 else [_BLUE]
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        xs = [group + (number - (len(names) - 1) / 2) * width for group in range(len(groups))]
        values = [100 * bars.get(name, math.nan) for bars in groups.values()]
        drawn = axes.bar(xs, values, width * 0.92, color=colours[number % len(colours)], label=name)
        labels = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
        axes.bar_label(drawn, labels, color=_INK, fontsize=12 if len(groups) * len(names) <= 12 else 9, padding=2)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=13 if len(groups) <= 5 else 10, parse_math=False)
    axes.set_ylabel("percent")
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="x", visible=False)
    if len(names) > 1:
        _legend(axes, loc="upper center", ncols=len(names))
    return _picture(figure)


def against_baseline(what: str, value: float, baseline: float | None) -> str:
    """A title that says in words how a share (0 to 1) stands beside the baseline's."""
    if baseline is None:
        return f"{what}: {value:.1%}"
    points = 100 * (value - baseline)
    if abs(points) < 0.05:
        return f"{what}: {value:.1%}, as before"
    return f"{what}: {value:.1%}, {abs(points):.1f} points {'better' if points > 0 else 'worse'} than the baseline"


def _running_mean(values: Sequence[float]) -> list[float]:
    """An exponential mean over about a thirtieth of the curve, corrected for its start."""
    keep = 1 - 1 / max(3.0, len(values) / 30)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


def _figure(title: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, facecolor=_GROUND, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor=_GROUND)
    axes.set_title(title, color=_INK, fontsize=15, wrap=True, parse_math=False)  # a run's name may hold a $
    axes.tick_params(colors=_INK, labelsize=13)
    axes.xaxis.label.set(color=_INK, fontsize=14)
    axes.yaxis.label.set(color=_INK, fontsize=14)
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set(color=_FAINT, visible=name in ("left", "bottom"))
    return figure, axes


def _legend(axes, **where) -> None:
    legend = axes.legend(**({"loc": "upper right"} | where), fontsize=13, framealpha=0.8, facecolor=_GROUND)
    legend.get_frame().set_edgecolor(_FAINT)
    for text in legend.get_texts():
        text.set(color=_INK, parse_math=False)


def _picture(figure):
    from PIL import Image

    figure.canvas.draw()
    return Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba()).convert("RGB")
