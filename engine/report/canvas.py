"""What all charts are drawn on: a dark ground that works on dark and light pages, its colours and letters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
GROUND, INK, FAINT = "#20232a", "#e8e8e8", "#4a4f5a"
BLUE, ORANGE, GREEN, GREY = "#5aa9f0", "#f2a541", "#7bc96f", "#9aa0ab"
TOP = 128  # of an axis in percent, so that a legend has room above bars of 100


def canvas(size: tuple[float, float]) -> Figure:
    """Return an empty matplotlib figure, `size` in inches; opens no window and touches no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)  # inches; the default lets titles touch the edge
    figure = Figure(figsize=size, dpi=DPI, facecolor=GROUND, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, title: str, size: float = 14) -> None:
    """Give axes a title and the look of all charts; `size` is that of the letters beside them, in points."""
    axes.set_facecolor(GROUND)
    axes.set_title(title, color=INK, fontsize=size + 1, wrap=True, parse_math=False)  # a run's name may hold a $
    axes.tick_params(colors=INK, labelsize=size - 1)
    axes.xaxis.label.set(color=INK, fontsize=size)
    axes.yaxis.label.set(color=INK, fontsize=size)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set(color=FAINT, visible=name in ("left", "bottom"))


def colours_of(names: Sequence[str]) -> list[str]:
    """Return a colour for each model; the baseline is grey wherever it stands."""
    others = itertools.cycle((BLUE, ORANGE, GREEN))
    return [GREY if name == "baseline" else next(others) for name in names]


def add_legend(axes: Axes, *, size: float = 13, **options: Any) -> None:
    """Add a legend of what has a label; `options` as for matplotlib's `legend`."""
    legend = axes.legend(**({"loc": "upper right"} | options), fontsize=size, framealpha=0.8, facecolor=GROUND)
    legend.get_frame().set_edgecolor(FAINT)
    legend.get_title().set(color=INK, fontsize=size)
    for text in legend.get_texts():
        text.set(color=INK, parse_math=False)


def figure_to_image(figure: Figure) -> Image.Image:
    """Draw the figure; the image is RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = figure.canvas
    assert isinstance(drawn, FigureCanvasAgg)
    drawn.draw()
    return Image.frombuffer("RGBA", drawn.get_width_height(), drawn.buffer_rgba()).convert("RGB")


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
