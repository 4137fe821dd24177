"""Layouts from and to rows of columns and bool tables. Imports torch, dilated_core's checks and this room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_block_sparse.layout import algebra, block_layout, checks
from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.layout.compressed import offsets

if TYPE_CHECKING:
    from dilated_block_sparse.layout.block_layout import BlockLayout


def from_rows(
    rows: Sequence[Iterable[int]] | Sequence[Sequence[Iterable[int]]], q_len: int, kv_len: int, block_size: BlockSize
) -> BlockLayout:
    """A layout from the live columns of every row of blocks; one list of rows a head where it is nested.

    Raises:
        ValueError: not one list a row of blocks, or columns that come twice or are out of range; the row is named.
    """
    q_len, block = checks.length("q_len", q_len), checks.block_size(block_size)
    q_blocks = -(-q_len // block[0])
    listed = [_listed("rows", row) for row in rows]
    lists = (isinstance(entry, Iterable) and not isinstance(entry, str) for row in listed for entry in row)
    nested = any(lists) or (q_blocks == 0 and len(listed) > 0)
    heads: list[list[Any]] = listed if nested else [listed]
    counts: list[list[int]] = []
    columns: list[int] = []
    for head, of_head in enumerate(heads):
        if len(of_head) != q_blocks:
            raise ValueError(f"rows: expected {q_blocks} rows of blocks in head {head}, got {len(of_head)}")
        sorted_rows = [sorted(_columns(f"rows: row {row} of head {head}", each)) for row, each in enumerate(of_head)]
        counts.append([len(row) for row in sorted_rows])
        columns.extend(column for row in sorted_rows for column in row)
    indptr = offsets(torch.tensor(counts, dtype=torch.int64, device="cpu").view(len(heads), q_blocks))
    return block_layout.BlockLayout(
        indptr, torch.tensor(columns, dtype=torch.int64, device="cpu"), q_len, kv_len, block_size=block
    )


def _listed(name: str, entries: object) -> list[Any]:
    """``entries`` as a list, of ints where they come in a tensor."""
    if isinstance(entries, Tensor):
        return list(entries.tolist())
    if not isinstance(entries, Iterable):
        raise TypeError(f"{name}: expected an iterable of columns, got {entries!r} of type {type(entries).__name__}")
    return [entry.tolist() if isinstance(entry, Tensor) else entry for entry in entries]


def _columns(name: str, entries: object) -> list[int]:
    """``entries`` as a list of ints, which a row of columns must be."""
    columns = _listed(name, entries)
    for column in columns:
        if isinstance(column, bool) or not hasattr(column, "__index__"):
            raise TypeError(f"{name}: expected an int as column, got {column!r} of type {type(column).__name__}")
    return columns


def from_dense(mask: Tensor, block_size: BlockSize) -> BlockLayout:
    """The blocks in which the token mask is True. Raises ValueError, naming it, where a block is live in part."""
    mask = _bool_table("mask", mask, "q_len, kv_len")
    rows, columns = checks.block_size(block_size)
    heads, q_len, kv_len = mask.shape
    q_blocks, kv_blocks = -(-q_len // rows), -(-kv_len // columns)
    margin = (0, kv_blocks * columns - kv_len, 0, q_blocks * rows - q_len)
    shape = (heads, q_blocks, rows, kv_blocks, columns)
    # What lies past the end counts as live for "all" and as dead for "any": a short block is judged by its tokens.
    some = pad(mask, margin, value=False).reshape(shape).any(4).any(2)
    every = pad(mask, margin, value=True).reshape(shape).all(4).all(2)
    parts = (some & ~every).nonzero()
    if len(parts):
        head, row, column = parts[0].tolist()
        raise ValueError(
            f"mask: expected blocks of {(rows, columns)} that are True or False throughout, "
            f"got both in block ({row}, {column}) of head {head}"
        )
    return from_blocks(some, q_len, kv_len, (rows, columns))


def to_dense(layout: BlockLayout) -> Tensor:
    """The token mask, bool (heads, q_len, kv_len)."""
    rows, columns = layout.block_size
    tokens = to_blocks(layout).repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    return tokens[:, : layout.q_len, : layout.kv_len].contiguous()


def from_blocks(blocks: Tensor, q_len: int, kv_len: int, block_size: BlockSize) -> BlockLayout:
    """A layout from a bool table of blocks, (q_blocks, kv_blocks) or (heads, q_blocks, kv_blocks)."""
    blocks = _bool_table("blocks", blocks, "q_blocks, kv_blocks")
    q_len, kv_len = checks.length("q_len", q_len), checks.length("kv_len", kv_len)
    rows, columns = checks.block_size(block_size)
    expected = (-(-q_len // rows), -(-kv_len // columns))
    if blocks.shape[1:] != expected:
        raise ValueError(
            f"blocks: expected (q_blocks, kv_blocks) = {expected} for q_len={q_len}, kv_len={kv_len} and "
            f"block_size={(rows, columns)}, got {tuple(blocks.shape[1:])}"
        )
    indptr = offsets(blocks.sum(2))
    return block_layout.BlockLayout(indptr, blocks.nonzero()[:, 2], q_len, kv_len, block_size=(rows, columns))


def _bool_table(name: str, table: object, sizes: str) -> Tensor:
    """``table`` as bool (heads, rows, columns) in CPU memory. Raises TypeError or ValueError."""
    if not isinstance(table, Tensor) or table.dtype != torch.bool:
        found = table.dtype if isinstance(table, Tensor) else type(table).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {found}")
    if table.ndim not in (2, 3) or (table.ndim == 3 and not len(table)):
        raise ValueError(f"{name}: expected shape ({sizes}) or (heads, {sizes}), got {tuple(table.shape)}")
    table = table.detach().cpu()
    return table.unsqueeze(0) if table.ndim == 2 else table


def to_blocks(layout: BlockLayout) -> Tensor:
    """The table of blocks, bool (heads, q_blocks, kv_blocks)."""
    table = torch.zeros(layout.heads * layout.q_blocks, layout.kv_blocks, dtype=torch.bool, device="cpu")
    table[algebra.rows_of(layout), layout.indices.to(torch.int64)] = True
    return table.view(layout.heads, layout.q_blocks, layout.kv_blocks)
