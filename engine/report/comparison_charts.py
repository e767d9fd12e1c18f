"""Charts of a fine-tune beside its baseline."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from .canvas import BLUE, GREEN, GREY, INK, ORANGE, add_legend, canvas, dress, figure_to_image

_LARGE = (10.24, 9.0)
_LETTERS = 12
_POSITION_COLOURS = {"start": GREY, "words": BLUE, "end": ORANGE, "padding": GREEN}


def comparison_chart(
    points: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    histograms: Mapping[str, Mapping[str, Sequence[int]]],
    states: Mapping[str, Mapping[str, float]],
    layers: Mapping[str, Sequence[float]],
    *,
    title: str = "",
):
    """Four panels. `points[model][kind]` on shared axes, `histograms[model][pairs]` of cosines in equal bins from -1 to
    1, for the models baseline and model, kinds pictures and texts, pairs matching and other; `states[name][position]`
    and `layers[tower]` by depth are relative changes (0 for none)."""
    figure = canvas(_LARGE)
    figure.suptitle(title, color=INK, fontsize=_LETTERS + 3, wrap=True, parse_math=False)
    ((cloud, cosines), (read, weights)) = figure.subplots(2, 2)
    _draw_points(cloud, points)
    _draw_histograms(cosines, histograms)
    _draw_states(read, states)
    _draw_layers(weights, layers)
    return figure_to_image(figure)


def _draw_points(axes, points: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    colours = {"pictures": BLUE, "texts": ORANGE}
    for model, kinds in points.items():
        old = model == "baseline"
        for kind, places in kinds.items():
            if places:
                xs, ys = zip(*places, strict=True)
                size = 26 if len(places) <= 200 else 12
                new = dict(color=colours[kind], linewidths=0)
                look = dict(facecolors="none", edgecolors=INK, linewidths=0.8, zorder=3) if old else new
                axes.scatter(
                    xs,
                    ys,
                    size,
                    marker="o" if kind == "pictures" else "s",
                    alpha=0.6 if old else 0.8,
                    label=f"{kind}, {model}",
                    **look,
                )
    dress(axes, "Pictures and texts, on the baseline's axes", _LETTERS)
    axes.tick_params(labelsize=_LETTERS - 3)
    _legend_above(axes, 0.25, ncols=2)


def _draw_histograms(axes, histograms: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
    """Each as a density of its own pairs, so that few matching pairs are seen beside many others."""
    colours, low, high = {"matching": GREEN, "other": ORANGE}, 1.0, -1.0
    for model, pairs in histograms.items():
        for kind, counts in pairs.items():
            total, width = sum(counts), 2 / len(counts)
            if not total:
                continue
            grouped = _grouped(counts, total)
            step = len(counts) // len(grouped) * width
            edges = [-1 + number * step for number in range(len(grouped) + 1)]
            there = [number for number, count in enumerate(grouped) if count > total / 2000]
            low, high = min(low, edges[there[0]]), max(high, edges[there[-1] + 1])
            densities = [count / total / step for count in grouped]
            new = model != "baseline"
            axes.stairs(
                densities,
                edges,
                color=colours[kind],
                fill=new,
                alpha=0.55 if new else 1.0,
                linewidth=0 if new else 1.8,
                label=f"{kind}, {model}",
            )
    if low < high:
        room = 0.05 * (high - low)
        axes.set_xlim(low - room, high + room)
    dress(axes, "Cosine of pictures with own and other texts", _LETTERS)
    axes.set_ylabel("density of pairs")
    axes.tick_params(labelsize=_LETTERS - 2)
    axes.set_ylim(bottom=0)
    _legend_above(axes, 0.35, ncols=2)


def _grouped(counts: Sequence[int], total: int) -> list[int]:
    """Neighbouring bins together, the more the fewer pairs there are."""
    size = 1 if total >= 20_000 else 2 if total >= 2_000 else 4
    return [sum(counts[start : start + size]) for start in range(0, len(counts), size)]


def _draw_states(axes, states: Mapping[str, Mapping[str, float]]) -> None:
    positions = [name for name in _POSITION_COLOURS if any(name in found for found in states.values())]
    width = 0.84 / max(1, len(positions))
    for number, position in enumerate(positions):
        there = [(place, found[position]) for place, found in enumerate(states.values()) if position in found]
        for_one = [name for name, found in enumerate(states.values()) if len(found) == 1]
        xs = [place if place in for_one else place + (number - (len(positions) - 1) / 2) * width for place, _ in there]
        drawn = axes.bar(
            xs, [100 * value for _, value in there], width * 0.92, color=_POSITION_COLOURS[position], label=position
        )
        axes.bar_label(drawn, [_short(100 * value) for _, value in there], color=INK, fontsize=9, padding=1)
    axes.set_xticks(range(len(states)), ["\n".join(textwrap.wrap(name, 14)) for name in states])
    dress(axes, "What image models read: change in percent", _LETTERS)
    axes.tick_params(labelsize=_LETTERS - 2)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
    _legend_above(axes, 0.4, ncols=2, title="tokens of a prompt")


def _draw_layers(axes, layers: Mapping[str, Sequence[float]]) -> None:
    for (tower, drifts), colour in zip(layers.items(), (BLUE, ORANGE), strict=False):
        depths = range(1, len(drifts) + 1)
        axes.plot(
            depths,
            [100 * drift for drift in drifts],
            color=colour,
            marker="o",
            linewidth=2,
            markersize=4,
            label=f"{tower} tower",
        )
    dress(axes, "Weights, block by block: change in percent", _LETTERS)
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=_LETTERS - 2)
    axes.set_ylim(bottom=0)
    _legend_above(axes, 0.25, ncols=2)


def gmp_chart(before: Sequence[Mapping] | None, after: Sequence[Mapping], *, title: str = ""):
    """r, theta and (with `before`) the angles by which rows have turned, by tower and depth.

    Each layer is {"tower", "depth", "layer", "r": (5 %, median, 95 %), "theta": (0.1 %, 5 %, median, 95 %, 99.9 %),
    "turned": (5 %, median, 95 %) or None, "histogram": (edges, counts)}.
    """
    towers = [tower for tower in ("vision", "text") if any(found["tower"] == tower for found in after)]
    figure = canvas(_LARGE)
    figure.suptitle(title, color=INK, fontsize=_LETTERS + 3, wrap=True, parse_math=False)
    panels = figure.subplots(3, max(1, len(towers)), squeeze=False)
    shown = [("after", after, BLUE)] if before is None else [("before", before, GREY), ("after", after, BLUE)]
    for column, tower in enumerate(towers):
        for when, layers, colour in shown:
            name = "" if before is None else f", {when}"
            _draw_bands(panels[0][column], layers, tower, "r", colour, name)
            _draw_theta(panels[1][column], layers, tower, colour, when if before is not None else "")
        dress(panels[0][column], f"{tower.capitalize()} tower: r, the length of rows", _LETTERS)
        dress(panels[1][column], "theta, their direction (±1: all parts equal)", _LETTERS)
        if before is None:
            _draw_theta_histogram(panels[2][column], after, tower)
        else:
            _draw_bands(panels[2][column], after, tower, "turned", ORANGE, "")
            dress(panels[2][column], "How far rows have turned, in degrees", _LETTERS)
            panels[2][column].set_ylim(0, max(0.01, panels[2][column].get_ylim()[1]))  # less is rounding
        by_depth = panels[:2, column] if before is None else panels[:, column]
        by_depth[-1].set_xlabel("block", color=INK)
        for axes in by_depth:
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in panels[:, column]:
            axes.tick_params(labelsize=_LETTERS - 2)
        for axes in by_depth:
            _legend_above(axes, 0.2 if before is None or axes is panels[2][column] else 0.4, ncols=2)
    return figure_to_image(figure)


def _draw_bands(axes, layers: Sequence[Mapping], tower: str, what: str, colour: str, name: str) -> None:
    """Medians by depth with the band of 5 to 95 %."""
    for layer, style in (("c_fc", "-"), ("c_proj", "--")):
        found = [entry for entry in layers if entry["tower"] == tower and entry["layer"] == layer]
        depths = [entry["depth"] + 1 for entry in found]
        low, middle, high = zip(*(entry[what] for entry in found), strict=True)
        axes.fill_between(depths, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(
            depths,
            middle,
            style,
            color=colour,
            linewidth=2,
            label=f"{layer}{name}",
            marker="o" if len(depths) < 3 else None,
        )


def _draw_theta(axes, layers: Sequence[Mapping], tower: str, colour: str, when: str) -> None:
    """The middle 90 % as a band, the middle 99.8 % between lines, both kinds of layers at their widest."""
    depths = sorted({entry["depth"] for entry in layers if entry["tower"] == tower})
    rows = [[entry["theta"] for entry in layers if entry["tower"] == tower and entry["depth"] == d] for d in depths]
    xs = [depth + 1 for depth in depths]
    inner = [(min(row[1] for row in found), max(row[3] for row in found)) for found in rows]
    outer = [(min(row[0] for row in found), max(row[4] for row in found)) for found in rows]
    words = f", {when}" if when else ""
    axes.fill_between(xs, *zip(*inner, strict=True), color=colour, alpha=0.3, linewidth=0, label=f"90 %{words}")
    for number, line in enumerate(zip(*outer, strict=True)):
        axes.plot(
            xs,
            line,
            color=colour,
            linewidth=1.5,
            linestyle=":" if when == "before" else "-",
            label=None if number else f"99.8 %{words}",
        )


def _draw_theta_histogram(axes, layers: Sequence[Mapping], tower: str) -> None:
    ends: list[float] = []
    for layer, colour in (("c_fc", BLUE), ("c_proj", ORANGE)):
        found = [entry["histogram"] for entry in layers if entry["tower"] == tower and entry["layer"] == layer]
        edges, counts = found[0][0], [sum(column) for column in zip(*(part[1] for part in found), strict=True)]
        axes.stairs(counts, edges, color=colour, linewidth=1.8, label=layer)
        there = [number for number, count in enumerate(counts) if count]
        ends = [*ends, edges[there[0]], edges[there[-1] + 1]]
    dress(axes, "theta of all blocks: how many", _LETTERS)
    axes.set_yscale("log")
    axes.set_xlim(min(ends), max(ends))
    axes.set_ylim(bottom=0.7, top=10 * axes.get_ylim()[1])
    _small_legend(axes, loc="upper center", ncols=2)


def sweep_chart(
    points: Sequence[tuple[float, float, float | None]],
    best: float,
    *,
    measure: str,
    general_measure: str | None = None,
    floor: float | None = None,
    title: str = "",
):
    """(alpha, score, general score or None) from 0 to 1: the scores along the way, and with a general set the frontier
    of the two. `floor` is the least general score that was allowed; the best point is marked."""
    figure = canvas((10.24, 5.4) if general_measure else (7.68, 5.4))
    figure.suptitle(title, color=INK, fontsize=_LETTERS + 3, wrap=True, parse_math=False)
    panels = figure.subplots(1, 2 if general_measure else 1, squeeze=False)[0]
    alphas = [alpha for alpha, _, _ in points]
    chosen = next(point for point in points if point[0] == best)
    _curve(panels[0], alphas, [score for _, score, _ in points], BLUE, f"this data: {measure}")
    panels[0].plot(
        best, 100 * chosen[1], color=GREEN, marker="*", markersize=18, linestyle="none", label=f"best: alpha {best:g}"
    )
    if general_measure:
        _curve(panels[0], alphas, [general for _, _, general in points], ORANGE, f"general: {general_measure}")
        _draw_frontier(panels[1], points, chosen, floor)
    dress(panels[0], "From the baseline (0) to the model (1)", _LETTERS)
    panels[0].set_xlabel("alpha", color=INK)
    panels[0].set_ylabel("percent", color=INK)
    for axes in panels:
        axes.tick_params(labelsize=_LETTERS - 1)
    _legend_above(panels[0], 0.45 if general_measure else 0.3)
    return figure_to_image(figure)


def _curve(axes, xs: Sequence[float], shares: Sequence[float], colour: str, label: str) -> None:
    axes.plot(xs, [100 * share for share in shares], color=colour, marker="o", linewidth=2, markersize=5, label=label)


def _draw_frontier(axes, points, chosen, floor: float | None) -> None:
    dress(axes, "Up: better on this data. Right: better in general", _LETTERS)
    axes.plot(
        [100 * general for _, _, general in points],
        [100 * score for _, score, _ in points],
        color=GREY,
        marker="o",
        linewidth=1.5,
        markersize=5,
    )
    ends = {points[0][0]: "baseline", points[-1][0]: "model"}
    places: dict[tuple[float, float], list[str]] = {}  # several blends may score the same
    for alpha, score, general in points:
        places.setdefault((100 * general, 100 * score), []).append(ends.get(alpha, f"{alpha:g}"))
    middle = sum(x for x, _ in places) / len(places)
    for place, names in places.items():
        label = ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]}"
        left = place[0] > middle  # so that no label runs over the edge
        axes.annotate(
            label,
            place,
            (-7 if left else 7, 5),
            textcoords="offset points",
            color=INK,
            fontsize=10,
            ha="right" if left else "left",
        )
    axes.plot(100 * chosen[2], 100 * chosen[1], color=GREEN, marker="*", markersize=18, linestyle="none")
    if floor is not None:
        axes.axvline(100 * floor, color=ORANGE, linestyle="--", linewidth=1.5, label="right of it: allowed")
        _small_legend(axes, loc="lower left")
    axes.set_xlabel("general, percent", color=INK)
    axes.margins(x=0.18)


def _short(value: float) -> str:
    return "0" if value == 0 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _legend_above(axes, room: float, **where) -> None:
    """A legend over what is drawn, in room made for it as a share of the height."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + room * (high - low))
    _small_legend(axes, loc="upper center", **where)


def _small_legend(axes, **where) -> None:
    add_legend(axes, **where)
    legend = axes.get_legend()
    legend.get_title().set_color(INK)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_fontsize(_LETTERS - 2)
