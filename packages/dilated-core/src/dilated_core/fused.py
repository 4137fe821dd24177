"""The fused path: a whole dilated attention as one custom operator, forward and exact backward by one plan.

Forward: every tile is a strided view of q, k and v; the kernel attends it; its partial is merged into the result in
float32. Backward: the same tiles again, each through the kernel's stock backward with the *merged* out and lse, which
gives the exact gradient of the joint softmax (see ``Kernel.backward``). No scores are kept, no tile knows it was one
of many.

Memory beyond the result: tiles are gathered a few segments at a time (a tile the kernel can read in place is not
gathered at all), and where the result is half precision, its float32 sums exist for half of the heads at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from dilated_core.autograd import make_differentiable
from dilated_core.kernels import Kernel, Problem, choose, tile_backward
from dilated_core.partial import accumulation_dtype, merge_in_place
from dilated_core.plan import Tile, make_tiles

# Elements gathered of each tensor at a time. On a CPU 4 MiB of float32: long calls that still lie in the shared cache.
# On a GPU, calls large enough to fill the card.
GATHER_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def _parts(tile: Tile, tensor: Tensor) -> Iterator[tuple[slice, Tile]]:
    """Cut a tile into (batch rows, some of its segments), each small enough to gather."""
    batch, head_dim = tensor.shape[0], tensor.shape[-1]
    budget = GATHER_ELEMENTS.get(tensor.device.type, GATHER_ELEMENTS["cuda"])
    segment = tile.heads * tile.rows * head_dim
    segments = min(tile.segments, max(1, budget // segment))
    rows = min(batch, max(1, budget // (segment * tile.segments)))
    for row in range(0, batch, rows):
        for first in range(0, tile.segments, segments):
            yield slice(row, row + rows), tile.part(first, min(first + segments, tile.segments))


def _gather(tile: Tile, tensor: Tensor) -> Tensor:
    """The tile's rows as the kernels take them, (batch * segments, heads, rows, ...): a view where strides allow."""
    view = tile.view(tensor)
    return view.reshape(view.shape[0] * tile.segments, tile.heads, tile.rows, *view.shape[5:])


def _is_whole(tile: Tile, tensor: Tensor) -> bool:
    """Does the tile hold every row of every head, readable in place? Then its result is the first sum."""
    _, seq, heads, _ = tensor.shape
    return tile.rate == 1 and tile.rows * tile.segments == seq and tile.heads == heads


def _ungather(tile: Tile, rows: Tensor) -> Tensor:
    """A whole tile's (batch * segments, heads, rows, ...) as (batch, seq, heads, ...), contiguous."""
    batch = rows.shape[0] // tile.segments
    rows = rows.transpose(1, 2)
    return rows.reshape(batch, tile.segments * tile.rows, *rows.shape[2:]).contiguous()


def _last_stride_1(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _over_heads(
    compute: Callable[[slice], Sequence[Tensor]], query: Tensor, dtypes: tuple[torch.dtype, ...]
) -> list[Tensor]:
    """Compute sums (batch, seq, heads, ...) for all heads, and round them to ``dtypes``.

    In half precision one half of the heads at a time, because their float32 sums are twice the size of the result.
    """
    heads = query.shape[2]
    if accumulation_dtype(query.dtype) == query.dtype:
        return list(compute(slice(0, heads)))
    middle = (heads + 1) // 2
    halves = [half for half in (slice(0, middle), slice(middle, heads)) if half.start < half.stop]
    rounded = [[rows.to(dtype) for rows, dtype in zip(compute(half), dtypes, strict=True)] for half in halves]
    return [torch.cat(parts, dim=2) for parts in zip(*rounded, strict=True)]


def _tiles(segment_lengths: Sequence[int], dilation_rates: Sequence[int], query: Tensor, heads: slice) -> list[Tile]:
    """The plan of these heads, rate 1 first: its result, where it is whole, becomes the sum the others join."""
    tiles = make_tiles(
        tuple(segment_lengths), tuple(dilation_rates), query.shape[1], heads.stop - heads.start, heads.start
    )
    return sorted(tiles, key=lambda tile: tile.rate)


@custom_op("dilated_core::dilated_attention", mutates_args=())
def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    is_causal: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """LongNet attention of (batch, seq, heads, head_dim) tensors -> out like query, lse (batch, heads, seq).

    Takes its arguments as checked: ``dilated_core.dilated_attention`` is the door.
    """
    engine = choose(kernel, query.device, query.dtype, query.shape[-1])
    if query.numel() == 0:
        return _forward_results(query)
    tensors = [_last_stride_1(tensor) for tensor in (query, key, value)]

    def forward(heads: slice) -> tuple[Tensor, Tensor]:
        tiles = _tiles(segment_lengths, dilation_rates, query, heads)
        return _forward_heads(engine, tiles, [tensor[:, :, heads] for tensor in tensors], is_causal, scale)

    out, lse = _over_heads(forward, query, (query.dtype, accumulation_dtype(query.dtype)))
    return out, lse.transpose(1, 2)


def _forward_heads(
    engine: Kernel, tiles: list[Tile], tensors: list[Tensor], is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out and lse of these heads, (batch, seq, heads, ...), in the accumulation dtype.

    ``tensors``: query, key and value, (batch, seq, heads, head_dim).
    """
    query = tensors[0]
    dtype = accumulation_dtype(query.dtype)

    def forward(tile: Tile, batch: slice) -> tuple[Tensor, Tensor]:
        q, k, v = (_gather(tile, tensor[batch]) for tensor in tensors)
        return engine.forward(Problem(q, k, v, is_causal, scale))

    if tiles and _is_whole(tiles[0], query):
        whole = tiles.pop(0)
        out, lse = forward(whole, slice(None))
        out, lse = _ungather(whole, out).to(dtype), _ungather(whole, lse)
    else:
        out = query.new_zeros(query.shape, dtype=dtype)
        lse = query.new_full(query.shape[:-1], -math.inf, dtype=dtype)
    for tile in tiles:
        for batch, part in _parts(tile, query):
            new_out, new_lse = forward(part, batch)
            out_rows, lse_rows = part.view(out[batch]), part.view(lse[batch])
            merge_in_place(out_rows, lse_rows, new_out.reshape(out_rows.shape), new_lse.reshape(lse_rows.shape))
    return out, lse


def _forward_results(query: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Tensors shaped like the results. lse lies in memory as (batch, seq, heads), as the CPU kernel writes it."""
    lse = query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))
    return query.new_empty(query.shape), lse.transpose(1, 2)


fused_attention.register_fake(_forward_results)


@custom_op("dilated_core::dilated_attention_backward", mutates_args=())
def fused_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    is_causal: bool,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given those of out and (or None) of lse, and the forward's results."""
    if query.numel() == 0:
        return _backward_results(grad_out, grad_lse, query, key, value)
    tensors = [_last_stride_1(tensor) for tensor in (grad_out, query, key, value, out)]
    tensors += [tensor.transpose(1, 2) for tensor in (lse, grad_lse) if tensor is not None]

    def backward(heads: slice) -> list[Tensor]:
        tiles = _tiles(segment_lengths, dilation_rates, query, heads)
        return _backward_heads(kernel, tiles, [tensor[:, :, heads] for tensor in tensors], is_causal, scale)

    grad_query, grad_key, grad_value = _over_heads(backward, query, (query.dtype,) * 3)
    return grad_query, grad_key, grad_value


def _backward_heads(
    kernel: str, tiles: list[Tile], tensors: list[Tensor], is_causal: bool, scale: float
) -> list[Tensor]:
    """Gradients of query, key and value of these heads, (batch, seq, heads, head_dim), in the accumulation dtype.

    ``tensors``: grad_out, query, key, value, out, lse and, where there is one, grad_lse; (batch, seq, heads, ...).
    """
    query = tensors[1]
    dtype = accumulation_dtype(query.dtype)

    def backward(tile: Tile, batch: slice) -> tuple[Tensor, Tensor, Tensor]:
        grad_out, q, k, v, out, lse, *rest = (_gather(tile, tensor[batch]) for tensor in tensors)
        problem = Problem(q, k, v, is_causal, scale)
        return tile_backward(kernel, problem, grad_out, rest[0] if rest else None, out, lse)

    if tiles and _is_whole(tiles[0], query):
        whole = tiles.pop(0)
        grads = [_ungather(whole, rows).to(dtype) for rows in backward(whole, slice(None))]
    else:
        grads = [torch.zeros(query.shape, dtype=dtype, device=query.device) for _ in range(3)]
    for tile in tiles:
        for batch, part in _parts(tile, query):
            for grad, rows in zip(grads, backward(part, batch), strict=True):
                view = part.view(grad[batch])
                view.add_(rows.reshape(view.shape))
    return grads


def _backward_results(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


fused_backward.register_fake(_backward_results)


make_differentiable(fused_attention, fused_backward)
