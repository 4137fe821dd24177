"""What is asked of an attention, and one sequence of it: its plan, and its tiles' rows brought to the kernels.

Options and Extras are what every path takes, plain or fused, on one device or over many. A Span cuts its plan into
parts small enough to gather, and makes of each the problem that a kernel attends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from dilated_core.kernels import Dropout, Problem
from dilated_core.plan import Tile, make_tiles
from dilated_core.resources import OF_QKV, BufferKind, Resources
from dilated_core.tiles import make_problem

# Elements gathered of each tensor at a time. On a CPU 4 MiB of float32: long calls that still lie in the shared cache.
# On a GPU, calls large enough to fill the card.
GATHER_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
ALL = slice(None)


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
        budget = gather_elements(tensor)
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
        q, k, v = (self.gather(tile, of_batch(tensor, batch), kind) for tensor, kind in zip(qkv, OF_QKV, strict=True))
        options = self.options
        dropout = None if self.seed is None else Dropout(options.dropout_p, (self.seed + number) % 2**63)
        real = None
        if self.real is not None:
            mask = of_batch(self.real, batch)
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


def gather_elements(tensor: Tensor) -> int:
    """How many of a tensor's elements are gathered at a time, on its device."""
    return GATHER_ELEMENTS.get(tensor.device.type, GATHER_ELEMENTS["cuda"])


def of_batch(tensor: Tensor, batch: slice) -> Tensor:
    """These batch rows. All of them is the usual case, and worth no operation."""
    return tensor if batch is ALL else tensor[batch]
