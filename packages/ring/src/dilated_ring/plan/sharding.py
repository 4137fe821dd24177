"""Where shards start and end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dilated_core import checks


def even_bounds(length: int, parts: int) -> tuple[int, ...]:
    """``parts + 1`` bounds of shards as equal as can be, the first ones taking one more.

    Args:
        length: positions of the whole sequence.
        parts: how many shards.

    >>> even_bounds(10, 4)
    (0, 3, 6, 8, 10)
    """
    size, more = divmod(length, parts)
    return tuple(part * size + min(part, more) for part in range(parts + 1))


def even_part(length: int, parts: int, number: int) -> slice:
    """One of these shards.

    >>> even_part(10, 4, 1)
    slice(3, 6, None)
    """
    size, more = divmod(length, parts)
    start = number * size + min(number, more)
    return slice(start, start + size + (number < more))


def check_bounds(bounds: Sequence[int], world_size: int | None = None) -> tuple[int, ...]:
    """Return where shards start and end, as a tuple: ``world_size + 1`` positions that rise from 0.

    Args:
        bounds: the positions; shards may be empty.
        world_size: how many ranks there are; None where any number fits.

    Raises:
        TypeError, ValueError: they are not.
    """
    if not isinstance(bounds, Sequence) or isinstance(bounds, (str, bytes)):
        raise TypeError(f"bounds: expected a sequence of positions, got {type(bounds).__name__}")
    positions = tuple(checks.length(f"bounds[{index}]", bound) for index, bound in enumerate(bounds))
    if len(positions) < 2 or positions[0] != 0 or any(low > high for low, high in pairwise(positions)):
        raise ValueError(f"bounds: expected positions that rise from 0 to the length, got {list(positions)}")
    if world_size is not None and len(positions) != world_size + 1:
        raise ValueError(f"bounds: expected world_size + 1 = {world_size + 1} positions, got {len(positions)}")
    return positions
