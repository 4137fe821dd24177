"""Which pairs of a query and a key each branch of a pattern reaches, head by head, and how often all branches do."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import style
import torch
from torch import Tensor

from dilated_core import DilatedPattern, attention_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, HEADS = 16, 4
PATTERN = DilatedPattern([4, 8, 16], [1, 2, 4])


class Row(NamedTuple):
    """A row of the picture."""

    label: str
    head: int
    is_causal: bool


ROWS = (Row("head 0", 0, False), Row("head 1", 1, False), Row("head 1,\ncausal", 1, True))


def reached(segment_length: int, rate: int, *, is_causal: bool) -> Tensor:
    """The pairs of one branch, int64 (heads, queries, keys): where the attention map has a weight."""
    same = torch.zeros(1, TOKENS, HEADS, 1)
    weights = attention_map(same, same, [segment_length], [rate], rows=range(TOKENS), is_causal=is_causal)
    return (weights.per_head.to_dense()[0] > 0).long()


def by_branch(*, is_causal: bool) -> list[Tensor]:
    """The pairs of every branch."""
    branches = zip(PATTERN.segment_lengths, PATTERN.dilation_rates, strict=True)
    return [reached(length, rate, is_causal=is_causal) for length, rate in branches]


def draw() -> Figure:
    """A column a branch and one for their sum; a row a head."""
    side, gap, left, top = 1.43, 0.17, 0.78, 0.72
    figure = style.card(top + len(ROWS) * (side + gap) + 0.42)
    branches = list(zip(PATTERN.segment_lengths, PATTERN.dilation_rates, strict=True))
    titles = [f"branch {number + 1}\nsegments of {w}, rate {r}" for number, (w, r) in enumerate(branches)]
    for column, title in enumerate([*titles, "all branches: how often\na row meets a key"]):
        style.say(figure, left + column * (side + gap), 0.2, title)
    for number, row in enumerate(ROWS):
        pairs = by_branch(is_causal=row.is_causal)
        place = top + number * (side + gap)
        style.say(figure, 0.18, place + 0.05, row.label, bold=True)
        for column, table in enumerate([*pairs, sum(pairs)]):
            canvas = style.axes(figure, left + column * (side + gap), place, side, side)
            counts = table[row.head].tolist()
            if column < len(pairs):
                colours = [[style.SERIES[column] if count else None for count in line] for line in counts]
                style.cells(canvas, colours, bounds=range(0, TOKENS + 1, PATTERN.segment_lengths[column]))
            else:
                style.cells(canvas, [[style.SHADES[count] for count in line] for line in counts], bounds=(0, TOKENS))
    end = top + len(ROWS) * (side + gap) - 0.02
    style.say(
        figure, left, end, "Rows are queries, columns are keys; lines are bounds of segments.", colour=style.FAINT
    )
    shades = [(shade, str(often)) for often, shade in enumerate(style.SHADES)]
    style.legend(figure, left + 3 * (side + gap), end + 0.02, shades, step=0.36)
    return figure
