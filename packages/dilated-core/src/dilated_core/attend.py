"""attend: one tile -> Partial(out, lse), differentiable in both. The only door to a softmax in this project."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.library import custom_op

from dilated_core import checks
from dilated_core.autograd import make_differentiable
from dilated_core.kernels import Dropout, Needs, Problem, choose, rows_for_backward, tile_backward
from dilated_core.partial import Partial, accumulation_dtype
from dilated_core.tiles import last_stride_1


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
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
        key_padding_mask: (batch, kv_seq), bool, True where the key is real; what padding holds has no influence.
        dropout_p: probability of a weight to be dropped; lse is that of all weights.
        generator: on the CPU, of the dropout's seed; the global one by default.
        kernel: a name from ``dilated_core.kernels.table()``, or "auto" for the first that can run.

    Returns:
        Partial: out like query, lse (batch, heads, seq) in float32 (float64 for float64). In rows with no key 0, -inf.

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
    query, scale = checks.query_and_scale(query, scale)
    real = checks.key_padding_mask(key_padding_mask, key)
    dropout_p = checks.probability("dropout_p", dropout_p)
    seed = dropout_seed(dropout_p, generator)
    return Partial(*_attend(query, key, value, real, seed, is_causal, scale, dropout_p, kernel))


def dropout_seed(dropout_p: float, generator: torch.Generator | None) -> Tensor | None:
    """Draw the seed of an attention's dropout, (), int64; None where nothing is dropped.

    A tensor, so that a compiled graph draws it anew at every call.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if generator is not None and generator.device.type != "cpu":  # only the seed is drawn from it
        raise ValueError(f"generator: expected one on the CPU, got one on {generator.device}")
    return torch.randint(2**62, (), generator=generator, device="cpu") if dropout_p > 0.0 else None


def _rows_last(tensor: Tensor) -> Tensor:
    """(batch, seq, heads, head_dim) as the kernels take it: (batch, heads, seq, head_dim), last stride 1."""
    return last_stride_1(tensor).transpose(1, 2)


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> Problem:
    if real is not None:
        padding = ~real[:, :, None, None]
        key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
        real = real.unsqueeze(1).expand(-1, key.shape[2], -1)
    dropout = None if seed is None else Dropout(dropout_p, int(seed))
    return Problem(_rows_last(query), _rows_last(key), _rows_last(value), is_causal, scale, real, dropout)


@custom_op("dilated_core::attend", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    engine = choose(kernel, query.device, query.dtype, query.shape[-1], Needs(real is not None, seed is not None))
    if query.numel() == 0 or key.numel() == 0:
        out, lse = _attend_results(query)
        return out.zero_(), lse.fill_(-math.inf)
    out, lse = engine.forward(_problem(query, key, value, real, seed, is_causal, scale, dropout_p))
    return out.transpose(1, 2).contiguous(), lse.contiguous()


@_attend.register_fake
def _attend_results(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    batch, seq, heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty(batch, heads, seq, dtype=accumulation_dtype(query.dtype))


@custom_op("dilated_core::attend_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    real: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    problem = _problem(query, key, value, real, seed, is_causal, scale, dropout_p)
    if real is not None:
        lse, grad_lse = rows_for_backward(lse, grad_lse)
    grads = tile_backward(kernel, problem, _rows_last(grad_out), grad_lse, _rows_last(out), lse)
    grad_query, grad_key, grad_value = (grad.to(query.dtype).transpose(1, 2).contiguous() for grad in grads)
    return grad_query, grad_key, grad_value


@_attend_backward.register_fake
def _attend_backward_results(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


make_differentiable("attend", _attend, _attend_backward)
