"""Several new tokens after others: in each branch, their tiles over each other and over the rows kept.

A chunk is cut where the branch's segments end. Its first rows may lie in a segment already open: they meet that
segment's older rows in one tile and each other in a causal one. Segments that begin in the chunk are causal tiles, all
whole ones in one call a phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from dilated_core.decode.cache import DilatedKVCache
from dilated_core.decode.lanes import rows_before
from dilated_core.decode.store import Shelf, Store
from dilated_core.kernels import Kernel, Problem
from dilated_core.partial import accumulation_dtype, merge_in_place


class Engine(NamedTuple):
    """A kernel and the factor on its scores."""

    kernel: Kernel
    scale: float

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
        """(out, lse) of one tile, (batch, heads, rows, ...)."""
        return self.kernel.forward(Problem(query, key, value, is_causal, self.scale))


class Piece(NamedTuple):
    """Equal parts of a branch's segments, side by side in a chunk.

    Attributes:
        first: index in the chunk where they begin.
        segments: how many.
        length: of each.
        offset: where in its segment each begins; above 0 only for the one segment that was open before the chunk.
    """

    first: int
    segments: int
    length: int
    offset: int


class Grid(NamedTuple):
    """The rows of a piece that lie on the grid of a phase."""

    piece: Piece
    phase: int
    rate: int

    @property
    def skip(self) -> int:
        """Index of the first of them in each part."""
        return (self.phase - self.piece.offset) % self.rate

    @property
    def old(self) -> int:
        """Rows of the same segment and grid that came before the chunk."""
        return rows_before(self.piece.offset, self.phase, self.rate)

    def view(self, tensor: Tensor, heads: slice | Tensor) -> Tensor:
        """(batch, seq, heads, ...) -> (batch, segments, rows, heads, ...); without copying where heads is a slice."""
        first, segments, length, _ = self.piece
        parts = tensor.narrow(1, first, segments * length).unflatten(1, (segments, length))
        view: Tensor = parts[:, :, self.skip :: self.rate, heads]
        return view


def attend_chunk(
    engine: Engine, query: Tensor, key: Tensor, value: Tensor, cache: DilatedKVCache, rows: slice, position: int
) -> Tensor:
    """Attend a chunk without keeping it.

    Args:
        engine: the kernel.
        query, key, value: of these batch rows only, as ``decode_step`` takes them, last stride 1.
        cache: read, not changed.
        rows: batch rows that have all seen ``position`` tokens.
        position: at least 1.

    Returns:
        Output like query, in the accumulation dtype.
    """
    dtype = accumulation_dtype(query.dtype)
    out = query.new_zeros(query.shape, dtype=dtype)
    lse = query.new_full(query.shape[:-1], -math.inf, dtype=dtype)
    for store in cache.stores:
        for piece in _pieces(position, query.shape[1], store.plan.segment_length):
            for phase, shelves in store.shelves.items():
                grid = Grid(piece, phase, store.plan.rate)
                if grid.skip >= piece.length:
                    continue
                for shelf in shelves:
                    joint = grid.view(out, shelf.heads), grid.view(lse, shelf.heads)
                    for partial in _tiles(engine, query, key, value, grid, shelf.of(rows)):
                        merge_in_place(*joint, *partial)
    return out


def keep_chunk(store: Store, key: Tensor, value: Tensor, rows: slice, position: int) -> None:
    """Keep what the segment that stays open has of a chunk's keys and values, of batch rows at ``position``."""
    segment_length, rate = store.plan.segment_length, store.plan.rate
    opened = (position + key.shape[1]) // segment_length * segment_length
    first = max(position, opened)
    for phase, shelves in store.shelves.items():
        skip = first - position + (phase - (first - opened)) % rate
        old = rows_before(first - opened, phase, rate)
        for shelf in shelves:
            for kept, tensor in zip(shelf.of(rows).pair, (key, value), strict=True):
                new = tensor[:, skip::rate, shelf.kv_heads].transpose(1, 2)
                kept[:, :, old : old + new.shape[2]] = new


def _pieces(position: int, count: int, segment_length: int) -> Iterator[Piece]:
    """The rest of the open segment, then the whole ones, then the one that stays open."""
    offset = position % segment_length
    first = 0
    if offset:
        first = min(count, segment_length - offset)
        yield Piece(0, 1, first, offset)
    whole, tail = divmod(count - first, segment_length)
    if whole:
        yield Piece(first, whole, segment_length, 0)
    if tail:
        yield Piece(first + whole * segment_length, 1, tail, 0)


def _tiles(
    engine: Engine, query: Tensor, key: Tensor, value: Tensor, grid: Grid, shelf: Shelf
) -> Iterator[tuple[Tensor, Tensor]]:
    """(out, lse) of the grid's rows, (batch, segments, rows, heads, ...): over each other, then over older rows."""

    def gather(tensor: Tensor, heads: slice | Tensor) -> Tensor:
        return grid.view(tensor, heads).transpose(2, 3).flatten(0, 1)

    q, k, v = gather(query, shelf.heads), gather(key, shelf.kv_heads), gather(value, shelf.kv_heads)
    size = (query.shape[0], grid.piece.segments, *q.shape[1:])

    def scatter(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return out.reshape(size).transpose(2, 3), lse.reshape(size[:-1]).transpose(2, 3)

    if shelf.per_lane > 1:
        k, v = k.repeat_interleave(shelf.per_lane, 1), v.repeat_interleave(shelf.per_lane, 1)
    yield scatter(*engine.attend(q, k, v, is_causal=True))
    if grid.old:
        # Heads that share a lane are so many more rows of its tile.
        lanes = q.unflatten(1, (-1, shelf.per_lane)).flatten(2, 3)
        old = shelf.key[:, :, : grid.old], shelf.value[:, :, : grid.old]
        yield scatter(*engine.attend(lanes, *old, is_causal=False))
