"""The grid of blocks that patterns are drawn on, and compressed rows from what they draw. Integer tensors only.

A drawn block is a *key*: row * kv_blocks + column, in int64. Rising keys without repeats are a pattern; a set union is
a sort. Nothing here holds a table of q_blocks x kv_blocks.

One rule carries every pattern over to rectangular blocks. Patterns are defined between column blocks. A row block takes
the union of what the column blocks that its own positions touch, ``first`` to ``last``, would take. With square blocks
that is the row's own column alone.

Imports torch, dilated_core's checks and the layout's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from dilated_block_sparse.layout import checks
from dilated_block_sparse.layout.compressed import offsets

CompressedRows: TypeAlias = "tuple[Tensor, Tensor]"
"""(indptr, int64 (heads, q_blocks + 1); indices, int32 (live blocks,)), as BlockLayout takes them."""


class Grid:
    """Blocks of rows and columns of a sequence that attends itself.

    Args:
        seq_len: tokens.
        block_size: tokens in a block, (rows, columns) or one number for both.
        is_causal: whether ``limit`` stops at the last column that a row block may see.

    Attributes:
        seq_len: as given; block_size: as (rows, columns).
        q_blocks, kv_blocks: blocks of rows and of columns, the last one perhaps short.
        rows: (q_blocks,) int64, 0, 1, ...
        first, last: (q_blocks,) int64, the columns of the first and of the last position of each row block.
        limit: (q_blocks,) int64, a row block may have the columns below this.

    >>> grid = Grid(700, (256, 128), is_causal=True)
    >>> grid.first.tolist(), grid.last.tolist(), grid.limit.tolist()
    ([0, 2, 4], [1, 3, 5], [2, 4, 6])
    """

    def __init__(self, seq_len: int, block_size: checks.BlockSize, *, is_causal: bool = False) -> None:
        self.seq_len = checks.length("seq_len", seq_len)
        self.block_size = checks.block_size(block_size)
        height, width = self.block_size
        self.q_blocks = -(-self.seq_len // height)
        self.kv_blocks = -(-self.seq_len // width)
        self.rows = torch.arange(self.q_blocks, device="cpu")
        self.first = self.rows * height // width
        self.last = ((self.rows + 1) * height).clamp(max=self.seq_len).sub_(1) // width
        self.limit = self.last + 1 if is_causal else torch.full_like(self.rows, self.kv_blocks)


class Runs(NamedTuple):
    """Columns start, start + step, ... of rows: ``length`` of them in each. A row may have many runs, in any order."""

    row: Tensor
    start: Tensor
    length: Tensor
    step: int

    @classmethod
    def between(cls, row: Tensor, start: Tensor, stop: Tensor, step: int = 1) -> Runs:
        """Runs from ``start`` up to, not including, ``stop``; none where that is not above ``start``."""
        return cls(row, start, (stop - start + step - 1).div_(step, rounding_mode="floor").clamp_(min=0), step)

    @property
    def blocks(self) -> int:
        """Blocks in all runs together."""
        return int(self.length.sum())

    def keys(self, kv_blocks: int) -> Tensor:
        """The key of every block, run by run."""
        begins = self.length.cumsum(0) - self.length
        offset = self.row * kv_blocks + self.start - begins * self.step
        total = self.blocks
        keys = torch.arange(total, device="cpu").mul_(self.step)
        return keys.add_(torch.repeat_interleave(offset, self.length, output_size=total))


def expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Write out ``counts[i]`` entries for each i: (which i an entry is of, which of its entries it is).

    >>> [part.tolist() for part in expand(torch.tensor([2, 0, 3]))]
    [[0, 0, 2, 2, 2], [0, 1, 0, 1, 2]]
    """
    owner = torch.repeat_interleave(counts)
    begins = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device="cpu") - begins[owner]


def union(parts: Sequence[Tensor]) -> Tensor:
    """The keys in any of the parts, rising, each once."""
    keys = torch.cat([*parts]) if len(parts) != 1 else parts[0]
    if bool((keys[1:] > keys[:-1]).all()):
        return keys
    joined: Tensor = torch.unique_consecutive(keys.sort().values)
    return joined


def bounds(keys: Tensor, rows: int, kv_blocks: int) -> Tensor:
    """(rows + 1,): the keys of row i are keys[bounds[i] : bounds[i + 1]]."""
    return torch.searchsorted(keys, torch.arange(rows + 1, device="cpu") * kv_blocks)


def compress(keys: Tensor, q_blocks: int, kv_blocks: int, heads: int) -> CompressedRows:
    """Compressed rows of rising keys, in which head h has rows h * q_blocks and on."""
    counts = bounds(keys, heads * q_blocks, kv_blocks).diff().view(heads, q_blocks)
    return offsets(counts), keys.remainder(max(kv_blocks, 1)).to(torch.int32)


def same_for_all(keys: Tensor, grid: Grid, heads: int) -> CompressedRows:
    """Compressed rows of rising keys that every head has."""
    indptr, indices = compress(keys, grid.q_blocks, grid.kv_blocks, 1)
    return indptr + torch.arange(heads, device="cpu")[:, None] * len(keys), indices.repeat(heads)
