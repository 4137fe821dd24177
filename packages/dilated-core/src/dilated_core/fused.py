"""The fused path: a whole dilated attention in one pass over its plan, and its exact backward by the same plan.

Forward: every tile is a strided view of q, k and v; the kernel attends it; its partial is merged into the result in
float32. Backward: the same tiles again, each through the kernel's stock backward with the *merged* out and lse, which
gives the exact gradient of the joint softmax (see ``Kernel.backward``). No scores are kept, no tile knows it was one
of many. How PyTorch comes to call this is told in ``operators``.

Memory beyond the result: tiles are gathered a few segments at a time (a tile the kernel can read in place is not
gathered at all). Where the result is half precision, its float32 sums exist for a quarter of the heads at a time; where
heads share keys, for one head of each group at a time, so shared keys are never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.kernels import Kernel, Needs, choose, rows_for_backward, tile_backward
from dilated_core.packing import sequence_bounds
from dilated_core.partial import accumulation_dtype
from dilated_core.plan import Tile
from dilated_core.resources import NO_RESOURCES, OF_QKV, BufferKind, Resources
from dilated_core.span import ALL, Extras, Options, Span, gather_elements, of_batch
from dilated_core.tiles import add_tile, attend_tile, last_stride_1, merge_tile

# Where the result is half precision, its float32 sums exist for one of so many blocks of heads at a time; fewer where
# all of it is smaller than what is gathered anyway.
HALF_PRECISION_BLOCKS = 4
# What the sums of a plan's tiles are allocated as: results of the forward, or what is yet to be rounded or copied.
OF_RESULTS: tuple[BufferKind, BufferKind] = ("output", "output")
OF_SUMS: tuple[BufferKind, BufferKind, BufferKind] = ("temp", "temp", "temp")


def _place(tile: Tile, tensor: Tensor) -> Tensor:
    """The tile's part of a sum, to write to: in the shape of the kernels' results where strides allow."""
    lanes = tile.lanes(tensor)
    return tile.view(tensor) if lanes is None else lanes


def _starts_whole(tiles: list[Tile], span: Span, query: Tensor) -> bool:
    """Does the first tile hold every row of every head, readable in place? Then its result is the first sum."""
    if not tiles or span.real is not None:
        return False
    _, seq, heads, _ = query.shape
    tile = tiles[0]
    return tile.rate == 1 and tile.rows * tile.segments == seq and tile.heads == heads


def _ungather(tile: Tile, rows: Tensor) -> Tensor:
    """A whole tile's (batch * segments, heads, rows, ...) as (batch, seq, heads, ...), contiguous."""
    batch = rows.shape[0] // tile.segments
    rows = rows.transpose(1, 2)
    return rows.reshape(batch, tile.segments * tile.rows, *rows.shape[2:]).contiguous()


class HeadBlock(NamedTuple):
    """Heads whose float32 sums exist at one time: every ``group``-th query head, and the key heads they meet."""

    queries: slice
    keys: slice

    def chosen(self) -> range:
        """The query heads' numbers."""
        return range(self.queries.start, self.queries.stop, self.queries.step)

    def of_qkv(self) -> tuple[slice, slice, slice]:
        """The heads of query, key and value."""
        return self.queries, self.keys, self.keys


def _head_blocks(query: Tensor, key: Tensor) -> list[HeadBlock]:
    heads, kv_heads = query.shape[2], key.shape[2]
    group = heads // kv_heads
    if group > 1:
        return [HeadBlock(slice(first, heads, group), slice(0, kv_heads)) for first in range(group)]
    blocks = 1
    if accumulation_dtype(query.dtype) != query.dtype:
        blocks = min(HALF_PRECISION_BLOCKS, heads, -(-query.numel() // gather_elements(query)))
    size = -(-heads // blocks)
    return [HeadBlock(own, own) for own in (slice(at, min(at + size, heads), 1) for at in range(0, heads, size))]


def _spans(query: Tensor, extras: Extras, options: Options, resources: Resources) -> Iterator[tuple[slice, Span]]:
    """The positions of every packed sequence, and how to attend it."""
    _, seq_len, heads, _ = query.shape
    real, cu_seqlens, seed_tensor = extras
    seed = None if seed_tensor is None else int(seed_tensor)
    for start, stop in sequence_bounds(cu_seqlens, seq_len):
        part = real if real is None else real[:, start:stop]
        yield slice(start, stop), Span(options, resources, heads, part, seed).apart(start * heads)


# ------------------------------------------------------------------------------------------------ forward


def forward(
    engine: Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    options: Options,
    resources: Resources = NO_RESOURCES,
) -> tuple[Tensor, Tensor]:
    """Dilated attention of (batch, seq, heads, head_dim) tensors -> out like query, lse (batch, heads, seq).

    ``key`` and ``value`` may have fewer heads than query. Takes its arguments as checked: ``dilated_attention`` is the
    door. ``engine`` attends the tiles.

    Raises:
        ValueError: cu_seqlens that do not fit, or "torchscale" with segments it cannot place.
    """
    spans = list(_spans(query, extras, options, resources))
    if query.numel() == 0:
        return results_of_forward(query)
    qkv = [last_stride_1(tensor) for tensor in (query, key, value)]
    blocks = _head_blocks(query, key)
    dtype = accumulation_dtype(query.dtype)
    if len(spans) == len(blocks) == 1 and dtype == query.dtype:
        out, lse = _forward_block(engine, spans[0][1], blocks[0], qkv, OF_RESULTS)
        return out, lse.transpose(1, 2)
    out = resources.empty(query.shape, dtype=query.dtype, device=query.device, kind="output")
    lse = resources.empty(query.shape[:-1], dtype=dtype, device=query.device, kind="output")
    for positions, span in spans:
        for block in blocks:
            part = [tensor[:, positions, heads] for tensor, heads in zip(qkv, block.of_qkv(), strict=True)]
            _write((out, lse), positions, block.queries, _forward_block(engine, span, block, part, OF_SUMS[:2]))
    return out, lse.transpose(1, 2)


def _forward_block(
    engine: Kernel, span: Span, block: HeadBlock, qkv: list[Tensor], kinds: tuple[BufferKind, BufferKind]
) -> tuple[Tensor, Tensor]:
    """out and lse of the block's heads, (batch, seq, heads, ...), in the accumulation dtype."""
    tiles = span.tiles(qkv[0].shape[1], block.chosen())
    return forward_tiles(engine, span.apart(block.queries.start), tiles, qkv, kinds)


def forward_tiles(
    engine: Kernel, span: Span, tiles: list[Tile], qkv: list[Tensor], kinds: tuple[BufferKind, BufferKind]
) -> tuple[Tensor, Tensor]:
    """out and lse of a plan's tiles, (batch, seq, heads, ...), in the accumulation dtype; 0 and -inf where none lies.

    Args:
        tiles: rate 1 first; qkv: (batch, seq, heads, head_dim), of as many heads, last stride 1.
        kinds: what out and lse are allocated as.
    """
    query = qkv[0]
    dtype = accumulation_dtype(query.dtype)

    def attend(tile: Tile, batch: slice, number: int) -> tuple[Tensor, Tensor] | None:
        problem = span.problem(tile, batch, qkv, number)
        return None if problem is None else attend_tile(engine, problem, tile.phantoms)

    if _starts_whole(tiles, span, query):
        whole, *tiles = tiles
        out, lse = (_ungather(whole, rows).to(dtype) for rows in attend(whole, ALL, 0) or ())
    else:
        out = span.resources.empty(query.shape, dtype=dtype, device=query.device, kind=kinds[0]).zero_()
        lse = span.resources.empty(query.shape[:-1], dtype=dtype, device=query.device, kind=kinds[1]).fill_(-math.inf)
    for number, (tile, batch) in enumerate(span.parts(tiles, query), 1):
        partial = attend(tile, batch, number)
        if partial is not None:
            place = _place(tile, of_batch(out, batch)), _place(tile, of_batch(lse, batch))
            merge_tile(partial, *place, all_have_keys=span.real is None)
    return out, lse


def results_of_forward(query: Tensor) -> tuple[Tensor, Tensor]:
    """Tensors shaped like the results. lse lies in memory as (batch, seq, heads), as the CPU kernel writes it."""
    lse = query.new_empty(query.shape[:-1], dtype=accumulation_dtype(query.dtype))
    return query.new_empty(query.shape), lse.transpose(1, 2)


# ------------------------------------------------------------------------------------------------ backward


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    extras: Extras,
    options: Options,
    resources: Resources = NO_RESOURCES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given those of out and (or None) of lse, and the forward's results."""
    if query.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    by_query = [last_stride_1(tensor) for tensor in (query, grad_out, out)]
    by_query += [rows.transpose(1, 2) for rows in rows_for_backward(lse, grad_lse) if rows is not None]
    by_key = [last_stride_1(tensor) for tensor in (key, value)]
    spans, blocks = list(_spans(query, extras, options, resources)), _head_blocks(query, key)
    if len(spans) == len(blocks) == 1 and accumulation_dtype(query.dtype) == query.dtype:
        grad_query, grad_key, grad_value = _backward_block(spans[0][1], blocks[0], by_query, by_key, [], OF_QKV)
        return grad_query, grad_key, grad_value
    grads = [
        resources.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, kind=kind)
        for tensor, kind in zip((query, key, value), OF_QKV, strict=True)
    ]
    for positions, span in spans:
        kv_sums: list[Tensor] = []
        for block in blocks:
            queries = [tensor[:, positions, block.queries] for tensor in by_query]
            keys = [tensor[:, positions, block.keys] for tensor in by_key]
            sums = _backward_block(span, block, queries, keys, kv_sums, OF_SUMS)
            _write(grads[:1], positions, block.queries, sums[:1])
            kv_sums = sums[1:]
            if block is blocks[-1] or block.keys != blocks[-1].keys:  # no other block adds to these
                _write(grads[1:], positions, block.keys, kv_sums)
                kv_sums = []
            del sums  # before the next block has its own
    return grads[0], grads[1], grads[2]


def _write(results: Iterable[Tensor], positions: slice, heads: slice, sums: Iterable[Tensor]) -> None:
    """Round sums into their place in the results."""
    for result, total in zip(results, sums, strict=True):
        result[:, positions, heads] = total


def _backward_block(
    span: Span,
    block: HeadBlock,
    by_query: list[Tensor],
    by_key: list[Tensor],
    kv_sums: list[Tensor],
    kinds: tuple[BufferKind, BufferKind, BufferKind],
) -> list[Tensor]:
    """Gradients of the block's query, key and value heads, (batch, seq, heads, head_dim), in the accumulation dtype."""
    tiles = span.tiles(by_query[0].shape[1], block.chosen())
    return backward_tiles(span.apart(block.queries.start), tiles, by_query, by_key, kv_sums, kinds)


def backward_tiles(
    span: Span,
    tiles: list[Tile],
    by_query: list[Tensor],
    by_key: list[Tensor],
    kv_sums: list[Tensor],
    kinds: tuple[BufferKind, BufferKind, BufferKind],
) -> list[Tensor]:
    """Gradients of query, key and value by a plan's tiles, (batch, seq, heads, head_dim), in the accumulation dtype.

    Args:
        tiles: those of the forward.
        by_query: query, grad_out, out, lse and, where there is one, grad_lse; (batch, seq, heads, ...).
        by_key: key and value.
        kv_sums: those of key and value so far, added to and returned; empty for none.
        kinds: what the gradients of query, key and value are allocated as.
    """
    query = by_query[0]
    dtype = accumulation_dtype(query.dtype)

    def gradients(tile: Tile, batch: slice, number: int) -> tuple[Tensor, ...] | None:
        qkv = [query, *by_key]
        problem = span.problem(tile, batch, qkv, number)
        if problem is None:
            return None
        grad_out, out, lse, *rest = (span.gather(tile, of_batch(tensor, batch)) for tensor in by_query[1:])
        if span.options.semantics == "torchscale":
            # The weights of the mixture take no gradient: the branch's own out, with its weights in the joint softmax.
            engine = choose(span.options.kernel, query.device, query.dtype, query.shape[-1], Needs.of(problem))
            out = attend_tile(engine, problem, tile.phantoms)[0].to(out.dtype)
        return tile_backward(span.options.kernel, problem, grad_out, rest[0] if rest else None, out, lse)

    shapes = [query.shape, *(tensor.shape for tensor in by_key)]
    if _starts_whole(tiles, span, query):
        whole, *tiles = tiles
        sums = [_ungather(whole, rows).to(dtype) for rows in gradients(whole, ALL, 0) or ()]
        for total, earlier in zip(sums[1:], kv_sums, strict=False):
            total.add_(earlier)
    else:
        missing = shapes[: len(shapes) - len(kv_sums)]
        sums = [
            span.resources.empty(shape, dtype=dtype, device=query.device, kind=kind).zero_()
            for shape, kind in zip(missing, kinds, strict=False)
        ]
        sums += kv_sums
    for number, (tile, batch) in enumerate(span.parts(tiles, query), 1):
        grads = gradients(tile, batch, number)
        if grads is not None:
            add_tile(grads, (_place(tile, of_batch(total, batch)) for total in sums))
        del grads  # before the next tile has its own
    return sums
