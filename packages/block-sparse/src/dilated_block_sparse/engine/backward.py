"""Backward: the same rectangles through the kernel's stock backward with the merged out and lse, and the sums of it.

Memory beyond the gradients: what is gathered of one call. Where they are half precision, float32 sums for a quarter
of the heads at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dilated_block_sparse.engine.bias import bias_gradient, widened
from dilated_block_sparse.engine.gather import Scratch, add_at
from dilated_block_sparse.engine.heads import heads_of
from dilated_block_sparse.engine.work import Extras, Options, Work, readable, work_of
from dilated_block_sparse.layout import BlockLayout
from dilated_core.kernels import rows_for_backward, tile_backward
from dilated_core.partial import accumulation_dtype
from dilated_core.resources import NO_RESOURCES, OF_QKV, Resources
from dilated_core.tiles import last_stride_1

SUMS = ("grad_query", "grad_key", "grad_value")


class Gradients(NamedTuple):
    """Of query, key, value and, where there is one, the bias."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    extras: Extras,
    layout: BlockLayout,
    options: Options,
    resources: Resources = NO_RESOURCES,
) -> Gradients:
    """The gradients, given those of out and (or None) of lse, and the forward's results.

    ``out`` and ``lse`` may be those of a larger softmax that the forward's were merged into.
    """
    dtype = accumulation_dtype(query.dtype)
    grads = [
        resources.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, kind=kind)
        for tensor, kind in zip((query, key, value), OF_QKV, strict=True)
    ]
    grad_bias = None if extras.bias is None else torch.zeros_like(extras.bias, dtype=dtype)
    if query.numel() == 0 or key.numel() == 0:
        none = None if extras.bias is None else torch.zeros_like(extras.bias)
        return Gradients(grads[0].zero_(), grads[1].zero_(), grads[2].zero_(), none)
    by_query = [last_stride_1(tensor) for tensor in (query, grad_out, out)]
    by_query += [rows.transpose(1, 2) for rows in rows_for_backward(lse, grad_lse) if rows is not None]
    summed: slice | None = None  # the key heads that the sums are of
    for work in work_of(query, key, value, layout, extras, options, resources, sums=True):
        queries, keys = work.block.queries, work.block.keys
        places = [heads_of(grad, heads) for grad, heads in zip(grads, (queries, keys, keys), strict=True)]
        sums = [_summable(work.scratch, name, place, dtype) for name, place in zip(SUMS, places, strict=True)]
        for total in sums[:1] if summed == keys else sums:  # query heads of one group add to the same keys' sums
            total.zero_()
        summed = keys
        own_keys = [readable(work, name, heads_of(tensor, keys)) for name, tensor in (("keys", key), ("values", value))]
        _add_gradients(work, [heads_of(tensor, queries) for tensor in by_query], own_keys, sums, grad_bias)
        for place, total in zip(places, sums, strict=True):
            if total is not place:
                place.copy_(total)
    if grad_bias is not None and extras.bias is not None:
        grad_bias = grad_bias.to(extras.bias.dtype)
    return Gradients(grads[0], grads[1], grads[2], grad_bias)


def _summable(scratch: Scratch, name: str, place: Tensor, dtype: torch.dtype) -> Tensor:
    """Where gradients are summed: their own place, or scratch where that is less precise."""
    return place if place.dtype == dtype else scratch.empty(name, place.shape, dtype)


def _add_gradients(
    work: Work, by_query: list[Tensor], keys: list[Tensor], sums: list[Tensor], grad_bias: Tensor | None
) -> None:
    """Add the gradients of a head block to ``sums``, (batch, seq, heads, head_dim), and to that of the bias.

    Args:
        by_query: query, grad_out, out, lse and, where there is one, grad_lse; keys: key and value.
    """
    heads, head_dim = by_query[0].shape[2:]
    for call in work.calls(by_query[0], keys[0]):
        query, *others = (tensor[call.batch] for tensor in by_query)
        problem = work.problem(call, query, *(tensor[call.batch] for tensor in keys))
        if problem is None:
            continue
        names = ("grad_out", "out", "lse", "grad_lse")
        grad_out, out, lse, *rest = (
            work.query_rows(name, call, tensor) for name, tensor in zip(names, others, strict=False)
        )
        if grad_bias is not None:
            grad_out, out = widened(grad_out), widened(out)
        grads = tile_backward(work.options.kernel, problem, grad_out, rest[0] if rest else None, out, lse)
        totals = [total[call.batch] for total in sums]
        call.rows.add(totals[0], work.as_rows(call, grads[0][..., :head_dim], heads))
        for total, grad in zip(totals[1:], grads[1:], strict=True):
            call.keys.add(total, work.as_keys(call, grad[..., :head_dim], heads))
        if grad_bias is not None and work.bias is not None:
            of_keys = bias_gradient(grads[1], head_dim, call.keys.count, work.options.scale).to(grad_bias.dtype)
            add_at(grad_bias.unsqueeze(0), work.bias_positions(work.bias, call).flatten(), of_keys.reshape(1, -1))
