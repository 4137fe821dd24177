"""Constructors of BlockLayout that draw a pattern, each by the function of its name in ``patterns``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dilated_block_sparse import patterns
from dilated_block_sparse.layout.checks import BlockSize

if TYPE_CHECKING:
    from dilated_block_sparse.layout.block_layout import BlockLayout


class Constructors:
    """Classmethods that BlockLayout inherits.

    ``seq_len`` is both lengths, counts are in blocks, and ``heads`` above 1 makes one layout a head. The function of
    the same name in ``patterns`` says more: arguments, the pattern's definition and its paper, an example.
    """

    @classmethod
    def full(cls, seq_len: int, *, block_size: BlockSize = 128, heads: int = 1) -> BlockLayout:
        """Every block."""
        drawn = patterns.full(seq_len, block_size=block_size, heads=heads)
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def empty(cls, seq_len: int, *, block_size: BlockSize = 128, heads: int = 1) -> BlockLayout:
        """No block."""
        drawn = patterns.empty(seq_len, block_size=block_size, heads=heads)
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def local(cls, seq_len: int, window: int, *, block_size: BlockSize = 128, heads: int = 1) -> BlockLayout:
        """The row's own block and ``window`` blocks on either side."""
        drawn = patterns.local(seq_len, window, block_size=block_size, heads=heads)
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def dilated(
        cls, seq_len: int, segment: int, rate: int, *, block_size: BlockSize = 128, heads: int = 1
    ) -> BlockLayout:
        """Blocks (i, j) of the same segment of ``segment`` blocks with (i - j) % rate == 0."""
        drawn = patterns.dilated(seq_len, segment, rate, block_size=block_size, heads=heads)
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def global_(
        cls,
        seq_len: int,
        cols: patterns.Blocks,
        rows: patterns.Blocks,
        *,
        block_size: BlockSize = 128,
        heads: int = 1,
    ) -> BlockLayout:
        """The first ``cols`` columns for all rows, all columns for the first ``rows`` rows; or sequences of indices."""
        drawn = patterns.global_(seq_len, cols, rows, block_size=block_size, heads=heads)
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def strided(cls, seq_len: int, stride: int, *, block_size: BlockSize = 128, heads: int = 1) -> BlockLayout:
        """Blocks (i, j) with ``|i - j| < stride`` or ``(i - j) % stride == 0``: Sparse Transformer's strided."""
        drawn = patterns.strided(seq_len, stride, block_size=block_size, heads=heads)
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def fixed(
        cls,
        seq_len: int,
        stride: int,
        *,
        summary: int = 1,
        block_size: BlockSize = 128,
        heads: int = 1,
    ) -> BlockLayout:
        """Blocks of the same group of ``stride``, and the last ``summary`` of each: Sparse Transformer's fixed."""
        drawn = patterns.fixed(seq_len, stride, summary=summary, block_size=block_size, heads=heads)
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def hierarchical(
        cls,
        seq_len: int,
        window: int,
        *,
        levels: int | None = None,
        branching: int = 4,
        block_size: BlockSize = 128,
        heads: int = 1,
    ) -> BlockLayout:
        """A window, and at level l one column in branching^l, reaching branching^l times further."""
        drawn = patterns.hierarchical(
            seq_len, window, levels=levels, branching=branching, block_size=block_size, heads=heads
        )
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def longnet(
        cls,
        seq_len: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        block_size: BlockSize = 128,
        heads: int = 1,
    ) -> BlockLayout:
        """Blocks that hold a pair of LongNet's branches, lengths and rates in tokens: a superset, each key once."""
        drawn = patterns.longnet(seq_len, segment_lengths, dilation_rates, block_size=block_size, heads=heads)
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def random(
        cls,
        seq_len: int,
        blocks_per_row: int,
        *,
        seed: int = 0,
        block_size: BlockSize = 128,
        heads: int = 1,
        is_causal: bool = False,
    ) -> BlockLayout:
        """``blocks_per_row`` columns for every row by lot, for each head anew; see ``patterns.random``."""
        drawn = patterns.random(
            seq_len, blocks_per_row, seed=seed, block_size=block_size, heads=heads, is_causal=is_causal
        )
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def bigbird(
        cls,
        seq_len: int,
        window: int,
        global_blocks: int,
        blocks_per_row: int,
        *,
        seed: int = 0,
        block_size: BlockSize = 128,
        heads: int = 1,
        is_causal: bool = False,
    ) -> BlockLayout:
        """A window, ``global_blocks`` global columns and rows, and ``blocks_per_row`` more columns by lot."""
        drawn = patterns.bigbird(
            seq_len,
            window,
            global_blocks,
            blocks_per_row,
            seed=seed,
            block_size=block_size,
            heads=heads,
            is_causal=is_causal,
        )
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def named(
        cls,
        pattern: str,
        seq_len: int,
        sparsity_ratio: float,
        *,
        block_size: BlockSize = 128,
        heads: int = 1,
        seed: int = 0,
        is_causal: bool = False,
    ) -> BlockLayout:
        """The pattern of that name that LEAVES OUT ``sparsity_ratio`` of the blocks: 0.9 keeps one block in ten.

        Names: "local_window", "dilated_sparse", "global_local", "random", "bigbird", "strided". Within one block a row,
        or a UserWarning says what it gave.
        """
        drawn = patterns.named(
            pattern, seq_len, sparsity_ratio, block_size=block_size, heads=heads, seed=seed, is_causal=is_causal
        )
        return _build(cls, *drawn, seq_len, seq_len, block_size)

    @classmethod
    def topk(
        cls,
        scores: Tensor,
        k: int,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
        block_size: BlockSize = 128,
        is_causal: bool = False,
    ) -> BlockLayout:
        """The ``k`` best columns of each row by ``scores``, ([heads,] q_blocks, kv_blocks); never one at -inf."""
        chosen = patterns.topk(scores, k, q_len=q_len, kv_len=kv_len, block_size=block_size, is_causal=is_causal)
        return _build(cls, *chosen, block_size)

    @classmethod
    def threshold(
        cls,
        scores: Tensor,
        mass: float,
        *,
        minimum: int = 1,
        q_len: int | None = None,
        kv_len: int | None = None,
        block_size: BlockSize = 128,
        is_causal: bool = False,
    ) -> BlockLayout:
        """The fewest columns of each row that hold ``mass`` of the softmax of ``scores``, which are logits."""
        chosen = patterns.threshold(
            scores, mass, minimum=minimum, q_len=q_len, kv_len=kv_len, block_size=block_size, is_causal=is_causal
        )
        return _build(cls, *chosen, block_size)


def _build(cls: Any, indptr: Tensor, indices: Tensor, q_len: int, kv_len: int, block_size: BlockSize) -> BlockLayout:
    """The layout, by the class that inherits the constructors: the import of that class here would be a circle."""
    layout: BlockLayout = cls(indptr, indices, q_len, kv_len, block_size=block_size)
    return layout
