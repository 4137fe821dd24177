"""Plan, attend, merge, for one row of one head: its tiles, its partials, and the softmax they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import style
import torch
from torch import Tensor

from dilated_core import DilatedPattern, Partial, attend, attention_map, merge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOKENS, ROW = 8, 2
PATTERN = DilatedPattern([4, 8], [1, 2])


class Steps(NamedTuple):
    """What comes of each step, for the row.

    Attributes:
        tiles: of each branch the pairs that it joins, bool (queries, keys).
        keys: of each branch, the keys that the row meets.
        partials: of each branch; ``out`` is the weight of every key, since values are the identity's rows.
        merged: the partials as one.
    """

    tiles: list[Tensor]
    keys: list[list[int]]
    partials: list[Partial]
    merged: Partial


def query_and_key() -> tuple[Tensor, Tensor]:
    """Of one head, (1, tokens, 1, tokens): as wide as there are keys, so that values can be the identity."""
    query, key = style.numbers(2, 1, TOKENS, 1, TOKENS, seed=8).unbind()
    return query, key


def steps() -> Steps:
    """Attend the row's keys branch by branch, and merge."""
    query, key = query_and_key()
    value = torch.eye(TOKENS, dtype=torch.float64).reshape(1, TOKENS, 1, TOKENS)
    tiles, keys, partials = [], [], []
    for length, rate in zip(PATTERN.segment_lengths, PATTERN.dilation_rates, strict=True):
        weights = attention_map(query, key, [length], [rate], rows=range(TOKENS)).per_head.to_dense()[0, 0]
        tiles.append(weights > 0)
        keys.append(torch.nonzero(weights[ROW]).flatten().tolist())
        partials.append(attend(query[:, [ROW]], key[:, keys[-1]], value[:, keys[-1]]))
    return Steps(tiles, keys, partials, merge(*partials))


def draw() -> Figure:
    """Three columns, one a step."""
    found = steps()
    figure = style.card(3.2)
    style.say(figure, 0.3, 0.2, "plan", size=style.TITLE, bold=True)
    style.say(figure, 0.3, 0.4, "which rows meet which keys", colour=style.FAINT)
    colours = [
        [
            next((style.SERIES[at] for at, tile in enumerate(found.tiles) if tile[row, column]), None)
            for column in range(TOKENS)
        ]
        for row in range(TOKENS)
    ]
    canvas = style.axes(figure, 0.3, 0.78, 1.9, 1.9)
    style.cells(canvas, colours)
    _mark_both(canvas, found.tiles)
    canvas.plot([0, TOKENS, TOKENS, 0, 0], [ROW, ROW, ROW + 1, ROW + 1, ROW], color=style.INK, linewidth=1.6)
    style.say(figure, 0.3, 2.84, f"two branches; row {ROW} is framed", size=style.SMALL, colour=style.FAINT)

    style.say(figure, 2.75, 0.2, "attend", size=style.TITLE, bold=True)
    style.say(figure, 2.75, 0.4, "each tile alone: out and lse", colour=style.FAINT)
    for at, (keys, partial) in enumerate(zip(found.keys, found.partials, strict=True)):
        canvas = style.axes(figure, 2.75, 0.98 + 1.02 * at, 1.75, 0.6)
        heights = partial.out[0, 0, 0, keys].tolist()
        canvas.bar(keys, heights, 0.8, color=style.SERIES[at])
        _keys(canvas, 0.6)
        style.say(figure, 4.5, 0.76 + 1.02 * at, f"lse {partial.lse.item():.2f}", size=style.SMALL, at="right")
        style.say(figure, 2.75, 0.76 + 1.02 * at, f"branch {at + 1}", size=style.SMALL)

    style.say(figure, 5.0, 0.2, "merge", size=style.TITLE, bold=True)
    style.say(figure, 5.0, 0.4, "scale by exp(lseᵢ − lse), add", colour=style.FAINT)
    canvas = style.axes(figure, 5.0, 0.98, 1.95, 1.62)
    below = torch.zeros(TOKENS, dtype=torch.float64)
    for at, partial in enumerate(found.partials):
        share = torch.exp(partial.lse - found.merged.lse).item()
        heights = share * partial.out[0, 0, 0]
        canvas.bar(range(TOKENS), heights.tolist(), 0.8, below.tolist(), color=style.SERIES[at], label=f"× {share:.2f}")
        below += heights
    _keys(canvas, float(below.max()) * 1.25)
    canvas.legend(frameon=False, fontsize=style.SMALL, loc="upper right", handlelength=1.0, borderaxespad=0.0)
    style.say(figure, 5.0, 0.76, f"lse {found.merged.lse.item():.2f}", size=style.SMALL)
    style.say(
        figure, 6.95, 2.84, "keys; one of both branches counts twice", size=style.SMALL, colour=style.FAINT, at="right"
    )
    style.arrow(figure, (2.27, 1.7), (2.6, 1.7))
    style.arrow(figure, (4.58, 1.7), (4.88, 1.7))
    return figure


def _mark_both(canvas: Axes, tiles: list[Tensor]) -> None:
    """The pairs of both branches: a triangle in the second's colour."""
    from matplotlib.patches import Polygon

    for row, column in torch.nonzero(tiles[0] & tiles[1]).tolist():
        corners = [(column + 1, row), (column + 1, row + 1), (column, row + 1)]
        canvas.add_patch(Polygon(corners, facecolor=style.SERIES[1], linewidth=0))


def _keys(canvas: Axes, highest: float) -> None:
    canvas.set_xlim(-0.6, TOKENS - 0.4)
    canvas.set_ylim(0, highest)
    canvas.set_xticks(range(TOKENS))
    canvas.set_yticks([])
    canvas.spines["left"].set_visible(False)
