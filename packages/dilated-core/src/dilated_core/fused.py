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

from dilated_core.kernels import Dropout, Kernel, Needs, Problem, choose, rows_for_backward, tile_backward
from dilated_core.packing import sequence_bounds
from dilated_core.partial import accumulation_dtype
from dilated_core.plan import Tile, make_tiles
from dilated_core.resources import NO_RESOURCES, OF_QKV, BufferKind, Resources
from dilated_core.tiles import add_tile, attend_tile, make_problem, merge_tile

# Elements gathered of each tensor at a time. On a CPU 4 MiB of float32: long calls that still lie in the shared cache.
# On a GPU, calls large enough to fill the card.
GATHER_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
# Where the result is half precision, its float32 sums exist for one of so many blocks of heads at a time; fewer where
# all of it is smaller than what is gathered anyway.
HALF_PRECISION_BLOCKS = 4
ALL = slice(None)
# What the sums of a plan's tiles are allocated as: results of the forward, or what is yet to be rounded or copied.
OF_RESULTS: tuple[BufferKind, BufferKind] = ("output", "output")
OF_SUMS: tuple[BufferKind, BufferKind, BufferKind] = ("temp", "temp", "temp")


class Options(NamedTuple):
    """What is to be computed; checked by whoever made it."""

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    semantics: str
    is_causal: bool
    scale: float
    dropout_p: float
    kernel: str


class Extras(NamedTuple):
    """Tensors beside query, key and value.

    Attributes:
        real: (batch, seq), bool, True where a key is no padding; None for all.
        cu_seqlens: (sequences + 1,), integers: where packed sequences start and end; None for one.
        seed: (), int64, of the dropout; None without.
    """

    real: Tensor | None = None
    cu_seqlens: Tensor | None = None
    seed: Tensor | None = None


class Span(NamedTuple):
    """One sequence to attend, and how: what every part of its plan shares."""

    options: Options
    resources: Resources
    heads: int  # query heads, all of them
    real: Tensor | None
    seed: int | None

    def apart(self, place: int) -> Span:
        """The same with random numbers of its own, which its tiles count on from: there are less than 2^20 of them."""
        return self if self.seed is None else self._replace(seed=self.seed + (place << 20))

    def tiles(self, seq_len: int, chosen: range) -> list[Tile]:
        """The plan of the chosen query heads."""
        lengths, rates, semantics, is_causal, *_ = self.options

        def create() -> list[Tile]:
            return make_tiles(
                lengths, rates, seq_len, self.heads, semantics=semantics, is_causal=is_causal, chosen=chosen
            )

        if self.resources.patterns is None:
            return create()
        key = ("dilated_core.tiles", lengths, rates, seq_len, self.heads, semantics, is_causal, chosen)
        tiles: list[Tile] = self.resources.patterns.get_or_create(key, create)
        return tiles

    def parts(self, tiles: list[Tile], tensor: Tensor) -> Iterator[tuple[Tile, slice]]:
        """Cut tiles into (some of the segments, batch rows), each small enough to gather."""
        batch, head_dim = tensor.shape[0], tensor.shape[-1]
        budget = _gather_elements(tensor)
        for tile in tiles:
            segment = tile.heads * tile.rows * head_dim
            segments = min(tile.segments, max(1, budget // segment))
            rows = min(batch, max(1, budget // (segment * tile.segments)))
            for row in range(0, batch, rows):
                chosen = slice(row, row + rows) if rows < batch else ALL
                for first in range(0, tile.segments, segments):
                    last = min(first + segments, tile.segments)
                    yield tile if segments == tile.segments else tile.part(first, last), chosen

    def gather(self, tile: Tile, tensor: Tensor, kind: BufferKind = "temp") -> Tensor:
        """The tile's rows for the kernels, (batch * segments, heads, rows, ...): a view where it can be one."""
        lanes = tile.lanes(tensor)
        if lanes is None:
            view = tile.view(tensor)
            rows = self.resources.empty(view.shape, dtype=view.dtype, device=view.device, kind=kind).copy_(view)
            lanes = rows.view(-1, tile.heads, tile.rows, *view.shape[5:])
        return lanes

    def problem(self, tile: Tile, batch: slice, qkv: list[Tensor], number: int) -> Problem | None:
        """What the kernel is to attend; None where all keys are padding and nothing stands in for them."""
        q, k, v = (self.gather(tile, _at(tensor, batch), kind) for tensor, kind in zip(qkv, OF_QKV, strict=True))
        options = self.options
        dropout = None if self.seed is None else Dropout(options.dropout_p, (self.seed + number) % 2**63)
        real = None
        if self.real is not None:
            mask = _at(self.real, batch)
            real = self.gather(tile, mask.unsqueeze(-1).expand(*mask.shape, qkv[1].shape[2]), "mask")
        return make_problem(
            q,
            k,
            v,
            real,
            is_causal=options.is_causal,
            scale=options.scale,
            dropout=dropout,
            phantoms=tile.phantoms,
        )


def _gather_elements(tensor: Tensor) -> int:
    return GATHER_ELEMENTS.get(tensor.device.type, GATHER_ELEMENTS["cuda"])


def _at(tensor: Tensor, batch: slice) -> Tensor:
    """These batch rows. All of them is the usual case, and worth no operation."""
    return tensor if batch is ALL else tensor[batch]


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


def last_stride_1(tensor: Tensor) -> Tensor:
    """The tensor as kernels read it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


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
        blocks = min(HALF_PRECISION_BLOCKS, heads, -(-query.numel() // _gather_elements(query)))
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
            place = _place(tile, _at(out, batch)), _place(tile, _at(lse, batch))
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
        grad_out, out, lse, *rest = (span.gather(tile, _at(tensor, batch)) for tensor in by_query[1:])
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
            add_tile(grads, (_place(tile, _at(total, batch)) for total in sums))
        del grads  # before the next tile has its own
    return sums
