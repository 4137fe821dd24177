"""Checks of what a layout is made of: lengths, block sizes, compressed rows. Each returns the value or raises.

Imports torch and dilated_core's checks.
"""

from __future__ import annotations

import operator
from typing import TypeAlias

import torch
from torch import Tensor

from dilated_core.checks import length as length  # one of these, for who checks what a layout is made of
from dilated_core.checks import positive_integer

BlockSize: TypeAlias = "int | tuple[int, int]"
"""Tokens in a block: (rows, columns), or one number for both."""

MOST_BLOCKS = 2**31 - 1  # columns are int32


def block_size(value: object) -> tuple[int, int]:
    """Return ``value``, a positive int or two of them, as (rows, columns). Raises TypeError or ValueError."""
    if not isinstance(value, (tuple, list)):
        size = positive_integer("block_size", value)
        return size, size
    if len(value) != 2:
        raise ValueError(f"block_size: expected an int or (rows, columns), got {value!r} of {len(value)} entries")
    return positive_integer("block_size[0]", value[0]), positive_integer("block_size[1]", value[1])


def index(name: str, value: object, size: int) -> int:
    """Return ``value`` as an int from 0 up to, not including, ``size``. Raises TypeError or ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int from 0 to {size - 1}, got {value!r} of type {type(value).__name__}")
    number = operator.index(value)
    if not 0 <= number < size:
        expected = f"an int from 0 to {size - 1}" if size else "nothing, as there are none"
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def tensor_of_integers(name: str, value: object) -> Tensor:
    """Return ``value`` as an int64 tensor in CPU memory. Raises TypeError where it is no tensor of integers."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of integers, got {type(value).__name__}")
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise TypeError(f"{name}: expected a tensor of integers, got dtype {value.dtype}")
    return value.detach().to("cpu", torch.int64)


def compressed_rows(indptr: object, indices: object, q_blocks: int, kv_blocks: int) -> tuple[Tensor, Tensor]:
    """Return contiguous copies of compressed rows in CPU memory, once they are found to be right.

    Args:
        indptr: (heads, q_blocks + 1) or (q_blocks + 1,), integers of any dtype, on any device.
        indices: (live blocks,), integers of any dtype, on any device.

    Returns:
        ``indptr`` as int64 (heads, q_blocks + 1) and ``indices`` as int32 (live blocks,).

    Raises:
        TypeError: not tensors of integers.
        ValueError: shapes that do not fit; offsets that do not start at 0, fall, do not end at the number of live
            blocks or leave a gap between heads; a row whose columns do not rise or are out of range. Head and row are
            named.
    """
    columns = tensor_of_integers("indices", indices)
    if columns.ndim != 1:
        raise ValueError(f"indices: expected shape (live blocks,), got {tuple(columns.shape)}")
    if kv_blocks > MOST_BLOCKS:
        raise ValueError(f"kv_len: expected at most {MOST_BLOCKS} blocks of columns, got {kv_blocks}")
    offsets = row_offsets(indptr, q_blocks, len(columns))
    _check_columns(offsets, columns, kv_blocks)
    # A clone even where nothing was converted: whoever holds the argument must not be able to write to the layout.
    return offsets.clone(memory_format=torch.contiguous_format), columns.to(torch.int32, copy=True).contiguous()


def row_offsets(indptr: object, q_blocks: int, live: int) -> Tensor:
    """Return ``indptr`` as int64 (heads, q_blocks + 1), not copied, once its offsets are found to be right."""
    offsets = tensor_of_integers("indptr", indptr)
    if offsets.ndim == 1:
        offsets = offsets.unsqueeze(0)
    if offsets.ndim != 2 or offsets.shape[0] < 1 or offsets.shape[1] != q_blocks + 1:
        expected = f"(heads, q_blocks + 1) = (heads, {q_blocks + 1})"
        raise ValueError(f"indptr: expected shape {expected}, got {tuple(offsets.shape)}")
    if int(offsets[0, 0]) != 0:
        raise ValueError(f"indptr: expected head 0 to start at 0, got {int(offsets[0, 0])}")
    falls = (offsets[:, 1:] < offsets[:, :-1]).nonzero()
    if len(falls):
        head, row = falls[0].tolist()
        first, second = offsets[head, row : row + 2].tolist()
        raise ValueError(f"indptr: row {row} of head {head}: expected offsets that do not fall, got {first}, {second}")
    gaps = (offsets[1:, 0] != offsets[:-1, -1]).nonzero()
    if len(gaps):
        head = int(gaps[0]) + 1
        end, start = int(offsets[head - 1, -1]), int(offsets[head, 0])
        raise ValueError(f"indptr: expected head {head} to start where head {head - 1} ends, {end}, got {start}")
    if int(offsets[-1, -1]) != live:
        raise ValueError(
            f"indptr: expected the last offset to be the {live} entries of indices, got {int(offsets[-1, -1])}"
        )
    return offsets


def _check_columns(offsets: Tensor, columns: Tensor, kv_blocks: int) -> None:
    outside = ((columns < 0) | (columns >= kv_blocks)).nonzero()
    if len(outside):
        position = int(outside[0])
        expected = f"columns from 0 to {kv_blocks - 1}" if kv_blocks else "no columns, as there are no keys"
        raise ValueError(f"indices: {_place(offsets, position)}: expected {expected}, got {int(columns[position])}")
    falls = columns[1:] <= columns[:-1]
    # Where a row starts, its first column may be any.
    starts = offsets[:, :-1].flatten()
    falls[starts[(starts > 0) & (starts < len(columns))] - 1] = False
    wrong = falls.nonzero()
    if len(wrong):
        position = int(wrong[0])
        first, second = columns[position : position + 2].tolist()
        raise ValueError(
            f"indices: {_place(offsets, position)}: expected columns that rise, got {first} before {second}"
        )


def _place(offsets: Tensor, position: int) -> str:
    """The row and head in which entry ``position`` of the indices lies: the first whose end comes after it."""
    flat = int((offsets[:, 1:].flatten() <= position).sum())
    head, row = divmod(flat, offsets.shape[1] - 1)
    return f"row {row} of head {head}"
