"""What a plan makes of a layout: long rectangles, each block in exactly one, and causal squares on the diagonal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import style
import torch
from torch import Tensor

from dilated_block_sparse import BlockLayout
from dilated_block_sparse.plan import Axis, make_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, BLOCK = 3072, 128
COLOURS = (*style.SERIES, "#f0e442", "#999999", "#8c510a", "#4b3f72")  # as many as there are calls
PALER = (0.0, 0.3, 0.55)  # how much white is in the first, second and third rectangle of a call, and so on


class Piece(NamedTuple):
    """A rectangle, in tokens: stretches of rows and of keys, and the number of the call that attends it."""

    call: int
    rows: tuple[range, ...]
    keys: tuple[range, ...]
    is_causal: bool


class Panel(NamedTuple):
    """A layout and what its plan makes of it."""

    title: str
    layout: BlockLayout
    is_causal: bool

    def pieces(self) -> list[Piece]:
        """Every rectangle of the plan."""
        (plan,) = make_plan(self.layout, is_causal=self.is_causal)
        return [
            Piece(number, rows, keys, stack.is_causal)
            for number, stack in enumerate(plan.stacks)
            for rows, keys in zip(_stretches(stack.rows), _stretches(stack.keys), strict=True)
        ]


def _stretches(axis: Axis) -> Iterator[tuple[range, ...]]:
    """Of each rectangle its stretches, those that follow each other as one; the last is cut to the length."""
    for starts in axis.starts:
        tokens = [token for start in starts for token in range(start, start + axis.size)][: axis.length]
        found: list[range] = []
        for token in tokens:
            if found and found[-1].stop == token:
                found[-1] = range(found[-1].start, token + 1)
            else:
                found.append(range(token, token + 1))
        yield tuple(found)


def panels() -> list[Panel]:
    """One kind of layout each."""
    window = BlockLayout.local(TOKENS, 2, block_size=BLOCK) | BlockLayout.global_(TOKENS, 1, 1, block_size=BLOCK)
    dilated = BlockLayout.dilated(TOKENS, 12, 3, block_size=BLOCK)
    return [
        Panel("window and global", window, False),
        Panel("the same, causal", window, True),
        Panel("dilated", dilated, False),
    ]


def attended(panel: Panel) -> Tensor:
    """How often the plan's rectangles join each pair of tokens, int32 (tokens, tokens)."""
    count = torch.zeros(TOKENS, TOKENS, dtype=torch.int32)
    for piece in panel.pieces():
        for rows in piece.rows:
            for keys in piece.keys:
                # Rows and keys of a causal rectangle are one stretch.
                square = torch.ones(len(rows), len(keys), dtype=torch.int32)
                count[rows.start : rows.stop, keys.start : keys.stop] += square.tril() if piece.is_causal else square
    return count


def draw() -> Figure:
    """Three panels; a colour a call."""
    from matplotlib.patches import Polygon, Rectangle

    side, gap, left, top = 2.0, 0.3, 0.35, 0.68
    figure = style.card(top + side + 0.5)
    for number, panel in enumerate(panels()):
        x = left + number * (side + gap)
        pieces = panel.pieces()
        calls = 1 + max(piece.call for piece in pieces)
        style.say(figure, x, 0.2, panel.title, size=style.TITLE, bold=True)
        live = panel.layout.causal().live if panel.is_causal else panel.layout.live
        blocks = f"{live} blocks, {len(pieces)} rectangles, {calls} call{'s' * (calls > 1)}"
        style.say(figure, x, 0.42, blocks, size=style.SMALL, colour=style.FAINT)
        canvas = style.axes(figure, x, top, side, side)
        style.cells(canvas, [[None] * (TOKENS // BLOCK)] * (TOKENS // BLOCK))
        canvas.set_xlim(0, TOKENS)
        canvas.set_ylim(TOKENS, 0)
        canvas.add_patch(Rectangle((0, 0), TOKENS, TOKENS, facecolor=style.NOTHING, linewidth=0))
        seen: Counter[int] = Counter()
        for piece in pieces:
            colour = style.paler(COLOURS[piece.call], PALER[seen[piece.call] % len(PALER)])
            seen[piece.call] += 1
            looks = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.9}
            for rows in piece.rows:
                for keys in piece.keys:
                    low, high = (keys.start, rows.start), (keys.stop, rows.stop)
                    if piece.is_causal:
                        canvas.add_patch(Polygon([low, (low[0], high[1]), high], **looks))
                    else:
                        canvas.add_patch(Rectangle(low, len(keys), len(rows), **looks))
    note = f"{TOKENS:,} tokens in blocks of {BLOCK}; shades of one colour are the rectangles of one call"
    style.say(figure, left, top + side + 0.15, note, size=style.SMALL, colour=style.FAINT)
    return figure
