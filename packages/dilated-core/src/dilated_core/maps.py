"""attention_map: the exact weights of chosen query rows, sparse, for pictures and audits. Not for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dilated_core import checks
from dilated_core.partial import accumulation_dtype
from dilated_core.plan import check_torchscale, head_phases


@dataclass(frozen=True)
class AttentionMap:
    """Attention weights of some query rows.

    Attributes:
        per_head: sparse COO (batch, heads, rows, seq), coalesced: the weight of each key, counted over all branches
            that reach it. A row sums to 1 (less ``zero_key_share``), or to 0 where it has no key.
        zero_key_share: (batch, heads, rows), what the zero keys of torchscale's padding take; 0 in other semantics.
    """

    per_head: Tensor
    zero_key_share: Tensor

    @property
    def merged(self) -> Tensor:
        """Sparse COO (batch, rows, seq): the mean over the heads that attend at all, so that a row again sums to 1."""
        attending = torch.sparse.sum(self.per_head, 3).to_dense() + self.zero_key_share > 0
        heads = attending.sum(1).clamp(min=1)
        merged = torch.sparse.sum(self.per_head, 1).coalesce()
        batch, row, _ = merged.indices()
        values = merged.values() / heads[batch, row]
        return torch.sparse_coo_tensor(merged.indices(), values, merged.shape, check_invariants=True, is_coalesced=True)


@torch.no_grad()
def attention_map(
    query: Tensor,
    key: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    rows: Sequence[int] | Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    semantics: str = "paper",
) -> AttentionMap:
    """Weights with which ``dilated_attention`` would mix the values, for the query rows asked for.

    The output row is ``per_head @ value`` ("grouped": divided by the number of branches). Costs the keys that the rows
    reach, in time and memory.

    Args:
        query: (batch, seq, heads, head_dim); key: (batch, seq, kv_heads, head_dim).
        segment_lengths, dilation_rates: the pattern, one entry a branch.
        rows: query positions, each in [0, seq).
        is_causal, scale, key_padding_mask, enable_gqa, semantics: as in ``dilated_attention``.

    Returns:
        AttentionMap, in float32 (float64 for float64), without gradients.

    Raises:
        TypeError, ValueError: as ``dilated_attention``; a row out of range.

    >>> query, key = torch.randn(2, 1, 100, 4, 8).unbind()
    >>> weights = attention_map(query, key, [10, 100], [1, 3], rows=[0, 57])
    >>> weights.per_head.shape, weights.merged.shape
    (torch.Size([1, 4, 2, 100]), torch.Size([1, 2, 100]))
    >>> torch.allclose(weights.merged.to_dense().sum(-1), torch.ones(1, 2))
    True
    """
    checks.boolean("is_causal", is_causal)
    checks.boolean("enable_gqa", enable_gqa)
    checks.semantics(semantics)
    lengths, rates = checks.branches(segment_lengths, dilation_rates)
    query, key, _ = checks.query_key_value(query, key, key, same_length=True, enable_gqa=enable_gqa)
    real = checks.key_padding_mask(key_padding_mask, key)
    scale = checks.softmax_scale(scale, query.shape[-1])
    batch, seq_len, heads, _ = query.shape
    positions = _rows(rows, seq_len)
    dtype = accumulation_dtype(query.dtype)
    device = query.device

    head = torch.arange(heads, device=device)
    kv_head = head // max(heads // max(key.shape[2], 1), 1)
    phases = []
    for branch, (w, r) in enumerate(zip(lengths, rates, strict=True)):
        if semantics == "torchscale":
            check_torchscale(branch, min(w, seq_len), r, seq_len)
        of_head = head_phases(semantics, branch, len(rates), r, heads)
        phases.append(torch.tensor([-1 if phase is None else phase for phase in of_head], device=device))

    zero_lse = torch.full((batch, heads, len(positions)), -math.inf, dtype=dtype, device=device)
    lse = zero_lse.clone()
    scored: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for at, position in enumerate(positions):
        for (w, r), phase in zip(zip(lengths, rates, strict=True), phases, strict=True):
            w = min(w, seq_len)
            start = position // w * w
            stop = min(start + w, seq_len)
            offset = (position - start) % r
            members = head[phase == offset]
            if len(members) == 0:
                continue
            keys = torch.arange(start + offset, position + 1 if is_causal else stop, r, device=device)
            scores = torch.einsum(
                "bhd,bkhd->bhk",
                query[:, position, members].to(dtype),
                key[:, keys[:, None], kv_head[members][None, :]].to(dtype),
            ).mul_(scale)
            if real is not None:
                scores.masked_fill_(~real[:, None, keys], -math.inf)
            scored.append((at, members, keys, scores))
            lse[:, members, at] = torch.logaddexp(lse[:, members, at], torch.logsumexp(scores, -1))
            phantoms = -(-w // r) - len(keys)
            if semantics == "torchscale" and phantoms and not is_causal:
                count = torch.tensor(float(phantoms), dtype=dtype, device=device).log()
                zero_lse[:, members, at] = torch.logaddexp(zero_lse[:, members, at], count)
    lse = torch.logaddexp(lse, zero_lse)
    shift = lse.masked_fill(lse == -math.inf, math.inf)  # a row with no key: weights 0

    size = (batch, heads, len(positions), seq_len)
    indices = [torch.empty(4, 0, dtype=torch.int64, device=device)]
    values = [torch.empty(0, dtype=dtype, device=device)]
    for at, members, keys, scores in scored:
        weights = torch.exp(scores - shift[:, members, at, None])
        own = torch.arange(batch, device=device), members, torch.tensor([at], device=device), keys
        indices.append(torch.cartesian_prod(*own).T)
        values.append(weights.flatten())
    per_head = torch.sparse_coo_tensor(torch.cat(indices, 1), torch.cat(values), size, check_invariants=True).coalesce()
    return AttentionMap(per_head, torch.exp(zero_lse - shift))


def _rows(rows: object, seq_len: int) -> list[int]:
    if isinstance(rows, Tensor):
        if rows.ndim != 1 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise TypeError(f"rows: expected a 1-D integer tensor, got {rows.dtype} of shape {tuple(rows.shape)}")
        rows = rows.tolist()
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Sequence):
        raise TypeError(f"rows: expected a sequence of query positions, got {type(rows).__name__}")
    positions = [checks.length(f"rows[{at}]", row) for at, row in enumerate(rows)]
    for at, position in enumerate(positions):
        if position >= seq_len:
            raise ValueError(f"rows[{at}]: expected a position below seq = {seq_len}, got {position}")
    return positions
