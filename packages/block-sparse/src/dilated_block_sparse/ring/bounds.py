"""Where shards start and end: anywhere, but best on edges of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dilated_block_sparse.layout import BlockLayout
from dilated_ring.plan import check_bounds, even_bounds


def block_bounds(layout: BlockLayout, world_size: int) -> tuple[int, ...]:
    """Bounds of shards of whole blocks, as equal as can be; where blocks are few, the last shards are empty.

    Shards may lie otherwise. But of a rank whose shard begins inside a block, rows and keys are copied, and keys of a
    block that lies on several ranks are attended under a mask.

    Args:
        layout: of the whole sequence.
        world_size: how many ranks.

    Returns:
        world_size + 1 positions that rise from 0 to the length.

    Raises:
        ValueError: the layout has not as many keys as rows.

    >>> block_bounds(BlockLayout.from_rows([[0]] * 5, 140, 140, block_size=32), 2)
    (0, 96, 140)
    """
    length, step = sequence_length(layout), math.lcm(*layout.block_size)
    return tuple(min(bound * step, length) for bound in even_bounds(-(-length // step), world_size))


def check_layout_bounds(layout: BlockLayout, bounds: Sequence[int], world_size: int | None = None) -> tuple[int, ...]:
    """Return the bounds as a tuple, if they are some and those of the layout's sequence.

    Raises:
        TypeError: no sequence of ints.
        ValueError: they do not rise from 0 to the layout's length.
    """
    positions, length = check_bounds(bounds, world_size), sequence_length(layout)
    if positions[-1] != length:
        raise ValueError(f"bounds: expected to end at the {length} positions of layout, got {list(positions)}")
    return positions


def sequence_length(layout: BlockLayout) -> int:
    """Positions of the sequence. Raises ValueError where rows and keys are not of one."""
    if layout.q_len != layout.kv_len:
        raise ValueError(
            f"layout: expected as many keys as rows, which shards have in common, got {layout.q_len} rows and "
            f"{layout.kv_len} keys"
        )
    return layout.kv_len
