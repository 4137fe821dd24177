"""dilated_attention: the front door. Checks its arguments, then hands them to the fused or the plain path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from dilated_core import checks
from dilated_core.composed import composed_attention
from dilated_core.fused import fused_attention


@dataclass(frozen=True)
class AuxRequest:
    """What to return beside the output.

    Attributes:
        lse: the natural log of each row's softmax denominator.
    """

    lse: bool = False


@dataclass(frozen=True)
class AuxOutput:
    """What was asked for beside the output; None where it was not.

    Attributes:
        lse: (batch, heads, seq), float32 (float64 for float64), -inf in a row with no key; differentiable.
    """

    lse: Tensor | None = None


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    semantics: str = "paper",
    kernel: str = "auto",
    fused: bool = True,
    return_aux: None = None,
) -> Tensor: ...


@overload
def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    semantics: str = "paper",
    kernel: str = "auto",
    fused: bool = True,
    return_aux: AuxRequest,
) -> tuple[Tensor, AuxOutput]: ...


def dilated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    semantics: str = "paper",
    kernel: str = "auto",
    fused: bool = True,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """LongNet's dilated self-attention (arXiv 2307.02486, eq. 3-15), exact, with exact gradients.

    Branch i cuts the positions into segments of w_i; in each, head j attends among the positions p with
    (p - segment start) mod r_i == j mod r_i. The branches mix by their softmax denominators s_i,
    alpha_i = s_i / sum_j s_j: one softmax over the multiset of reachable keys. A last, shorter segment is simply
    shorter; nothing is padded. A row that lies on no branch's grid gives 0.

    Args:
        query: (batch, seq, heads, head_dim), float64, float32, bfloat16 or float16, CPU or CUDA. Under autocast,
            float32 inputs are cast to autocast's dtype.
        key, value: (batch, seq, kv_heads, head_dim), dtype and device of query; kv_heads == heads, or with
            ``enable_gqa`` a divisor of it (query head j then meets key head j // (heads // kv_heads)).
        segment_lengths: w_i, in tokens, one a branch.
        dilation_rates: r_i, one a branch, 1 <= r_i <= w_i.
        is_causal: whether a row sees only keys at or before it.
        scale: factor on the scores, 1 / sqrt(head_dim) by default.
        semantics: "paper", as above.
        kernel: a name from ``dilated_core.kernels.table()``, or "auto" for the first that can run.
        fused: False runs the plain composition of torch operations instead of the one fused operator.
        return_aux: ``AuxRequest(lse=True)`` to have the lse too.

    Returns:
        Output like query; with ``return_aux``, a pair of it and an AuxOutput.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or values that do not fit, or a kernel that cannot run them.

    >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
    >>> dilated_attention(q, k, v, [128, 512], [1, 4], is_causal=True).shape
    torch.Size([1, 1000, 4, 16])
    """
    checks.boolean("is_causal", is_causal)
    checks.boolean("enable_gqa", enable_gqa)
    checks.boolean("fused", fused)
    checks.choice("semantics", semantics, checks.SEMANTICS)
    if return_aux is not None and not isinstance(return_aux, AuxRequest):
        raise TypeError(f"return_aux: expected an AuxRequest or None, got {type(return_aux).__name__}")
    checks.kernel(kernel)
    lengths, rates = checks.branches(segment_lengths, dilation_rates)
    query, key, value = _autocast(query, key, value)
    query, key, value = checks.query_key_value(query, key, value, same_length=True, enable_gqa=enable_gqa)
    scale = checks.softmax_scale(scale, query.shape[-1])
    if key.shape[2] != query.shape[2]:
        repeats = query.shape[2] // key.shape[2]
        key, value = key.repeat_interleave(repeats, dim=2), value.repeat_interleave(repeats, dim=2)
    attention = fused_attention if fused else composed_attention
    out, lse = attention(query, key, value, lengths, rates, is_causal, scale, kernel)
    if return_aux is None:
        return out
    return out, AuxOutput(lse=lse if return_aux.lse else None)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, float32 and half precision inputs in autocast's dtype, as SDPA does; else as they came."""
    device = next((tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)), None)
    if device is None or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )
