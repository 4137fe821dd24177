"""Which rows travel to one rank where segments cross the bounds of its shard, by "gather" and by "heads"."""

from __future__ import annotations

from typing import TYPE_CHECKING

import style

from dilated_ring import RingPlan, make_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, HEADS, RANKS, RANK = 24, 4, 3, 1
SEGMENT, RATE = 12, 3
EXCHANGES = {
    "gather": "the keys and values that its own rows meet come to it",
    "heads": "queries, keys and values of its share of the heads come to it; results go back",
}


def plan(exchange: str) -> RingPlan:
    """Three shards of eight positions, two segments of twelve."""
    return make_plan(TOKENS, [SEGMENT], [RATE], HEADS, RANKS, exchange=exchange)


def grid() -> set[tuple[int, int]]:
    """Every (head, position) that attends in this branch."""
    return {
        (head, position)
        for head in range(HEADS)
        for position in range(TOKENS)
        if position % SEGMENT % RATE == head % RATE
    }


def travelling(exchange: str) -> set[tuple[int, int]]:
    """Every (head, position) of which keys come to the rank."""
    return {
        (head, position)
        for rows in plan(exchange).ranges(RANK)
        if rows.tensor == "keys"
        for head in rows.heads
        for position in rows.positions
    }


def draw() -> Figure:
    """A table of heads and positions for each exchange."""
    figure = style.card(4.55)
    left, side = 0.95, 0.25
    owners = (style.BLUE, style.ORANGE, style.GREEN)
    pale = ("#bcd9ea", "#f7dfae", "#b5dfd2")
    bounds = plan("gather").bounds
    for number, (exchange, what) in enumerate(EXCHANGES.items()):
        top = 0.2 + 1.98 * number
        style.say(figure, 0.3, top, f'"{exchange}"', size=style.TITLE, bold=True)
        style.say(figure, left + 0.12, top, what, colour=style.FAINT)
        for rank in range(RANKS):
            middle = left + side * (bounds[rank] + bounds[rank + 1]) / 2
            width = side * (bounds[rank + 1] - bounds[rank]) - 0.06
            style.box(
                figure,
                middle - width / 2,
                top + 0.3,
                width,
                0.2,
                f"rank {rank}",
                colour=owners[rank],
                size=7,
                filled=True,
            )
        moved = travelling(exchange)
        colours: list[list[style.Colour]] = [[None] * TOKENS for _ in range(HEADS)]
        for head, position in grid():
            owner = next(rank for rank in range(RANKS) if position < bounds[rank + 1])
            colours[head][position] = (owners if (head, position) in moved else pale)[owner]
        canvas = style.axes(figure, left, top + 0.56, side * TOKENS, side * HEADS)
        style.cells(canvas, colours)
        for bound in range(0, TOKENS + 1, SEGMENT):
            canvas.plot([bound, bound], [0, HEADS], color=style.INK, linewidth=1.4, clip_on=False)
        for head in range(HEADS):
            style.write(canvas, -0.3, head + 0.5, f"head {head}", at="right")
        for position in range(0, TOKENS, 4):
            style.write(canvas, position + 0.5, HEADS + 0.5, str(position), colour=style.FAINT)
    note = f"dark: rows that come to rank {RANK}; pale: the others; black lines: bounds of segments; below: positions"
    style.say(figure, left, 4.22, note, size=style.SMALL, colour=style.FAINT)
    return figure
