"""How PyTorch calls the fused path: a custom operator where it traces, a plain autograd function where it runs.

Both have the same forward and backward: from ``fused``, tile by tile, or where the kernel takes all tiles at once, from
``one_launch``. The operator is one opaque node under torch.compile, export and fake tensors. The function has less
overhead, works under torch.func's transforms, and takes what no operator can: an allocator and a store of plans.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op

from dilated_core import fused, one_launch
from dilated_core.autograd import make_differentiable
from dilated_core.kernels import Kernel, Needs, choose
from dilated_core.kernels.triton import Triton
from dilated_core.resources import NO_RESOURCES, Resources
from dilated_core.span import Extras, Options

PLAIN = (Tensor, nn.Parameter)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options, resources: Resources
) -> tuple[Tensor, Tensor]:
    """(out, lse), differentiable; see ``fused.forward``. ``resources`` step aside where PyTorch traces."""
    if torch.compiler.is_compiling() or type(query) not in PLAIN or query.is_meta:
        out, lse = _operator(query, key, value, *extras, *options)
    else:
        out, lse = _Function.apply(query, key, value, *extras, options, resources)  # type: ignore[no-untyped-call]
    return out, lse


def _kernel(query: Tensor, extras: Extras, options: Options) -> Kernel:
    needs = Needs(extras.real is not None, options.dropout_p > 0)
    return choose(options.kernel, query.device, query.dtype, query.shape[-1], needs)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, options: Options, resources: Resources
) -> tuple[Tensor, Tensor]:
    kernel = _kernel(query, extras, options)
    if isinstance(kernel, Triton):
        return one_launch.forward(kernel, query, key, value, extras, options, resources)
    return fused.forward(kernel, query, key, value, extras, options, resources)


def _backward(
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
    arguments = (grad_out, grad_lse, query, key, value, out, lse, extras, options, resources)
    kernel = _kernel(query, extras, options)
    return one_launch.backward(kernel, *arguments) if isinstance(kernel, Triton) else fused.backward(*arguments)


@custom_op("dilated_core::dilated_attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    semantics: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    options = Options(tuple(segment_lengths), tuple(dilation_rates), semantics, is_causal, scale, dropout_p, kernel)
    return _forward(query, key, value, Extras(real, cu_seqlens, seed), options, NO_RESOURCES)


@_operator.register_fake
def _results(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return fused.results_of_forward(query)


@custom_op("dilated_core::dilated_attention_backward", mutates_args=())
def _backward_operator(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    semantics: str,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = Options(tuple(segment_lengths), tuple(dilation_rates), semantics, is_causal, scale, dropout_p, kernel)
    extras = Extras(real, cu_seqlens, seed)
    return _backward(grad_out, grad_lse, query, key, value, out, lse, extras, options, NO_RESOURCES)


@_backward_operator.register_fake
def _gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


make_differentiable("dilated_attention", _operator, _backward_operator)


class _Function(torch.autograd.Function):
    """Of (query, key, value, real, cu_seqlens, seed, options, resources)."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *extras, options, resources = rest
        return _forward(query, key, value, Extras(*extras), options, resources)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.options, ctx.resources = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if grad_out is not None or grad_lse is not None:
            grad_out = torch.zeros_like(out) if grad_out is None else grad_out
            grads = _Gradient.apply(grad_out, grad_lse, out, lse, *tensors, ctx.options, ctx.resources)  # type: ignore[no-untyped-call]
        return (*grads, None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _mapped(_Function, info.batch_size, in_dims, inputs)


class _Gradient(torch.autograd.Function):
    """Of (grad_out, grad_lse, out, lse, query, key, value, real, cu_seqlens, seed, options, resources).

    A function of its own, so that a second derivative is an error and not a zero, and so that it can be mapped over.
    """

    @staticmethod
    def forward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        query, key, value, *extras, options, resources = rest
        return _backward(grad_out, grad_lse, query, key, value, out, lse, Extras(*extras), options, resources)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("dilated_attention: second derivatives are not defined")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _mapped(_Gradient, info.batch_size, in_dims, inputs)


for _function in (_Function, _Gradient):
    # Told once here, so that autograd does not inspect it at every call: in a short one that shows.
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]


def _mapped(
    function: type[torch.autograd.Function], size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Call ``function`` with the mapped dimension folded into the batch, and unfold its results."""
    *tensors, cu_seqlens, seed, options, resources = inputs
    if cu_seqlens is not None or seed is not None:
        raise ValueError("torch.func.vmap: packed sequences and dropout cannot be mapped over, use a loop")
    folded = []
    for tensor, dim in zip(tensors, in_dims, strict=False):
        if isinstance(tensor, Tensor):
            mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            tensor = mapped.flatten(0, 1)
        folded.append(tensor)
    results = function.apply(*folded, None, None, options, resources)
    return tuple(result.unflatten(0, (size, -1)) for result in results), (0,) * len(results)
