"""attention_map: the exact weights of chosen query rows, sparse, for pictures and audits. Not for training."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core import checks
from dilated_core.partial import accumulation_dtype
from dilated_core.plan import check_torchscale, head_phases

# torch's switch for the checks is the process's: two threads that set it would each restore what the other had set.
_CHECKING = threading.Lock()


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
        """The mean over the heads that attend at all, so that a row again sums to 1; sparse COO (batch, rows, seq)."""
        attending = torch.sparse.sum(self.per_head, 3).to_dense() + self.zero_key_share > 0
        heads = attending.sum(1).clamp(min=1)
        merged = torch.sparse.sum(self.per_head, 1).coalesce()
        batch, row, _ = merged.indices()
        values = merged.values() / heads[batch, row]
        return _sparse(merged.indices(), values, merged.shape, is_coalesced=True)


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
        query: (batch, seq, heads, head_dim), float64, float32, bfloat16 or float16.
        key: (batch, seq, kv_heads, head_dim), dtype and device of query.
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
    dtype, device = accumulation_dtype(query.dtype), query.device
    lse = torch.full((batch, heads, len(positions)), -math.inf, dtype=dtype, device=device)
    zero_keys = torch.zeros_like(lse)
    reached = []
    for branch, (w, r) in enumerate(zip(lengths, rates, strict=True)):
        phases = head_phases(semantics, branch, len(rates), r, heads)
        if semantics == "torchscale":
            check_torchscale(branch, min(w, seq_len), r, seq_len)
        for reach in _reach(positions, seq_len, w, r, phases, is_causal):
            scores = reach.scores(query, key, scale, real)
            reached.append((reach, scores))
            place = (slice(None), reach.heads, reach.at)
            lse[place] = torch.logaddexp(lse[place], torch.logsumexp(scores, -1))
            if semantics == "torchscale" and not is_causal:
                zero_keys[place] += -(-min(w, seq_len) // r) - len(reach.keys)
    lse = torch.logaddexp(lse, zero_keys.log())
    shift = lse.masked_fill(lse == -math.inf, math.inf)  # a row with no key: weights 0

    indices = [torch.empty(4, 0, dtype=torch.int64, device=device)]
    values = [torch.empty(0, dtype=dtype, device=device)]
    for reach, scores in reached:
        axes = (range(batch), reach.heads, [reach.at], reach.keys)
        indices.append(torch.cartesian_prod(*(torch.tensor(axis, dtype=torch.int64, device=device) for axis in axes)).T)
        values.append(torch.exp(scores - shift[:, reach.heads, reach.at, None]).flatten())
    size = (batch, heads, len(positions), seq_len)
    per_head = _sparse(torch.cat(indices, 1), torch.cat(values), size)
    return AttentionMap(per_head.coalesce(), zero_keys * torch.exp(-shift))


def _sparse(indices: Tensor, values: Tensor, size: tuple[int, ...], *, is_coalesced: bool | None = None) -> Tensor:
    """A sparse COO tensor whose indices were checked."""
    # By the switch, since torch 2.11 warns of check_invariants=True too.
    with _CHECKING, torch.sparse.check_sparse_tensor_invariants(True):
        return torch.sparse_coo_tensor(indices, values, size, is_coalesced=is_coalesced)


class _Reach(NamedTuple):
    """The heads for which a row lies on a branch's grid, and the keys they reach there.

    Attributes:
        at: index of the row among those asked for; position: its own.
    """

    at: int
    position: int
    heads: list[int]
    keys: range

    def scores(self, query: Tensor, key: Tensor, scale: float, real: Tensor | None) -> Tensor:
        """(batch, heads, keys), in the accumulation dtype; -inf at padding."""
        dtype = accumulation_dtype(query.dtype)
        group = query.shape[2] // key.shape[2]
        kept = key[:, self.keys.start : self.keys.stop : self.keys.step, [head // group for head in self.heads]]
        scores = torch.einsum("bhd,bkhd->bhk", query[:, self.position, self.heads].to(dtype), kept.to(dtype)) * scale
        if real is not None:
            scores.masked_fill_(~real[:, None, self.keys.start : self.keys.stop : self.keys.step], -math.inf)
        return scores


def _reach(
    positions: list[int], seq_len: int, segment_length: int, rate: int, phases: Sequence[int | None], is_causal: bool
) -> Iterator[_Reach]:
    """What each row reaches in one branch; rows that lie on no head's grid are left out."""
    for at, position in enumerate(positions):
        start = position // segment_length * segment_length
        offset = (position - start) % rate
        heads = [head for head, phase in enumerate(phases) if phase == offset]
        if heads:
            stop = position + 1 if is_causal else min(start + segment_length, seq_len)
            yield _Reach(at, position, heads, range(start + offset, stop, rate))


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
