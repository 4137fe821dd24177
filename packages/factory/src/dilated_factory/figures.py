"""The look that this package's pictures share: colours, labels and panels.

Colours are Okabe and Ito's, which people with any colour vision can tell apart. Figures are made without pyplot, so no
display and no global state are needed. Imports matplotlib when drawing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, FAINT, GRID = "#222222", "#777777", "#DDDDDD"
DOTS_PER_INCH = 144


def plain(value: float, _: float) -> str:
    """Axis labels 0.1, 1, 10, 1,000 instead of powers."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def make_figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels side by side, its width and height in inches, and the panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    axes_list = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
    for axes in axes_list:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, which="both")
        axes.grid(visible=True, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, axes_list
