"""How PyTorch calls the engine: a custom operator where it traces, a plain autograd function where it runs.

The operator takes the layout as its tensors and sizes; the function takes the layout itself, with the plans it keeps,
an allocator and a store of plans.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import custom_op

from dilated_block_sparse import engine
from dilated_block_sparse.engine import Extras, Options
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.layout.algebra import bytes_of
from dilated_block_sparse.layout.block_layout import living
from dilated_core.resources import Resources

PLAIN = (Tensor, nn.Parameter)
Grads = tuple[Tensor | None, ...]


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    layout: BlockLayout,
    options: Options,
    resources: Resources,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``engine.forward``, differentiable. ``resources`` step aside where PyTorch traces."""
    if torch.compiler.is_compiling() or type(query) not in PLAIN or query.is_meta:
        sizes = [layout.q_len, layout.kv_len, *layout.block_size]
        out, lse = _operator(query, key, value, *extras, layout.indptr, layout.indices, sizes, *options)
    else:
        out, lse = _Function.apply(query, key, value, *extras, layout, options, resources)  # type: ignore[no-untyped-call]
    return out, lse


# ------------------------------------------------------------------------------------------------ where it traces


def _layout(indptr: Tensor, indices: Tensor, sizes: Sequence[int]) -> BlockLayout:
    """The layout of these tensors. The last ones are remembered, with their plans."""
    layout = living(indptr, indices)
    if layout is not None and sizes == [layout.q_len, layout.kv_len, *layout.block_size]:
        return layout
    # Of an exported program, which has copies, perhaps moved to a GPU.
    indptr, indices = (tensor.cpu().contiguous() for tensor in (indptr, indices))
    return _remembered(indptr.shape[0], bytes_of(indptr), bytes_of(indices), tuple(sizes))


@lru_cache(maxsize=32)
def _remembered(heads: int, indptr: bytes, indices: bytes, sizes: tuple[int, ...]) -> BlockLayout:
    q_len, kv_len, rows, columns = sizes
    starts = torch.frombuffer(bytearray(indptr), dtype=torch.int64).view(heads, -1)
    live = (
        torch.frombuffer(bytearray(indices), dtype=torch.int32)
        if indices
        else torch.empty(0, dtype=torch.int32, device="cpu")
    )
    return BlockLayout(starts, live, q_len, kv_len, block_size=(rows, columns))


@custom_op("dilated_block_sparse::attention", mutates_args=())
def _operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    sizes: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    options = Options(is_causal, scale, dropout_p, kernel)
    return engine.forward(query, key, value, Extras(real, bias, seed), _layout(indptr, indices, sizes), options)


@_operator.register_fake
def _results(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return engine.results_of_forward(query)


@custom_op("dilated_block_sparse::attention_backward", mutates_args=())
def _backward_operator(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    real: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    indptr: Tensor,
    indices: Tensor,
    sizes: Sequence[int],
    is_causal: bool,
    scale: float,
    dropout_p: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(is_causal, scale, dropout_p, kernel)
    extras = Extras(real, bias, seed)
    layout = _layout(indptr, indices, sizes)
    *grads, grad_bias = engine.backward(grad_out, grad_lse, query, key, value, out, lse, extras, layout, options)
    return (*grads, query.new_empty(0) if grad_bias is None else grad_bias)  # type: ignore[return-value]


@_backward_operator.register_fake
def _gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    real: Tensor | None,
    bias: Tensor | None,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return (*grads, query.new_empty(0) if bias is None else bias.new_empty(bias.shape))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.sizes, ctx.is_causal, ctx.scale, ctx.dropout_p, ctx.kernel = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Grads:
    out, lse, query, key, value, *rest = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 13
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    options = ctx.sizes, ctx.is_causal, ctx.scale, ctx.dropout_p, ctx.kernel
    *grads, grad_bias = _backward_operator(grad_out, grad_lse, query, key, value, out, lse, *rest, *options)
    return (*grads, None, None if rest[1] is None else grad_bias, *(None for _ in range(8)))


def _refuse(ctx: Any, *grads: Tensor) -> Grads:
    raise RuntimeError("block_sparse_attention: second derivatives are not defined")


_operator.register_autograd(_differentiate, setup_context=_save)
_backward_operator.register_autograd(_refuse)


# ------------------------------------------------------------------------------------------------ where it runs


class _Function(torch.autograd.Function):
    """Of (query, key, value, real, bias, seed, layout, options, resources)."""

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *extras, layout, options, resources = rest
        return engine.forward(query, key, value, Extras(*extras), layout, options, resources)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.layout, ctx.options, ctx.resources = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Grads:
        out, lse, *tensors = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 9
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        rest = ctx.layout, ctx.options, ctx.resources
        *grads, grad_bias = _Gradient.apply(grad_out, grad_lse, out, lse, *tensors, *rest)  # type: ignore[no-untyped-call]
        return (*grads, None, grad_bias, None, None, None, None)


class _Gradient(torch.autograd.Function):
    """Of (grad_out, grad_lse, out, lse, query, key, value, real, bias, seed, layout, options, resources).

    A function of its own, so that a second derivative is an error and not a zero.
    """

    @staticmethod
    def forward(
        grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        query, key, value, real, bias, seed, layout, options, resources = rest
        extras = Extras(real, bias, seed)
        return engine.backward(grad_out, grad_lse, query, key, value, out, lse, extras, layout, options, resources)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("block_sparse_attention: second derivatives are not defined")


for _function in (_Function, _Gradient):
    # Told once here, so that autograd does not inspect it at every call: in a short one that shows.
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]
