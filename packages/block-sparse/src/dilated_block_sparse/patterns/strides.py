"""Patterns of steps: dilated, and the two of the Sparse Transformer, strided and fixed."""

from __future__ import annotations

import torch

from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.patterns.grid import CompressedRows, Grid, Runs, expand, same_for_all, union
from dilated_block_sparse.patterns.windows import window_runs
from dilated_core.checks import positive_integer


def dilated(seq_len: int, segment: int, rate: int, *, block_size: BlockSize = 128, heads: int = 1) -> CompressedRows:
    """Blocks (i, j) of the same segment with (i - j) % rate == 0: dilated attention with blocks for positions.

    Every row has its own block, so none is empty. Unlike LongNet's branch, which attends one residue of the positions,
    all residues are attended, each among itself, and all heads are the same.

    With rectangular blocks, i is each of the column blocks that the row block touches.

    Args:
        seq_len: tokens.
        segment: column blocks in a segment; the last one may be shorter.
        rate: column blocks from one attended block to the next.
        block_size: tokens, (rows, columns) or one number for both.
        heads: layouts to make, all alike; leave it at 1 where heads share.

    Returns:
        indptr, int64 (heads, q_blocks + 1), and indices, int32 (live blocks,).

    >>> dilated(6, 4, 2, block_size=1)[1].tolist()
    [0, 2, 1, 3, 0, 2, 1, 3, 4, 5]
    """
    segment, rate = positive_integer("segment", segment), positive_integer("rate", rate)
    heads = positive_integer("heads", heads)
    grid = Grid(seq_len, block_size)
    return same_for_all(union([dilated_runs(grid, segment, rate).keys(grid.kv_blocks)]), grid, heads)


def dilated_runs(grid: Grid, segment: int, rate: int) -> Runs:
    """Disjoint runs of ``dilated``: one for every residue that a row touches in a segment."""
    row, which = expand(grid.last // segment - grid.first // segment + 1)
    begin = (grid.first[row] // segment + which) * segment
    touched = torch.maximum(grid.first[row], begin)
    residues = (torch.minimum(grid.last[row] + 1, begin + segment) - touched).clamp_(max=rate)
    owner, residue = expand(residues)
    row, begin = row[owner], begin[owner]
    start = begin + (touched[owner] + residue - begin) % rate
    return Runs.between(row, start, torch.minimum(begin + segment, grid.limit[row]), rate)


def strided(seq_len: int, stride: int, *, block_size: BlockSize = 128, heads: int = 1) -> CompressedRows:
    """Blocks (i, j) with ``|i - j| < stride`` or ``(i - j) % stride == 0``.

    The strided pattern of the Sparse Transformer (arXiv 1904.10509, section 4.3), its two heads as one union:
    A1 = {t, ..., i} with t = max(0, i - stride), and A2 = {j : (i - j) mod stride = 0}. The paper is causal, as is
    ``.causal()`` of this; without it, what holds for the past holds for the future. Summary columns are ``fixed``.

    A row has about 2 * stride + kv_blocks / stride blocks, at the fewest 2 * sqrt(2 * kv_blocks), where stride is
    sqrt(kv_blocks / 2).

    With rectangular blocks, i is each of the column blocks that the row block touches.

    Args:
        seq_len: tokens.
        stride: column blocks.
        block_size: tokens, (rows, columns) or one number for both.
        heads: layouts to make, all alike; leave it at 1 where heads share.

    Returns:
        indptr, int64 (heads, q_blocks + 1), and indices, int32 (live blocks,).

    >>> indptr, indices = strided(12, 3, block_size=1)
    >>> indices[indptr[0, 4] : indptr[0, 5]].tolist()
    [1, 2, 3, 4, 5, 6, 7, 10]
    """
    stride, heads = positive_integer("stride", stride), positive_integer("heads", heads)
    grid = Grid(seq_len, block_size)
    keys = union([runs.keys(grid.kv_blocks) for runs in strided_runs(grid, stride)])
    return same_for_all(keys, grid, heads)


def strided_runs(grid: Grid, stride: int) -> list[Runs]:
    """Disjoint runs of ``strided``: before the window, the window, after it."""
    window = window_runs(grid, stride - 1)
    row, residue = expand((grid.last - grid.first + 1).clamp(max=stride))
    column = grid.first[row] + residue
    begin = window.start[row]
    end = begin + window.length[row]
    before = Runs.between(row, column % stride, begin, stride)
    after = Runs.between(row, end + (column - end) % stride, grid.limit[row], stride)
    return [before, window, after]


def fixed(
    seq_len: int, stride: int, *, summary: int = 1, block_size: BlockSize = 128, heads: int = 1
) -> CompressedRows:
    """Blocks (i, j) of the same group of ``stride``, and the last ``summary`` columns of every group.

    The fixed pattern of the Sparse Transformer (arXiv 1904.10509, section 4.3), its two heads as one union:
    A1 = {j : floor(j / stride) = floor(i / stride)}, A2 = {j : j mod stride >= stride - summary}. With summary 1 these
    are the columns with (j + 1) % stride == 0. A short last group has the summary columns that it reaches.

    With rectangular blocks, i is each of the column blocks that the row block touches.

    Args:
        seq_len: tokens.
        stride: column blocks in a group.
        summary: columns of a group that all rows see, from 1 to stride; the paper's c.
        block_size: tokens, (rows, columns) or one number for both.
        heads: layouts to make, all alike; leave it at 1 where heads share.

    Returns:
        indptr, int64 (heads, q_blocks + 1), and indices, int32 (live blocks,).

    >>> indptr, indices = fixed(9, 3, block_size=1)
    >>> indices[indptr[0, 4] : indptr[0, 5]].tolist()
    [2, 3, 4, 5, 8]
    """
    stride, summary = positive_integer("stride", stride), positive_integer("summary", summary)
    heads = positive_integer("heads", heads)
    if summary > stride:
        raise ValueError(f"summary: expected at most stride = {stride}, got {summary}")
    grid = Grid(seq_len, block_size)
    start = grid.first // stride * stride
    stop = torch.minimum((grid.last // stride + 1) * stride, grid.limit)
    parts = [Runs.between(grid.rows, start, stop).keys(grid.kv_blocks)]
    for column in range(stride - summary, min(stride, grid.kv_blocks)):
        runs = Runs.between(grid.rows, torch.full_like(grid.rows, column), grid.limit, stride)
        parts.append(runs.keys(grid.kv_blocks))
    return same_for_all(union(parts), grid, heads)
