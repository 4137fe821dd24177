"""What the kinds have done, as a small table in plain text."""

from __future__ import annotations

from collections.abc import Iterable

from dilated_memory_pool.sizes import format_bytes
from dilated_memory_pool.statistics import PoolStatistics

_HEADER = ("kind", "backend", "requests", "reuse", "allocated", "reserved")
_TEXT_COLUMNS = 2  # to the left; numbers to the right


def table(rows: Iterable[tuple[str, str, PoolStatistics]]) -> str:
    """One line for each (kind, backend, numbers). Requests are those that the pool served, not PyTorch."""
    lines = [_HEADER]
    for kind, backend, now in rows:
        served = now.hits + now.misses
        reuse = f"{now.hit_rate:.1%}" if served else "-"
        lines.append(
            (kind, backend, str(served), reuse, format_bytes(now.allocated_bytes), format_bytes(now.reserved_bytes))
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < _TEXT_COLUMNS else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
