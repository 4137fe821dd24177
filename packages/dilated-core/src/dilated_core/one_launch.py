"""A whole dilated attention by the Triton kernel: its pattern as numbers, its results allocated, one launch.

The fused path without its loop over tiles; the rules of the three semantics still come from ``plan``.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from dilated_core.fused import results_of_forward
from dilated_core.kernels.triton import Branches, Triton
from dilated_core.kernels.triton.kernel import Attention
from dilated_core.packing import sequence_bounds
from dilated_core.plan import check_torchscale, head_phases
from dilated_core.resources import OF_QKV, Resources
from dilated_core.span import Extras, Options
from dilated_core.tiles import last_stride_1


def forward(
    kernel: Triton, query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options, resources: Resources
) -> tuple[Tensor, Tensor]:
    """out like query, lse (batch, heads, seq); see ``fused.forward``."""
    attention = _attention(query, key, value, extras, options)
    if query.numel() == 0:
        return results_of_forward(query)
    out = resources.empty(query.shape, dtype=query.dtype, device=query.device, kind="output")
    lse = resources.empty(query.shape[:-1], dtype=torch.float32, device=query.device, kind="output").transpose(1, 2)
    kernel.attend(attention, resources.patterns, out, lse)
    return out, lse


def backward(
    kernel: Triton,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    extras: Extras,
    options: Options,
    resources: Resources,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; see ``fused.backward``."""
    if query.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    attention = _attention(query, key, value, extras, options)
    grad_query, grad_key, grad_value = (
        resources.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, kind=kind)
        for tensor, kind in zip((query, key, value), OF_QKV, strict=True)
    )
    sums = (grad_key, grad_value)
    if query.shape[2] > key.shape[2] and key.dtype != torch.float32:  # of several heads
        sum_key, sum_value = (
            resources.empty(key.shape, dtype=torch.float32, device=key.device, kind="temp") for _ in range(2)
        )
        sums = (sum_key, sum_value)
    grad_out, out = last_stride_1(grad_out), last_stride_1(out)
    kernel.differentiate(attention, resources.patterns, grad_out, grad_lse, out, lse, (grad_query, *sums))
    if sums[0] is not grad_key:
        grad_key.copy_(sums[0])
        grad_value.copy_(sums[1])
    return grad_query, grad_key, grad_value


def _attention(query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options) -> Attention:
    lengths, rates, semantics, is_causal, scale, *_ = options
    _, seq_len, heads, _ = query.shape
    bounds = sequence_bounds(extras.cu_seqlens, seq_len)
    if semantics == "torchscale":
        for start, stop in bounds:
            for branch, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
                check_torchscale(branch, min(length, stop - start), rate, stop - start)
    branches = _branches(lengths, rates, semantics, heads)
    query, key, value = (last_stride_1(tensor) for tensor in (query, key, value))
    return Attention(
        query, key, value, extras.real, branches, tuple(bounds), is_causal, scale, semantics == "torchscale"
    )


@lru_cache(maxsize=64)
def _branches(lengths: tuple[int, ...], rates: tuple[int, ...], semantics: str, heads: int) -> Branches:
    phases = (head_phases(semantics, branch, len(rates), rate, heads) for branch, rate in enumerate(rates))
    numbers = tuple(tuple(-1 if phase is None else phase for phase in of_heads) for of_heads in phases)
    return Branches(tuple(zip(lengths, rates, strict=True)), numbers)
