"""A plan as a picture: who sends how much to whom, in all and in each branch, and what every rank receives.

Drawn without pyplot, so that no display and no global state are needed. Imports matplotlib when it draws.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch

from dilated_ring.plan.description import in_units, shards

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import SubFigure

    from dilated_ring.plan.ring_plan import RingPlan

_DPI = 110
_INK, _FAINT, _NOTHING = "#222222", "#777777", "#f2f2f2"
_NUMBERED = 12  # ranks up to which a matrix says its numbers
_PLACES = 128  # a matrix has along each side at most
# Okabe and Ito's colours, told apart by all common forms of colour vision.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999")


def save_picture(plan: RingPlan, path: str | os.PathLike[str], dtype: torch.dtype, head_dim: int, phase: str) -> None:
    """See ``RingPlan.save_picture``."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "dilated-ring[plot]"') from error
    whole = plan.matrix(dtype, head_dim, phase=phase)
    numbers = [branch.number for branch in plan.branches if plan.exchanges[branch.number] != "none"]
    columns = max(1, math.ceil(len(numbers) / 2))
    figure = Figure(
        figsize=(7.0 + 3.3 * columns if numbers else 9.0, 8.4), dpi=_DPI, facecolor="white", layout="constrained"
    )
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr, call-arg]
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[3.0, 1.0])[:, 0]
    if numbers:
        left, right = top.subfigures(1, 2, squeeze=False, width_ratios=[6.2, 3.3 * columns])[0]
        smalls = right.subplots(math.ceil(len(numbers) / columns), columns, squeeze=False).flatten().tolist()
    else:
        left, smalls = top, []
    sizes = [size for row in whole for size in row if size]
    scale = LogNorm(max(1.0, min(sizes) / 1.5), max(sizes)) if sizes else None

    large = left.subplots()
    _draw_matrix(large, whole, scale, numbered=len(whole) <= _NUMBERED)
    title = "All branches" if sizes else "Nothing travels: every segment lies in one shard"
    if len(whole) > _PLACES:
        title += f" (of every {-(-len(whole) // _PLACES)} ranks, the most of two)"
    large.set_title(title, loc="left")
    large.set_xlabel("to rank")
    large.set_ylabel("from rank")
    if scale is not None:
        _draw_scale(left, large)
    for axes, number in zip(smalls, numbers, strict=False):
        branch = plan.branches[number]
        _draw_matrix(axes, plan.matrix(dtype, head_dim, branch=number, phase=phase), scale)
        title = (
            f"branch {number}: {plan.exchanges[number]}\nsegments of {branch.segment_length:,}, rate {branch.rate:,}"
        )
        axes.set_title(title, loc="left", fontsize=9)
    for axes in smalls[len(numbers) :]:
        axes.set_visible(False)
    _draw_received(bottom.subplots(), plan, dtype, head_dim, phase, numbers)
    name = str(dtype).removeprefix("torch.")
    figure.suptitle(
        f"Who sends to whom, {phase}: {plan.seq_len:,} tokens on {shards(plan)}, "
        f"{plan.heads} heads of {head_dim}, {name}{', causal' * plan.is_causal}",
        x=0.01,
        ha="left",
        fontsize=12,
        color=_INK,
    )
    figure.savefig(path, format="png", dpi=_DPI)


def _draw_matrix(axes: Axes, sizes: list[list[int]], scale: Normalize | None, *, numbered: bool = False) -> None:
    """Bytes from each rank (row) to each other (column); grey where nothing travels."""
    ranks = len(sizes)
    side = -(-ranks // _PLACES)
    shown = [[size or math.nan for size in row] for row in _most_of_squares(sizes, side)]
    axes.set_facecolor(_NOTHING)
    extent = len(shown) * side  # at 1,000 ranks the last square is not full
    axes.imshow(shown, cmap="viridis_r", norm=scale, interpolation="nearest", extent=(0, extent, extent, 0))
    _name_ranks(axes, ranks, on_both=True)
    axes.tick_params(length=0, labelsize=8, colors=_FAINT)
    axes.spines[:].set_visible(False)
    if numbered and scale is not None:
        for source, row in enumerate(sizes):
            for destination, size in enumerate(row):
                if size:
                    # White on the dark end of the scale.
                    colour = "white" if scale(size) > 0.55 else _INK
                    where = (destination + 0.5, source + 0.5)
                    text = in_units(size).replace(" ", "\n")
                    axes.annotate(text, where, ha="center", va="center", fontsize=7, color=colour)


def _most_of_squares(sizes: list[list[int]], side: int) -> list[list[int]]:
    """Of each square of so many ranks the most that two of them exchange, so that no line is too thin to be seen."""
    starts = range(0, len(sizes), side)
    rows = [[max(column) for column in zip(*sizes[start : start + side], strict=True)] for start in starts]
    return [[max(row[start : start + side]) for start in starts] for row in rows]


def _name_ranks(axes: Axes, ranks: int, *, on_both: bool) -> None:
    """Every rank's number in the middle of its place, or of so many that they can be read."""
    step = 1 if ranks <= _NUMBERED else 2 ** math.ceil(math.log2(ranks / _NUMBERED))
    for axis in (axes.xaxis, axes.yaxis) if on_both else (axes.xaxis,):
        axis.set_ticks([rank + 0.5 for rank in range(0, ranks, step)], [str(rank) for rank in range(0, ranks, step)])


def _draw_scale(figure: SubFigure, axes: Axes) -> None:
    """What the colours mean."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    bar = figure.colorbar(axes.images[0], ax=axes, shrink=0.85, aspect=30, pad=0.02)
    # Powers of two, of which each unit has ten.
    bar.locator = LogLocator(base=2, numticks=10)
    bar.formatter = FuncFormatter(lambda size, _: in_units(round(size)))
    bar.update_ticks()
    bar.minorticks_off()
    bar.ax.spines["outline"].set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=_FAINT)


def _draw_received(
    axes: Axes, plan: RingPlan, dtype: torch.dtype, head_dim: int, phase: str, numbers: list[int]
) -> None:
    """What every rank receives, branch upon branch."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    received = plan.bytes(dtype, head_dim, phase=phase).received
    ranks = range(len(received))
    below = [0.0] * len(received)
    for at, number in enumerate(numbers):
        heights = [float(received[rank][number]) for rank in ranks]
        colour = _COLOURS[at % len(_COLOURS)]
        width = 0.8 if len(received) <= 128 else 1.0
        places = [rank + 0.5 for rank in ranks]
        axes.bar(places, heights, width, below, color=colour, linewidth=0, label=f"branch {number}")
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xlim(0, len(received))
    most = max(below) or 1.0
    axes.set_ylim(0, most * 1.1)
    # A power of two that makes three to six steps: units have 1024 of each other.
    axes.yaxis.set_major_locator(MultipleLocator(2.0 ** math.floor(math.log2(most / 3))))
    _name_ranks(axes, len(received), on_both=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: in_units(round(size))))
    axes.set_xlabel("rank")
    axes.set_title("Received by each rank", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_FAINT)
    if not numbers:
        axes.yaxis.set_ticks([])
    else:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
