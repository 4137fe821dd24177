"""Some rows and some keys: which of them meet, their tiles merged into sums, their gradients added to sums.

Who may see whom is told by positions. Pieces of different shards are disjoint, so a query piece sees a key piece
altogether, up to the diagonal where both are the same positions, or not at all: every tile is a stock kernel's.

Query heads that share a key head are told apart by their number within the group, their *block*. One block at a time
is attended, so shared keys are never repeated.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from dilated_core.kernels import Kernel, Problem, choose, rows_for_backward, tile_backward
from dilated_core.kernels.needs import Needs
from dilated_core.partial import accumulation_dtype
from dilated_core.resources import BufferKind, Resources
from dilated_core.tiles import add_tile, attend_tile, last_stride_1, make_problem, merge_tile
from dilated_ring.dense.sharding import Pieces, rows_of


class Tile(NamedTuple):
    """Rows of a shard of queries that all see the same rows of a shard of keys; causal: up to their own index."""

    rows: slice
    keys: slice
    is_causal: bool


def meet(queries: Pieces, keys: Pieces, is_causal: bool) -> list[Tile]:
    """The tiles in which a shard's queries meet a shard's keys: together every pair that may meet, once.

    >>> meet(((0, 2), (6, 8)), ((2, 4), (4, 6)), is_causal=True)
    [Tile(rows=slice(2, 4, None), keys=slice(0, 4, None), is_causal=False)]
    >>> meet(((0, 2), (6, 8)), ((0, 2), (6, 8)), is_causal=True)
    [Tile(rows=slice(0, 4, None), keys=slice(0, 4, None), is_causal=True)]
    """
    if not queries or not keys:
        return []
    if not is_causal or queries == keys:  # rows of a shard are in the order of their positions
        return [Tile(slice(0, rows_of(queries)), slice(0, rows_of(keys)), is_causal)]
    tiles: list[Tile] = []
    row = 0
    for start, stop in queries:
        end = row + stop - start
        seen = sum(min(key_stop, start) - key_start for key_start, key_stop in keys if key_start < start)
        if seen:  # by every row of this piece; if by every row of the last piece too, they are one tile
            first = row
            if tiles and tiles[-1].rows.stop == row and tiles[-1].keys == slice(0, seen):
                first = tiles.pop().rows.start
            tiles.append(Tile(slice(first, end), slice(0, seen), is_causal=False))
        at = 0
        for key_start, key_stop in keys:
            low, high = max(start, key_start), min(stop, key_stop)
            if low < high:
                both = slice(at + low - key_start, at + high - key_start)
                tiles.append(Tile(slice(row + low - start, row + high - start), both, is_causal=True))
                if high < stop:
                    tiles.append(Tile(slice(row + high - start, end), both, is_causal=False))
            at += key_stop - key_start
        row = end
    return tiles


class Keys(NamedTuple):
    """Some keys.

    Attributes:
        pieces: their positions.
        key, value: (batch, keys, kv_heads, head_dim), last stride 1.
        real: (batch, keys), bool, True where a key is no padding; None for all.
    """

    pieces: Pieces
    key: Tensor
    value: Tensor
    real: Tensor | None


class Engine:
    """Attends some queries to keys that come one shard after another.

    Args:
        query: (batch, rows, heads, head_dim).
        pieces: the rows' positions.
        kv_heads: of the keys that will come.
        masked: whether some of them may be padding.
        scale: factor on the scores, above 0.
        kernel: a kernel's name, or "auto".
        resources: where the sums are allocated.
    """

    def __init__(
        self,
        query: Tensor,
        pieces: Pieces,
        kv_heads: int,
        *,
        masked: bool,
        is_causal: bool,
        scale: float,
        kernel: str,
        resources: Resources,
    ) -> None:
        self.pieces, self.kv_heads, self.is_causal, self.scale = pieces, kv_heads, is_causal, scale
        self.masked, self.kernel, self.resources = masked, kernel, resources
        self.dtype = accumulation_dtype(query.dtype)
        self.rounds = self.dtype != query.dtype  # whether sums are more precise than the results
        self.blocks = query.shape[2] // kv_heads if kv_heads else 1
        self.shape, self.device = query.shape, query.device
        self.query = self._by_block(last_stride_1(query))

    def empty(self, *size: int, kind: BufferKind = "temp") -> Tensor:
        """Room for a sum."""
        return self.resources.empty(size, dtype=self.dtype, device=self.device, kind=kind)

    def zeros(self, *size: int, kind: BufferKind = "temp") -> Tensor:
        """A sum of nothing."""
        return self.empty(*size, kind=kind).zero_()

    # -------------------------------------------------------------------------------------------- forward

    def start_forward(self) -> None:
        """Begin with no keys: out 0, lse -inf."""
        self.out = self.zeros(*self.shape, kind="temp" if self.rounds else "output")
        self.lse = self.empty(*self.shape[:-1], kind="output").fill_(-math.inf)
        self.engine: Kernel = choose(
            self.kernel, self.device, self.query.dtype, self.shape[-1], Needs(mask=self.masked)
        )

    def attend(self, keys: Keys) -> None:
        """Merge attention to these keys into ``out``, like query, and ``lse`` (batch, rows, heads)."""
        out, lse = self._by_block(self.out), self._by_block(self.lse)
        for tile, block in self._tiles(keys):
            problem = self._problem(keys, tile, block)
            if problem is not None:
                places = _lanes(out[:, tile.rows, :, block]), _lanes(lse[:, tile.rows, :, block])
                merge_tile(attend_tile(self.engine, problem), *places, all_have_keys=not self.masked)

    # -------------------------------------------------------------------------------------------- backward

    def start_backward(self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor) -> None:
        """Begin with gradients of 0.

        Args:
            grad_out, out: like query; grad_lse, lse: (batch, rows, heads); grad_lse None for none.
        """
        lse, grad_lse = rows_for_backward(lse, grad_lse)
        self.grad_query = self.zeros(*self.shape, kind="temp" if self.rounds else "query")
        self.by_row = [self._by_block(rows) for rows in (last_stride_1(grad_out), last_stride_1(out), lse)]
        self.grad_lse = None if grad_lse is None else self._by_block(grad_lse)

    def differentiate(self, keys: Keys, grad_key: Tensor, grad_value: Tensor) -> None:
        """Add the gradients of attention to these keys to ``grad_query`` and to ``grad_key`` and ``grad_value``.

        Args:
            grad_key, grad_value: (batch, keys, kv_heads, head_dim), float32 or float64.
        """
        grad_query = self._by_block(self.grad_query)
        for tile, block in self._tiles(keys):
            problem = self._problem(keys, tile, block)
            if problem is not None:
                grad_out, out, lse = (_lanes(rows[:, tile.rows, :, block]) for rows in self.by_row)
                grad_lse = None if self.grad_lse is None else _lanes(self.grad_lse[:, tile.rows, :, block])
                grads = tile_backward(self.kernel, problem, grad_out, grad_lse, out, lse)
                by_key = (_lanes(total[:, tile.keys]) for total in (grad_key, grad_value))
                add_tile(grads, (_lanes(grad_query[:, tile.rows, :, block]), *by_key))

    # -------------------------------------------------------------------------------------------- both

    def _by_block(self, tensor: Tensor) -> Tensor:
        """(batch, rows, heads, ...) as (batch, rows, kv_heads, blocks, ...), a view."""
        blocks: Tensor = tensor.unflatten(2, (self.kv_heads, self.blocks))
        return blocks

    def _tiles(self, keys: Keys) -> list[tuple[Tile, int]]:
        if 0 in (self.shape[0], self.kv_heads):
            return []
        tiles = meet(self.pieces, keys.pieces, self.is_causal)
        return [(tile, block) for tile in tiles for block in range(self.blocks)]

    def _problem(self, keys: Keys, tile: Tile, block: int) -> Problem | None:
        real = None
        if keys.real is not None:
            real = keys.real[:, None, tile.keys].expand(-1, self.kv_heads, -1)
        return make_problem(
            _lanes(self.query[:, tile.rows, :, block]),
            _lanes(keys.key[:, tile.keys]),
            _lanes(keys.value[:, tile.keys]),
            real,
            is_causal=tile.is_causal,
            scale=self.scale,
        )


def _lanes(rows: Tensor) -> Tensor:
    """(batch, rows, kv_heads, ...) as the kernels take it, (batch, kv_heads, rows, ...)."""
    return rows.transpose(1, 2)
