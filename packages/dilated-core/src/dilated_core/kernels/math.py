"""The portable kernel: two matrix products and a softmax, on any device and in every dtype. The fallback for all.

Query rows are taken in chunks, so the scores held at once stay bounded whatever the length. The one kernel that drops
probabilities: each chunk's random numbers come from the tile's seed, in the same order forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dilated_core.kernels.needs import Needs
from dilated_core.kernels.problem import Problem
from dilated_core.partial import accumulation_dtype

# Scores held at once, in elements: 64 MiB in float32, little beside the tensors that need chunking at all.
SCORES_AT_ONCE = 1 << 24


class Math:
    """Attention as textbooks write it, in float32 (float64 for float64 inputs), chunked over query rows."""

    name = "math"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        """None: it runs everywhere."""
        return None

    def recommended(self) -> bool:
        """Always."""
        return True

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        with torch.autocast(problem.query.device.type, enabled=False):  # which would round float32 matrix products
            return _forward(problem)

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, key and value, in float32 (float64 for float64 inputs)."""
        with torch.autocast(problem.query.device.type, enabled=False):
            return _backward(problem, grad_out, out, lse)


def _forward(problem: Problem) -> tuple[Tensor, Tensor]:
    query, value = problem.query, problem.value
    dtype = accumulation_dtype(query.dtype)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:-1], dtype=dtype, device=query.device)
    random = _generator(problem)
    for rows, keys in _chunks(problem):
        scores = _scores(problem, rows, keys)
        chunk_lse = torch.logsumexp(scores, -1)
        weight = torch.softmax(scores, -1)
        if problem.real is not None:  # the softmax of a row with no key is NaN
            weight.masked_fill_((chunk_lse == -math.inf).unsqueeze(-1), 0.0)
        if random is not None:
            weight *= _kept(problem, random, weight)
        lse[:, :, rows] = chunk_lse
        out[:, :, rows] = (weight @ value[:, :, keys].to(dtype)).to(out.dtype)
    return out, lse


def _backward(problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, scale = problem.query, problem.key, problem.value, problem.scale
    dtype = accumulation_dtype(query.dtype)
    grad_query = torch.empty_like(query, dtype=dtype, memory_format=torch.contiguous_format)
    grad_key = torch.zeros_like(key, dtype=dtype, memory_format=torch.contiguous_format)
    grad_value = torch.zeros_like(value, dtype=dtype, memory_format=torch.contiguous_format)
    random = _generator(problem)
    for rows, keys in _chunks(problem):
        go = grad_out[:, :, rows].to(dtype)
        weight = torch.exp(_scores(problem, rows, keys) - lse[:, :, rows, None])
        delta = (go * out[:, :, rows].to(dtype)).sum(-1, keepdim=True)
        grad_weight = go @ value[:, :, keys].to(dtype).transpose(-1, -2)
        used = weight
        if random is not None:
            kept = _kept(problem, random, weight)
            grad_weight *= kept
            used = weight * kept
        grad_score = weight * (grad_weight - delta)
        grad_query[:, :, rows] = grad_score @ key[:, :, keys].to(dtype) * scale
        grad_key[:, :, keys] += grad_score.transpose(-1, -2) @ query[:, :, rows].to(dtype) * scale
        grad_value[:, :, keys] += used.transpose(-1, -2) @ go
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
    if problem.real is not None:
        scores.masked_fill_(~problem.real[:, :, None, keys], -math.inf)
    return scores


def _generator(problem: Problem) -> torch.Generator | None:
    if problem.dropout is None:
        return None
    return torch.Generator(problem.query.device).manual_seed(_mixed(problem.dropout.seed))


def _mixed(seed: int) -> int:
    """All 64 bits of a seed in 32: no more are read by a generator on the CPU. The last steps of splitmix64."""
    seed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    seed = (seed ^ seed >> 27) * 0x94D049BB133111EB % 2**64
    return seed >> 32


def _kept(problem: Problem, random: torch.Generator, weight: Tensor) -> Tensor:
    """Like ``weight``: 0 where a probability is dropped, 1 / (1 - probability) where it is kept."""
    assert problem.dropout is not None
    keep = 1.0 - problem.dropout.probability
    return torch.empty_like(weight).bernoulli_(keep, generator=random).div_(keep)
