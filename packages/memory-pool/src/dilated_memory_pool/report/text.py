"""A pool as a table of plain text, for terminals and logs."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from dilated_memory_pool.report.plain import snapshot_of
from dilated_memory_pool.sizes import format_bytes
from dilated_memory_pool.snapshot import ArenaSnapshot, PoolSnapshot

if TYPE_CHECKING:
    from dilated_memory_pool import MemoryPool

_CELLS = 48  # characters in an arena's bar
_LEGEND = "# used  + in part  ~ waiting  . free"


def table(pool: MemoryPool | PoolSnapshot) -> str:
    """The numbers of a pool and a line for every arena.

    A bar shows an arena from its first byte to its last. Each character stands for an equal share of it: "#" is used
    for at least half, "+" for less, "~" is freed and waiting for a stream more than it is used, "." is free.

    Raises:
        TypeError: ``pool`` is neither a pool nor a snapshot.
    """
    snapshot = snapshot_of(pool)
    numbers = snapshot.statistics
    limit = "no limit" if numbers.limit_bytes is None else f"limit {format_bytes(numbers.limit_bytes)}"
    largest = format_bytes(numbers.largest_free_bytes)
    requests = (
        f"requests: {numbers.hits + numbers.misses} served, {numbers.hit_rate:.1%} of them from memory at hand; "
        f"{numbers.bypasses} left to PyTorch; {numbers.ooms} refused; {numbers.trims} arenas given back"
    )
    rows = [
        ("requested", numbers.requested_bytes, numbers.peak_requested_bytes, ""),
        ("allocated", numbers.allocated_bytes, numbers.peak_allocated_bytes, f"waste {numbers.waste:.1%}"),
        ("reserved", numbers.reserved_bytes, numbers.peak_reserved_bytes, limit),
        ("waiting", numbers.waiting_bytes, None, ""),
        ("free", numbers.free_bytes, None, f"largest {largest}, fragmentation {numbers.fragmentation:.1%}"),
    ]
    lines = [
        f"memory pool: {snapshot.backend} on {snapshot.device}, {snapshot.mode} mode",
        *(f"  {reason}" for reason in snapshot.reasons),
        "",
        f"{'bytes':<10}{'now':>12}{'peak':>12}",
        *(f"{name:<10}{_cell(now)}{_cell(peak)}  {remark}".rstrip() for name, now, peak, remark in rows),
        "",
        requests,
        "",
    ]
    if not snapshot.arenas:
        return "\n".join([*lines, "no arenas"])
    names = [f"{arena.address:#x}" for arena in snapshot.arenas]
    places = [arena.locality or "" for arena in snapshot.arenas]
    wide = max(map(len, names))
    wide_place = max(len("locality"), *map(len, places)) + 2 if any(places) else 0
    lines.append(
        f"{'arena':<{wide}}{'bytes':>12}  {'locality' if wide_place else '':<{wide_place}}{_LEGEND:<{_CELLS + 2}} used"
    )
    for name, place, arena in zip(names, places, snapshot.arenas, strict=True):
        used = sum(span.nbytes for span in arena.spans if span.state != "free") / arena.nbytes
        size = format_bytes(arena.nbytes)
        lines.append(f"{name:<{wide}}{size:>12}  {place:<{wide_place}}|{_bar(arena)}| {used:4.0%}")
    return "\n".join(lines)


def _cell(nbytes: int | None) -> str:
    return f"{'' if nbytes is None else format_bytes(nbytes):>12}"


def _bar(arena: ArenaSnapshot) -> str:
    """The arena in ``_CELLS`` characters."""
    share = arena.nbytes / _CELLS
    used, waiting = [0.0] * _CELLS, [0.0] * _CELLS
    for span in arena.spans:
        if span.state != "free":
            parts = used if span.state == "used" else waiting
            start, end = span.offset / share, (span.offset + span.nbytes) / share
            for cell in range(int(start), min(ceil(end), _CELLS)):
                parts[cell] += min(end, cell + 1) - max(start, cell)
    return "".join(map(_mark, used, waiting))


def _mark(used: float, waiting: float) -> str:
    """The character for a cell, of which these parts are used and waiting."""
    if waiting > used:
        return "~"
    if used >= 0.5:
        return "#"
    return "+" if used else "."
