"""Layouts from and to FlexAttention's BlockMask. Imports torch, FlexAttention where it is asked for, and this room."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dilated_block_sparse.layout import algebra
from dilated_block_sparse.layout.lists import counted, in_order, rows_and_columns
from dilated_block_sparse.layout.tables import to_blocks
from dilated_core.checks import boolean

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from dilated_block_sparse.layout.block_layout import BlockLayout

BLOCK_MASK_LIMIT = 2**30
"""Bytes that a BlockMask may take: its tables are dense in blocks, those of a layout are not."""

BYTES_A_BLOCK = 17  # of a BlockMask: four int32 lists as wide as the table, and the bool table


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
    partial_counts, partial_columns = counted(layout, ~full, layout.kv_blocks, device)
    full_counts, full_columns = counted(layout, full, layout.kv_blocks, device)
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
    partial = rows_and_columns("kv_num_blocks", mask.kv_num_blocks, mask.kv_indices)
    if len(partial[0]) and not isinstance(mask.mask_mod, BlockTable):
        head, row = divmod(int(partial[0][0]), rows_in_mask)
        raise ValueError(
            f"mask: expected no block that is live in part, got block ({row}, {int(partial[1][0])}) of head {head}"
        )
    parts = [partial]
    if mask.full_kv_num_blocks is not None:
        assert mask.full_kv_indices is not None
        parts.append(rows_and_columns("full_kv_num_blocks", mask.full_kv_num_blocks, mask.full_kv_indices))
    rows, columns = (torch.cat([part[place] for part in parts]) for place in (0, 1))
    return in_order(rows, columns, heads, int(q_len), int(kv_len), block)
