"""Charts from numbers: pictures (PIL, RGB) that stay readable at the size of a node in a graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .canvas import BLUE, GREEN, GREY, INK, ORANGE, TOP, add_legend, canvas, colours_of, dress, figure_to_image

_SIZE = (7.68, 4.8)  # inches
_NAMED_CLASSES = 24
_NAMED_CURVES = 8
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
        axes.plot(xs, losses, color=BLUE, alpha=0.35, linewidth=1)
        axes.plot(xs, _running_mean(losses), color=BLUE, linewidth=2.5, label="training loss")
        rates = axes.twinx()
        rates.plot(
            [line["step"] for line in thin],
            [max(line["learning_rate"].values()) for line in thin],
            color=GREY,
            linewidth=1,
            linestyle=":",
        )
        rates.set_axis_off()
    else:
        axes.text(0.5, 0.5, "no step yet", transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=16)
    points = [(line["step"], line["loss"]) for line in validations if math.isfinite(line["loss"])]
    if points:
        xs, losses = zip(*points, strict=True)
        axes.plot(xs, losses, color=ORANGE, marker="o", linewidth=2, markersize=6, label="validation loss")
        best = min(points, key=lambda point: point[1])
        axes.plot(*best, color=GREEN, marker="*", markersize=16, linestyle="none", label=f"best: step {best[0]}")
    if known or points:
        add_legend(axes, loc="best")
    return figure_to_image(figure)


def recall_chart(validations: Sequence[Mapping[str, Any]], *, title: str = "Recall at 1 on the validation pictures"):
    """The recalls of metrics.jsonl's validations in percent, both ways; the validation of the lowest loss is marked."""
    figure, axes = _figure(title)
    axes.set(xlabel="step", ylabel="percent")
    ways = (("image_to_text_r1", "image to text", BLUE), ("text_to_image_r1", "text to image", ORANGE))
    for key, words, colour in ways:
        xs, shares = [line["step"] for line in validations], [100 * line[key] for line in validations]
        axes.plot(xs, shares, color=colour, marker="o", linewidth=2, markersize=6, label=words)
    finite = [line for line in validations if math.isfinite(line["loss"])]
    if finite:
        best = min(finite, key=lambda line: line["loss"])["step"]
        axes.axvline(best, color=GREEN, linestyle="--", linewidth=1.5, label=f"lowest loss: step {best}")
    axes.set_ylim(bottom=0)
    add_legend(axes, loc="best")
    return figure_to_image(figure)


def learning_rate_chart(steps: Sequence[Mapping[str, Any]], *, title: str = "Learning rate of each group"):
    """The learning rates of metrics.jsonl's steps; groups that have the same ones share a curve."""
    figure, axes = _figure(title)
    axes.set(xlabel="step", ylabel="learning rate")
    thin = steps[:: max(1, len(steps) // _POINTS)]
    curves: dict[tuple[float | None, ...], list[str]] = {}
    for group in dict.fromkeys(name for line in thin for name in line["learning_rate"]):
        curves.setdefault(tuple(line["learning_rate"].get(group) for line in thin), []).append(group)
    colours = (BLUE, ORANGE, GREEN, GREY)
    for number, (rates, groups) in enumerate(curves.items()):
        label = groups[0] if len(groups) == 1 else f"{groups[0]} and {len(groups) - 1} more"
        axes.plot(
            [line["step"] for line in thin],
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


def bar_chart(groups: Mapping[str, Mapping[str, float]], *, title: str = ""):
    """Shares (0 to 1) as bars in percent: `groups[label][name]`, a group of bars for each label and a colour for each
    name, the value written on each bar."""
    figure, axes = _figure(title)
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    colours = colours_of(names)
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        xs = [group + (number - (len(names) - 1) / 2) * width for group in range(len(groups))]
        values = [100 * bars.get(name, math.nan) for bars in groups.values()]
        drawn = axes.bar(xs, values, width * 0.92, color=colours[number], label=name)
        labels = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
        axes.bar_label(drawn, labels, color=INK, fontsize=12 if len(groups) * len(names) <= 12 else 9, padding=2)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=13 if len(groups) <= 5 else 10, parse_math=False)
    axes.set_ylabel("percent")
    axes.set_ylim(0, TOP if len(names) > 1 else 112)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="x", visible=False)
    if len(names) > 1:
        add_legend(axes, loc="upper center", ncols=len(names))
    return figure_to_image(figure)


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
    figure = canvas((10.24, 7.2))
    rows = ([wide * 2 if len(wide) == 1 else wide] if wide else []) + [["sides", "shapes"]]
    panels = figure.subplot_mosaic(rows)
    if token_counts:
        _draw_token_counts(panels["captions"], token_counts, context_length)
    if classes:
        _draw_classes(panels["classes"], classes)
    dress(panels["sides"], "Shorter side of the pictures, in pixels", 11)
    dress(panels["shapes"], "Width by height", 11)
    if len(sizes):
        panels["sides"].hist([min(size) for size in sizes], bins=30, color=BLUE)
        panels["sides"].xaxis.get_major_locator().set_params(integer=True)
        panels["shapes"].hist(
            [math.log2(width / height) for width, height in sizes], bins=31, range=(-2, 2), color=BLUE
        )
    shapes = {"1:4": -2, "1:2": -1, "2:3": math.log2(2 / 3), "1:1": 0, "3:2": math.log2(3 / 2), "2:1": 1, "4:1": 2}
    panels["shapes"].set_xticks(list(shapes.values()), list(shapes))
    for axes in panels.values():
        axes.grid(axis="x", visible=False)
    return figure_to_image(figure)


def _draw_token_counts(axes, token_counts: Mapping[int, int], context_length: int) -> None:
    """A bar a length; what is longer than twice the limit stands at its end."""
    counts = dict.fromkeys(range(2 * context_length + 1), 0)
    for tokens, count in token_counts.items():
        counts[min(tokens, 2 * context_length)] += count
    last = max(length for length, count in counts.items() if count)
    lengths = range(last + 1)
    colours = [BLUE if length <= context_length else ORANGE for length in lengths]
    axes.bar(lengths, [counts[length] for length in lengths], 1.0, color=colours)
    cut = sum(count for tokens, count in token_counts.items() if tokens > context_length)
    dress(axes, "Captions by their tokens" + (f" ({cut} are cut at {context_length})" if cut else ""), 11)


def _draw_classes(axes, classes: Mapping[str, int]) -> None:
    ordered = sorted(classes.items(), key=lambda item: -item[1])
    axes.bar(range(len(ordered)), [count for _, count in ordered], color=BLUE)
    dress(axes, f"Pictures in each of {len(ordered)} classes", 11)
    if len(ordered) <= _NAMED_CLASSES:
        names = [name if len(name) <= 16 else f"{name[:15]}…" for name, _ in ordered]
        axes.set_xticks(range(len(ordered)), names, rotation=45, ha="right", parse_math=False)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"from {ordered[0][0][:30]} to {ordered[-1][0][:30]}", color=INK, parse_math=False)


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
    figure = canvas(_SIZE)
    axes = figure.add_subplot()
    dress(axes, title)
    return figure, axes
