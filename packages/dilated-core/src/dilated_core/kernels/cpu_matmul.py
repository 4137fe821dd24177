"""bfloat16 attention on CPUs that multiply bfloat16 natively: matrix products over blocks that stay in cache.

PyTorch's flash operator runs at a fraction of such a CPU's bfloat16 rate. Here the products are whole ``bmm`` calls and
the softmax is PyTorch's own fused one; docs/benchmarks/cpu_matmul.md has the ratios. The one hazard is that a bfloat16
``bmm`` rounds its result, and a rounded score is a wrong weight. So each score is kept as two bfloat16 numbers, the
rounded product and what the rounding lost: ``baddbmm(high, q, k, beta=-1)`` subtracts before it rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.kernels.cpu_flash import CPUFlash
from dilated_core.kernels.needs import NO_DROPOUT, Needs
from dilated_core.kernels.problem import Problem

# Query rows a block, and scores a block: float32 scores and weights, 2 MiB each, beside two halves of that.
BLOCK_ROWS = 256
BLOCK_SCORES = 1 << 19
# Below this many scores a call, the dozen operations of a block cost more than the flash operator's one.
FEWEST_SCORES = 1 << 17
# Beyond this many keys a block of rows no longer lies in cache, and flash, which cuts the keys too, is faster.
MOST_KEYS = 1 << 12


class CPUMatmul:
    """Forward and backward by batched matrix products; hands small problems to ``cpu_flash``."""

    name = "cpu_matmul"

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int, needs: Needs) -> str | None:
        """Why it cannot run here: not a CPU, not bfloat16, or a CPU without native bfloat16 products."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        if dtype != torch.bfloat16:
            return f"it takes bfloat16, not {dtype}"
        if needs.dropout:
            return NO_DROPOUT
        if not _multiplies_bfloat16():
            return "this CPU has no native bfloat16 products (avx512_bf16 or amx_bf16)"
        return _FLASH.refusal(device, dtype, head_dim, needs)

    def recommended(self) -> bool:
        """With one thread. More must meet after each of its many operations, and wait where a core has other work."""
        return torch.get_num_threads() == 1

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Return (out, lse) of the tile."""
        if not _pays(problem):
            return _FLASH.forward(problem)
        out = torch.empty_like(problem.query)
        lse = torch.empty_like(problem.query[..., 0], dtype=torch.float32)
        for block in _blocks(problem, by_query=(out, lse), by_key=()):
            out_rows, lse_rows = block.by_query
            weight, lse_rows[:] = block.softmax()
            out_rows[:] = torch.bmm(block.low.copy_(weight), block.value)
        return out, lse

    def backward(self, problem: Problem, grad_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of query, in bfloat16, and of key and value, in float32."""
        if not _pays(problem):
            return _FLASH.backward(problem, grad_out, out, lse)
        grad_query = torch.empty_like(problem.query)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in problem[1:3])
        for block in _blocks(problem, by_query=(grad_out, out, lse, grad_query), by_key=(grad_key, grad_value)):
            go, out_rows, lse_rows, dq = block.by_query
            dk, dv = block.by_key
            weight, own_lse = block.softmax()
            weight.mul_(torch.exp(own_lse - lse_rows).unsqueeze(-1))  # this tile's share of the joint softmax
            dv += torch.bmm(block.low.copy_(weight).transpose(1, 2), go)
            row_sum = (go.float() * out_rows).sum(-1, keepdim=True)
            torch.bmm(go, block.value.transpose(1, 2), out=block.low)
            grad_score = torch.sub(block.low, row_sum, out=block.scores)
            torch.mul(grad_score, weight, out=block.low)
            dk.add_(torch.bmm(block.low.transpose(1, 2), block.query), alpha=problem.scale)
            dq[:] = torch.bmm(block.low, block.key).mul_(problem.scale)
        return grad_query, grad_key, grad_value


_FLASH = CPUFlash()


@cache
def _multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _pays(problem: Problem) -> bool:
    batch, heads, rows, _ = problem.query.shape
    keys = problem.key.shape[2]
    return keys <= MOST_KEYS and batch * heads * rows * keys >= FEWEST_SCORES


class _Block(NamedTuple):
    """Some heads' query rows and all the keys they may see; tensors (heads, rows or keys, ...)."""

    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor | None
    by_query: list[Tensor]
    by_key: list[Tensor]
    first_row: int
    is_causal: bool
    scale: float
    # Scratch, (heads, rows, keys): two of bfloat16, two of float32.
    high: Tensor
    low: Tensor
    scores: Tensor
    weights: Tensor

    def softmax(self) -> tuple[Tensor, Tensor]:
        """Weights (in ``weights``) and lse, float32; 0 and -inf in a row with no key."""
        query, factor = self.query, self.scale
        if math.frexp(factor)[0] == 0.5:  # a power of two scales bfloat16 exactly
            query, factor = query * factor, 1.0
        key = self.key.transpose(1, 2)
        torch.bmm(query, key, out=self.high)
        torch.baddbmm(self.high, query, key, beta=-1, out=self.low)
        scores = self.scores.copy_(self.high).add_(self.low)
        if factor != 1.0:
            scores.mul_(factor)
        if self.is_causal:
            rows, keys = scores.shape[1:]
            future = torch.full((rows, rows), -math.inf).triu_(1)
            scores[..., self.first_row : keys] += future
        if self.real is not None:
            scores.masked_fill_(~self.real.unsqueeze(1), -math.inf)
        highest = scores.amax(-1)
        weights = torch.softmax(scores, -1, out=self.weights)
        # The highest weight is exp(highest - lse).
        lse = highest - weights.amax(-1).log_()
        if self.real is not None:
            no_key = highest == -math.inf
            weights.masked_fill_(no_key.unsqueeze(-1), 0.0)
            lse.masked_fill_(no_key, -math.inf)
        return weights, lse


def _blocks(problem: Problem, by_query: tuple[Tensor, ...], by_key: tuple[Tensor, ...]) -> Iterator[_Block]:
    """Cut the problem into blocks. ``by_query``, ``by_key``: tensors that go with the query and the key rows."""
    rows, keys = problem.query.shape[2], problem.key.shape[2]
    block_rows = min(rows, BLOCK_ROWS)
    block_heads = max(1, BLOCK_SCORES // (block_rows * keys))
    size = min(block_heads, problem.query.shape[0] * problem.query.shape[1]) * block_rows * keys
    scratch = [torch.empty(size, dtype=dtype) for dtype in (torch.bfloat16,) * 2 + (torch.float32,) * 2]
    real = () if problem.real is None else (problem.real,)
    for tensors in _by_head(*problem[:3], *by_query, *by_key, *real):
        total_heads = tensors[0].shape[0]
        for head in range(0, total_heads, block_heads):
            query, key, value, *others = (tensor[head : head + block_heads] for tensor in tensors)
            for first in range(0, rows, block_rows):
                chunk = slice(first, min(first + block_rows, rows))
                seen = slice(0, chunk.stop if problem.is_causal else keys)
                shape = (query.shape[0], chunk.stop - first, seen.stop)
                yield _Block(
                    query[:, chunk],
                    key[:, seen],
                    value[:, seen],
                    others[-1][:, seen] if real else None,
                    [tensor[:, chunk] for tensor in others[: len(by_query)]],
                    [tensor[:, seen] for tensor in others[len(by_query) : len(by_query) + len(by_key)]],
                    first,
                    problem.is_causal,
                    problem.scale,
                    *(buffer[: math.prod(shape)].view(shape) for buffer in scratch),
                )


def _by_head(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(batch, heads, ...) tensors as (heads, ...): all at once where the two join without a copy, else by batch."""
    batch = tensors[0].shape[0]
    if batch == 1 or all(tensor.stride(0) == tensor.stride(1) * tensor.shape[1] for tensor in tensors):
        yield tuple(tensor.flatten(0, 1) for tensor in tensors)
    else:
        yield from zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
