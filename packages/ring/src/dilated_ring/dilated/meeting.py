"""A meeting: query rows of a crossing segment with all keys that they attend, as the problems kernels take.

Where a rank attends its own rows, these are the strip's rows with the gathered keys of the whole segment; causal, with
those of earlier ranks, all of them, and with its own, causally. Where it attends whole heads, all rows are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.kernels import Dropout, Kernel, Problem
from dilated_core.partial import accumulation_dtype, merge_in_place
from dilated_core.plan import Tile
from dilated_core.span import Options
from dilated_core.tiles import attend_tile, make_problem
from dilated_ring.dilated.exchange import Gathered, Rows
from dilated_ring.plan import Route, Segment, Strip


class Shard(NamedTuple):
    """A rank's own tensors, block by block; ``real`` is None where no key is padding."""

    query: Rows
    key: Rows
    value: Rows
    real: Rows | None


class Reach(NamedTuple):
    """Keys that query rows meet, and where they lie.

    Attributes:
        problem: what the kernel attends; None where all keys are padding.
        rows: of the gathered segment, first and stop; None for the rank's own.
    """

    problem: Problem | None
    rows: tuple[int, int] | None


class Meeting(NamedTuple):
    """Query rows of one strip and all that they reach in one segment.

    Attributes:
        at, segment, block, strip: whose rows; ``at`` is the segment's number in its route.
        reaches: usually one.
    """

    at: int
    segment: Segment
    block: int
    strip: Strip
    reaches: list[Reach]

    @property
    def tile(self) -> Tile:
        """The strip's rows."""
        return self.strip.tile

    def partial(self, engine: Kernel) -> tuple[Tensor, Tensor] | None:
        """out and lse over all reaches, zero keys included; None where all keys are padding."""
        whole: tuple[Tensor, Tensor] | None = None
        for problem, _ in self.reaches:
            if problem is None:
                continue
            out, lse = attend_tile(engine, problem, self.tile.phantoms)
            if whole is None:
                whole = out, lse
            else:
                joint = whole[0].to(accumulation_dtype(out.dtype), copy=True), whole[1].clone()
                merge_in_place(*joint, out, lse)
                whole = joint
        return whole


def heads_first(view: Tensor) -> Tensor:
    """(batch, groups, phases, rows, ...) as kernels take it, (batch, heads, rows, ...): a view where it can be one."""
    return view.flatten(1, 2)


class Meetings:
    """All meetings of a rank's routes; gives their problems the same dropout in the backward as in the forward."""

    def __init__(self, options: Options, seed: int | None) -> None:
        self.options, self.seed = options, seed

    def of(self, number: int, route: Route, gathered: list[list[Gathered]], shard: Shard) -> Iterator[Meeting]:
        """The meetings of one route.

        Args:
            number: the route's, among the rank's.
            gathered: for each segment, of query (where whole heads are attended), key, value and (masked) real.
        """
        problems = 0
        for at, (segment, rooms) in enumerate(zip(route.segments, gathered, strict=True)):
            for block in range(len(segment.own)):
                for strip in (segment.whole if route.by_heads else segment.own)[block]:
                    find = self._whole_heads if route.by_heads else self._own_rows
                    reaches = []
                    for query, key, value, real, is_causal, rows in find(segment, block, strip, rooms, shard):
                        problem = make_problem(
                            query,
                            key,
                            value,
                            real,
                            is_causal=is_causal,
                            scale=self.options.scale,
                            dropout=self._dropout((number << 20) + problems),
                            phantoms=strip.tile.phantoms,
                        )
                        reaches.append(Reach(problem, rows))
                        problems += 1
                    yield Meeting(at, segment, block, strip, reaches)

    def _dropout(self, number: int) -> Dropout | None:
        return None if self.seed is None else Dropout(self.options.dropout_p, (self.seed + number) % 2**63)

    def _whole_heads(
        self, segment: Segment, block: int, strip: Strip, rooms: list[Gathered], shard: Shard
    ) -> Iterator[_Found]:
        query, key, value, *real = (heads_first(strip.of_segment(room.of(block))) for room in rooms)
        mask = real[0].to(torch.bool) if real else None
        yield _Found(query, key, value, mask, self.options.is_causal, (strip.row, strip.row + strip.tile.rows))

    def _own_rows(
        self, segment: Segment, block: int, strip: Strip, rooms: list[Gathered], shard: Shard
    ) -> Iterator[_Found]:
        share, is_causal = segment.share, self.options.is_causal
        query = heads_first(strip.of_shard(shard.query.of(block, share)))
        stop = strip.row if is_causal else strip.of
        if stop > 0:
            views = (heads_first(strip.of_segment(room.of(block), 0, stop)) for room in rooms)
            key, value, *real = views
            yield _Found(query, key, value, real[0].to(torch.bool) if real else None, False, (0, stop))
        if is_causal:
            tensors = (shard.key, shard.value, *(() if shard.real is None else (shard.real,)))
            key, value, *real = (heads_first(strip.of_shard(rows.of(block, share))) for rows in tensors)
            yield _Found(query, key, value, real[0].to(torch.bool) if real else None, True, None)


class _Found(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor | None
    is_causal: bool
    rows: tuple[int, int] | None
