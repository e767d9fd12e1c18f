"""Charts of what models take pictures for: classes, attacks, and one picture with its texts (PIL, RGB)."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence

from .canvas import DPI, GROUND, INK, TOP, add_legend, canvas, colours_of, dress, figure_to_image
from .contact_sheet import contact_sheet, font, wrapped

_WIDTH = 892  # pixels; four pictures of a contact sheet side by side
_BARS_HEIGHT, _ROW, _MOST_ROWS = 400, 0.42, 12  # pixels; inches a row of bars; rows
_LETTERS = 44  # of a text or pair of names in a line


def share_chart(
    groups: Mapping[str, Mapping[str, float]],
    *,
    title: str = "",
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    confused: Mapping[str, Sequence[tuple[str, str, int]]] | None = None,
):
    """Shares (0 to 1) as bars in percent: `groups[label][name]`, with the whiskers of `intervals[label][name]`. Below
    them, if given, for each name what was most often `confused`: (class, what it was taken for, how often)."""
    lists = {name: list(pairs[:6]) for name, pairs in (confused or {}).items() if pairs}
    rows = max(map(len, lists.values()), default=0)
    height = _BARS_HEIGHT / DPI + (rows * _ROW + 0.9 if rows else 0)
    figure = canvas((_WIDTH / DPI, height))
    if not rows:
        _draw_groups(figure.add_subplot(), groups, title, intervals or {})
        return figure_to_image(figure)
    grid = figure.add_gridspec(2, len(lists), height_ratios=[_BARS_HEIGHT / DPI, rows * _ROW + 0.9])
    _draw_groups(figure.add_subplot(grid[0, :]), groups, title, intervals or {})
    most = max(count for pairs in lists.values() for *_, count in pairs)
    for number, (name, pairs) in enumerate(lists.items()):
        axes = figure.add_subplot(grid[1, number])
        labels = [_confused(one, other, beside=len(lists) > 1) for one, other, _ in pairs]
        drawn = axes.barh(range(len(pairs)), [count for *_, count in pairs], 0.7, color=colours_of(list(lists))[number])
        axes.bar_label(drawn, color=INK, fontsize=10, padding=3)
        dress(axes, f"Most often mistaken by the {name}" if len(lists) > 1 else "Most often mistaken", 10)
        axes.set_yticks(range(len(pairs)), labels, parse_math=False)
        axes.set(xlim=(0, most * 1.15), ylim=(rows - 0.4, -0.6), xticks=[])
        axes.grid(visible=False)
    return figure_to_image(figure)


def attack_chart(
    groups: Mapping[str, Mapping[str, float]], pictures: Sequence[tuple], *, title: str = "", heading: str = ""
):
    """Bars as in `share_chart`, and under a heading a sheet of (picture, caption) pairs."""
    from PIL import Image

    bars = share_chart(groups, title=title)
    if not pictures:
        return bars
    line = _heading(heading, bars.width)
    sheet = contact_sheet(pictures, columns=4)
    whole = Image.new("RGB", (bars.width, bars.height + line.height + sheet.height), sheet.getpixel((0, 0)))
    whole.paste(bars, (0, 0))
    whole.paste(line, (0, bars.height))
    whole.paste(sheet, ((bars.width - sheet.width) // 2, bars.height + line.height))
    return whole


def ranking_chart(
    picture,
    texts: Sequence[str],
    shares: Mapping[str, Sequence[float]],
    cosines: Mapping[str, Sequence[float]],
    *,
    title: str = "",
):
    """A picture (PIL) beside the shares (0 to 1) that each model, by its name, gives the texts, in their order; the
    cosine stands behind each bar. More than twelve texts are told in words."""
    names, shown = list(shares), list(texts[:_MOST_ROWS])
    lines = ["\n".join(textwrap.wrap(_cut(text, 2 * _LETTERS), _LETTERS)) or " " for text in shown]
    tall = sum(0.3 + 0.2 * line.count("\n") + 0.24 * len(names) for line in lines) + 1.3
    figure = canvas((10.24, max(4.2, tall)))
    image, axes = figure.subplots(1, 2, width_ratios=[1, 1.7])
    image.imshow(picture.convert("RGB"))
    image.set_axis_off()
    width = 0.8 / len(names)
    for number, (name, colour) in enumerate(zip(names, colours_of(names), strict=True)):
        places = [row + (number - (len(names) - 1) / 2) * width for row in range(len(shown))]
        values = [100 * share for share in shares[name][: len(shown)]]
        drawn = axes.barh(places, values, width * 0.92, color=colour, label=name)
        told = [f"{_percent(value)}   cos {cosine:.3f}" for value, cosine in zip(values, cosines[name], strict=False)]
        axes.bar_label(drawn, told, color=INK, fontsize=10, padding=4)
    more = f" (the first {_MOST_ROWS} of {len(texts)} texts)" if len(texts) > _MOST_ROWS else ""
    dress(axes, title + more, 11)
    axes.set_yticks(range(len(shown)), lines, parse_math=False)
    axes.set_xlabel("share of these texts, in percent", color=INK)
    axes.set(xlim=(0, 145), ylim=(len(shown) - 0.45, -0.55 - 0.5 * (len(names) > 1)))
    axes.set_xticks(range(0, 101, 25))
    axes.grid(axis="y", visible=False)
    if len(names) > 1:
        add_legend(axes, loc="upper right", ncols=len(names))
    return figure_to_image(figure)


def _draw_groups(axes, groups, title: str, intervals) -> None:
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / max(1, len(names))
    for number, (name, colour) in enumerate(zip(names, colours_of(names), strict=True)):
        xs = [group + (number - (len(names) - 1) / 2) * width for group in range(len(groups))]
        values = [100 * bars.get(name, math.nan) for bars in groups.values()]
        drawn = axes.bar(xs, values, width * 0.92, color=colour, label=name)
        tops = []
        for x, value, label in zip(xs, values, groups, strict=True):
            low, high = (100 * end for end in intervals.get(label, {}).get(name, (value / 100, value / 100)))
            if high > low:
                axes.vlines(x, low, high, color=INK, linewidth=1.5)
            tops.append(max(high, value))
        for bar, value, top in zip(drawn, values, tops, strict=True):
            if not math.isnan(value):
                axes.annotate(
                    f"{value:.1f}",
                    (bar.get_x() + bar.get_width() / 2, top),
                    (0, 3),
                    color=INK,
                    textcoords="offset points",
                    ha="center",
                    fontsize=12 if len(names) * len(groups) <= 12 else 9,
                )
    dress(axes, title)
    labels = ["\n".join(textwrap.wrap(label, 18, break_on_hyphens=False)) for label in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=13 if len(groups) <= 4 else 10, parse_math=False)
    axes.set_ylabel("percent")
    axes.set_ylim(0, TOP if len(names) > 1 else 115)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(axis="x", visible=False)
    if len(names) > 1:
        add_legend(axes, loc="upper center", ncols=len(names))


def _confused(one: str, other: str, *, beside: bool) -> str:
    """In a line, or in two where another list stands beside it."""
    most = _LETTERS // 2 - 2
    return f"{_cut(one, most)} →{chr(10) if beside else ' '}{_cut(other, most)}"


def _percent(value: float) -> str:
    return f"{value:.1f} %" if value >= 0.05 or value == 0 else "<0.1 %"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _heading(text: str, width: int):
    from PIL import Image, ImageDraw

    lines = wrapped(text, width - 24, 2)
    line = Image.new("RGB", (width, 10 + 20 * max(1, len(lines))), GROUND)
    draw = ImageDraw.Draw(line)
    for number, words in enumerate(lines):
        draw.text((12, 6 + 20 * number), words, fill=INK, font=font())
    return line
