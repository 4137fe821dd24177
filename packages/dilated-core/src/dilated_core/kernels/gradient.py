"""Backward of one tile, with or without a gradient that arrives through its lse.

The stock backward computes dS = P * (dP - D) with D = rowsum(grad_out * out). A gradient g of lse adds P * g, so all
it changes is D, which becomes D - g. No operator takes g, but each takes wider rows: two more columns that hold 0 in
q, k and v, 1 in grad_out and -g in out leave every score and dP as they were, and turn D into D - g, exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dilated_core.kernels.needs import Needs
from dilated_core.kernels.problem import Problem
from dilated_core.kernels.table import choose

# Head dimensions must stay multiples of 8 for the CUDA kernels.
COLUMNS = 8


def rows_for_backward(lse: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """lse and its gradient as backwards take them: rows with no key get lse +inf, so that their weights are 0.

    Nothing arrives through the lse of such a row, which is no number: its gradient becomes 0.

    Args:
        lse: any shape, -inf in a row with no key.
        grad_lse: the same shape, or None.

    Returns:
        Both, as ``tile_backward`` and every kernel's backward take them.
    """
    no_key = lse == -math.inf
    return lse.masked_fill(no_key, math.inf), None if grad_lse is None else grad_lse.masked_fill(no_key, 0.0)


def tile_backward(
    kernel: str, problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of one tile, given those of its (merged) out and lse.

    Args:
        kernel: a kernel's name, or "auto".
        problem: the tile.
        grad_out, out: like its query.
        grad_lse, lse: (batch, heads, rows); grad_lse None where nothing arrives through lse. lse is +inf in a row with
            no key, and grad_lse 0.

    Returns:
        Like query, key and value, in their dtype or a more precise one.
    """
    device, dtype, head_dim = problem.query.device, problem.query.dtype, problem.query.shape[-1]
    needs = Needs.of(problem)
    if grad_lse is None:
        return choose(kernel, device, dtype, head_dim, needs).backward(problem, grad_out, out, lse)

    query, key, value = (F.pad(tensor, (0, COLUMNS)) for tensor in problem[:3])
    wide = problem._replace(query=query, key=key, value=value)
    # In half precision one column holds g rounded and the next what the rounding lost.
    rounded = grad_lse.to(dtype)
    rest = (grad_lse - rounded).to(dtype)
    zeros = out.new_zeros(*out.shape[:-1], COLUMNS - 2)
    grad_out = torch.cat([grad_out, torch.ones_like(zeros[..., :2]), zeros], -1)
    out = torch.cat([out, -rounded.unsqueeze(-1), -rest.unsqueeze(-1), zeros], -1)
    try:
        engine = choose(kernel, device, dtype, head_dim + COLUMNS, needs)
    except ValueError:  # the forward's kernel ends below this width; any other gives the same gradient
        engine = choose("auto", device, dtype, head_dim + COLUMNS, needs)
    grad_query, grad_key, grad_value = (grad[..., :head_dim] for grad in engine.backward(wide, grad_out, out, lse))
    return grad_query, grad_key, grad_value
