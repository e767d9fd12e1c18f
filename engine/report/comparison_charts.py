"""Charts of a fine-tune beside its baseline (PIL, RGB)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from PIL.Image import Image

from .canvas import BLUE, GREEN, GREY, INK, ORANGE, add_legend, canvas, dress, figure_to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LARGE = (10.24, 9.0)
_LETTERS = 12
_POSITION_COLOURS = {"start": GREY, "words": BLUE, "end": ORANGE, "padding": GREEN}
Points = Sequence[tuple[float, float]]
SweepPoints = Sequence[tuple[float, float, float | None]]  # alpha, score, general score


class LayerNumbers(Protocol):
    """What is drawn of one layer in GmP form: quantiles of r and of the angles (5 %, median, 95 %), and of theta
    (0.1 %, 5 %, median, 95 %, 99.9 %), and theta's histogram."""

    @property
    def tower(self) -> str: ...
    @property
    def depth(self) -> int: ...
    @property
    def layer(self) -> str: ...
    @property
    def r(self) -> Sequence[float]: ...
    @property
    def theta(self) -> Sequence[float]: ...
    @property
    def turned(self) -> Sequence[float] | None: ...
    @property
    def theta_histogram(self) -> Sequence[int]: ...


def comparison_chart(
    points: Mapping[str, Mapping[str, Points]],
    histograms: Mapping[str, Mapping[str, Sequence[int]]],
    states: Mapping[str, Mapping[str, float]],
    layers: Mapping[str, Sequence[float]],
    *,
    title: str = "",
) -> Image:
    """Draw four panels for the models "baseline" and "model".

    `points[model]` are images and texts on shared axes, `histograms[model]` the cosines of matching and other pairs in
    equal bins from -1 to 1. `states[name][position]` and `layers[tower]` by depth are relative changes (0 for none).
    """
    figure = _titled(_LARGE, title)
    ((cloud, cosines), (read, weights)) = figure.subplots(2, 2)
    _draw_points(cloud, points)
    _draw_histograms(cosines, histograms)
    _draw_states(read, states)
    _draw_layers(weights, layers)
    return figure_to_image(figure)


def _titled(size: tuple[float, float], title: str) -> Figure:
    figure = canvas(size)
    figure.suptitle(title, color=INK, fontsize=_LETTERS + 3, wrap=True, parse_math=False)
    return figure


def _draw_points(axes: Axes, models: Mapping[str, Mapping[str, Points]]) -> None:
    for model, kinds in models.items():
        for (kind, points), marker, colour in zip(kinds.items(), "os", (BLUE, ORANGE), strict=True):
            if points:
                xs, ys = zip(*points, strict=True)
                size, label = 26 if len(points) <= 200 else 12, f"{kind}, {model}"
                hollow = {"facecolors": "none", "edgecolors": INK, "linewidths": 0.8, "alpha": 0.6, "zorder": 3}
                filled = {"color": colour, "linewidths": 0, "alpha": 0.8}
                look: dict[str, Any] = hollow if model == "baseline" else filled
                axes.scatter(xs, ys, size, marker=marker, label=label, **look)
    dress(axes, "Images and texts, on the baseline's axes", _LETTERS)
    axes.tick_params(labelsize=_LETTERS - 3)
    _legend_above(axes, 0.25, ncols=2)


def _draw_histograms(axes: Axes, models: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Draw each as a density of its own pairs, so that few matching pairs are visible beside many others."""
    low, high = 1.0, -1.0
    for model, pairs in models.items():
        for (kind, counts), colour in zip(pairs.items(), (GREEN, ORANGE), strict=True):
            total = sum(counts)
            if not total:
                continue
            grouped = _grouped(counts, total)
            step = 2 / len(grouped)
            edges = [-1 + number * step for number in range(len(grouped) + 1)]
            filled = [number for number, count in enumerate(grouped) if count > total / 2000]
            low, high = min(low, edges[filled[0]]), max(high, edges[filled[-1] + 1])
            new = model != "baseline"
            axes.stairs(
                [count / total / step for count in grouped],
                edges,
                color=colour,
                fill=new,
                alpha=0.55 if new else 1.0,
                linewidth=0 if new else 1.8,
                label=f"{kind}, {model}",
            )
    if low < high:
        margin = 0.05 * (high - low)
        axes.set_xlim(low - margin, high + margin)
    dress(axes, "Cosine of images with own and other texts", _LETTERS)
    axes.set_ylabel("density of pairs")
    axes.tick_params(labelsize=_LETTERS - 2)
    axes.set_ylim(bottom=0)
    _legend_above(axes, 0.35, ncols=2)


def _grouped(counts: Sequence[int], total: int) -> list[int]:
    """Merge neighbouring bins, more of them the fewer pairs there are."""
    size = 1 if total >= 20_000 else 2 if total >= 2_000 else 4
    return [sum(counts[start : start + size]) for start in range(0, len(counts), size)]


def _draw_states(axes: Axes, states: Mapping[str, Mapping[str, float]]) -> None:
    positions = [name for name in _POSITION_COLOURS if any(name in drifts for drifts in states.values())]
    width = 0.84 / max(1, len(positions))
    for number, position in enumerate(positions):
        shift = (number - (len(positions) - 1) / 2) * width
        bars = [
            (group if len(drifts) == 1 else group + shift, 100 * drifts[position])
            for group, drifts in enumerate(states.values())
            if position in drifts
        ]
        xs, values = zip(*bars, strict=True)
        drawn = axes.bar(xs, values, width * 0.92, color=_POSITION_COLOURS[position], label=position)
        axes.bar_label(drawn, [_short(value) for value in values], color=INK, fontsize=9, padding=1)
    axes.set_xticks(range(len(states)), ["\n".join(textwrap.wrap(name, 14)) for name in states])
    dress(axes, "What image models read: change in percent", _LETTERS)
    axes.tick_params(labelsize=_LETTERS - 2)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    _legend_above(axes, 0.4, ncols=2, title="tokens of a prompt")


def _draw_layers(axes: Axes, layers: Mapping[str, Sequence[float]]) -> None:
    for (tower, drifts), colour in zip(layers.items(), (BLUE, ORANGE), strict=False):
        values = [100 * drift for drift in drifts]
        depths, label = range(1, len(drifts) + 1), f"{tower} tower"
        axes.plot(depths, values, color=colour, marker="o", linewidth=2, markersize=4, label=label)
    dress(axes, "Weights, block by block: change in percent", _LETTERS)
    _count_blocks(axes)
    axes.tick_params(labelsize=_LETTERS - 2)
    axes.set_ylim(bottom=0)
    _legend_above(axes, 0.25, ncols=2)


def gmp_chart(
    after: Sequence[LayerNumbers], before: Sequence[LayerNumbers] = (), *, theta_end: float, title: str = ""
) -> Image:
    """Draw r, theta and (with a baseline's layers `before`) the angles by which rows turned, by tower and depth.

    Histograms of theta reach from −`theta_end` to `theta_end`.
    """
    towers = [tower for tower in ("vision", "text") if any(layer.tower == tower for layer in after)]
    figure = _titled(_LARGE, title)
    panels = figure.subplots(3, max(1, len(towers)), squeeze=False)
    for column, tower in enumerate(towers):
        new, old = ([layer for layer in layers if layer.tower == tower] for layers in (after, before))
        lengths, directions, last = panels[:, column]
        for when, layers, colour in (("before", old, GREY), ("after", new, BLUE)):
            if layers:
                suffix = f", {when}" if before else ""
                _draw_bands(lengths, layers, [layer.r for layer in layers], colour, suffix)
                _draw_theta(directions, layers, colour, suffix, dotted=when == "before")
        dress(lengths, f"{tower.capitalize()} tower: r, the length of rows", _LETTERS)
        dress(directions, "theta, their direction (±1: all components equal)", _LETTERS)
        if before:
            _draw_bands(last, new, [layer.turned or () for layer in new], ORANGE, "")
            dress(last, "How far rows have turned, in degrees", _LETTERS)
            last.set_ylim(0, max(0.01, last.get_ylim()[1]))  # less is rounding
        else:
            _draw_theta_histogram(last, new, theta_end)
        by_depth = panels[:, column] if before else panels[:2, column]
        _count_blocks(*by_depth)
        for axes in panels[:, column]:
            axes.tick_params(labelsize=_LETTERS - 2)
        for axes in by_depth:
            _legend_above(axes, 0.2 if not before or axes is last else 0.4, ncols=2)
    return figure_to_image(figure)


def _draw_bands(
    axes: Axes, layers: Sequence[LayerNumbers], quantiles: Iterable[Sequence[float]], colour: str, suffix: str
) -> None:
    """Draw medians by depth with the band from 5 to 95 %."""
    numbers = list(zip(layers, quantiles, strict=True))
    for kind, style in (("c_fc", "-"), ("c_proj", "--")):
        depths = [layer.depth + 1 for layer, _ in numbers if layer.layer == kind]
        low, middle, high = zip(*(values for layer, values in numbers if layer.layer == kind), strict=True)
        marker = "o" if len(depths) < 3 else None
        axes.fill_between(depths, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(depths, middle, style, color=colour, linewidth=2, label=f"{kind}{suffix}", marker=marker)


def _draw_theta(axes: Axes, layers: Sequence[LayerNumbers], colour: str, suffix: str, *, dotted: bool) -> None:
    """Draw the middle 90 % as a band and the middle 99.8 % between lines, both kinds of layers at their widest."""
    depths = sorted({layer.depth for layer in layers})
    thetas = [[layer.theta for layer in layers if layer.depth == depth] for depth in depths]

    def widest(low: int, high: int) -> tuple[list[float], list[float]]:
        return [min(row[low] for row in rows) for rows in thetas], [max(row[high] for row in rows) for rows in thetas]

    xs, style = [depth + 1 for depth in depths], ":" if dotted else "-"
    axes.fill_between(xs, *widest(1, 3), color=colour, alpha=0.3, linewidth=0, label=f"90 %{suffix}")
    lowest, highest = widest(0, 4)
    axes.plot(xs, lowest, style, color=colour, linewidth=1.5, label=f"99.8 %{suffix}")
    axes.plot(xs, highest, style, color=colour, linewidth=1.5)


def _draw_theta_histogram(axes: Axes, layers: Sequence[LayerNumbers], end: float) -> None:
    ends: list[float] = []
    for kind, colour in (("c_fc", BLUE), ("c_proj", ORANGE)):
        histograms = [layer.theta_histogram for layer in layers if layer.layer == kind]
        counts = [sum(column) for column in zip(*histograms, strict=True)]
        edges = [2 * end * number / len(counts) - end for number in range(len(counts) + 1)]
        axes.stairs(counts, edges, color=colour, linewidth=1.8, label=kind)
        filled = [number for number, count in enumerate(counts) if count]
        ends += [edges[filled[0]], edges[filled[-1] + 1]]
    dress(axes, "theta of all blocks: counts", _LETTERS)
    axes.set_yscale("log")
    axes.set_xlim(min(ends), max(ends))
    axes.set_ylim(bottom=0.7, top=10 * axes.get_ylim()[1])
    add_legend(axes, size=_LETTERS - 2, loc="upper center", ncols=2)


def _count_blocks(*by_depth: Axes) -> None:
    by_depth[-1].set_xlabel("block", color=INK)
    for axes in by_depth:
        axes.locator_params(axis="x", integer=True)


def sweep_chart(
    points: SweepPoints,
    best: float,
    *,
    measure: str,
    general_measure: str | None = None,
    floor: float | None = None,
    title: str = "",
) -> Image:
    """Draw scores by alpha, with the `best` one marked, and with a general dataset the trade-off between the two.

    `floor` is the lowest general score that was allowed.
    """
    figure = _titled((10.24, 5.4) if general_measure else (7.68, 5.4), title)
    panels = figure.subplots(1, 2 if general_measure else 1, squeeze=False)[0]
    alphas, scores, general = ([value or 0.0 for value in column] for column in zip(*points, strict=True))
    chosen = alphas.index(best)
    star: dict[str, Any] = {"color": GREEN, "marker": "*", "markersize": 18, "linestyle": "none"}
    _curve(panels[0], alphas, scores, BLUE, f"this data: {measure}")
    panels[0].plot(best, 100 * scores[chosen], label=f"best: alpha {best:g}", **star)
    if general_measure:
        _curve(panels[0], alphas, general, ORANGE, f"general: {general_measure}")
        _draw_trade_off(panels[1], points, floor)
        panels[1].plot(100 * general[chosen], 100 * scores[chosen], **star)
    dress(panels[0], "From the baseline (0) to the model (1)", _LETTERS)
    panels[0].set_xlabel("alpha", color=INK)
    panels[0].set_ylabel("percent", color=INK)
    for axes in panels:
        axes.tick_params(labelsize=_LETTERS - 1)
    _legend_above(panels[0], 0.45 if general_measure else 0.3)
    return figure_to_image(figure)


def _curve(axes: Axes, xs: Sequence[float], shares: Sequence[float], colour: str, label: str) -> None:
    axes.plot(xs, [100 * share for share in shares], color=colour, marker="o", linewidth=2, markersize=5, label=label)


def _draw_trade_off(axes: Axes, points: SweepPoints, floor: float | None) -> None:
    dress(axes, "Up: better on this data. Right: better in general", _LETTERS)
    places = [(100 * (general or 0.0), 100 * score) for _, score, general in points]
    axes.plot(*zip(*places, strict=True), color=GREY, marker="o", linewidth=1.5, markersize=5)
    ends = {points[0][0]: "baseline", points[-1][0]: "model"}
    labels: dict[tuple[float, float], list[str]] = {}  # several blends may score the same
    for (alpha, *_), place in zip(points, places, strict=True):
        labels.setdefault(place, []).append(ends.get(alpha, f"{alpha:g}"))
    middle = sum(x for x, _ in labels) / len(labels)
    for place, names in labels.items():
        label = ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"
        left = place[0] > middle  # so that no label runs over the edge
        look: dict[str, Any] = {"color": INK, "fontsize": 10, "ha": "right" if left else "left"}
        axes.annotate(label, place, (-7 if left else 7, 5), textcoords="offset points", **look)
    if floor is not None:
        axes.axvline(100 * floor, color=ORANGE, linestyle="--", linewidth=1.5, label="right of it: allowed")
        add_legend(axes, size=_LETTERS - 2, loc="lower left")
    axes.set_xlabel("general, percent", color=INK)
    axes.margins(x=0.18)


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _legend_above(axes: Axes, room: float, **options: Any) -> None:
    """Add a legend above what is drawn, in room made for it as a share of the height."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + room * (high - low))
    add_legend(axes, size=_LETTERS - 2, loc="upper center", **options)
