"""What all charts are drawn on: a dark ground that is readable on dark and light pages, its colours, its letters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

DPI = 100
GROUND, INK, FAINT = "#20232a", "#e8e8e8", "#4a4f5a"
BLUE, ORANGE, GREEN, GREY = "#5aa9f0", "#f2a541", "#7bc96f", "#9aa0ab"
TOP = 128  # of an axis in percent, so that a legend finds room above bars of 100


def canvas(size: tuple[float, float]):
    """An empty figure of matplotlib's, `size` in inches; no window is opened and no global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=DPI, facecolor=GROUND, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # inches; the default lets titles touch the edge
    FigureCanvasAgg(figure)
    return figure


def dress(axes, title: str, size: float = 14) -> None:
    """Give axes their title and the look of all charts; `size` is that of the letters beside them, in points."""
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
    """A colour for each model; the baseline is grey wherever it stands."""
    others = itertools.cycle((BLUE, ORANGE, GREEN))
    return [GREY if name == "baseline" else next(others) for name in names]


def add_legend(axes, **where) -> None:
    """A legend of what has a label; `where` as for matplotlib's `legend`."""
    legend = axes.legend(**({"loc": "upper right"} | where), fontsize=13, framealpha=0.8, facecolor=GROUND)
    legend.get_frame().set_edgecolor(FAINT)
    for text in legend.get_texts():
        text.set(color=INK, parse_math=False)


def figure_to_image(figure):
    """The figure drawn, as PIL RGB."""
    from PIL import Image

    figure.canvas.draw()
    return Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba()).convert("RGB")
