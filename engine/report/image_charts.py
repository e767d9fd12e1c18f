"""Charts that show images beside numbers (PIL, RGB)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from .canvas import GROUND, INK, add_legend, canvas, colours_of, dress, figure_to_image, shortened
from .contact_sheet import contact_sheet, font, wrapped

_MAX_TEXTS, _LINE_LETTERS = 12, 44


def chart_with_sheet(chart: Image.Image, images: Sequence[tuple[Image.Image, str]], heading: str) -> Image.Image:
    """Put a sheet of (image, caption) pairs under a heading below a chart; without images, return the chart."""
    if not images:
        return chart
    line = _heading(heading, chart.width)
    sheet = contact_sheet(images, columns=4)
    size = (max(chart.width, sheet.width), chart.height + line.height + sheet.height)
    whole = Image.new("RGB", size, GROUND)
    whole.paste(chart, (0, 0))
    whole.paste(line, (0, chart.height))
    whole.paste(sheet, ((whole.width - sheet.width) // 2, chart.height + line.height))
    return whole


def ranking_chart(
    image: Image.Image,
    texts: Sequence[str],
    shares: Mapping[str, Sequence[float]],
    cosines: Mapping[str, Sequence[float]],
    *,
    title: str = "",
) -> Image.Image:
    """Draw an image beside the shares (0 to 1) that each model, by its name, gives the texts, in their order.

    The cosine stands behind each bar. Only the first twelve texts are drawn; the title says so.
    """
    names, shown = list(shares), list(texts[:_MAX_TEXTS])
    lines = ["\n".join(textwrap.wrap(shortened(text, 2 * _LINE_LETTERS), _LINE_LETTERS)) or " " for text in shown]
    height = sum(0.3 + 0.2 * line.count("\n") + 0.24 * len(names) for line in lines) + 1.3
    figure = canvas((10.24, max(4.2, height)))
    left, axes = figure.subplots(1, 2, width_ratios=[1, 1.7])
    left.imshow(image.convert("RGB"))
    left.set_axis_off()
    width = 0.8 / len(names)
    for number, (name, colour) in enumerate(zip(names, colours_of(names), strict=True)):
        ys = [row + (number - (len(names) - 1) / 2) * width for row in range(len(shown))]
        values = [100 * share for share in shares[name][: len(shown)]]
        bars = axes.barh(ys, values, width * 0.92, color=colour, label=name)
        labels = [f"{_percent(value)}   cos {cosine:.3f}" for value, cosine in zip(values, cosines[name], strict=False)]
        axes.bar_label(bars, labels, color=INK, fontsize=10, padding=4)
    cut = f" (the first {_MAX_TEXTS} of {len(texts)} texts)" if len(texts) > _MAX_TEXTS else ""
    dress(axes, title + cut, 11)
    axes.set_yticks(range(len(shown)), lines, parse_math=False)
    axes.set_xlabel("share of these texts, in percent", color=INK)
    axes.set(xlim=(0, 145), ylim=(len(shown) - 0.45, -0.55 - 0.5 * (len(names) > 1)))
    axes.set_xticks(range(0, 101, 25))
    axes.grid(axis="y", visible=False)
    if len(names) > 1:
        add_legend(axes, loc="upper right", ncols=len(names))
    return figure_to_image(figure)


def _percent(value: float) -> str:
    return f"{value:.1f} %" if value >= 0.05 or value == 0 else "<0.1 %"


def _heading(text: str, width: int) -> Image.Image:
    lines = wrapped(text, width - 24, 2)
    strip = Image.new("RGB", (width, 10 + 20 * max(1, len(lines))), GROUND)
    draw = ImageDraw.Draw(strip)
    for number, words in enumerate(lines):
        draw.text((12, 6 + 20 * number), words, fill=INK, font=font())
    return strip
