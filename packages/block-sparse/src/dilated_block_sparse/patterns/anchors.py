"""Global blocks: columns that every row sees, and rows that see every column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from dilated_block_sparse.layout import checks
from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.patterns.grid import CompressedRows, Grid, Runs, same_for_all, union
from dilated_core.checks import positive_integer

Blocks: TypeAlias = "int | Sequence[int]"
"""The first so many blocks, or the blocks of these indices."""


def global_(seq_len: int, cols: Blocks, rows: Blocks, *, block_size: BlockSize = 128, heads: int = 1) -> CompressedRows:
    """Columns ``cols`` are seen by all rows, and rows ``rows`` see all columns.

    The global tokens of BigBird and Longformer (arXiv 2007.14062, 2004.05150) have both: cols=g, rows=g. One row of an
    otherwise sparse layout makes that row as dear as dense attention; columns alone cost each row a little.

    Args:
        seq_len: tokens.
        cols: how many of the first column blocks (all, where there are fewer), or a sequence of indices.
        rows: the same for row blocks.
        block_size: tokens, (rows, columns) or one number for both.
        heads: layouts to make, all alike; leave it at 1 where heads share.

    Returns:
        indptr, int64 (heads, q_blocks + 1), and indices, int32 (live blocks,).

    Raises:
        TypeError: neither an int nor a sequence of ints.
        ValueError: a negative number, or an index that is out of range.

    >>> global_(4, 1, [2], block_size=1)[1].tolist()
    [0, 0, 0, 1, 2, 3, 0]
    """
    heads = positive_integer("heads", heads)
    grid = Grid(seq_len, block_size)
    columns, wide = _blocks("cols", cols, grid.kv_blocks), _blocks("rows", rows, grid.q_blocks)
    return same_for_all(union(global_keys(grid, columns, wide)), grid, heads)


def global_keys(grid: Grid, columns: Tensor, wide: Tensor) -> list[Tensor]:
    """Keys of the columns in every row, and of every column in the rows ``wide``; some twice."""
    row, column = grid.rows[:, None], columns[None, :]
    seen = (row * grid.kv_blocks + column)[column < grid.limit[:, None]]
    return [seen, Runs.between(wide, torch.zeros_like(wide), grid.limit[wide]).keys(grid.kv_blocks)]


def _blocks(name: str, value: object, size: int) -> Tensor:
    """The indices that ``value`` stands for, rising, int64."""
    if isinstance(value, (list, tuple, range)):
        found = {checks.index(f"{name}[{place}]", entry, size) for place, entry in enumerate(value)}
        return torch.tensor(sorted(found), dtype=torch.int64, device="cpu")
    if isinstance(value, Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int or a sequence of ints, got {value!r} of type {type(value).__name__}")
    return torch.arange(min(checks.length(name, value), size), device="cpu")
