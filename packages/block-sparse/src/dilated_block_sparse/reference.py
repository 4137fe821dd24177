"""The definition: one masked softmax a row, O(q_len * kv_len), slow and obvious. What all else is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dilated_block_sparse.layout import BlockLayout
from dilated_core.partial import Partial


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    block_bias: Tensor | None = None,
    rows: slice | None = None,
) -> Partial:
    """out = softmax(scale * q k^T + bias, over the live keys of each row) v, and the log of its denominator.

    Differentiable by autograd, in the dtype of its inputs: pass float64.

    Args:
        query: (batch, q_len, heads, head_dim).
        key, value: (batch, kv_len, kv_heads, head_dim); query head j meets key head j // (heads // kv_heads).
        layout: of 1, kv_heads or heads heads.
        is_causal: row i sees keys j <= i only.
        key_padding_mask: (batch, kv_len), bool, True where the key is real.
        block_bias: (layout.live,), added to the scores of each block.
        rows: only these, from one block's edge to another's, of a sequence too long for all; without block_bias.

    Returns:
        Partial: out like query; lse (batch, heads, q_len). 0 and -inf in a row with no key.
    """
    first = 0
    if rows is not None:
        first = rows.start
        query, layout = query[:, rows], layout.q_slice(rows.start, rows.stop)
    heads, group = query.shape[2], query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(group, 2) for tensor in (key, value))
    if key_padding_mask is not None:
        padding = ~key_padding_mask[:, :, None, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale
    repeat = heads // layout.heads
    live = layout.to_dense().to(query.device).repeat_interleave(repeat, 0)
    if block_bias is not None:
        scores = scores + _spread(layout, block_bias).repeat_interleave(repeat, 0)
    if is_causal:
        live = live & torch.ones_like(live).tril(first)
    live = live.expand_as(scores)
    if key_padding_mask is not None:
        live = live & key_padding_mask[:, None, None, :]
    has_key = live.any(-1)
    scores = scores.masked_fill(~live, -math.inf)
    lse = torch.logsumexp(scores.masked_fill(~has_key.unsqueeze(-1), 0.0), -1).masked_fill(~has_key, -math.inf)
    weights = torch.exp(scores - lse.masked_fill(~has_key, 0.0).unsqueeze(-1))
    return Partial(torch.einsum("bhij,bjhd->bihd", weights, value), lse)


def _spread(layout: BlockLayout, bias: Tensor) -> Tensor:
    """The bias of every pair, (heads, q_len, kv_len)."""
    pairs = bias.new_zeros(layout.heads, layout.q_blocks, layout.kv_blocks)
    pairs[layout.to_blocks()] = bias
    rows, columns = layout.block_size
    pairs = pairs.repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    return pairs[:, : layout.q_len, : layout.kv_len]
