"""BlockSparseAdaptiveAttention: scores, selection and attention over the kept blocks, as one nn.Module.

Imports torch, dilated_core and this package.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from dilated_block_sparse.adaptive.folding import attend_layout
from dilated_block_sparse.adaptive.scorer import BlockScorer
from dilated_block_sparse.adaptive.scores import POOLS, QUERY_POOLS, block_scores
from dilated_block_sparse.adaptive.selection import check_budget, layout_of, select_blocks
from dilated_block_sparse.functional import BACKENDS
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.layout.checks import block_size as check_block_size
from dilated_core import Allocator, checks

GRADIENTS = ("exact", "straight_through")
KEEP = 0.25


class BlockSparseAdaptiveAttention(nn.Module):
    """Attention over the blocks that matter most to these queries and keys, chosen anew at every call.

    Blocks are scored by pooled rows (``block_scores``, or a BlockScorer), the best of each row of blocks are kept, per
    head and per batch row, and block-sparse attention over them is exact: one softmax a row. Which blocks are kept is a
    step function of the scores, so it has no gradient of its own. Two ways to go on from there:

    - "exact": the gradient of attention over the kept blocks, with the choice taken as a constant. A scorer gets none
      (train it by ``distillation_loss``).
    - "straight_through": the output is the same; beside that gradient, the score of each kept block gets the one that
      a bias on the scores of its pairs would get at 0: the sum of dS over the block. It tells the scorer whether more
      or less weight on that block would lower the loss, and flows on, through the pooled rows, into query and key. It
      is no gradient of the output, which does not move when a score does; blocks that were not kept get none.

    ``torch.compile`` leaves this module out: it runs as it is, between two graphs, for its layout depends on the data.
    Each call plans its own layout, so there is no plan to keep between calls.

    Args:
        block_size: tokens in a block, or (rows, columns).
        keep: int: so many blocks a row; float in (0, 1]: a share of those it could attend. 0.25 where ``mass`` is None.
        mass: instead: the fewest blocks whose predicted softmax adds up to this, in (0, 1].
        scorer: BlockScorer, or None for ``block_scores`` with ``pool`` and ``query_pool``.
        gradient: "exact" or "straight_through".
        sink, window: blocks that are always kept, see ``select_blocks``.
        pool, query_pool: see ``block_scores``; a scorer has its own. Causal with query_pool="mean", a row's blocks are
            chosen with a look at the queries of its whole block; "first" looks at nothing after the row.
        is_causal: whether a row sees only keys at or before it.
        softmax_scale: factor on the scores, 1 / sqrt(head_dim) by default.
        attention_dropout: probability in [0, 1) that a weight is dropped, in training mode only.
        enable_gqa, backend, kernel, allocator: as in ``block_sparse_attention``.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> attention = BlockSparseAdaptiveAttention(block_size=16, keep=3, is_causal=True)
    >>> query, key, value = torch.randn(3, 2, 200, 4, 8).unbind()
    >>> out, layout = attention(query, key, value, return_layout=True)
    >>> out.shape, layout.heads, len(layout.row(12, head=5))
    (torch.Size([2, 200, 4, 8]), 8, 3)
    """

    def __init__(
        self,
        block_size: BlockSize = 128,
        keep: float | None = None,
        *,
        mass: float | None = None,
        scorer: BlockScorer | None = None,
        gradient: str = "exact",
        sink: int = 1,
        window: int | None = 1,
        pool: str = "moments",
        query_pool: str = "mean",
        is_causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        enable_gqa: bool = False,
        backend: str = "auto",
        kernel: str = "auto",
        allocator: Allocator | None = None,
    ) -> None:
        super().__init__()
        if keep is None and mass is None:
            keep = KEEP
        check_budget(keep, mass)
        if scorer is not None and not isinstance(scorer, BlockScorer):
            raise TypeError(f"scorer: expected a BlockScorer or None, got {type(scorer).__name__}")
        if scorer is not None and (pool, query_pool) != (POOLS[0], QUERY_POOLS[0]):
            raise ValueError(f"pool, query_pool: expected none beside a scorer, got {pool!r}, {query_pool!r}")
        self.block_size = check_block_size(block_size)
        self.keep, self.mass = keep, mass
        self.scorer = scorer
        self.gradient = checks.choice("gradient", gradient, GRADIENTS)
        self.sink = checks.length("sink", sink)
        self.window = None if window is None else checks.length("window", window)
        self.pool = checks.choice("pool", pool, POOLS)
        self.query_pool = checks.choice("query_pool", query_pool, QUERY_POOLS)
        self.is_causal = checks.boolean("is_causal", is_causal)
        checks.softmax_scale(softmax_scale, 1, name="softmax_scale")
        self.softmax_scale = softmax_scale
        self.attention_dropout = checks.probability("attention_dropout", attention_dropout)
        self.enable_gqa = checks.boolean("enable_gqa", enable_gqa)
        self.backend = checks.choice("backend", backend, BACKENDS)
        self.kernel = checks.kernel(kernel)
        checks.resources(allocator, None)
        self.allocator = allocator

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        return_layout: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        return_layout: Literal[True],
    ) -> tuple[Tensor, BlockLayout]: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        return_layout: bool = False,
    ) -> Tensor | tuple[Tensor, BlockLayout]:
        """Choose blocks and attend them.

        Args:
            query: (batch, q_len, heads, head_dim); key, value: (batch, kv_len, kv_heads, head_dim).
            is_causal: overrides the module's own, for this call.
            key_padding_mask: (batch, kv_len), bool, True where the key is real. Blocks of only padding are never kept.
            query_padding_mask: (batch, q_len), bool, True where the row is real: in self-attention the same again. The
                others have no say in the choice, and attend like any other.
            return_layout: whether to return the layout too.

        Returns:
            Output like query; with ``return_layout`` a pair of it and the layout, whose heads are batch * heads.

        Raises:
            TypeError, ValueError: as ``block_sparse_attention`` and ``block_scores``.
        """
        causal = self.is_causal if is_causal is None else checks.boolean("is_causal", is_causal)
        query, key, value = checks.autocast(query, key, value)
        checks.query_key_value(query, key, value, same_length=causal, enable_gqa=self.enable_gqa)
        through = self.gradient == "straight_through" and torch.is_grad_enabled()
        with torch.set_grad_enabled(through):
            scores = self.scores(
                query, key, is_causal=causal, key_padding_mask=key_padding_mask, query_padding_mask=query_padding_mask
            )
        kept = self._select(scores, query, key, causal)
        layout = layout_of(kept, query.shape[1], key.shape[1], self.block_size)
        bias = None
        if through and scores.requires_grad:
            chosen = scores[kept]  # row by row, as layout.indices
            bias = chosen - chosen.detach()  # 0, with the gradient of the score
        out: Tensor = attend_layout(
            query,
            key,
            value,
            layout,
            key_padding_mask=key_padding_mask,
            block_bias=bias,
            is_causal=causal,
            scale=self.softmax_scale,
            dropout_p=self.attention_dropout if self.training else 0.0,
            enable_gqa=self.enable_gqa,
            backend=self.backend,
            kernel=self.kernel,
            allocator=self.allocator,
        )
        return (out, layout) if return_layout else out

    def scores(
        self,
        query: Tensor,
        key: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The scores that blocks are chosen by.

        Args:
            query, key, is_causal, key_padding_mask, query_padding_mask: as in ``forward``.

        Returns:
            (batch, heads, q_blocks, kv_blocks), float32 (float64 for float64), -inf where nothing can be attended.

        Raises:
            TypeError, ValueError: as ``block_scores``.
        """
        causal = self.is_causal if is_causal is None else is_causal
        if self.scorer is not None:
            scores: Tensor = self.scorer(
                query,
                key,
                block_size=self.block_size,
                scale=self.softmax_scale,
                is_causal=causal,
                key_padding_mask=key_padding_mask,
                query_padding_mask=query_padding_mask,
            )
            return scores
        return block_scores(
            query,
            key,
            block_size=self.block_size,
            scale=self.softmax_scale,
            is_causal=causal,
            enable_gqa=self.enable_gqa,
            key_padding_mask=key_padding_mask,
            query_padding_mask=query_padding_mask,
            pool=self.pool,
            query_pool=self.query_pool,
        )

    @torch.no_grad()
    def layout(
        self,
        query: Tensor,
        key: Tensor,
        *,
        is_causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
    ) -> BlockLayout:
        """The layout that ``forward`` would attend.

        Args:
            query, key, is_causal, key_padding_mask, query_padding_mask: as in ``forward``.

        Returns:
            BlockLayout of batch * heads heads, those of the first batch row first.

        Raises:
            TypeError, ValueError: as ``block_scores``.
        """
        causal = self.is_causal if is_causal is None else is_causal
        scores = self.scores(
            query, key, is_causal=causal, key_padding_mask=key_padding_mask, query_padding_mask=query_padding_mask
        )
        return layout_of(self._select(scores, query, key, causal), query.shape[1], key.shape[1], self.block_size)

    def _select(self, scores: Tensor, query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
        return select_blocks(
            scores,
            query.shape[1],
            key.shape[1],
            block_size=self.block_size,
            keep=self.keep,
            mass=self.mass,
            sink=self.sink,
            window=self.window,
            is_causal=is_causal,
        )

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        pooled = "" if self.scorer is not None else f"pool={self.pool!r}, query_pool={self.query_pool!r}, "
        budget = f"keep={self.keep}" if self.mass is None else f"mass={self.mass}"
        return (
            f"block_size={self.block_size}, {budget}, gradient={self.gradient!r}, sink={self.sink}, "
            f"window={self.window}, {pooled}is_causal={self.is_causal}"
        )
