"""How much of the true softmax mass blocks hold: of the blocks a layout keeps, and of every block.

Exact, by the log denominators of attention over all keys and over some: share = exp(lse_some - lse_all). No scores are
stored. Imports torch, dilated_core and this package's attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_block_sparse.adaptive.folding import attend_layout
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.layout.checks import BlockSize
from dilated_block_sparse.layout.checks import block_size as check_block_size
from dilated_core import AuxRequest, attend, checks
from dilated_core.partial import accumulation_dtype


@dataclass(frozen=True)
class Recall:
    """Shares of the true softmax mass that kept blocks hold, one a query row.

    Attributes:
        rows: (batch, heads, q_len), float32 or float64, in [0, 1] up to rounding; NaN in a row that has no key at all.

    >>> Recall(torch.tensor([[[1.0, 0.5, 0.75]]])).mean
    tensor([0.7500])
    """

    rows: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over batch and rows, (heads,)."""
        return self._by_head().nanmean(-1)

    @property
    def minimum(self) -> Tensor:
        """The worst row's, (heads,); NaN where no row has a key."""
        shares = self._by_head()
        if not shares.shape[-1]:
            return shares.new_full(shares.shape[:1], math.nan)
        least = shares.masked_fill(shares.isnan(), math.inf).amin(-1)
        return least.masked_fill(least == math.inf, math.nan)

    def quantile(self, share: float) -> Tensor:
        """What that share of the rows, in [0, 1], has at most, (heads,).

        Raises:
            ValueError: ``share`` is outside of [0, 1].
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share: expected a number in [0, 1], got {share}")
        # Sorted rather than torch.quantile, which refuses more than 16M rows. NaN is sorted last.
        shares = self._by_head().sort(-1).values
        if not shares.shape[-1]:
            return shares.new_full(shares.shape[:1], math.nan)
        known = (~shares.isnan()).sum(-1, keepdim=True)
        place = ((known - 1).clamp(min=0) * share).floor().long()
        return shares.gather(-1, place).squeeze(-1)

    def _by_head(self) -> Tensor:
        return self.rows.transpose(0, 1).flatten(1)


@torch.no_grad()
def attention_recall(
    query: Tensor,
    key: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
    backend: str = "auto",
    kernel: str = "auto",
) -> Recall:
    """The share of each row's softmax mass, over all keys it may see, that lies in the blocks of a layout.

    share = sum over kept keys of exp(S) / sum over all keys of exp(S) = exp(lse_kept - lse_all). Dense attention runs
    once: for a study, not for every step.

    Args:
        query: (batch, q_len, heads, head_dim); key: (batch, kv_len, kv_heads, head_dim).
        layout: its heads are 1, kv_heads, heads, or batch * heads as ``BlockSparseAdaptiveAttention.layout`` gives it.
        is_causal, scale, enable_gqa, key_padding_mask, backend, kernel: as in ``block_sparse_attention``.

    Returns:
        Recall.

    Raises:
        TypeError, ValueError: as ``block_sparse_attention``.

    >>> query, key = torch.randn(2, 1, 96, 2, 8).unbind()
    >>> recall = attention_recall(query, key, BlockLayout.full(96, block_size=32))
    >>> torch.allclose(recall.mean, torch.ones(2))
    True
    """
    query, key = checks.autocast(query, key)
    checks.query_key_value(query, key, key, same_length=is_causal, enable_gqa=enable_gqa)
    _, aux = attend_layout(
        query,
        key,
        key,
        layout,
        key_padding_mask=key_padding_mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        backend=backend,
        kernel=kernel,
        return_aux=AuxRequest(lse=True),
    )
    everything = _all_heads(key, query)
    whole = attend(query, everything, everything, is_causal=is_causal, scale=scale, key_padding_mask=key_padding_mask)
    return Recall((aux.lse - whole.lse).exp())  # -inf - -inf is NaN: no key at all


@torch.no_grad()
def block_masses(
    query: Tensor,
    key: Tensor,
    *,
    block_size: BlockSize = 128,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """The true softmax mass of every block, mean over its rows: what a perfect scorer would predict.

    Entry (i, j) is the mean over the rows r of block i of exp(lse of r over block j - lse of r over all keys). Costs
    dense attention twice, in time; in memory one lse of all rows at a time, and the table.

    Args:
        query, key, is_causal, scale, enable_gqa, key_padding_mask, block_size: as in ``block_scores``.

    Returns:
        (batch, heads, q_blocks, kv_blocks), float32 (float64 for float64). A row of it adds up to 1; to less where some
        of its rows have no key at all, which count as 0.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or value.

    >>> query, key = torch.randn(2, 1, 96, 2, 8).unbind()
    >>> masses = block_masses(query, key, block_size=32, is_causal=True)
    >>> masses.shape, torch.allclose(masses.sum(-1), torch.ones(()))
    (torch.Size([1, 2, 3, 3]), True)
    """
    query, key = checks.autocast(query, key)
    checks.query_key_value(query, key, key, same_length=is_causal, enable_gqa=enable_gqa)
    real = checks.key_padding_mask(key_padding_mask, key)
    rows, columns = check_block_size(block_size)
    key = _all_heads(key, query)
    batch, q_len, heads, _ = query.shape
    whole = attend(query, key, key, is_causal=is_causal, scale=scale, key_padding_mask=real).lse
    no_key = whole == -math.inf
    q_blocks = -(-q_len // rows)
    size = (batch, heads, q_blocks, -(-key.shape[1] // columns))
    masses = torch.zeros(size, dtype=accumulation_dtype(query.dtype), device=query.device)
    block_of_row = torch.arange(q_len, device=query.device) // rows
    counts = torch.bincount(block_of_row, minlength=q_blocks)
    for column, start in enumerate(range(0, key.shape[1], columns)):
        stop = min(start + columns, key.shape[1])
        # Causal: the rows of these very positions see a triangle, those after them all, those before them nothing.
        parts = [(start, stop, True), (stop, q_len, False)] if is_causal else [(0, q_len, False)]
        for first, last, triangle in parts:
            if first == last:
                continue
            lse = attend(
                query[:, first:last],
                key[:, start:stop],
                key[:, start:stop],
                is_causal=triangle,
                scale=scale,
                key_padding_mask=None if real is None else real[:, start:stop],
            ).lse
            share = (lse - whole[:, :, first:last]).exp().masked_fill(no_key[:, :, first:last], 0.0)
            masses[..., column].index_add_(2, block_of_row[first:last], share)
    return masses / counts[:, None]


def _all_heads(key: Tensor, query: Tensor) -> Tensor:
    """key with as many heads as query."""
    groups = query.shape[2] // max(1, key.shape[2])
    return key.repeat_interleave(groups, dim=2) if groups > 1 else key
