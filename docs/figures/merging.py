"""Two tiles of one row become one softmax: each tile's weights, the factors exp(lse_i - lse), and their sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import style
import torch

from dilated_core import Partial, attend, merge

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES = (1.2, 0.3, -0.4, 0.8, -1.0, 2.1, 0.1, 1.5)
TILES = (range(5), range(5, 8))  # keys of each tile


class Merged(NamedTuple):
    """Weights of a row: of each tile alone, of their merge, and of the softmax over all keys at once."""

    partials: list[Partial]
    merged: Partial
    joint: Partial


def weights() -> Merged:
    """Attend with values that are the rows of the identity, so that ``out`` is the weight of every key."""
    count = len(SCORES)
    query = torch.eye(count, dtype=torch.float64)[:1].reshape(1, 1, 1, count)
    key = torch.zeros(1, count, 1, count, dtype=torch.float64)
    key[0, :, 0, 0] = torch.tensor(SCORES, dtype=torch.float64)  # with the query above, the score of the key
    value = torch.eye(count, dtype=torch.float64).reshape(1, count, 1, count)
    partials = [attend(query, key[:, tile], value[:, tile], scale=1.0) for tile in map(list, TILES)]
    return Merged(partials, merge(*partials), attend(query, key, value, scale=1.0))


def draw() -> Figure:
    """Tiles above, the factors between, what they make below."""
    found = weights()
    figure = style.card(4.2)
    lefts, widths = (0.3, 4.6), (3.9, 2.4)
    lse = found.merged.lse.item()
    for at, (tile, partial) in enumerate(zip(TILES, found.partials, strict=True)):
        own = partial.lse.item()
        style.say(figure, lefts[at], 0.2, f"tile {at + 1}", size=style.TITLE, bold=True)
        style.say(figure, lefts[at] + 0.55, 0.2, f"softmax over its keys, lse {own:.3f}", colour=style.FAINT)
        _bars(style.axes(figure, lefts[at], 0.5, widths[at], 0.95), tile, partial, style.SERIES[at])
        middle = lefts[at] + widths[at] / 2
        style.arrow(figure, (middle, 1.75), (middle, 2.4), colour=style.SERIES[at])
        share = torch.exp(partial.lse - found.merged.lse).item()
        style.say(figure, middle + 0.12, 1.83, f"× {share:.3f}", bold=True)
        style.say(figure, middle + 0.12, 2.02, f"exp({own:.3f} − {lse:.3f})", size=style.SMALL, colour=style.FAINT)
    style.say(figure, 0.3, 2.5, "merged", size=style.TITLE, bold=True)
    style.say(figure, 0.95, 2.5, f"lse = log(exp lse₁ + exp lse₂) = {lse:.3f}", colour=style.FAINT)
    style.say(figure, 7.0, 2.5, "frames: one softmax over all keys", at="right", colour=style.FAINT)
    canvas = style.axes(figure, 0.3, 2.75, 6.7, 0.95)
    for at, tile in enumerate(TILES):
        _bars(canvas, tile, found.merged, style.SERIES[at])
    joint = found.joint.out[0, 0, 0].tolist()
    canvas.bar(range(len(joint)), joint, 0.8, facecolor="none", edgecolor=style.INK, linewidth=1.2)
    canvas.set_xlim(-0.6, len(joint) - 0.4)
    canvas.set_ylim(0, max(joint) * 1.3)
    canvas.set_xticks(range(len(joint)))
    note = "bars: the weight of each key, by the key's number; in each softmax they sum to 1"
    style.say(figure, 0.3, 3.93, note, size=style.SMALL, colour=style.FAINT)
    return figure


def _bars(canvas: Axes, tile: range, partial: Partial, colour: str) -> None:
    heights = partial.out[0, 0, 0, list(tile)].tolist()
    canvas.bar(list(tile), heights, 0.8, color=colour)
    for key, height in zip(tile, heights, strict=True):
        place = {"textcoords": "offset points", "ha": "center", "fontsize": style.SMALL, "color": style.INK}
        canvas.annotate(f"{height:.2f}", (key, height), (0, 3), **place)
    canvas.set_xlim(tile.start - 0.6, tile.stop - 0.4)
    canvas.set_ylim(0, max(heights) * 1.3)
    canvas.set_xticks(list(tile))
    canvas.set_yticks([])
    canvas.spines["left"].set_visible(False)
