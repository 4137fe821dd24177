"""One autograd rule for every attention operator here: (query, key, value, *options) -> (out, lse)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

Gradients = tuple[Tensor | None, ...]


def make_differentiable(forward: CustomOpDef, backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Register ``backward`` as the gradient of ``forward``.

    Args:
        forward: operator of (query, key, value, *options) that returns (out, lse).
        backward: function of (grad_out, grad_lse or None, query, key, value, out, lse, *options) that returns the
            gradients of query, key and value.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, *output)

    def differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Gradients:
        query, key, value, out, lse = ctx.saved_tensors
        grads: Gradients = (None, None, None)
        if grad_out is not None or grad_lse is not None:
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            grads = backward(grad_out, grad_lse, query, key, value, out, lse, *ctx.options)
        return (*grads, *(None for _ in ctx.options))

    forward.register_autograd(differentiate, setup_context=save)
