"""The definition, written to be believed: O(n^2), obvious, any floating dtype. Everything else is compared with it.

Shares nothing with the fast path: no plan, no tiles, no merge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def multiplicity(
    seq_len: int,
    heads: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    rows: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """In how many branches may each query row see each key row?

    Returns:
        (heads, seq or len(rows), seq), int64: 0 where the pair never meets.

    >>> multiplicity(4, 1, [2, 4], [1, 2])[0]
    tensor([[2, 1, 1, 0],
            [1, 1, 0, 0],
            [1, 0, 2, 1],
            [0, 0, 1, 1]])
    """
    key = torch.arange(seq_len, device=device)
    query = key if rows is None else rows.to(key.device)
    head = torch.arange(heads, device=device)
    count = torch.zeros(heads, len(query), seq_len, dtype=torch.int64, device=device)
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        same_segment = query[:, None] // w == key[None, :] // w
        query_kept = (query % w) % r == (head % r)[:, None]  # (heads, queries)
        key_kept = (key % w) % r == (head % r)[:, None]  # (heads, seq)
        count += same_segment & query_kept[:, :, None] & key_kept[:, None, :]
    if is_causal:
        count *= key[None, :] <= query[:, None]
    return count


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LongNet attention (arXiv 2307.02486, eq. 3-15) as one softmax over each row's multiset of keys.

    Mixing branch softmaxes by their denominators, alpha_i = s_i / sum s_j, is the same as one softmax in which a key
    that m branches reach counts m times. That is what is written here.

    Args:
        query, key, value: (batch, seq, heads, head_dim), one floating dtype; float64 makes this the oracle.
        segment_lengths, dilation_rates: the pattern, one entry a branch.
        is_causal: whether a row sees only keys at or before it.
        scale: factor on the scores, 1 / sqrt(head_dim) by default.
        rows: query positions (1-D, int64) to compute; all by default. Makes long sequences checkable.

    Returns:
        output (batch, seq or len(rows), heads, head_dim), zeros in rows with no key, and
        lse (batch, heads, seq or len(rows)), the natural log of the softmax denominator, -inf in such rows.
        Autograd differentiates both.

    >>> x = torch.ones(1, 4, 2, 8, dtype=torch.float64)
    >>> out, lse = dilated_attention(x, x, x, [2, 4], [1, 2])
    >>> bool((out == 1).all()), lse.shape
    (True, torch.Size([1, 2, 4]))
    """
    if query.shape[1] == 0:
        return torch.zeros_like(query), query.new_zeros(query.shape[0], query.shape[2], 0)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    count = multiplicity(
        query.shape[1],
        query.shape[2],
        segment_lengths,
        dilation_rates,
        is_causal=is_causal,
        rows=rows,
        device=query.device,
    )
    if rows is not None:
        query = query[:, rows.to(query.device)]
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    seen = count > 0
    highest = scores.detach().masked_fill(~seen, -math.inf).amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    weight = count * torch.exp((scores - highest).masked_fill(~seen, -math.inf))
    total = weight.sum(-1, keepdim=True)
    has_key = total > 0
    total = torch.where(has_key, total, 1.0)
    output = torch.einsum("bhqk,bkhd->bqhd", weight / total, value)
    lse = torch.where(has_key, torch.log(total) + highest, -math.inf).squeeze(-1)
    return output, lse
