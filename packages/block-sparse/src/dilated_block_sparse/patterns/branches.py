"""LongNet's branches, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.patterns.grid import CompressedRows, Grid, compress, expand, union
from dilated_core.checks import branches, positive_integer
from dilated_core.plan import head_phases


def longnet(
    seq_len: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    block_size: BlockSize = 128,
    heads: int = 1,
) -> CompressedRows:
    """The blocks that hold at least one (query, key) pair of LongNet's branches (arXiv 2307.02486): their set union.

    In branch (w, r), head h attends, in each segment of w tokens, the positions p with p mod r == h mod r, counted from
    the segment's start, among themselves. Ragged ends are exact.

    This is not what ``dilated_core.dilated_attention`` computes. A block is attended whole, so a rate above 1 that is
    finer than a block keeps the whole block: the pairs are a superset of LongNet's. And each key counts once in a row's
    one softmax, where LongNet counts it once for every branch that reaches it. Rates between blocks are ``dilated``.

    Args:
        seq_len: tokens.
        segment_lengths: tokens in a segment, one entry a branch.
        dilation_rates: tokens from one position to the next, one entry a branch.
        block_size: tokens, (rows, columns) or one number for both.
        heads: layouts to make, head h with its own offsets; with 1, that of head 0.

    Returns:
        indptr, int64 (heads, q_blocks + 1), and indices, int32 (live blocks,).

    >>> longnet(16, [4, 16], [1, 8], block_size=2, heads=3)[1].tolist()[-18:]  # head 2: positions 2 and 10 of branch 1
    [0, 1, 0, 1, 5, 2, 3, 2, 3, 4, 5, 1, 4, 5, 6, 7, 6, 7]
    """
    lengths, rates = branches(segment_lengths, dilation_rates)
    heads = positive_integer("heads", heads)
    grid = Grid(seq_len, block_size)
    phases = [head_phases("paper", 0, 1, rate, heads) for rate in rates]
    drawn: dict[tuple[int | None, ...], Tensor] = {}  # heads of the same phases have the same blocks
    parts = []
    for head, starts in enumerate(zip(*phases, strict=True)):
        if starts not in drawn:
            keys = [_branch_keys(grid, *branch) for branch in zip(lengths, rates, starts, strict=True)]
            drawn[starts] = union(keys)
        parts.append(drawn[starts] + head * grid.q_blocks * grid.kv_blocks)
    return compress(torch.cat(parts), grid.q_blocks, grid.kv_blocks, heads)


def _branch_keys(grid: Grid, length: int, rate: int, start: int | None) -> Tensor:
    """Keys of the blocks that hold a pair of one branch, rising, each once."""
    height, width = grid.block_size
    row, row_segment = _touched(grid.seq_len, height, length, rate, start or 0)
    column, column_segment = _touched(grid.seq_len, width, length, rate, start or 0)
    # Blocks come in the order of their segments, so a segment's columns lie side by side.
    begin = torch.searchsorted(column_segment, row_segment)
    owner, which = expand(torch.searchsorted(column_segment, row_segment, right=True) - begin)
    return union([row[owner] * grid.kv_blocks + column[begin[owner] + which]])


def _touched(seq_len: int, size: int, length: int, rate: int, start: int) -> tuple[Tensor, Tensor]:
    """(block, segment) of every block of ``size`` tokens that holds a position of a segment's grid, in their order."""
    begin = torch.arange(0, seq_len, size, device="cpu")
    end = (begin + size).clamp_(max=seq_len)
    block, which = expand((end - 1) // length - begin // length + 1)
    segment = begin[block] // length + which
    low, high = torch.maximum(begin[block], segment * length), torch.minimum(end[block], (segment + 1) * length)
    holds = low + (start - (low - segment * length)) % rate < high
    return block[holds], segment[holds]
