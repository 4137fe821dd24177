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
    semantics: str = "paper",
    rows: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """In how many branches may each query row see each key row?

    Args:
        seq_len: positions.
        heads: query heads.
        segment_lengths, dilation_rates: the pattern, one entry a branch.
        is_causal: whether a row sees only keys at or before it.
        semantics: "paper", "torchscale" or "grouped".
        rows: query positions (1-D, int64) to look at; all by default.
        device: of the result.

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
    count = torch.zeros(heads, len(query), seq_len, dtype=torch.int64, device=device)
    for branch, (w, r) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        phase, member = _phases(branch, len(dilation_rates), r, heads, semantics, device)
        same_segment = query[:, None] // w == key[None, :] // w
        query_kept = ((query % w) % r == phase[:, None]) & member[:, None]  # (heads, queries)
        key_kept = (key % w) % r == phase[:, None]  # (heads, seq)
        count += same_segment & query_kept[:, :, None] & key_kept[:, None, :]
    if is_causal:
        count *= key[None, :] <= query[:, None]
    return count


def _phases(
    branch: int, branches: int, rate: int, heads: int, semantics: str, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Of every head: where in a segment its grid starts, and whether it takes part in the branch at all."""
    head = torch.arange(heads, device=device)
    if semantics == "paper":
        return head % rate, head >= 0
    if semantics == "torchscale":
        return head // math.ceil(heads / rate), head >= 0
    sizes = [heads // branches + (group < heads % branches) for group in range(branches)]
    first = sum(sizes[:branch])
    return torch.full_like(head, branch % rate), (head >= first) & (head < first + sizes[branch])


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    semantics: str = "paper",
    key_padding_mask: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LongNet attention (arXiv 2307.02486, eq. 3-15) as one softmax over each row's multiset of keys.

    Mixing branch softmaxes by their denominators, alpha_i = s_i / sum s_j, is the same as one softmax in which a key
    that m branches reach counts m times. That is what is written here for ``semantics="paper"``. "grouped" is the same
    with each head in one branch only, divided by the number of branches. "torchscale" has other phases, zero keys in
    the padding (not causal), and weights alpha_i that take no gradient.

    Args:
        query, key, value: (batch, seq, heads, head_dim), one floating dtype; float64 makes this the oracle.
        segment_lengths, dilation_rates: the pattern, one entry a branch.
        is_causal: whether a row sees only keys at or before it.
        scale: factor on the scores, 1 / sqrt(head_dim) by default.
        semantics: "paper", "torchscale" or "grouped".
        key_padding_mask: (batch, seq), bool, True where the key is real; all by default.
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
    batch, seq_len, heads, head_dim = query.shape
    if seq_len == 0:
        return torch.zeros_like(query), query.new_zeros(batch, heads, 0)
    rows = torch.arange(seq_len) if rows is None else rows
    rows = rows.to(query.device)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    scores = torch.einsum("bqhd,bkhd->bhqk", query[:, rows], key) * scale
    real = torch.ones(batch, seq_len, dtype=torch.bool) if key_padding_mask is None else key_padding_mask
    real = real.to(query.device)[:, None, None, :]

    def softmax(lengths: Sequence[int], rates: Sequence[int], phantoms: Tensor | None) -> tuple[Tensor, Tensor]:
        count = multiplicity(
            seq_len, heads, lengths, rates, is_causal=is_causal, semantics=semantics, rows=rows, device=query.device
        )
        return _softmax(scores, value, count * real, phantoms)

    if semantics == "paper":
        return softmax(segment_lengths, dilation_rates, None)
    if semantics == "grouped":
        output, lse = softmax(segment_lengths, dilation_rates, None)
        return output / len(dilation_rates), lse

    outputs, lses = [], []
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        w = min(w, seq_len)
        # The sequence is padded to whole segments and each segment to whole steps of the rate: every row meets
        # ceil(w / r) keys of its grid, of which those beyond the sequence or the segment are zeros.
        seen = multiplicity(seq_len, heads, [w], [r], semantics=semantics, rows=rows, device=query.device)
        on_grid = seen.sum(-1)  # of real positions, padded keys among them
        phantoms = torch.where(on_grid > 0, math.ceil(w / r) - on_grid, 0) * (not is_causal)
        output, lse = softmax([w], [r], phantoms)
        outputs.append(output)
        lses.append(lse)
    stacked = torch.stack(lses)
    lse = torch.logsumexp(stacked, 0)
    weights = torch.exp(stacked - lse.masked_fill(lse == -math.inf, 0.0)).detach()
    return torch.einsum("mbhq,mbqhd->bqhd", weights, torch.stack(outputs)), lse


def _softmax(scores: Tensor, value: Tensor, count: Tensor, phantoms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over a multiset: key k counts ``count`` times, beside ``phantoms`` keys of score 0 and value 0.

    Args:
        scores: (batch, heads, queries, keys); count: the same; phantoms: (heads, queries).
    """
    seen = count > 0
    highest = scores.detach().masked_fill(~seen, -math.inf).amax(-1, keepdim=True)
    highest = highest.masked_fill(highest == -math.inf, 0.0)
    if phantoms is not None:
        highest = highest.clamp(min=0.0)
    weight = count * torch.exp((scores - highest).masked_fill(~seen, -math.inf))
    total = weight.sum(-1, keepdim=True)
    if phantoms is not None:
        total = total + phantoms.unsqueeze(-1) * torch.exp(-highest)
    has_key = total > 0
    total = torch.where(has_key, total, 1.0)
    output = torch.einsum("bhqk,bkhd->bqhd", weight / total, value)
    lse = torch.where(has_key, torch.log(total) + highest, -math.inf).squeeze(-1)
    return output, lse
