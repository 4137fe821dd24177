"""A pool's memory as a picture: what lies where, what is free, and how much of it is in one piece."""

from __future__ import annotations

import os
from math import ceil
from typing import TYPE_CHECKING, TypeAlias

from dilated_memory_pool.report.figures import EDGE, FREE, INK, MIB, USED, WAITING, WASTED, new_figure, save
from dilated_memory_pool.report.plain import snapshot_of
from dilated_memory_pool.sizes import format_bytes
from dilated_memory_pool.snapshot import ArenaSnapshot, PoolSnapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

    from dilated_memory_pool import MemoryPool

_HEADROOM = 1.6  # inches for title, axis and legend
_ROW = 0.3  # inches for an arena, while there are few
_FEWEST = 2  # rows, filled or not
_TALLEST = 14.0  # inches for all arenas
_LABEL = 0.17  # inches that a line of text needs
_BAR = 0.8  # of a row; the rest keeps rows apart
_CROWD = 2000  # spans; with more of them, lines between them would cover them

_LOOKS = (  # state, colour, colour of edges and hatching, hatching
    ("used", USED, "white", ""),
    ("wasted", WASTED, "white", "////"),
    ("waiting", WAITING, "white", ""),
    ("free", FREE, EDGE, ""),
)

_Box: TypeAlias = list[tuple[float, float]]  # the four corners


def picture(pool: MemoryPool | PoolSnapshot, path: str | os.PathLike[str]) -> None:
    """Draw the memory map of a pool as a PNG, 1200 pixels wide and as high as its arenas need, up to 1560.

    One row for each arena, by address, all at one scale. Of a used span, what was asked for is dark, and what its size
    class wastes is light and hatched.

    Raises:
        TypeError: ``pool`` is neither a pool nor a snapshot.
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    snapshot = snapshot_of(pool)
    arenas = snapshot.arenas
    rows = max(len(arenas), _FEWEST)
    room = min(rows * _ROW, _TALLEST)
    figure, axes = new_figure(_HEADROOM + room)
    from matplotlib.ticker import MaxNLocator  # after new_figure, which says what to install where there is none

    legend = _draw_spans(axes, arenas)
    figure.legend(handles=legend, loc="outside lower right", ncols=len(legend), frameon=False, fontsize=9)
    axes.set_title(_title(snapshot), loc="left", fontsize=11, color=INK)
    axes.set_xlabel("offset in the arena, MiB", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 4, 8, 10]))  # arenas are rarely multiples of 5
    axes.set_xlim(0, max((arena.nbytes for arena in arenas), default=MIB) / MIB)
    axes.set_ylim(rows - 0.4, -0.6)  # the lowest address on top
    step = ceil(rows * _LABEL / room)  # so that labels do not run into one another
    axes.set_yticks(range(0, len(arenas), step))
    axes.set_yticklabels(
        [f"{arena.address:#x}" + (f"  [{arena.locality}]" if arena.locality else "") for arena in arenas[::step]],
        family="monospace",
        fontsize=8,
    )
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if not arenas:
        axes.text(0.5, 0.5, "no arenas", transform=axes.transAxes, ha="center", va="center", color=INK)
    save(figure, path)


def _draw_spans(axes: Axes, arenas: tuple[ArenaSnapshot, ...]) -> list[Patch]:
    """The spans of every arena in its row, by state; the legend's entries, with the bytes of each state."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    boxes: dict[str, list[_Box]] = {state: [] for state, *_ in _LOOKS}
    nbytes = dict.fromkeys(boxes, 0)
    for row, arena in enumerate(arenas):
        for span in arena.spans:
            kept = span.requested if span.state == "used" else span.nbytes
            for state, start, end in ((span.state, 0, kept), ("wasted", kept, span.nbytes)):
                if end > start:
                    boxes[state].append(_box(row, span.offset + start, span.offset + end))
                    nbytes[state] += end - start
    legend = []
    crowded = sum(map(len, boxes.values())) > _CROWD
    for name, colour, edge, hatch in _LOOKS:
        spans = PolyCollection(boxes[name], facecolors=colour, hatch=hatch, linewidths=0 if crowded else 0.5)
        spans.set_edgecolor(edge)
        axes.add_collection(spans)
        label = f"{name}  {format_bytes(nbytes[name])}"
        legend.append(Patch(facecolor=colour, edgecolor=edge, hatch=hatch, linewidth=0.5, label=label))
    return legend


def _box(row: int, start: int, end: int) -> _Box:
    top, bottom = row - _BAR / 2, row + _BAR / 2
    return [(start / MIB, top), (end / MIB, top), (end / MIB, bottom), (start / MIB, bottom)]


def _title(snapshot: PoolSnapshot) -> str:
    numbers = snapshot.statistics
    limit = "" if numbers.limit_bytes is None else f", limit {format_bytes(numbers.limit_bytes)}"
    return (
        f"{snapshot.backend} on {snapshot.device}, {snapshot.mode} mode: "
        f"{format_bytes(numbers.allocated_bytes)} allocated of {format_bytes(numbers.reserved_bytes)} reserved{limit}\n"
        f"waste {numbers.waste:.1%}, fragmentation {numbers.fragmentation:.1%}, hit rate {numbers.hit_rate:.1%}"
    )
