"""Layouts from and to what others take: rows, bool tables, FlexAttention's BlockMask, FlashInfer's compressed rows,
FlashAttention-4's lists.

Imports torch (FlexAttention where it is asked for), dilated_core's checks and this room.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_block_sparse.layout import algebra, block_layout, checks
from dilated_block_sparse.layout.checks import BlockSize
from dilated_core.checks import boolean

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from dilated_block_sparse.layout.block_layout import BlockLayout

BLOCK_MASK_LIMIT = 2**30
"""Bytes that a BlockMask may take: its tables are dense in blocks, those of a layout are not."""

BYTES_A_BLOCK = 17  # of a BlockMask: four int32 lists as wide as the table, and the bool table


# ------------------------------------------------------------------------------------------------ rows and bool tables


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
    indptr = algebra.offsets(torch.tensor(counts, dtype=torch.int64).view(len(heads), q_blocks))
    return block_layout.BlockLayout(indptr, torch.tensor(columns, dtype=torch.int64), q_len, kv_len, block_size=block)


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
    indptr = algebra.offsets(blocks.sum(2))
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
    table = torch.zeros(layout.heads * layout.q_blocks, layout.kv_blocks, dtype=torch.bool)
    table[algebra.rows_of(layout), layout.indices.to(torch.int64)] = True
    return table.view(layout.heads, layout.q_blocks, layout.kv_blocks)


# ------------------------------------------------------------------------------------------------ FlexAttention


class BlockTable:
    """The mask_mod of a layout's BlockMask: a look-up of the block, and of the order in time where it is causal.

    The table is data and the function is one for all, so that torch.compile need not compile again for another layout
    of the same sizes.
    """

    def __init__(self, blocks: Tensor, block_size: tuple[int, int], is_causal: bool) -> None:
        self.blocks = blocks  # bool (heads or 1, q_blocks, kv_blocks), on the device of the BlockMask
        self.block_size = block_size
        self.is_causal = is_causal
        self.shared = blocks.shape[0] == 1

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Whether row ``q_idx`` of head ``h`` attends key ``kv_idx``; bool, of their shape."""
        rows, columns = self.block_size
        head = h * 0 if self.shared else h
        live = self.blocks[head, q_idx // rows, kv_idx // columns]
        return live & (q_idx >= kv_idx) if self.is_causal else live


def to_block_mask(
    layout: BlockLayout, *, is_causal: bool = False, device: torch.device | str | None = None
) -> BlockMask:
    """The layout as FlexAttention's BlockMask, of batch 1 (any batch) and the layout's heads (any where it has 1).

    Blocks that FlexAttention need not mask are its full blocks. The others, which are those on the diagonal with
    ``is_causal`` and the short ones at the end, are its partial blocks, as in ``create_block_mask``. The mask_mod is
    always a look-up of the block: without one, eager ``flex_attention`` attends everything. Full and partial lists have
    equal shapes, as its kernels read both with the strides of one.

    ``BlockMask.to(device)`` moves the lists and not the mask_mod's table: name the device here.

    Raises:
        ValueError: more than ``BLOCK_MASK_LIMIT`` bytes, as a BlockMask is dense in blocks; with ``is_causal``, q_len
            that is not kv_len.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if boolean("is_causal", is_causal):
        layout = layout.causal()
    size = BYTES_A_BLOCK * layout.heads * layout.q_blocks * layout.kv_blocks
    if size > BLOCK_MASK_LIMIT:
        raise ValueError(
            f"to_block_mask: expected at most {BLOCK_MASK_LIMIT} bytes, got {size}: a BlockMask keeps {BYTES_A_BLOCK} "
            f"bytes for each of {layout.heads} x {layout.q_blocks} x {layout.kv_blocks} blocks, live or not; larger "
            f"blocks take less"
        )
    full = _whole(layout, is_causal)
    blocks = to_blocks(layout)
    partial_counts, partial_columns = _lists(layout, ~full, layout.kv_blocks, device)
    full_counts, full_columns = _lists(layout, full, layout.kv_blocks, device)
    return BlockMask.from_kv_blocks(
        partial_counts,
        partial_columns,
        full_counts,
        full_columns,
        BLOCK_SIZE=layout.block_size,
        mask_mod=BlockTable(blocks.to(device), layout.block_size, is_causal),
        seq_lengths=(layout.q_len, layout.kv_len),
    )


def _whole(layout: BlockLayout, is_causal: bool) -> Tensor:
    """Which live blocks need no mask: not cut short by an end, nor by the diagonal. Bool (live,)."""
    rows, columns = layout.block_size
    first_row = algebra.rows_of(layout) % max(layout.q_blocks, 1) * rows
    last_key = (layout.indices.to(torch.int64) + 1) * columns - 1
    whole = (first_row + rows <= layout.q_len) & (last_key < layout.kv_len)
    return whole & (last_key <= first_row) if is_causal else whole


def _lists(layout: BlockLayout, kept: Tensor, width: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """(counts (1, heads, q_blocks), columns (1, heads, q_blocks, width)), int32, of the live blocks in ``kept``."""
    rows, columns = algebra.rows_of(layout)[kept], layout.indices[kept]
    counts = torch.bincount(rows, minlength=layout.heads * layout.q_blocks)
    starts = counts.cumsum(0) - counts
    table = torch.zeros(layout.heads * layout.q_blocks, width, dtype=torch.int32)
    table[rows, torch.arange(len(rows)) - starts[rows]] = columns
    shape = (1, layout.heads, layout.q_blocks)
    return counts.to(device, torch.int32).view(shape), table.to(device).view(*shape, width)


def from_block_mask(mask: BlockMask) -> BlockLayout:
    """The live blocks of a BlockMask of batch 1, whose mask_mod must keep every block whole.

    Partial blocks are refused, as only their mask_mod knows what is live inside. In a mask that ``to_block_mask`` made
    they are not: there they are the short ones at the end and, with ``is_causal``, those on the diagonal, so that
    ``BlockLayout.from_block_mask(layout.to_block_mask(is_causal=True)) == layout.causal()``.

    Raises:
        TypeError: not a BlockMask.
        ValueError: a batch other than 1, or a partial block; the first is named.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask: expected a BlockMask, got {type(mask).__name__}")
    if mask.kv_num_blocks.ndim != 3 or mask.kv_num_blocks.shape[0] != 1:
        raise ValueError(f"mask: expected a batch of 1, got lists of shape {tuple(mask.kv_num_blocks.shape)}")
    (q_len, kv_len), block = mask.seq_lengths, (int(mask.BLOCK_SIZE[0]), int(mask.BLOCK_SIZE[1]))
    heads, rows_in_mask = mask.kv_num_blocks.shape[1:]
    if rows_in_mask != -(-q_len // block[0]):
        raise ValueError(
            f"mask: expected {-(-q_len // block[0])} rows of blocks of {block[0]} for q_len={q_len}, got {rows_in_mask}"
        )
    partial = _rows_and_columns("kv_num_blocks", mask.kv_num_blocks, mask.kv_indices)
    if len(partial[0]) and not isinstance(mask.mask_mod, BlockTable):
        head, row = divmod(int(partial[0][0]), rows_in_mask)
        raise ValueError(
            f"mask: expected no block that is live in part, got block ({row}, {int(partial[1][0])}) of head {head}"
        )
    parts = [partial]
    if mask.full_kv_num_blocks is not None:
        assert mask.full_kv_indices is not None
        parts.append(_rows_and_columns("full_kv_num_blocks", mask.full_kv_num_blocks, mask.full_kv_indices))
    rows, columns = (torch.cat([part[place] for part in parts]) for place in (0, 1))
    return _sorted(rows, columns, heads, int(q_len), int(kv_len), block)


def _rows_and_columns(name: str, counts: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
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
    listed = torch.arange(columns.shape[-1]) < flat.unsqueeze(1)
    return torch.repeat_interleave(torch.arange(len(flat)), flat), table[listed]


def _sorted(
    rows: Tensor, columns: Tensor, heads: int, q_len: int, kv_len: int, block_size: tuple[int, int]
) -> BlockLayout:
    """The layout of blocks that come in any order in their rows."""
    q_blocks = -(-q_len // block_size[0])
    counts = torch.bincount(rows, minlength=heads * q_blocks)
    by_column = columns.argsort()
    order = by_column[rows[by_column].argsort(stable=True)]
    return block_layout.BlockLayout(
        algebra.offsets(counts.view(heads, q_blocks)), columns[order], q_len, kv_len, block_size=block_size
    )


# ------------------------------------------------------------------------------------------------ flash kernels


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
    rows = torch.repeat_interleave(torch.arange(counts.numel()), counts.flatten())
    return _sorted(rows, columns, len(counts), q_len, kv_len, block)


def to_lists(layout: BlockLayout, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """(counts (1, heads, q_blocks), columns (1, heads, q_blocks, most)), int32; ``most`` is the longest row, or 1.

    They are FlashAttention-4's ``full_block_cnt`` and ``full_block_idx``, blocks that it need not mask; with a mask_mod
    of its own (causal order, say) its ``mask_block_cnt`` and ``mask_block_idx``. Entries past a row's count are 0.
    """
    counts = layout.indptr.diff(dim=1)
    most = max(int(counts.max()), 1) if counts.numel() else 1
    return _lists(layout, torch.ones(layout.live, dtype=torch.bool), most, device)


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
    rows, listed = _rows_and_columns("counts", counts, columns)
    return _sorted(rows, listed, counts.shape[1], q_len, kv_len, block)
