"""How every picture looks: one card, one palette, places in inches from the top left. Imports matplotlib when it draws.

A card is 700 pixels wide in a browser, white with a rounded edge, so that it reads on a light and on a dark page. The
colours are Okabe and Ito's, told apart by all common forms of colour vision. Text becomes paths, ids have a fixed salt
and no date is written: with one version of matplotlib a picture is the same bytes every time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.3  # inches of 96 pixels: what a page of the site is wide
INK, FAINT, LINE, NOTHING = "#222222", "#666666", "#c8c8c8", "#f1f1f1"
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)
ON = {NOTHING: FAINT, ORANGE: INK}  # text on a colour, where white is hard to read
SHADES = (NOTHING, "#a6cbe3", "#3f8fc4", "#003f66")  # of how often: never, once, twice, three times
TITLE, TEXT, SMALL = 9.5, 8.5, 7.5  # points

Colour = str | None


def card(height: float) -> Figure:
    """An empty white card, ``height`` inches high."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    figure = Figure(figsize=(WIDTH, height), facecolor="none")
    FigureCanvasSVG(figure)
    edge = 0.03
    figure.add_artist(
        FancyBboxPatch(
            (edge, edge),
            WIDTH - 2 * edge,
            height - 2 * edge,
            boxstyle="round,pad=0,rounding_size=0.1",
            transform=figure.dpi_scale_trans,
            facecolor="white",
            edgecolor="#dddddd",
            linewidth=0.8,
            zorder=-1,
        )
    )
    return figure


def axes(figure: Figure, left: float, top: float, width: float, height: float, *, bare: bool = False) -> Axes:
    """Axes at a place in inches; ``bare`` without lines and ticks."""
    high = figure.get_figheight()
    made = figure.add_axes((left / WIDTH, 1 - (top + height) / high, width / WIDTH, height / high))
    made.tick_params(labelsize=SMALL, colors=FAINT, length=2, width=0.6)
    made.spines[["top", "right"]].set_visible(False)
    made.spines[["left", "bottom"]].set(color=LINE, linewidth=0.8)
    made.patch.set_alpha(0.0)
    if bare:
        made.set_axis_off()
    return made


def say(
    figure: Figure,
    left: float,
    top: float,
    text: str,
    *,
    size: float = TEXT,
    colour: str = INK,
    bold: bool = False,
    at: str = "left",
    turned: bool = False,
) -> None:
    """Text whose first line begins at ``top``; ``at`` says which end of it is at ``left``. Turned, it reads upwards."""
    high = figure.get_figheight()
    looks = {"fontsize": size, "color": colour, "fontweight": "bold" if bold else "normal", "ha": at}
    if turned:
        figure.text(left / WIDTH, 1 - top / high, text, rotation=90, va="center", **looks)
        return
    for number, line in enumerate(text.splitlines()):
        baseline = top + (0.9 + 1.4 * number) * size / 72
        figure.text(left / WIDTH, 1 - baseline / high, line, va="baseline", **looks)


def box(
    figure: Figure,
    left: float,
    top: float,
    width: float,
    height: float,
    text: str = "",
    *,
    colour: str = BLUE,
    size: float = TEXT,
    filled: bool = False,
) -> None:
    """A box with text in its middle: tinted, or ``filled`` with the colour."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import FancyBboxPatch

    high = figure.get_figheight()
    figure.add_artist(
        FancyBboxPatch(
            (left, high - top - height),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            transform=figure.dpi_scale_trans,
            facecolor=colour if filled else to_rgba(colour, 0.12),
            edgecolor=colour,
            linewidth=1.0,
        )
    )
    figure.text(
        (left + width / 2) / WIDTH,
        1 - (top + height / 2) / high,
        text,
        fontsize=size,
        color=ON.get(colour, "white") if filled else INK,
        ha="center",
        va="center",
        linespacing=1.4,
    )


def arrow(
    figure: Figure, start: tuple[float, float], end: tuple[float, float], *, colour: str = FAINT, bend: float = 0.0
) -> None:
    """An arrow between two places in inches."""
    from matplotlib.patches import FancyArrowPatch

    high = figure.get_figheight()
    figure.add_artist(
        FancyArrowPatch(
            (start[0], high - start[1]),
            (end[0], high - end[1]),
            transform=figure.dpi_scale_trans,
            arrowstyle="-|>,head_length=4,head_width=2.2",
            connectionstyle=f"arc3,rad={bend}",
            color=colour,
            linewidth=1.1,
            shrinkA=0,
            shrinkB=0,
        )
    )


def cells(canvas: Axes, colours: Sequence[Sequence[Colour]], *, bounds: Sequence[int] = ()) -> None:
    """A table of coloured cells, first row on top; None stays grey. Dark lines at ``bounds``, both ways."""
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Outline

    rows, wide = len(colours), len(colours[0])
    canvas.add_patch(Rectangle((0, 0), wide, rows, facecolor=NOTHING, linewidth=0))
    squares: dict[str, list[Outline]] = {}
    for row, line in enumerate(colours):
        for column, colour in enumerate(line):
            if colour is not None:
                corners = [(column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1), (column, row)]
                squares.setdefault(colour, []).append(Outline(corners, closed=True))
    for colour, outlines in squares.items():  # one path a colour: a path a cell makes files of half a megabyte
        canvas.add_patch(PathPatch(Outline.make_compound_path(*outlines), facecolor=colour, linewidth=0))
    grid = [Outline([(at, 0), (at, rows)]) for at in range(1, wide)]
    grid += [Outline([(0, at), (wide, at)]) for at in range(1, rows)]
    canvas.add_patch(PathPatch(Outline.make_compound_path(*grid), fill=False, edgecolor="white", linewidth=0.7))
    for bound in bounds:
        canvas.plot([bound, bound], [0, rows], color=INK, linewidth=0.8)
        canvas.plot([0, wide], [bound, bound], color=INK, linewidth=0.8)
    canvas.set_xlim(0, wide)
    canvas.set_ylim(rows, 0)
    canvas.set_axis_off()


def write(
    canvas: Axes, across: float, down: float, text: str, *, size: float = SMALL, colour: str = INK, at: str = "center"
) -> None:
    """Text in the units of the axes, its middle at ``down``; ``at`` says which end of it is at ``across``."""
    canvas.text(across, down, text, fontsize=size, color=colour, ha=at, va="center")


def stretch(canvas: Axes, start: float, length: float, text: str, colour: str) -> None:
    """A stretch of a bar that is 1 high, with text in its middle."""
    from matplotlib.patches import Rectangle

    canvas.add_patch(Rectangle((start, 0), length, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
    write(canvas, start + length / 2, 0.46, text, colour=ON.get(colour, "white"))


def legend(figure: Figure, left: float, top: float, entries: Sequence[tuple[str, str]], *, step: float = 1.0) -> None:
    """Small squares of colour with what they mean, from left to right."""
    from matplotlib.patches import Rectangle

    high = figure.get_figheight()
    for number, (colour, text) in enumerate(entries):
        place = left + number * step
        figure.add_artist(
            Rectangle(
                (place, high - top - 0.12),
                0.12,
                0.12,
                transform=figure.dpi_scale_trans,
                facecolor=colour,
                edgecolor=LINE,
                linewidth=0.5,
            )
        )
        say(figure, place + 0.18, top - 0.01, text, size=SMALL, colour=FAINT)


def paler(colour: str, white: float) -> str:
    """The colour with so much white in it, 0 to 1."""
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in parts)


def in_kib(nbytes: float) -> str:
    """Bytes as a label."""
    return f"{nbytes / 1024:,.0f} KiB"


def numbers(*shape: int, seed: int) -> Tensor:
    """Normal random numbers in float64, the same on every machine and with every version of torch."""
    draw = random.Random(seed)
    return torch.tensor([draw.gauss(0.0, 1.0) for _ in range(math.prod(shape))], dtype=torch.float64).reshape(shape)


def save(figure: Figure, path: Path) -> None:
    """Write the picture as SVG."""
    import matplotlib

    # Who reads the page may not have the font, and dates and random ids would change the file every time.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "dilated"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
