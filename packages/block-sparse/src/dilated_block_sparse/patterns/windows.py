"""Patterns of distance: everything, nothing, a local window, and windows that coarsen as they widen."""

from __future__ import annotations

import torch

from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.patterns.grid import CompressedRows, Grid, Runs, same_for_all, union
from dilated_core.checks import length as non_negative
from dilated_core.checks import positive_integer


def full(seq_len: int, *, block_size: BlockSize = 128, heads: int = 1) -> CompressedRows:
    """Every block. 4 bytes a block stay, so mind the square: 256 MiB at 1M tokens and blocks of 128."""
    heads = positive_integer("heads", heads)
    grid = Grid(seq_len, block_size)
    runs = Runs.between(grid.rows, torch.zeros_like(grid.rows), grid.limit)
    return same_for_all(runs.keys(grid.kv_blocks), grid, heads)


def empty(seq_len: int, *, block_size: BlockSize = 128, heads: int = 1) -> CompressedRows:
    """No block: every row gives 0. The neutral element of a union."""
    heads = positive_integer("heads", heads)
    grid = Grid(seq_len, block_size)
    return same_for_all(grid.rows[:0], grid, heads)


def local(seq_len: int, window: int, *, block_size: BlockSize = 128, heads: int = 1) -> CompressedRows:
    """Blocks (i, j) with ``|i - j| <= window``: the row's own block and ``window`` on either side.

    With rectangular blocks: the column blocks that the positions of the row block touch, and ``window`` column blocks
    on either side of those.

    Args:
        seq_len: tokens.
        window: column blocks on either side, at least 0.
        block_size: tokens, (rows, columns) or one number for both.
        heads: layouts to make, all alike; leave it at 1 where heads share.

    Returns:
        indptr, int64 (heads, q_blocks + 1), and indices, int32 (live blocks,).

    >>> local(500, 1)[1].tolist()
    [0, 1, 0, 1, 2, 1, 2, 3, 2, 3]
    """
    window, heads = non_negative("window", window), positive_integer("heads", heads)
    grid = Grid(seq_len, block_size)
    return same_for_all(window_runs(grid, window).keys(grid.kv_blocks), grid, heads)


def window_runs(grid: Grid, window: int) -> Runs:
    """The one run of each row in ``local``."""
    start = (grid.first - window).clamp(min=0)
    return Runs.between(grid.rows, start, torch.minimum(grid.last + window + 1, grid.limit))


def hierarchical(
    seq_len: int,
    window: int,
    *,
    levels: int | None = None,
    branching: int = 4,
    block_size: BlockSize = 128,
    heads: int = 1,
) -> CompressedRows:
    """A local window, and ever fewer representatives of ever longer groups ever further away.

    Level l, from 0 to ``levels``, has the blocks (i, j) with::

        (j + 1) % branching^l == 0   and   |i - j| <= window * branching^l

    Level 0 is the local window. Level l keeps the last column of every group of branching^l (in causal attention, the
    one that has seen its whole group) and reaches branching^l times further. Each level adds about 2 * window columns
    to a row, so a row has of the order of window * log(kv_blocks) of them.

    With rectangular blocks, i is each of the column blocks that the row block touches.

    Args:
        seq_len: tokens.
        window: column blocks on either side at level 0, at least 1.
        levels: coarser levels, at least 0. Default: as many as it takes to reach from one end to the other.
        branching: how much coarser a level is than the one before, at least 2.
        block_size: tokens, (rows, columns) or one number for both.
        heads: layouts to make, all alike.

    Returns:
        indptr, int64 (heads, q_blocks + 1), and indices, int32 (live blocks,).

    >>> indptr, indices = hierarchical(16, 1, branching=2, block_size=1)
    >>> indices[indptr[0, 8] : indptr[0, 9]].tolist()  # 7, 8, 9; then 7, 9; then 7, 11; then 7, 15
    [7, 8, 9, 11, 15]
    """
    window, heads = positive_integer("window", window), positive_integer("heads", heads)
    if levels is not None:
        levels = non_negative("levels", levels)
    branching = positive_integer("branching", branching)
    if branching < 2:
        raise ValueError(f"branching: expected an int of at least 2, got {branching}")
    grid = Grid(seq_len, block_size)
    parts, group, level = [], 1, 0
    while True:
        start = (grid.first - window * group).clamp_(min=0)
        start += (-1 - start) % group  # the next column that ends a group
        stop = (grid.last + window * group + 1).clamp_(max=grid.kv_blocks)
        parts.append(Runs.between(grid.rows, start, stop, group).keys(grid.kv_blocks))
        # A group longer than the sequence has no last column in it: no level from there on adds anything.
        reaches = group > grid.kv_blocks or (levels is None and window * group >= grid.kv_blocks - 1)
        if reaches or level == levels:
            return same_for_all(union(parts), grid, heads)
        group, level = group * branching, level + 1
