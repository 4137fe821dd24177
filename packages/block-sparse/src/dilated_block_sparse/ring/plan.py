"""BlockSparseRingPlan: which key blocks every rank needs from every other, and what that costs. No network here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.ring import description
from dilated_block_sparse.ring.bounds import block_bounds, check_layout_bounds
from dilated_block_sparse.ring.rank_plan import RankPlan, make_rank_plan
from dilated_core import checks
from dilated_ring.plan import Peers, Traffic


class Pieces(NamedTuple):
    """Blocks of keys, cut where shards end; each field (pieces,), int64, in the order of their positions.

    Attributes:
        starts, lengths: of each, in tokens.
        blocks: which block it is of.
        owners: which rank has it.
    """

    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    owners: Tensor


class BlockSparseRingPlan:
    """Block-sparse attention over shards of one sequence: each rank gets the key blocks that its rows keep, once each.

    What travels is counted in pairs of a key head and a piece, which is a block or what of it lies on one rank: with a
    layout for each head, a piece goes only in the heads that keep it; with one for all, in all. No table of blocks by
    blocks is made.

    Args:
        layout: of the whole sequence, with as many keys as rows.
        sequence: how many ranks, for shards as equal as whole blocks allow; or the bounds of the shards,
            world_size + 1 positions that rise from 0 to the length (shards may be empty).
        kv_heads: key and value heads. ``layout.heads`` is 1, this number, or a multiple: the query heads.
        is_causal: whether rows see only keys up to their own; those after them then never travel.

    Attributes:
        layout: what is attended: ``layout.causal()`` where ``is_causal``.
        bounds: rank i holds positions bounds[i] to bounds[i + 1].

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> layout = BlockLayout.from_rows([[0], [0, 1], [1, 2], [2, 3]], 64, 64, block_size=16)  # a window of two blocks
    >>> plan = BlockSparseRingPlan(layout, 4, kv_heads=2)
    >>> plan.peers(2)
    Peers(sends_to=(3,), receives_from=(1,))
    >>> plan.bytes(torch.float32, 8).of(2)  # 16 keys and values of 2 heads of 8 numbers of 4 bytes
    2048
    """

    def __init__(
        self, layout: BlockLayout, sequence: int | Sequence[int], *, kv_heads: int = 1, is_causal: bool = False
    ) -> None:
        if not isinstance(layout, BlockLayout):
            raise TypeError(f"layout: expected a BlockLayout, got {type(layout).__name__}")
        self.kv_heads = checks.positive_integer("kv_heads", kv_heads)
        if layout.heads != 1 and layout.heads % self.kv_heads:
            raise ValueError(f"layout: expected 1 head or a multiple of the {kv_heads} key heads, got {layout.heads}")
        self.bounds = (
            check_layout_bounds(layout, sequence)
            if isinstance(sequence, Sequence)
            else block_bounds(layout, checks.positive_integer("sequence", sequence))
        )
        self.is_causal = checks.boolean("is_causal", is_causal)
        self.layout = layout.causal() if is_causal else layout

    @property
    def seq_len(self) -> int:
        """Positions in the whole sequence."""
        return self.bounds[-1]

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return len(self.bounds) - 1

    @property
    def lanes(self) -> int:
        """Groups of key heads that travel apart: 1 where all share the layout, else one a key head."""
        return 1 if self.layout.heads == 1 else self.kv_heads

    def rows(self, rank: int) -> tuple[int, int]:
        """The blocks of rows that the rank has rows of, first and one past the last; (0, 0) for none."""
        return self._touched(rank, self.layout.block_size[0])

    def columns(self, rank: int) -> tuple[int, int]:
        """The blocks of keys that the rank has keys of, first and one past the last; (0, 0) for none."""
        return self._touched(rank, self.layout.block_size[1])

    @cached_property
    def pieces(self) -> Pieces:
        """The blocks of keys, cut where shards end."""
        layout, columns = self.layout, self.layout.block_size[1]
        edges = (torch.arange(layout.kv_blocks + 1, device="cpu") * columns).clamp(max=layout.kv_len)
        edges = torch.cat([edges, torch.tensor(self.bounds, device="cpu")]).unique()
        starts = edges[:-1]
        owners = torch.bucketize(starts, torch.tensor(self.bounds[1:-1], dtype=torch.int64, device="cpu"), right=True)
        return Pieces(starts, edges.diff(), starts // columns, owners)

    def needed(self, rank: int) -> Tensor:
        """Bool (lanes, pieces): the keys of other ranks that this one's rows keep."""
        layout, pieces = self.layout, self.pieces
        table = torch.zeros(self.lanes, layout.kv_blocks, dtype=torch.bool, device="cpu")
        first, last = self.rows(rank)
        bounds = layout.indptr[:, [first, last]].tolist()
        for head, (start, stop) in enumerate(bounds):
            table[head * self.lanes // layout.heads].index_fill_(0, layout.indices[start:stop].long(), True)
        others = pieces.owners < rank if self.is_causal else pieces.owners != rank
        return table[:, pieces.blocks] & others

    def for_rank(self, rank: int) -> RankPlan:
        """What one rank is to do."""
        return make_rank_plan(self, self._check(rank))

    @property
    def travels(self) -> bool:
        """Whether any rank needs anything of another."""
        return any(any(row) for row in self._pairs)

    def bytes(
        self,
        dtype: torch.dtype,
        head_dim: int,
        *,
        batch: int = 1,
        phase: str = "forward",
        masked: bool = False,
        refetch: bool = False,
    ) -> Traffic:
        """What one pass puts on the wire, exact to the byte, but for the agreement before it.

        Forward: the keys and values of every needed pair of a key head and a block, head_dim numbers of ``dtype`` a
        token each, and with a mask a byte for each token that is needed in any head. Backward: their gradients, the
        other way; and what went forward, if it was not kept.

        Args:
            dtype: of query, key and value.
            head_dim, batch: their sizes.
            phase: "forward" or "backward".
            masked: whether there is a key_padding_mask.
            refetch: whether the backward gathers again what the forward did not keep.

        Returns:
            Traffic: ``.of(rank)`` are the bytes that a rank receives, ``.total`` those of all ranks.

        Raises:
            TypeError, ValueError: an argument of a wrong type or value.
        """
        table = self.matrix(dtype, head_dim, batch=batch, phase=phase, masked=masked, refetch=refetch)
        received = tuple((sum(row[rank] for row in table),) for rank in range(self.world_size))
        return Traffic(received, tuple((sum(row),) for row in table))

    def matrix(
        self,
        dtype: torch.dtype,
        head_dim: int,
        *,
        batch: int = 1,
        phase: str = "forward",
        masked: bool = False,
        refetch: bool = False,
    ) -> list[list[int]]:
        """Bytes from every rank (row) to every other (column); arguments as of ``bytes``.

        >>> layout = BlockLayout.from_rows([[0], [0, 1], [0, 2]], 24, 24, block_size=8)
        >>> BlockSparseRingPlan(layout, 3).matrix(torch.float32, 1)
        [[0, 64, 64], [0, 0, 0], [0, 0, 0]]
        """
        if dtype not in checks.FLOATS:
            raise TypeError(f"dtype: expected one of {[str(each) for each in checks.FLOATS]}, got {dtype!r}")
        numbers = 2 * checks.positive_integer("head_dim", head_dim) * checks.length("batch", batch) * dtype.itemsize
        backward = checks.choice("phase", phase, ("forward", "backward")) == "backward"
        mask = batch * checks.boolean("masked", masked)
        gathers = checks.boolean("refetch", refetch) or not backward
        heads = self.kv_heads // self.lanes
        ranks = range(self.world_size)
        found = [[0] * self.world_size for _ in ranks]
        for source in ranks:
            for destination in ranks:
                rows = self._pairs[source][destination] * heads * numbers
                if gathers:
                    found[source][destination] += rows + self._tokens[source][destination] * mask
                if backward:
                    found[destination][source] += rows
        return found

    def peers(self, rank: int) -> Peers:
        """Who a rank sends to and receives from in a forward pass, rising; in a backward it is the other way round.

        Raises:
            TypeError, ValueError: there is no such rank.
        """
        self._check(rank)
        ranks = range(self.world_size)
        sends_to = tuple(peer for peer in ranks if self._pairs[rank][peer])
        return Peers(sends_to, tuple(peer for peer in ranks if self._pairs[peer][rank]))

    def live(self, rank: int) -> int:
        """Live blocks in the rank's blocks of rows, of all heads of the layout: what it computes is in proportion.

        Raises:
            TypeError, ValueError: there is no such rank.
        """
        first, last = self.rows(self._check(rank))
        indptr = self.layout.indptr
        return int((indptr[:, last] - indptr[:, first]).sum())

    def describe(self, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> str:
        """A page about the plan: shards, and of every rank its peers, live blocks and bytes.

        Args:
            dtype, head_dim: of query, key and value; batch is 1, unmasked, and the backward keeps what it gathered.

        >>> layout = BlockLayout.from_rows([[0], [0, 1], [0, 2]], 24, 24, block_size=8)
        >>> print(BlockSparseRingPlan(layout, 3).describe())
        24 tokens on 3 ranks...
        """
        return description.describe(self, dtype, head_dim)

    def __repr__(self) -> str:
        return (
            f"BlockSparseRingPlan({self.layout!r}, {list(self.bounds)}, kv_heads={self.kv_heads}, "
            f"is_causal={self.is_causal})"
        )

    def _touched(self, rank: int, size: int) -> tuple[int, int]:
        low, high = self.bounds[rank : rank + 2]
        return (low // size, -(-high // size)) if low < high else (0, 0)

    def _check(self, rank: int) -> int:
        if checks.length("rank", rank) >= self.world_size:
            raise ValueError(f"rank: expected a number below {self.world_size}, got {rank}")
        return rank

    @property
    def _pairs(self) -> list[list[int]]:
        """Tokens times lanes from every rank (row) to every other (column)."""
        return self._counts[0]

    @property
    def _tokens(self) -> list[list[int]]:
        """Tokens from every rank (row) to every other (column), in whatever lanes."""
        return self._counts[1]

    @cached_property
    def _counts(self) -> tuple[list[list[int]], list[list[int]]]:
        size, pieces = self.world_size, self.pieces
        pairs, tokens = torch.zeros(2, size, size, dtype=torch.int64, device="cpu")
        for rank in range(size):
            needed = self.needed(rank)
            pairs[rank].index_add_(0, pieces.owners, needed.sum(0) * pieces.lengths)
            tokens[rank].index_add_(0, pieces.owners, needed.any(0) * pieces.lengths)
        return pairs.T.tolist(), tokens.T.tolist()
