"""One autograd rule for every attention operator here: (query, key, value, *options) -> (out, lse)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

Gradients = tuple[Tensor | None, ...]


def make_differentiable(name: str, forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Register ``backward`` as the gradient of ``forward``.

    Args:
        name: of the public function, for errors.
        forward: operator of (query, key, value, *options) that returns (out, lse).
        backward: operator of (grad_out, grad_lse or None, query, key, value, out, lse, *options) that returns the
            gradients of query, key and value.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, *options = inputs
        # Options that are tensors are saved like the others, so that a change in place before backward is noticed.
        tensors = [option for option in options if isinstance(option, Tensor)]
        ctx.options = [None if isinstance(option, Tensor) else option for option in options]
        ctx.tensor_at = [at for at, option in enumerate(options) if isinstance(option, Tensor)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, *output, *tensors)

    def differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Gradients:
        query, key, value, out, lse, *tensors = ctx.saved_tensors
        options = list(ctx.options)
        for at, tensor in zip(ctx.tensor_at, tensors, strict=True):
            options[at] = tensor
        grads: Gradients = (None, None, None)
        if grad_out is not None or grad_lse is not None:
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            grads = backward(grad_out, grad_lse, query, key, value, out, lse, *options)
        return (*grads, *(None for _ in options))

    def refuse(ctx: Any, *grads: Tensor) -> Gradients:
        raise RuntimeError(f"{name}: second derivatives are not defined")

    forward.register_autograd(differentiate, setup_context=save)
    backward.register_autograd(refuse)
