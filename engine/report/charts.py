"""Charts of a training, of measurements and of a dataset (PIL, RGB), readable at the size of a node in a graph."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from .canvas import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    TOP,
    add_legend,
    canvas,
    colours_of,
    dress,
    figure_to_image,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (7.68, 4.8)  # inches
_BARS_WIDTH, _BARS_HEIGHT, _ROW_HEIGHT = 8.92, 4.0, 0.42  # inches; as wide as four images of a contact sheet
_MAX_CONFUSED, _LINE_LETTERS = 6, 44  # pairs of classes, and their letters in a line
_NAMED_CLASSES = 24
_NAMED_CURVES = 8
_POINTS = 1500  # a curve of more steps is thinned to this many
Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl
Bars = Mapping[str, Mapping[str, float]]  # shares (0 to 1) by label and model
Intervals = Mapping[str, Mapping[str, tuple[float, float]]]  # by label and model
Confused = Sequence[tuple[str, str, int]]  # class, what it was taken for, how often


def loss_chart(steps: Lines, validations: Lines, *, title: str = "") -> Image:
    """Draw the loss of each step and its running mean, validations with the best one marked, and the learning rate."""
    figure, axes = _figure(title or "training")
    axes.set(xlabel="step", ylabel="loss")
    thinned = _thinned(steps)
    finite = [(line["step"], line["loss"]) for line in thinned if math.isfinite(line["loss"])]
    if finite:
        xs, losses = zip(*finite, strict=True)
        axes.plot(xs, losses, color=BLUE, alpha=0.35, linewidth=1)
        axes.plot(xs, _running_mean(losses), color=BLUE, linewidth=2.5, label="training loss")
        rates = axes.twinx()
        values = [max(line["learning_rate"].values()) for line in thinned]
        rates.plot([line["step"] for line in thinned], values, color=GREY, linewidth=1, linestyle=":")
        rates.set_axis_off()
    else:
        axes.text(0.5, 0.5, "no step yet", transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=16)
    points = [(line["step"], line["loss"]) for line in validations if math.isfinite(line["loss"])]
    if points:
        xs, losses = zip(*points, strict=True)
        axes.plot(xs, losses, color=ORANGE, marker="o", linewidth=2, markersize=6, label="validation loss")
        best = min(points, key=lambda point: point[1])
        axes.plot(*best, color=GREEN, marker="*", markersize=16, linestyle="none", label=f"best: step {best[0]}")
    if finite or points:
        add_legend(axes, loc="best")
    return figure_to_image(figure)


def recall_chart(validations: Lines, *, title: str = "Recall at 1 on the validation images") -> Image:
    """Draw the recalls of the validations in percent, both ways; the one with the lowest loss is marked."""
    figure, axes = _figure(title)
    axes.set(xlabel="step", ylabel="percent")
    directions = (("image_to_text_r1", "image to text", BLUE), ("text_to_image_r1", "text to image", ORANGE))
    for key, words, colour in directions:
        xs, shares = [line["step"] for line in validations], [100 * line[key] for line in validations]
        axes.plot(xs, shares, color=colour, marker="o", linewidth=2, markersize=6, label=words)
    finite = [line for line in validations if math.isfinite(line["loss"])]
    if finite:
        best = min(finite, key=lambda line: line["loss"])["step"]
        axes.axvline(best, color=GREEN, linestyle="--", linewidth=1.5, label=f"lowest loss: step {best}")
    axes.set_ylim(bottom=0)
    add_legend(axes, loc="best")
    return figure_to_image(figure)


def learning_rate_chart(steps: Lines, *, title: str = "Learning rate of each group") -> Image:
    """Draw the learning rates of the steps; groups with equal ones share a curve."""
    figure, axes = _figure(title)
    axes.set(xlabel="step", ylabel="learning rate")
    thinned = _thinned(steps)
    curves: dict[tuple[float | None, ...], list[str]] = {}
    for group in dict.fromkeys(name for line in thinned for name in line["learning_rate"]):
        curves.setdefault(tuple(line["learning_rate"].get(group) for line in thinned), []).append(group)
    colours = (BLUE, ORANGE, GREEN, GREY)
    for number, (rates, groups) in enumerate(curves.items()):
        label = groups[0] if len(groups) == 1 else f"{groups[0]} and {len(groups) - 1} more"
        axes.plot(
            [line["step"] for line in thinned],
            [math.nan if rate is None else rate for rate in rates],
            linewidth=2,
            color=colours[number % 4],
            linestyle=("-", "--", ":")[number // 4 % 3],
            label=label if number < _NAMED_CURVES else None,
        )
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.yaxis.get_offset_text().set_color(INK)
    axes.set_ylim(bottom=0)
    if curves:
        add_legend(axes)
    return figure_to_image(figure)


def bar_chart(
    groups: Bars,
    *,
    title: str = "",
    intervals: Intervals | None = None,
    confused: Mapping[str, Confused] | None = None,
) -> Image:
    """Draw shares as bars in percent, with the whiskers of `intervals`; below, what each model `confused` most."""
    lists = {name: list(pairs[:_MAX_CONFUSED]) for name, pairs in (confused or {}).items() if pairs}
    rows = max(map(len, lists.values()), default=0)
    lists_height = rows * _ROW_HEIGHT + 0.9
    figure = canvas((_BARS_WIDTH, _BARS_HEIGHT + (lists_height if rows else 0)))
    if not rows:
        _draw_groups(figure.add_subplot(), groups, title, intervals or {})
        return figure_to_image(figure)
    grid = figure.add_gridspec(2, len(lists), height_ratios=[_BARS_HEIGHT, lists_height])
    _draw_groups(figure.add_subplot(grid[0, :]), groups, title, intervals or {})
    most = max(count for pairs in lists.values() for *_, count in pairs)
    for number, ((name, pairs), colour) in enumerate(zip(lists.items(), colours_of(list(lists)), strict=True)):
        axes = figure.add_subplot(grid[1, number])
        labels = [_confused(shown, answer, narrow=len(lists) > 1) for shown, answer, _ in pairs]
        bars = axes.barh(range(len(pairs)), [count for *_, count in pairs], 0.7, color=colour)
        axes.bar_label(bars, color=INK, fontsize=10, padding=3)
        dress(axes, f"Most often mistaken by the {name}" if len(lists) > 1 else "Most often mistaken", 10)
        axes.set_yticks(range(len(pairs)), labels, parse_math=False)
        axes.set(xlim=(0, most * 1.15), ylim=(rows - 0.4, -0.6), xticks=[])
        axes.grid(visible=False)
    return figure_to_image(figure)


def _draw_groups(axes: Axes, groups: Bars, title: str, intervals: Intervals) -> None:
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / max(1, len(names))
    size = 12 if len(names) * len(groups) <= 12 else 9
    for number, (name, colour) in enumerate(zip(names, colours_of(names), strict=True)):
        xs = [group + (number - (len(names) - 1) / 2) * width for group in range(len(groups))]
        values = [100 * bars.get(name, math.nan) for bars in groups.values()]
        axes.bar(xs, values, width * 0.92, color=colour, label=name)
        for x, value, label in zip(xs, values, groups, strict=True):
            low, high = (100 * end for end in intervals.get(label, {}).get(name, (value / 100, value / 100)))
            if high > low:
                axes.vlines(x, low, high, color=INK, linewidth=1.5)
            if not math.isnan(value):
                look: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": size}
                axes.annotate(f"{value:.1f}", (x, max(high, value)), (0, 3), color=INK, **look)
    dress(axes, title)
    labels = ["\n".join(textwrap.wrap(label, 18, break_on_hyphens=False)) for label in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=13 if len(groups) <= 4 else 10, parse_math=False)
    axes.set_ylabel("percent")
    axes.set_ylim(0, TOP if len(names) > 1 else 115)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="x", visible=False)
    if len(names) > 1:
        add_legend(axes, loc="upper center", ncols=len(names))


def _confused(shown: str, answer: str, *, narrow: bool) -> str:
    """Return one line, or two where another list stands beside it."""
    limit = _LINE_LETTERS // 2 - 2
    return f"{shortened(shown, limit)} →{chr(10) if narrow else ' '}{shortened(answer, limit)}"


def dataset_chart(
    token_counts: Mapping[int, int],
    context_length: int,
    sizes: Sequence[tuple[int, int]],
    classes: Mapping[str, int],
) -> Image:
    """Draw what a dataset consists of; parts that it lacks are left out.

    How many captions have how many tokens (those that are cut in another colour), how many images each class has, and
    the images' shorter sides and shapes; `sizes` are (width, height).
    """
    wide = [name for name, present in (("captions", token_counts), ("classes", classes)) if present]
    figure = canvas((10.24, 7.2))
    first_row = [wide * 2 if len(wide) == 1 else wide] if wide else []
    layout: list[Any] = [*first_row, ["sides", "shapes"]]
    panels = figure.subplot_mosaic(layout)
    if token_counts:
        _draw_token_counts(panels["captions"], token_counts, context_length)
    if classes:
        _draw_classes(panels["classes"], classes)
    dress(panels["sides"], "Shorter side of the images, in pixels", 11)
    dress(panels["shapes"], "Width by height", 11)
    if len(sizes):
        panels["sides"].hist([min(size) for size in sizes], bins=30, color=BLUE)
        panels["sides"].locator_params(axis="x", integer=True)
        ratios = [math.log2(width / height) for width, height in sizes]
        panels["shapes"].hist(ratios, bins=31, range=(-2, 2), color=BLUE)
    shapes = {"1:4": -2, "1:2": -1, "2:3": math.log2(2 / 3), "1:1": 0, "3:2": math.log2(3 / 2), "2:1": 1, "4:1": 2}
    panels["shapes"].set_xticks(list(shapes.values()), list(shapes))
    for axes in panels.values():
        axes.grid(axis="x", visible=False)
    return figure_to_image(figure)


def _draw_token_counts(axes: Axes, token_counts: Mapping[int, int], context_length: int) -> None:
    """Draw a bar for each length; captions of more than twice the limit stand at its end."""
    counts = dict.fromkeys(range(2 * context_length + 1), 0)
    for tokens, count in token_counts.items():
        counts[min(tokens, 2 * context_length)] += count
    longest = max(length for length, count in counts.items() if count)
    lengths = range(longest + 1)
    colours = [BLUE if length <= context_length else ORANGE for length in lengths]
    axes.bar(lengths, [counts[length] for length in lengths], 1.0, color=colours)
    cut = sum(count for tokens, count in token_counts.items() if tokens > context_length)
    dress(axes, "Captions by number of tokens" + (f" ({cut} are cut at {context_length})" if cut else ""), 11)


def _draw_classes(axes: Axes, classes: Mapping[str, int]) -> None:
    ordered = sorted(classes.items(), key=lambda item: -item[1])
    axes.bar(range(len(ordered)), [count for _, count in ordered], color=BLUE)
    dress(axes, f"Images in each of {len(ordered)} classes", 11)
    if len(ordered) <= _NAMED_CLASSES:
        names = [shortened(name, 16) for name, _ in ordered]
        axes.set_xticks(range(len(ordered)), names, rotation=45, ha="right", parse_math=False)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"from {ordered[0][0][:30]} to {ordered[-1][0][:30]}", color=INK, parse_math=False)


def against_baseline(what: str, value: float, baseline: float | None) -> str:
    """Return a title that says how a share (0 to 1) compares with the baseline's."""
    if baseline is None:
        return f"{what}: {value:.1%}"
    points = 100 * (value - baseline)
    if abs(points) < 0.05:
        return f"{what}: {value:.1%}, as before"
    return f"{what}: {value:.1%}, {abs(points):.1f} points {'better' if points > 0 else 'worse'} than the baseline"


def _running_mean(values: Sequence[float]) -> list[float]:
    """Return an exponential mean over about a thirtieth of the curve, corrected for its start."""
    keep = 1 - 1 / max(3.0, len(values) / 30)
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


def _thinned(steps: Lines) -> Lines:
    return steps[:: max(1, len(steps) // _POINTS)]


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = canvas(_SIZE)
    axes = figure.add_subplot()
    dress(axes, title)
    return figure, axes
