"""attend: one tile -> Partial(out, lse), differentiable in both. The only door to a softmax in this project."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import custom_op

from dilated_core import checks
from dilated_core.autograd import make_differentiable
from dilated_core.kernels import Problem, choose, tile_backward
from dilated_core.partial import Partial, accumulation_dtype


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    kernel: str = "auto",
) -> Partial:
    """Softmax attention of the query rows over these keys, with the log of its denominator.

    out = softmax(scale * q k^T) v and lse = log sum exp(scale * q k^T). Both carry exact gradients, so that merged
    partials do too.

    Args:
        query: (batch, seq, heads, head_dim), float64, float32, bfloat16 or float16, CPU or CUDA.
        key, value: (batch, kv_seq, heads, head_dim), dtype and device of query.
        is_causal: row i sees keys up to i; needs kv_seq == seq.
        scale: factor on the scores, 1 / sqrt(head_dim) by default.
        kernel: a name from ``dilated_core.kernels.table()``, or "auto" for the first that can run.

    Returns:
        Partial: out like query, lse (batch, heads, seq) in float32 (float64 for float64). With kv_seq = 0: 0 and -inf.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes or devices that do not fit, or a kernel that cannot run them.

    >>> query, key = torch.randn(1, 3, 2, 8), torch.randn(1, 5, 2, 8)
    >>> out, lse = attend(query, key, torch.ones_like(key))
    >>> torch.allclose(out, torch.ones_like(out)), lse.shape
    (True, torch.Size([1, 2, 3]))
    """
    checks.boolean("is_causal", is_causal)
    checks.kernel(kernel)
    query, key, value = checks.query_key_value(query, key, value, same_length=is_causal)
    scale = checks.softmax_scale(scale, query.shape[-1])
    return Partial(*_attend(query, key, value, is_causal, scale, kernel))


def _rows_last(tensor: Tensor) -> Tensor:
    """(batch, seq, heads, head_dim) as the kernels take it: (batch, heads, seq, head_dim), last stride 1."""
    return (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2)


def _problem(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Problem:
    return Problem(_rows_last(query), _rows_last(key), _rows_last(value), is_causal, scale)


@custom_op("dilated_core::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    engine = choose(kernel, query.device, query.dtype, query.shape[-1])
    if query.numel() == 0 or key.numel() == 0:
        out, lse = _attend_results(query)
        return out.zero_(), lse.fill_(-math.inf)
    out, lse = engine.forward(_problem(query, key, value, is_causal, scale))
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _attend_results(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    batch, seq, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, seq, dtype=accumulation_dtype(query.dtype))


_attend.register_fake(_attend_results)


@custom_op("dilated_core::attend_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    problem = _problem(query, key, value, is_causal, scale)
    grads = tile_backward(kernel, problem, _rows_last(grad_out), grad_lse, _rows_last(out), lse)
    grad_query, grad_key, grad_value = (grad.to(query.dtype).transpose(1, 2).contiguous() for grad in grads)
    return grad_query, grad_key, grad_value


def _attend_backward_results(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


_attend_backward.register_fake(_attend_backward_results)


make_differentiable(_attend, _attend_backward)
