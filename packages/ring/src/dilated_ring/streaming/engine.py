"""Forward and backward of a streamed attention: a loop over tiles (chunk of queries, chunk of keys), without autograd.

Nothing on the device but inputs and results is longer than a chunk: the chunks of keys and values, what a kernel
returns, and the sums that are not results themselves. In which order the tiles are taken decides what these are:

- float32, float64: a chunk of keys meets all its queries before the next one comes, so keys are read once. The sums of
  out and of query's gradient are the results; key's and value's gradients of one chunk are summed on the device.
- half precision: a chunk of queries meets all its keys before the next one comes, so that out and query's gradient need
  float32 sums of one chunk only, and keys are read once a chunk of queries. Key's and value's gradients are summed in
  float32 in host memory. (The other order would need a float32 sum as long as out.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.kernels import Needs, Problem, choose, rows_for_backward, tile_backward
from dilated_core.partial import accumulation_dtype
from dilated_core.resources import OF_QKV, BufferKind, Resources
from dilated_core.tiles import add_tile, attend_tile, last_stride_1, make_problem, merge_tile
from dilated_ring.plan import even_bounds
from dilated_ring.streaming.sources import Source
from dilated_ring.streaming.staging import chunks_on


class Options(NamedTuple):
    """What is to be computed, and how; checked by whoever made it."""

    ring_size: int
    is_causal: bool
    scale: float
    kernel: str
    progress: Callable[[int, int], object] | None
    resources: Resources


class Tile(NamedTuple):
    """A chunk of query positions and a chunk of key positions; is_causal: they are the same, on the diagonal."""

    queries: slice
    keys: slice
    is_causal: bool


ALL = slice(None)
# Called with a tile, the query heads of it that meet each key head once, and what the kernel is to attend.
Work = Callable[[Tile, slice, Problem], None]


def make_tiles(seq: int, kv_seq: int, ring_size: int, *, is_causal: bool, keys_once: bool) -> list[Tile]:
    """All tiles in the order they are taken; those that a causal attention does not see are left out.

    Args:
        keys_once: a chunk of keys meets all its queries before the next one comes; else the other way round.

    >>> [(tile.queries.start, tile.keys.start) for tile in make_tiles(4, 4, 2, is_causal=True, keys_once=True)]
    [(0, 0), (2, 0), (2, 2)]
    """
    queries, keys = (
        [slice(*bounds) for bounds in pairwise(even_bounds(length, min(length, ring_size)))] for length in (seq, kv_seq)
    )
    tiles = [
        Tile(rows, columns, is_causal and columns == rows)
        for number, rows in enumerate(queries)
        # There and back: a chunk of queries begins with the keys that the one before ended with, where it sees them.
        for columns in (keys[::-1] if number % 2 else keys)
        if not is_causal or columns.start <= rows.start
    ]
    return sorted(tiles, key=lambda tile: tile.keys.start) if keys_once else tiles


class ChunkedSum:
    """A tensor (batch, seq, heads, head_dim) that begins as 0 and is summed chunk after chunk.

    Where it lies on the device in the accumulation dtype, it is its own sum. Else a buffer on the device holds the sum
    of the chunk at hand, and is added to the tensor when another chunk begins. A tensor less precise than the buffer is
    exact to one rounding if each chunk comes once.

    Args:
        shape, dtype, device: of the tensor; query: says where and in what precision is summed.
        kind: what the tensor is allocated as.
    """

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        query: Tensor,
        options: Options,
        kind: BufferKind,
    ) -> None:
        self._resources = options.resources
        self._total = self._resources.empty(shape, dtype=dtype, device=device, kind=kind).zero_()
        self._chunk: slice | None = None
        self._buffer: Tensor | None = None
        precise = accumulation_dtype(query.dtype)
        if device != query.device or dtype != precise:
            batch, length, *rest = shape
            longest = _longest(length, options.ring_size)
            self._buffer = self._resources.empty((batch, longest, *rest), dtype=precise, device=query.device)

    def at(self, chunk: slice) -> Tensor:
        """The sum of these positions, to add to, as the kernels take tensors: (batch, heads, rows, head_dim)."""
        if self._buffer is None:
            return self._total[:, chunk].transpose(1, 2)
        rows = self._buffer[:, : chunk.stop - chunk.start]
        if chunk != self._chunk:
            self._flush()
            self._chunk = chunk
            rows.zero_()
        return rows.transpose(1, 2)

    def release(self, dtype: torch.dtype, kind: BufferKind) -> Tensor:
        """The complete tensor in ``dtype``, rounded into memory of ``kind`` where it had another.

        This object is over then, and does not keep what was rounded.
        """
        self._flush()
        total, self._buffer = self._total, None
        del self._total
        if total.dtype == dtype:
            return total
        return self._resources.empty(total.shape, dtype=dtype, device=total.device, kind=kind).copy_(total)

    def _flush(self) -> None:
        if self._buffer is not None and self._chunk is not None:
            rows = self._buffer[:, : self._chunk.stop - self._chunk.start]
            self._total[:, self._chunk].add_(rows.to(self._total))
            self._chunk = None


def _keys_once(query: Tensor) -> bool:
    return accumulation_dtype(query.dtype) == query.dtype


def _longest(length: int, ring_size: int) -> int:
    return -(-length // ring_size)


def _rows(tensor: Tensor, chunk: slice) -> Tensor:
    """A chunk of (batch, seq, heads, head_dim) as kernels take it: (batch, heads, rows, head_dim), last stride 1."""
    part = tensor[:, chunk]
    return last_stride_1(part).transpose(1, 2)


def _each_tile(query: Tensor, sources: list[Source], real: Tensor | None, options: Options, work: Work) -> None:
    """Call ``work`` for each tile and each block of heads, and tell the progress.

    A callback and not an iterator: when it returns, nothing holds the chunk at hand while the next one is read.
    """
    (_, seq, heads, _), (_, kv_seq, kv_heads, _) = query.shape, sources[0].shape
    if query.numel() == 0 or kv_seq == 0:
        return
    ring_size, is_causal, scale, _, progress, resources = options
    tiles = make_tiles(seq, kv_seq, ring_size, is_causal=is_causal, keys_once=_keys_once(query))
    # Of query heads that share a key head, one of each group at a time: shared keys are never repeated.
    group = heads // kv_heads
    if real is not None:
        real = real.to(query.device)  # a byte a key, once: a copy a chunk would wait for the device each time

    def attend(tile: Tile, key: Tensor, value: Tensor, attended: Tensor | None) -> None:
        rows = _rows(query, tile.queries)
        for first in range(group):
            block = slice(first, heads, group)
            problem = make_problem(rows[:, block], key, value, attended, is_causal=tile.is_causal, scale=scale)
            if problem is not None:
                work(tile, block, problem)

    done = 0
    with chunks_on(query.device, query.dtype, sources, _longest(kv_seq, ring_size), resources) as take:
        for columns, its_tiles in groupby(tiles, key=lambda tile: tile.keys):
            key, value = (_rows(chunk, ALL) for chunk in take(columns))
            attended = None
            if real is not None:
                attended = real[:, columns].unsqueeze(1).expand(-1, kv_heads, -1)
            for tile in its_tiles:
                attend(tile, key, value, attended)
                done += 1
                if progress is not None:
                    progress(done, len(tiles))
            del key, value


def forward(query: Tensor, sources: list[Source], real: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """out like query and lse (batch, heads, seq) of (batch, seq, heads, head_dim) queries, keys and values.

    Args:
        sources: of key and value, of maybe fewer heads.
        real: (batch, kv_seq), bool, True where the key is no padding, on the CPU or query's device; None for all.
    """
    dtype, device = accumulation_dtype(query.dtype), query.device
    engine = choose(options.kernel, device, query.dtype, query.shape[-1], Needs(mask=real is not None))
    out = ChunkedSum(query.shape, query.dtype, device, query, options, "output")
    lse = options.resources.empty(query.shape[:-1], dtype=dtype, device=device, kind="output")
    lse = lse.fill_(-math.inf).transpose(1, 2)

    def attend(tile: Tile, heads: slice, problem: Problem) -> None:
        places = out.at(tile.queries)[:, heads], lse[:, heads, tile.queries]
        merge_tile(attend_tile(engine, problem), *places, all_have_keys=problem.real is None)

    _each_tile(query, sources, real, options, attend)
    return out.release(query.dtype, "output"), lse


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    sources: list[Source],
    out: Tensor,
    lse: Tensor,
    real: Tensor | None,
    options: Options,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value, given those of out and lse, and the forward's results.

    Args:
        grad_out, grad_lse: None where nothing arrives.
        wanted: whether key's and whether value's are.

    Returns:
        Query's on its device in its dtype; key's and value's in host memory in their dtype, None where not wanted.
    """
    totals: list[ChunkedSum | None] = [ChunkedSum(query.shape, query.dtype, query.device, query, options, OF_QKV[0])]
    for source, is_wanted, kind in zip(sources, wanted, OF_QKV[1:], strict=True):
        dtype = source.dtype if _keys_once(query) else accumulation_dtype(query.dtype)
        host = torch.device("cpu")
        kind = kind if dtype == source.dtype else "temp"
        totals.append(ChunkedSum(source.shape, dtype, host, query, options, kind) if is_wanted else None)

    def differentiate(tile: Tile, heads: slice, problem: Problem) -> None:
        out_rows, lse_rows = _rows(out, tile.queries)[:, heads], lse[:, heads, tile.queries]
        grad_rows = torch.zeros_like(out_rows) if grad_out is None else _rows(grad_out, tile.queries)[:, heads]
        grad_lse_rows = None if grad_lse is None else grad_lse[:, heads, tile.queries]
        if real is not None:
            lse_rows, grad_lse_rows = rows_for_backward(lse_rows, grad_lse_rows)
        grads = tile_backward(options.kernel, problem, grad_rows, grad_lse_rows, out_rows, lse_rows)
        # Query's is of these heads; key's and value's of all, each of which these heads meet once.
        places = (tile.queries, heads), (tile.keys, ALL), (tile.keys, ALL)
        for total, (chunk, block), grad in zip(totals, places, grads, strict=True):
            if total is not None:
                add_tile([grad], [total.at(chunk)[:, block]])

    _each_tile(query, sources, real, options, differentiate)
    # One after the other, so that a sum which is rounded to the gradient is gone before the next is.
    dtypes = (query.dtype, *(source.dtype for source in sources))
    return tuple(
        None if total is None else total.release(dtype, kind)
        for total, dtype, kind in zip(totals, dtypes, OF_QKV, strict=True)
    )
