"""A pool's bytes over time, from a log of its events."""

from __future__ import annotations

import os

from dilated_memory_pool.observers.json_lines import read
from dilated_memory_pool.report.figures import INK, LIMIT, MIB, USED, WASTED, new_figure, save
from dilated_memory_pool.sizes import format_bytes

_HEIGHT = 4.5  # inches


def timeline(log: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Draw what a pool had allocated and reserved over time as a PNG of 1200 x 450 pixels.

    Args:
        log: the file of a ``JsonLinesLog`` of one pool; refused requests are marked in it.
        path: of the picture.

    Raises:
        ValueError: ``log`` is not such a file.
        ImportError: matplotlib is not installed.
        OSError: ``log`` cannot be read, or the picture cannot be written.
    """
    changes = {"allocate": (1, 0), "free": (-1, 0), "reserve": (0, 1), "release": (0, -1)}
    times, allocated, reserved = [0.0], [0], [0]
    refused: list[float] = []
    for time, event in read(log):
        in_use, held = changes.get(event.kind, (0, 0))
        times.append(time)
        allocated.append(allocated[-1] + in_use * event.nbytes)
        reserved.append(reserved[-1] + held * event.nbytes)
        if event.kind == "failure":
            refused.append(time)
    figure, axes = new_figure(_HEIGHT)
    axes.fill_between(times, [n / MIB for n in reserved], step="post", color=WASTED, alpha=0.5, linewidth=0)
    axes.step(times, [n / MIB for n in reserved], where="post", color=INK, linewidth=1, label="reserved")
    axes.fill_between(times, [n / MIB for n in allocated], step="post", color=USED, linewidth=0, label="allocated")
    if refused:
        axes.plot(refused, [0] * len(refused), "^", color=LIMIT, markersize=8, clip_on=False, label="refused")
    axes.set_title(
        f"peak {format_bytes(max(allocated))} allocated, {format_bytes(max(reserved))} reserved",
        loc="left",
        fontsize=11,
        color=INK,
    )
    axes.set_xlabel("seconds since the log began", fontsize=9, color=INK)
    axes.set_ylabel("MiB", fontsize=9, color=INK)
    axes.set_xlim(0, times[-1] or 1)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)
    save(figure, path)
