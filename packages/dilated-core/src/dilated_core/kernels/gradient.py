"""Backward of one tile, with or without a gradient that arrives through its lse.

The stock backward computes dS = P * (dP - D) with D = rowsum(grad_out * out). A gradient g of lse adds P * g, so all
it changes is D, which becomes D - g. No operator takes g, but each takes wider rows: two more columns that hold 0 in
q, k and v, 1 in grad_out and -g in out leave every score and dP as they were, and turn D into D - g, exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dilated_core.kernels.table import choose

# Head dimensions must stay multiples of 8 for the CUDA kernels.
COLUMNS = 8


def tile_backward(
    kernel: str,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of one tile, given those of its (merged) out and lse.

    Args:
        kernel: a kernel's name, or "auto".
        grad_out, query, key, value, out: (batch, heads, rows, head_dim), last stride 1; key and value may have
            another number of rows.
        grad_lse, lse: (batch, heads, rows); grad_lse None where nothing arrives through lse.

    Returns:
        Like query, key and value, in their dtype or a more precise one.
    """
    head_dim = query.shape[-1]
    if grad_lse is None:
        engine = choose(kernel, query.device, query.dtype, head_dim)
        return engine.backward(grad_out, query, key, value, out, lse, is_causal, scale)

    query, key, value = (F.pad(tensor, (0, COLUMNS)) for tensor in (query, key, value))
    # In half precision one column holds g rounded and the next what the rounding lost.
    rounded = grad_lse.to(out.dtype)
    rest = (grad_lse - rounded).to(out.dtype)
    zeros = out.new_zeros(*out.shape[:-1], COLUMNS - 2)
    ones = torch.ones_like(zeros[..., :2])
    grad_out = torch.cat([grad_out, ones, zeros], -1)
    out = torch.cat([out, -rounded.unsqueeze(-1), -rest.unsqueeze(-1), zeros], -1)
    try:
        engine = choose(kernel, query.device, query.dtype, head_dim + COLUMNS)
    except ValueError:  # the forward's kernel ends below this width; any other gives the same gradient
        engine = choose("auto", query.device, query.dtype, head_dim + COLUMNS)
    grads = engine.backward(grad_out, query, key, value, out, lse, is_causal, scale)
    grad_query, grad_key, grad_value = (grad[..., :head_dim] for grad in grads)
    return grad_query, grad_key, grad_value
