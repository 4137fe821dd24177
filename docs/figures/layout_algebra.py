"""Layouts are sets of blocks: union, intersection, difference, transposition, and the density of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import style

from dilated_block_sparse import BlockLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, BLOCK = 2048, 128


class Panel(NamedTuple):
    """A layout, its name, and how it was made."""

    name: str
    made: str
    layout: BlockLayout
    colour: str


def panels() -> list[Panel]:
    """Six layouts, made of two."""
    a = BlockLayout.local(TOKENS, 1, block_size=BLOCK)
    b = BlockLayout.dilated(TOKENS, 16, 4, block_size=BLOCK)
    before = BlockLayout.full(TOKENS, block_size=BLOCK).causal()
    c = (a | b) & before
    return [
        Panel("A", "local(…, window=1)", a, style.BLUE),
        Panel("B", "dilated(…, segment=16, rate=4)", b, style.ORANGE),
        Panel("A | B", "in either", a | b, style.GREEN),
        Panel("C", "(A | B) & causal, or (A | B).causal()", c, style.GREEN),
        Panel("C − A", "in the first alone", c - a, style.PURPLE),
        Panel("(C − A).T", "rows and columns exchanged", (c - a).T, style.PURPLE),
    ]


def draw() -> Figure:
    """Two rows of three."""
    side, gap, left, top = 1.95, 0.4, 0.35, 0.62
    figure = style.card(2 * (top + side) + 0.55)
    for number, panel in enumerate(panels()):
        row, column = divmod(number, 3)
        x, y = left + column * (side + gap), 0.2 + row * (top + side + 0.05)
        style.say(figure, x, y, panel.name, size=style.TITLE, bold=True)
        style.say(figure, x + side, y + 0.01, f"density {panel.layout.density:.2f}", at="right", size=style.SMALL)
        style.say(figure, x, y + 0.2, panel.made, size=style.SMALL, colour=style.FAINT)
        table = panel.layout.to_blocks()[0].tolist()
        colours = [[panel.colour if live else None for live in line] for line in table]
        style.cells(style.axes(figure, x, y + 0.42, side, side), colours)
    note = f"rows: blocks of {BLOCK} queries; columns: blocks of {BLOCK} keys; {TOKENS:,} tokens"
    style.say(figure, left, 2 * (top + side) + 0.28, note, size=style.SMALL, colour=style.FAINT)
    return figure
