"""The portable kernel: two matrix products and a softmax, on any device and in every dtype. The fallback for all.

Query rows are taken in chunks, so the scores held at once stay bounded whatever the length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dilated_core.kernels.problem import Problem
from dilated_core.partial import accumulation_dtype

# Scores held at once, in elements: 64 MiB in float32, little beside the tensors that need chunking at all.
SCORES_AT_ONCE = 1 << 24


class Math:
    """Attention as textbooks write it, in float32 (float64 for float64 inputs), chunked over query rows."""

    name = "math"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """None: it runs everywhere."""
        return None

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        query, _, value, _, _ = problem
        dtype = accumulation_dtype(query.dtype)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty(query.shape[:-1], dtype=dtype, device=query.device)
        for rows, keys in _chunks(problem):
            scores = _scores(problem, rows, keys)
            lse[:, :, rows] = torch.logsumexp(scores, -1)
            out[:, :, rows] = (torch.softmax(scores, -1) @ value[:, :, keys].to(dtype)).to(out.dtype)
        return out, lse

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value, in float32 (float64 for float64 inputs)."""
        query, key, value, _, scale = problem
        dtype = accumulation_dtype(query.dtype)
        grad_query = torch.empty_like(query, dtype=dtype, memory_format=torch.contiguous_format)
        grad_key = torch.zeros_like(key, dtype=dtype, memory_format=torch.contiguous_format)
        grad_value = torch.zeros_like(value, dtype=dtype, memory_format=torch.contiguous_format)
        for rows, keys in _chunks(problem):
            go = grad_out[:, :, rows].to(dtype)
            shift = lse[:, :, rows, None]
            # A row with no key has lse -inf: shifted by 0 instead, its scores (all -inf) still give weight 0.
            shift = shift.masked_fill(shift == -math.inf, 0.0)
            weight = torch.exp(_scores(problem, rows, keys) - shift)
            delta = (go * out[:, :, rows].to(dtype)).sum(-1, keepdim=True)
            grad_score = weight * (go @ value[:, :, keys].to(dtype).transpose(-1, -2) - delta)
            grad_query[:, :, rows] = grad_score @ key[:, :, keys].to(dtype) * scale
            grad_key[:, :, keys] += grad_score.transpose(-1, -2) @ query[:, :, rows].to(dtype) * scale
            grad_value[:, :, keys] += weight.transpose(-1, -2) @ go
        return grad_query, grad_key, grad_value


def _chunks(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """(query rows, key rows) of each chunk; causal chunks leave out the keys that none of their rows sees."""
    batch, heads, rows, _ = problem.query.shape
    keys = problem.key.shape[2]
    step = max(1, SCORES_AT_ONCE // (batch * heads * keys))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        yield slice(start, stop), slice(0, stop if problem.is_causal else keys)


def _scores(problem: Problem, rows: slice, keys: slice) -> Tensor:
    dtype = accumulation_dtype(problem.query.dtype)
    query, key = problem.query[:, :, rows].to(dtype), problem.key[:, :, keys].to(dtype)
    scores = query @ key.transpose(-1, -2) * problem.scale
    if problem.is_causal:
        row = torch.arange(rows.start, rows.stop, device=query.device)
        scores.masked_fill_(torch.arange(keys.stop, device=query.device) > row[:, None], -math.inf)
    return scores
