"""What one rank is to do: layouts of its own rows, and which rows of keys it gets and lends. No network here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dilated_block_sparse.layout import BlockLayout

if TYPE_CHECKING:
    from dilated_block_sparse.ring.plan import BlockSparseRingPlan


class Rows(NamedTuple):
    """Rows of a (batch, tokens, heads, ...) tensor that travel, in the order in which they do; none is there twice.

    Attributes:
        starts, lengths: (pairs,), int64: the first token of each piece, and how many.
        heads: (pairs,), int64: the head of each; None where all heads travel together.
        tokens: of all pairs.
    """

    starts: Tensor
    lengths: Tensor
    heads: Tensor | None
    tokens: int

    def shape(self, tensor: Tensor) -> torch.Size:
        """Of these rows: (batch, rows, ...)."""
        kept = tensor.shape[2 if self.heads is None else 3 :]
        return torch.Size((tensor.shape[0], self.tokens, *kept))

    def take(self, tensor: Tensor, out: Tensor) -> None:
        """Copy the rows to ``out``."""
        torch.index_select(self._lines(tensor), 1, self._index(tensor), out=out)

    def put(self, tensor: Tensor, rows: Tensor) -> None:
        """Write the rows of a contiguous tensor."""
        self._lines(tensor).index_copy_(1, self._index(tensor), rows)

    def add(self, tensor: Tensor, rows: Tensor) -> None:
        """Add to the rows of a contiguous tensor, in its dtype."""
        self._lines(tensor).index_add_(1, self._index(tensor), rows.to(tensor.dtype))

    def _lines(self, tensor: Tensor) -> Tensor:
        """One line for what travels together: a token's heads, or each of them."""
        return tensor if self.heads is None else tensor.flatten(1, 2)

    def _index(self, tensor: Tensor) -> Tensor:
        """Of the rows among the lines."""
        starts, lengths = (each.to(tensor.device) for each in (self.starts, self.lengths))
        # What to add to the number of a row in the message to have its token.
        shifts = (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths, output_size=self.tokens)
        tokens = torch.arange(self.tokens, device=tensor.device) + shifts
        if self.heads is None:
            return tokens
        heads = self.heads.to(tensor.device).repeat_interleave(lengths, output_size=self.tokens)
        return tokens * tensor.shape[2] + heads


class Part(NamedTuple):
    """Some of the keys that a rank's rows attend.

    Attributes:
        layout: the rank's rows against these keys.
        is_causal: whether rows see only keys up to their own.
    """

    layout: BlockLayout
    is_causal: bool


class RankPlan(NamedTuple):
    """One rank's share of a plan.

    Where a shard begins inside a block, rows and keys of no meaning stand before it, up to the block's first.

    Attributes:
        rank, size: its number, and how many there are.
        rows_before, keys_before: how many rows, and how many keys, stand before the shard's.
        own: its rows against its own keys; None where no block is kept.
        far: its rows against the keys that it gets, block by block in the order of their positions; None for none.
        gathered: for each source, the rows that it sends, as rows of these keys.
        lent: for each destination, the rows that it gets, as rows of the shard.
        gathered_mask, lent_mask: the same of a mask of positions, which all heads share.
        tokens: how many positions these keys have.
        present: (tokens,), bool: which of them are gathered; None where all are.
        complete: whether every one of them is gathered, and for all heads.
        travels: whether any rank gets anything: if not, none of them exchanges.
    """

    rank: int
    size: int
    rows_before: int
    keys_before: int
    own: Part | None
    far: Part | None
    gathered: tuple[Rows, ...]
    lent: tuple[Rows, ...]
    gathered_mask: tuple[Rows, ...]
    lent_mask: tuple[Rows, ...]
    tokens: int
    present: Tensor | None
    complete: bool
    travels: bool


def make_rank_plan(plan: BlockSparseRingPlan, rank: int) -> RankPlan:
    """What one rank is to do."""
    layout, pieces = plan.layout, plan.pieces
    rows, columns = layout.block_size
    low = plan.bounds[rank]
    # A causal square begins at one position.
    step = math.lcm(rows, columns)
    before = (low % step, low % step) if plan.is_causal else (low % rows, low % columns)
    needed = plan.needed(rank)
    union = needed.any(0)
    far = pieces.blocks[union].unique()
    place = torch.zeros(layout.kv_blocks, dtype=torch.int64, device="cpu")
    place[far] = torch.arange(len(far), device="cpu")
    tokens = int((layout.kv_len - far * columns).clamp(max=columns).sum())
    in_far = pieces.starts + (place[pieces.blocks] - pieces.blocks) * columns
    present = torch.zeros(tokens, dtype=torch.bool, device="cpu")
    whole = _rows(union[None], in_far, pieces.lengths)
    whole.put(present[None], torch.ones(1, whole.tokens, dtype=torch.bool, device="cpu"))
    own = pieces.owners == rank
    nobody = torch.zeros_like(needed)
    gathered, lent = [], []
    for peer in range(plan.world_size):
        gathered.append(needed & (pieces.owners == peer))
        lent.append(nobody if peer == rank else plan.needed(peer) & own)
    return RankPlan(
        rank,
        plan.world_size,
        *before,
        _own_part(plan, rank, *before),
        _far_part(plan, rank, before[0], far, place, tokens),
        tuple(_rows(table, in_far, pieces.lengths) for table in gathered),
        tuple(_rows(table, pieces.starts - low, pieces.lengths) for table in lent),
        tuple(_rows(table.any(0, keepdim=True), in_far, pieces.lengths) for table in gathered),
        tuple(_rows(table.any(0, keepdim=True), pieces.starts - low, pieces.lengths) for table in lent),
        tokens,
        None if present.all() else present,
        bool(present.all() and needed[:, union].all()),
        plan.travels,
    )


def _rows(table: Tensor, starts: Tensor, lengths: Tensor) -> Rows:
    """Of a bool table (heads, pieces): those that are True, piece by piece."""
    chosen, heads = table.T.nonzero().unbind(1)
    lengths = lengths[chosen]
    return Rows(starts[chosen], lengths, heads if len(table) > 1 else None, int(lengths.sum()))


def _own_part(plan: BlockSparseRingPlan, rank: int, rows_before: int, keys_before: int) -> Part | None:
    """The rank's rows against its own keys."""
    low, high = plan.bounds[rank : rank + 2]
    first, last = plan.columns(rank)
    begin = (low - keys_before) // plan.layout.block_size[1]
    place = torch.arange(plan.layout.kv_blocks, device="cpu") - begin
    kept = torch.zeros(plan.layout.kv_blocks, dtype=torch.bool, device="cpu")
    kept[first:last] = True
    layout = _layout(plan, rank, rows_before, kept, place, high - low + keys_before)
    return None if layout is None else Part(layout, plan.is_causal)


def _far_part(
    plan: BlockSparseRingPlan, rank: int, rows_before: int, far: Tensor, place: Tensor, tokens: int
) -> Part | None:
    """The rank's rows against the blocks that it gets, in part or whole."""
    kept = torch.zeros(plan.layout.kv_blocks, dtype=torch.bool, device="cpu")
    kept[far] = True
    layout = _layout(plan, rank, rows_before, kept, place, tokens)
    return None if layout is None else Part(layout, is_causal=False)


def _layout(
    plan: BlockSparseRingPlan, rank: int, rows_before: int, kept: Tensor, place: Tensor, tokens: int
) -> BlockLayout | None:
    """The rank's rows against some columns, ``place`` telling where these are among ``tokens``; None for no block."""
    layout, (rows, _) = plan.layout, plan.layout.block_size
    low, high = plan.bounds[rank : rank + 2]
    first, last = plan.rows(rank)
    sliced = layout.q_slice(first * rows, min(last * rows, layout.q_len))
    columns = sliced.indices.long()
    chosen = kept[columns]
    if not chosen.any():
        return None
    counts = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), chosen.cumsum(0)])
    indptr = counts[sliced.indptr]
    empty = first - (low - rows_before) // rows  # blocks of nothing but rows of no meaning
    indptr = torch.cat([indptr[:, :1].expand(-1, empty), indptr], 1)
    return BlockLayout(indptr, place[columns[chosen]], high - low + rows_before, tokens, block_size=layout.block_size)
