"""streamed_attention: the front door. Checks its arguments, then hands them to the engine through autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from dilated_core import Allocator, AuxOutput, AuxRequest, checks
from dilated_ring.streaming import engine
from dilated_ring.streaming.engine import Options
from dilated_ring.streaming.sources import Source, StoredTensor, as_source


@overload
def streamed_attention(
    query: Tensor,
    key: Tensor | StoredTensor,
    value: Tensor | StoredTensor,
    *,
    ring_size: int,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    kernel: str = "auto",
    return_aux: None = None,
    progress: Callable[[int, int], object] | None = None,
    allocator: Allocator | None = None,
) -> Tensor: ...


@overload
def streamed_attention(
    query: Tensor,
    key: Tensor | StoredTensor,
    value: Tensor | StoredTensor,
    *,
    ring_size: int,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    kernel: str = "auto",
    return_aux: AuxRequest,
    progress: Callable[[int, int], object] | None = None,
    allocator: Allocator | None = None,
) -> tuple[Tensor, AuxOutput]: ...


def streamed_attention(
    query: Tensor,
    key: Tensor | StoredTensor,
    value: Tensor | StoredTensor,
    *,
    ring_size: int,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    enable_gqa: bool = False,
    kernel: str = "auto",
    return_aux: AuxRequest | None = None,
    progress: Callable[[int, int], object] | None = None,
    allocator: Allocator | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Dense attention, exact with exact gradients, over keys and values that stay in host memory or in a file.

    Queries and keys are each cut into ``ring_size`` chunks, and the device holds what two chunks need: beyond query,
    out, lse and query's gradient its peak is proportional to 1 / ring_size, forward and backward, beside the scratch of
    a kernel, some MiB whatever the length. In float32 and float64 keys pass once; in half precision once a chunk of
    queries, whose sums are float32.

    On CUDA a chunk is copied through pinned memory while the one before it is attended; not yet measured on a GPU.
    There two chunks of keys are on the device at once, from ring_size 2 on. On the CPU, chunks of tensors are views.

    In half precision the gradients of key and value are summed in host memory in float32. Under torch.compile the call
    is a graph break, and with fullgraph=True an error that says so.

    Args:
        query: (batch, seq, heads, head_dim), float64, float32, bfloat16 or float16, on the CPU or a CUDA device. Under
            autocast, float32 inputs are cast to autocast's dtype, keys and values a chunk at a time.
        key, value: (batch, kv_seq, kv_heads, head_dim), dtype of query; kv_heads == heads, or with ``enable_gqa`` a
            divisor of it (query head j then meets key head j // (heads // kv_heads)). Each a tensor on the CPU, be it
            over a memory-mapped file, or a StoredTensor, such as ``safetensors.safe_open(...).get_slice(name)``.
            Tensors get their gradient in host memory. Stored tensors get none, and must not change, and their file must
            stay open, until the backward is done.
        ring_size: number of chunks; more than there are positions means one position a chunk.
        is_causal: row i sees keys up to i; needs kv_seq == seq. Chunks of keys after a chunk of queries are skipped.
        scale: factor on the scores, 1 / sqrt(head_dim) by default.
        key_padding_mask: (batch, kv_seq), bool, on the CPU or query's device, True where the key is real. What padding
            of keys holds, even NaN, has no influence. With is_causal: both.
        enable_gqa: whether query heads may share key heads, see ``key``.
        kernel: a name from ``dilated_core.kernels.table()``, or "auto" for the first that can run.
        return_aux: ``AuxRequest(lse=True)`` to have the lse too.
        progress: called as ``progress(done, total)`` after each tile (a chunk of queries meets a chunk of keys), on
            CUDA when its work is launched; in the backward again from 1. An exception from it ends the attention.
        allocator: where results, gradients, sums and device buffers are allocated, by kind where it is a BufferManager;
            torch.empty by default. Pinned memory is always torch's.

    Returns:
        Output like query, 0 in a row with no key; with ``return_aux``, a pair of it and an AuxOutput.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes, devices or values that do not fit, or a kernel that cannot run them.

    >>> query, key, value = torch.randn(3, 1, 100, 4, 16).unbind()
    >>> streamed_attention(query, key, value, ring_size=8, is_causal=True).shape
    torch.Size([1, 100, 4, 16])
    """
    if torch.compiler.is_compiling():  # a decorator would load the compiler, seconds, with this package
        torch._dynamo.graph_break(msg="streamed_attention reads its keys while it runs, which cannot be traced")
        result: Tensor | tuple[Tensor, AuxOutput] = torch.compiler.disable(streamed_attention)(
            query,
            key,
            value,
            ring_size=ring_size,
            is_causal=is_causal,
            scale=scale,
            key_padding_mask=key_padding_mask,
            enable_gqa=enable_gqa,
            kernel=kernel,
            return_aux=return_aux,
            progress=progress,
            allocator=allocator,
        )
        return result
    checks.boolean("is_causal", is_causal)
    checks.boolean("enable_gqa", enable_gqa)
    checks.kernel(kernel)
    ring_size = checks.positive_integer("ring_size", ring_size)
    with_lse = checks.asks_for_lse(return_aux)
    if progress is not None and not callable(progress):
        raise TypeError(f"progress: expected a callable or None, got {type(progress).__name__}")
    resources = checks.resources(allocator, None)
    query = _query(query)
    _check_sources(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa)
    _check_mask(key_padding_mask, query, as_source("key", key))
    query, scale = checks.query_and_scale(query, scale)
    options = Options(ring_size, is_causal, scale, kernel, progress, resources)
    out: Tensor
    lse: Tensor
    out, lse = _Function.apply(query, key, value, key_padding_mask, options)  # type: ignore[no-untyped-call]
    if return_aux is None:
        return out
    return out, AuxOutput(lse=lse if with_lse else None)


def _query(query: object) -> Tensor:
    """The query in the dtype it is to be attended in. Raises TypeError or ValueError where no stream can serve it."""
    if not isinstance(query, Tensor):
        raise TypeError(f"query: expected a torch.Tensor, got {type(query).__name__}")
    if query.device.type not in ("cpu", "cuda"):
        raise ValueError(f"query: expected a tensor on the CPU or a CUDA device, got one on {query.device}")
    return query.to(_attended_dtype(query.dtype, query.device))


def _attended_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Under autocast its dtype for float32 and half precision, as SDPA has it; else ``dtype``."""
    if torch.is_autocast_enabled(device.type) and dtype.is_floating_point and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype


def _check_sources(query: Tensor, key: object, value: object, *, is_causal: bool, enable_gqa: bool) -> None:
    """Raise TypeError or ValueError where the three do not fit together."""

    def stand_in(source: Source) -> Tensor:
        """One number in the shape of the source, where and as it is attended."""
        dtype = _attended_dtype(source.dtype, query.device)
        return torch.empty((), dtype=dtype, device=query.device).expand(source.shape)

    keys, values = (stand_in(as_source(name, given)) for name, given in (("key", key), ("value", value)))
    checks.query_key_value(query, keys, values, same_length=is_causal, enable_gqa=enable_gqa)


def _check_mask(mask: object, query: Tensor, key: Source) -> None:
    """Raise TypeError or ValueError where the mask does not fit ``key``, or lies on a third device."""
    device = torch.device("cpu")
    if isinstance(mask, Tensor):
        if mask.device not in (device, query.device):
            raise ValueError(f"key_padding_mask: expected one on the CPU or {query.device}, got one on {mask.device}")
        device = mask.device
    checks.key_padding_mask(mask, torch.empty((), device=device).expand(key.shape))


def _sources(key: object, value: object) -> list[Source]:
    return [as_source("key", key), as_source("value", value)]


class _Function(torch.autograd.Function):
    """Of (query, key, value, real, options); key and value are tensors or stored tensors."""

    @staticmethod
    def forward(query: Tensor, key: Any, value: Any, real: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
        return engine.forward(query, _sources(key, value), real, options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, real, ctx.options = inputs
        # Tensors are saved as such, so that a change in place before backward is noticed.
        ctx.stored = [None if isinstance(given, Tensor) else given for given in (key, value)]
        key, value = (given if isinstance(given, Tensor) else None for given in (key, value))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, query, real, key, value)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, query, real, *tensors = ctx.saved_tensors
        key, value = (stored if tensor is None else tensor for tensor, stored in zip(tensors, ctx.stored, strict=True))
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if grad_out is not None or grad_lse is not None:
            wanted = tuple(ctx.needs_input_grad[1:3])
            grads = _Gradient.apply(grad_out, grad_lse, out, lse, query, key, value, real, ctx.options, wanted)  # type: ignore[no-untyped-call]
        return (*grads, None, None)


class _Gradient(torch.autograd.Function):
    """Of (grad_out, grad_lse, out, lse, query, key, value, real, options, wanted).

    A function of its own, so that a second derivative is an error and not a zero.
    """

    @staticmethod
    def forward(
        grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        key, value, real, options, wanted = rest
        return engine.backward(grad_out, grad_lse, query, _sources(key, value), out, lse, real, options, wanted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("streamed_attention: second derivatives are not defined")
