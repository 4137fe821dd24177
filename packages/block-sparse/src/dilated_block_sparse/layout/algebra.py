"""Sets of live blocks: union, intersection, difference, causal part, transpose, slices, heads. No dense table.

A live block is one int64 number, ``(head * q_blocks + row) * kv_blocks + column``: rising in the order of the indices,
so that a set operation is one on sorted numbers. Imports torch and this room.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_block_sparse.layout import block_layout, checks
from dilated_block_sparse.layout.compressed import offsets

if TYPE_CHECKING:
    from dilated_block_sparse.layout.block_layout import BlockLayout


# ------------------------------------------------------------------------------------------------ numbers


def rows_of(layout: BlockLayout) -> Tensor:
    """The row of every live block, counted through the heads: ``head * q_blocks + row``, int64 (live,)."""
    counts = layout.indptr.diff(dim=1).flatten()
    return torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts, output_size=layout.live)


def numbers(layout: BlockLayout) -> Tensor:
    """The number of every live block, rising, int64 (live,)."""
    return rows_of(layout) * layout.kv_blocks + layout.indices


def _from_numbers(numbers: Tensor, q_len: int, kv_len: int, block_size: tuple[int, int], heads: int) -> BlockLayout:
    """The layout whose live blocks have these numbers, rising and each once."""
    q_blocks, kv_blocks = -(-q_len // block_size[0]), -(-kv_len // block_size[1])
    rows = numbers // max(kv_blocks, 1)
    counts = torch.bincount(rows, minlength=heads * q_blocks).view(heads, q_blocks)
    columns = numbers - rows * kv_blocks
    return block_layout.BlockLayout(offsets(counts), columns, q_len, kv_len, block_size=block_size)


# ------------------------------------------------------------------------------------------------ sets


def union(first: BlockLayout, second: BlockLayout) -> BlockLayout:
    """Blocks that live in either. Raises ValueError where sizes or heads differ."""
    one, two, heads = _pair("|", first, second)
    return _from_numbers(torch.cat([one, two]).unique(), first.q_len, first.kv_len, first.block_size, heads)


def intersection(first: BlockLayout, second: BlockLayout) -> BlockLayout:
    """Blocks that live in both. Raises ValueError where sizes or heads differ."""
    one, two, heads = _pair("&", first, second)
    return _from_numbers(one[_among(one, two)], first.q_len, first.kv_len, first.block_size, heads)


def difference(first: BlockLayout, second: BlockLayout) -> BlockLayout:
    """Blocks that live in the first and not in the second. Raises ValueError where sizes or heads differ."""
    one, two, heads = _pair("-", first, second)
    return _from_numbers(one[~_among(one, two)], first.q_len, first.kv_len, first.block_size, heads)


def _pair(name: str, first: BlockLayout, second: BlockLayout) -> tuple[Tensor, Tensor, int]:
    """The numbers of both, over the same heads: a layout of one head is repeated for every head of the other."""
    if not isinstance(second, block_layout.BlockLayout):
        raise TypeError(f"{name}: expected a BlockLayout on both sides, got {type(second).__name__}")
    _check_sizes(name, [first, second])
    heads = max(first.heads, second.heads)
    for layout in (first, second):
        if layout.heads not in (1, heads):
            raise ValueError(
                f"{name}: expected layouts of the same heads, or one of 1, got {first.heads} and {second.heads} heads"
            )
    one, two = (
        found if layout.heads == heads else _repeated(found, layout.q_blocks * layout.kv_blocks, heads)
        for layout, found in ((first, numbers(first)), (second, numbers(second)))
    )
    return one, two, heads


def _check_sizes(name: str, layouts: Sequence[BlockLayout]) -> None:
    """Raise ValueError unless all have the lengths and the block size of the first."""
    sizes = [f"q_len={each.q_len}, kv_len={each.kv_len}, block_size={each.block_size}" for each in layouts]
    for found in sizes[1:]:
        if found != sizes[0]:
            raise ValueError(f"{name}: expected layouts of the same sizes, got ({sizes[0]}) and ({found})")


def _repeated(numbers: Tensor, table: int, heads: int) -> Tensor:
    return (torch.arange(heads, device="cpu").unsqueeze(1) * table + numbers).flatten()


def _among(numbers: Tensor, others: Tensor) -> Tensor:
    """Which of ``numbers`` are in ``others``, which rise."""
    if not len(others):
        return torch.zeros(len(numbers), dtype=torch.bool, device="cpu")
    return others[torch.searchsorted(others, numbers).clamp(max=len(others) - 1)] == numbers


def causal(layout: BlockLayout) -> BlockLayout:
    """The blocks whose first key is at or before their last row. Raises ValueError where q_len is not kv_len."""
    if layout.q_len != layout.kv_len:
        raise ValueError(f"causal: expected q_len == kv_len, got {layout.q_len} and {layout.kv_len}")
    rows, columns = layout.block_size
    last_row = ((rows_of(layout) % max(layout.q_blocks, 1) + 1) * rows).clamp(max=layout.q_len) - 1
    return _kept(layout, layout.indices.to(torch.int64) * columns <= last_row)


def _kept(layout: BlockLayout, kept: Tensor) -> BlockLayout:
    return _from_numbers(numbers(layout)[kept], layout.q_len, layout.kv_len, layout.block_size, layout.heads)


# ------------------------------------------------------------------------------------------------ other layouts


def transpose(layout: BlockLayout) -> BlockLayout:
    """Rows and columns exchanged, in every head."""
    rows = rows_of(layout)
    head = rows // max(layout.q_blocks, 1)
    numbers = (head * layout.kv_blocks + layout.indices) * layout.q_blocks + rows - head * layout.q_blocks
    block = (layout.block_size[1], layout.block_size[0])
    return _from_numbers(numbers.sort().values, layout.kv_len, layout.q_len, block, layout.heads)


def q_slice(layout: BlockLayout, start: int, stop: int) -> BlockLayout:
    """Rows of tokens ``start`` to ``stop``. Raises ValueError where they are not on the edges of blocks."""
    first, last = _blocks("q_slice", start, stop, layout.q_len, layout.block_size[0])
    bounds = layout.indptr[:, [first, last]].tolist()
    indices = torch.cat([layout.indices[begin:end] for begin, end in bounds])
    counts = layout.indptr[:, first : last + 1].diff(dim=1)
    return block_layout.BlockLayout(offsets(counts), indices, stop - start, layout.kv_len, block_size=layout.block_size)


def kv_slice(layout: BlockLayout, start: int, stop: int) -> BlockLayout:
    """Keys of tokens ``start`` to ``stop``. Raises ValueError where they are not on the edges of blocks."""
    first, last = _blocks("kv_slice", start, stop, layout.kv_len, layout.block_size[1])
    kept = (layout.indices >= first) & (layout.indices < last)
    rows = layout.heads * layout.q_blocks
    counts = torch.bincount(rows_of(layout)[kept], minlength=rows).view(layout.heads, layout.q_blocks)
    indices = layout.indices[kept] - first
    return block_layout.BlockLayout(offsets(counts), indices, layout.q_len, stop - start, block_size=layout.block_size)


def _blocks(name: str, start: int, stop: int, size: int, block: int) -> tuple[int, int]:
    """The blocks from ``start`` up to ``stop``, both on the edge of a block or at the end."""
    start, stop = checks.length(f"{name}: start", start), checks.length(f"{name}: stop", stop)
    if not start <= stop <= size:
        raise ValueError(f"{name}: expected 0 <= start <= stop <= {size}, got start {start} and stop {stop}")
    for end, token in (("start", start), ("stop", stop)):
        if token % block and token != size:
            raise ValueError(f"{name}: expected a {end} on the edge of a block of {block} tokens, got {token}")
    return -(-start // block), -(-stop // block)


def select_heads(layout: BlockLayout, heads: Sequence[int]) -> BlockLayout:
    """The layouts of ``heads``, one after the other; a head may come more than once."""
    chosen = [checks.index(f"heads[{place}]", head, layout.heads) for place, head in enumerate(heads)]
    if not chosen:
        raise ValueError("heads: expected at least one head, got none")
    bounds = layout.indptr[chosen][:, [0, -1]].tolist()
    return block_layout.BlockLayout(
        offsets(layout.indptr[chosen].diff(dim=1)),
        torch.cat([layout.indices[begin:end] for begin, end in bounds]),
        layout.q_len,
        layout.kv_len,
        block_size=layout.block_size,
    )


def stack(layouts: Sequence[BlockLayout]) -> BlockLayout:
    """Layouts of the same sizes, the heads of one after those of the other. Raises ValueError where sizes differ."""
    layouts = list(layouts)
    if not layouts:
        raise ValueError("layouts: expected at least one layout, got none")
    for place, layout in enumerate(layouts):
        if not isinstance(layout, block_layout.BlockLayout):
            raise TypeError(f"layouts[{place}]: expected a BlockLayout, got {type(layout).__name__}")
    _check_sizes("layouts", layouts)
    return block_layout.BlockLayout(
        offsets(torch.cat([layout.indptr.diff(dim=1) for layout in layouts])),
        torch.cat([layout.indices for layout in layouts]),
        layouts[0].q_len,
        layouts[0].kv_len,
        block_size=layouts[0].block_size,
    )


# ------------------------------------------------------------------------------------------------ measures


def pairs(layout: BlockLayout) -> int:
    """Live (query, key) pairs of all heads together, exact: short blocks at the end count their tokens only."""
    rows, columns = layout.block_size
    short_rows = layout.q_blocks * rows - layout.q_len
    short_columns = layout.kv_blocks * columns - layout.kv_len
    in_last_row = rows_of(layout) % max(layout.q_blocks, 1) == layout.q_blocks - 1
    in_last_column = layout.indices == layout.kv_blocks - 1
    return (
        layout.live * rows * columns
        - int(in_last_row.sum()) * short_rows * columns
        - int(in_last_column.sum()) * short_columns * rows
        + int((in_last_row & in_last_column).sum()) * short_rows * short_columns
    )


def density(layout: BlockLayout) -> float:
    """Live (query, key) pairs over all of them; 0 where there are none."""
    everything = layout.heads * layout.q_len * layout.kv_len
    return pairs(layout) / everything if everything else 0.0


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a contiguous tensor in CPU memory, without numpy: one copy of memory."""
    size = tensor.numel() * tensor.element_size()
    return ctypes.string_at(tensor.data_ptr(), size) if size else b""
