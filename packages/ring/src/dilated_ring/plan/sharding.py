"""Where shards start and end."""

from __future__ import annotations


def even_bounds(length: int, parts: int) -> tuple[int, ...]:
    """``parts + 1`` bounds of shards as equal as can be, the first ones taking one more.

    >>> even_bounds(10, 4)
    (0, 3, 6, 8, 10)
    """
    size, more = divmod(length, parts)
    return tuple(part * size + min(part, more) for part in range(parts + 1))
