"""Layouts from and to lists of columns: FlashInfer's compressed rows and FlashAttention-4's counted lists.

Imports torch and this room.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_block_sparse.layout import algebra, block_layout, checks
from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.layout.compressed import offsets

if TYPE_CHECKING:
    from dilated_block_sparse.layout.block_layout import BlockLayout


def to_bsr(layout: BlockLayout, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """(indptr (q_blocks + 1,), indices (live,)), int32, as ``flashinfer.BlockSparseAttentionWrapper.plan`` takes them.

    The call is ``plan(indptr, indices, q_len, kv_len, *layout.block_size, ...)``.

    Raises:
        ValueError: a layout of several heads, or a short last block of keys: the wrapper has one layout for all heads
            and only whole blocks of keys.
    """
    if layout.heads != 1:
        raise ValueError(f"to_bsr: expected a layout that all heads share, got one of {layout.heads} heads")
    if layout.kv_len % layout.block_size[1]:
        raise ValueError(
            f"to_bsr: expected kv_len to be a multiple of the {layout.block_size[1]} tokens of a block, "
            f"got {layout.kv_len}: FlashInfer would attend keys past the end"
        )
    return layout.indptr[0].to(device, torch.int32), layout.indices.to(device, copy=True)


def from_bsr(indptr: Tensor, indices: Tensor, q_len: int, kv_len: int, block_size: BlockSize) -> BlockLayout:
    """The inverse of ``to_bsr``; columns may come in any order."""
    block = checks.block_size(block_size)
    q_blocks = -(-checks.length("q_len", q_len) // block[0])
    columns = checks.tensor_of_integers("indices", indices)
    if columns.ndim != 1:
        raise ValueError(f"indices: expected shape (live blocks,), got {tuple(columns.shape)}")
    counts = checks.row_offsets(indptr, q_blocks, len(columns)).diff(dim=1)
    rows = torch.repeat_interleave(torch.arange(counts.numel(), device="cpu"), counts.flatten())
    return in_order(rows, columns, len(counts), q_len, kv_len, block)


def to_lists(layout: BlockLayout, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """(counts (1, heads, q_blocks), columns (1, heads, q_blocks, most)), int32; ``most`` is the longest row, or 1.

    They are FlashAttention-4's ``full_block_cnt`` and ``full_block_idx``, blocks that it need not mask; with a mask_mod
    of its own (causal order, say) its ``mask_block_cnt`` and ``mask_block_idx``. Entries past a row's count are 0.
    """
    counts = layout.indptr.diff(dim=1)
    most = max(int(counts.max()), 1) if counts.numel() else 1
    return counted(layout, torch.ones(layout.live, dtype=torch.bool, device="cpu"), most, device)


def from_lists(counts: Tensor, columns: Tensor, q_len: int, kv_len: int, block_size: BlockSize) -> BlockLayout:
    """The inverse of ``to_lists``; columns may come in any order.

    Raises:
        ValueError: shapes that do not fit, a batch other than 1, or columns that come twice or are out of range.
    """
    block = checks.block_size(block_size)
    q_blocks = -(-checks.length("q_len", q_len) // block[0])
    counts, columns = checks.tensor_of_integers("counts", counts), checks.tensor_of_integers("columns", columns)
    if counts.ndim != 3 or counts.shape[0] != 1 or counts.shape[1] < 1 or counts.shape[2] != q_blocks:
        raise ValueError(f"counts: expected shape (1, heads, {q_blocks}), got {tuple(counts.shape)}")
    if columns.ndim != 4:
        raise ValueError(f"columns: expected shape (1, heads, {q_blocks}, most), got {tuple(columns.shape)}")
    rows, listed = rows_and_columns("counts", counts, columns)
    return in_order(rows, listed, counts.shape[1], q_len, kv_len, block)


def counted(layout: BlockLayout, kept: Tensor, width: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """(counts (1, heads, q_blocks), columns (1, heads, q_blocks, width)), int32, of the live blocks in ``kept``."""
    rows, columns = algebra.rows_of(layout)[kept], layout.indices[kept]
    counts = torch.bincount(rows, minlength=layout.heads * layout.q_blocks)
    starts = counts.cumsum(0) - counts
    table = torch.zeros(layout.heads * layout.q_blocks, width, dtype=torch.int32, device="cpu")
    table[rows, torch.arange(len(rows), device="cpu") - starts[rows]] = columns
    shape = (1, layout.heads, layout.q_blocks)
    return counts.to(device, torch.int32).view(shape), table.to(device).view(*shape, width)


def rows_and_columns(name: str, counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The row, counted through the heads, and the column of every listed block."""
    if columns.shape[:-1] != counts.shape:
        raise ValueError(
            f"{name}: expected counts for the {tuple(columns.shape[:-1])} lists of columns, got {tuple(counts.shape)}"
        )
    flat = checks.tensor_of_integers(name, counts).flatten()
    table = checks.tensor_of_integers(name, columns).reshape(len(flat), columns.shape[-1])
    wrong = ((flat < 0) | (flat > columns.shape[-1])).nonzero()
    if len(wrong):
        raise ValueError(f"{name}: expected counts from 0 to {columns.shape[-1]}, got {int(flat[wrong[0]])}")
    listed = torch.arange(columns.shape[-1], device="cpu") < flat.unsqueeze(1)
    return torch.repeat_interleave(torch.arange(len(flat), device="cpu"), flat), table[listed]


def in_order(
    rows: Tensor, columns: Tensor, heads: int, q_len: int, kv_len: int, block_size: tuple[int, int]
) -> BlockLayout:
    """The layout of blocks that come in any order in their rows."""
    q_blocks = -(-q_len // block_size[0])
    counts = torch.bincount(rows, minlength=heads * q_blocks)
    by_column = columns.argsort()
    order = by_column[rows[by_column].argsort(stable=True)]
    return block_layout.BlockLayout(
        offsets(counts.view(heads, q_blocks)), columns[order], q_len, kv_len, block_size=block_size
    )
