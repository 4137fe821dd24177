"""What the pictures have in common: matplotlib without its global state, a size, and colours.

Figures are made as objects and drawn by the Agg canvas. pyplot is never imported: it would choose a window system,
keep every figure alive and take over the program's settings.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 100
WIDTH = 12.0  # inches
_MARGIN = 0.12  # inches
MIB = 2**20

# Okabe and Ito's colours, told apart by all common forms of colour vision, and in grey by their lightness.
USED, WAITING, LIMIT = "#0072b2", "#e69f00", "#d55e00"
WASTED = "#9ecae8"  # of the hue of what it belongs to
FREE, EDGE, INK = "#ececec", "#b0b0b0", "#333333"


def new_figure(height: float) -> tuple[Figure, Axes]:
    """An empty figure of ``WIDTH`` and ``height`` inches with one pair of axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "dilated-memory-pool[report]"') from error
    layout = ConstrainedLayoutEngine(w_pad=_MARGIN, h_pad=_MARGIN)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("white")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    return figure, axes


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write it as a PNG of its own size."""
    figure.savefig(path, format="png", dpi=DPI, facecolor="white")
