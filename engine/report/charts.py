"""Charts from numbers: pictures (PIL, RGB) that stay readable at the size of a node in a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SIZE, _DPI = (7.68, 4.8), 100
_GROUND, _INK, _FAINT = "#20232a", "#e8e8e8", "#4a4f5a"
_BLUE, _ORANGE, _GREEN, _GREY = "#5aa9f0", "#f2a541", "#7bc96f", "#9aa0ab"
_NAMED_CLASSES = 24
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


def dataset_chart(
    token_counts: Mapping[int, int],
    context_length: int,
    sizes: Sequence[tuple[int, int]],
    classes: Mapping[str, int],
):
    """What a data set is made of: how many captions have how many tokens (those that are cut in another colour), the
    pictures' shorter sides in pixels and their shapes, and how many pictures each class has; what it has not is left
    out. `sizes` are (width, height)."""
    wide = [name for name, there in (("captions", token_counts), ("classes", classes)) if there]
    figure = _canvas((10.24, 7.2))
    rows = ([wide * 2 if len(wide) == 1 else wide] if wide else []) + [["sides", "shapes"]]
    panels = figure.subplot_mosaic(rows)
    if token_counts:
        _draw_token_counts(panels["captions"], token_counts, context_length)
    if classes:
        _draw_classes(panels["classes"], classes)
    _dress(panels["sides"], "Shorter side of the pictures, in pixels", 11)
    _dress(panels["shapes"], "Width by height", 11)
    if len(sizes):
        panels["sides"].hist([min(size) for size in sizes], bins=30, color=_BLUE)
        panels["sides"].xaxis.get_major_locator().set_params(integer=True)
        panels["shapes"].hist(
            [math.log2(width / height) for width, height in sizes], bins=31, range=(-2, 2), color=_BLUE
        )
    shapes = {"1:4": -2, "1:2": -1, "2:3": math.log2(2 / 3), "1:1": 0, "3:2": math.log2(3 / 2), "2:1": 1, "4:1": 2}
    panels["shapes"].set_xticks(list(shapes.values()), list(shapes))
    for axes in panels.values():
        axes.grid(axis="x", visible=False)
    return _picture(figure)


def _draw_token_counts(axes, token_counts: Mapping[int, int], context_length: int) -> None:
    """A bar a length; what is longer than twice the limit stands at its end."""
    counts = dict.fromkeys(range(2 * context_length + 1), 0)
    for tokens, count in token_counts.items():
        counts[min(tokens, 2 * context_length)] += count
    last = max(length for length, count in counts.items() if count)
    lengths = range(last + 1)
    colours = [_BLUE if length <= context_length else _ORANGE for length in lengths]
    axes.bar(lengths, [counts[length] for length in lengths], 1.0, color=colours)
    cut = sum(count for tokens, count in token_counts.items() if tokens > context_length)
    _dress(axes, "Captions by their tokens" + (f" ({cut} are cut at {context_length})" if cut else ""), 11)


def _draw_classes(axes, classes: Mapping[str, int]) -> None:
    ordered = sorted(classes.items(), key=lambda item: -item[1])
    axes.bar(range(len(ordered)), [count for _, count in ordered], color=_BLUE)
    _dress(axes, f"Pictures in each of {len(ordered)} classes", 11)
    if len(ordered) <= _NAMED_CLASSES:
        names = [name if len(name) <= 16 else f"{name[:15]}…" for name, _ in ordered]
        axes.set_xticks(range(len(ordered)), names, rotation=45, ha="right", parse_math=False)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"from {ordered[0][0][:30]} to {ordered[-1][0][:30]}", color=_INK, parse_math=False)


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
    figure = _canvas(_SIZE)
    axes = figure.add_subplot()
    _dress(axes, title)
    return figure, axes


def _canvas(size: tuple[float, float]):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=_DPI, facecolor=_GROUND, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _dress(axes, title: str, size: float = 14) -> None:
    """`size` is that of the letters beside the axes, in points."""
    axes.set_facecolor(_GROUND)
    axes.set_title(title, color=_INK, fontsize=size + 1, wrap=True, parse_math=False)  # a run's name may hold a $
    axes.tick_params(colors=_INK, labelsize=size - 1)
    axes.xaxis.label.set(color=_INK, fontsize=size)
    axes.yaxis.label.set(color=_INK, fontsize=size)
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set(color=_FAINT, visible=name in ("left", "bottom"))


def _legend(axes, **where) -> None:
    legend = axes.legend(**({"loc": "upper right"} | where), fontsize=13, framealpha=0.8, facecolor=_GROUND)
    legend.get_frame().set_edgecolor(_FAINT)
    for text in legend.get_texts():
        text.set(color=_INK, parse_math=False)


def _picture(figure):
    from PIL import Image

    figure.canvas.draw()
    return Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba()).convert("RGB")
