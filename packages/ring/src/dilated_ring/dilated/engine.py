"""One rank's share of a dilated attention, forward and backward, without autograd.

All exchanges start first. Segments that lie in the shard are attended while rows travel, by ``dilated_core.fused``;
then each branch that crosses, as its rows arrive. Partials are merged, and gradients summed, in float32 (float64 for
float64). The backward is the same plan again, with the merged out and lse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.fused import OF_SUMS, backward_tiles, forward_tiles
from dilated_core.kernels import Needs, choose, rows_for_backward, tile_backward
from dilated_core.partial import accumulation_dtype, merge_in_place
from dilated_core.resources import OF_QKV, BufferKind, Resources
from dilated_core.span import Options, Span
from dilated_core.tiles import add_tile, last_stride_1, merge_tile
from dilated_ring.comm import Comm, Purpose
from dilated_ring.dilated.exchange import Arrivals, Exchanges, Gathered, Rows
from dilated_ring.dilated.meeting import Meeting, Meetings, Shard, heads_first
from dilated_ring.plan import RankPlan, Route, Segment

Kept = list[list[list[Gathered]]]
"""What each route gathered, kept for the backward."""


class Inputs(NamedTuple):
    """A rank's shard.

    Attributes:
        query: (batch, local seq, heads, head_dim); key, value: the same with kv_heads.
        real: (batch, local seq), bool, True where a key is no padding; None for all.
        seed: of the dropout; None without.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    real: Tensor | None
    seed: int | None


class Rank:
    """One rank at work on one call."""

    def __init__(self, comm: Comm, plan: RankPlan, inputs: Inputs, options: Options, resources: Resources) -> None:
        self.plan, self.options, self.resources = plan, options, resources
        self.exchanges = Exchanges(comm, resources)
        self.blocks = len(plan.inner)
        self.query, self.key, self.value = (last_stride_1(tensor) for tensor in inputs[:3])
        self.real = inputs.real
        # Ranks may have drawn the same seed: what they drop must differ.
        self.seed = None if inputs.seed is None else (inputs.seed + plan.rank * 0x9E3779B97F4A7C15) % 2**62
        self.shard = Shard(
            Rows.of_queries(self.query, self.blocks),
            Rows.like_keys(self.key, self.blocks),
            Rows.like_keys(self.value, self.blocks),
            None if self.real is None else Rows.like_keys(_per_head(self.real, self.key), self.blocks),
        )
        self.meetings = Meetings(options, None if self.seed is None else self.seed + (1 << 40))
        needs = Needs(self.real is not None, options.dropout_p > 0)
        self.kernel = choose(options.kernel, self.query.device, self.query.dtype, self.query.shape[-1], needs)

    # -------------------------------------------------------------------------------------------- forward

    def forward(self, *, keep: bool) -> tuple[Tensor, Tensor, Kept | None]:
        """out like query, lse (batch, local seq, heads), and what was gathered, if it is to be kept."""
        waiting = [self._start_gather(route, "forward") for route in self.plan.routes]
        waiting.reverse()  # taken off the end: who has waited holds the buffer that the rows arrived in
        sums = [self._attend_inner(block) for block in range(self.blocks)]
        out, lse = (Rows(list(each)) for each in zip(*sums, strict=True))
        kept, returning = list[list[list[Gathered]]](), []
        for number, route in enumerate(self.plan.routes):
            gathered = waiting.pop()()
            if keep:
                kept.append(gathered)
            if route.by_heads:
                returning.append(self._attend_heads(number, route, gathered, out, lse))
            else:
                self._attend_rows(number, route, gathered, out, lse)
            del gathered
        for out_arrivals, lse_arrivals in returning:
            for (place, rows), (lse_place, lse_rows) in zip(out_arrivals(), lse_arrivals(), strict=True):
                merge_in_place(place, lse_place, rows, lse_rows)
        out_dtype, lse_dtype = self.query.dtype, lse.blocks[0].dtype
        results = self._joined(out, out_dtype, "output"), self._joined(lse, lse_dtype, "output")
        return *results, kept if keep else None

    def _start_gather(self, route: Route, phase: str) -> Callable[[], list[list[Gathered]]]:
        """Start to gather what a route's meetings take: query (for whole heads), key, value and the mask."""
        shard = self.shard
        tensors = [shard.query] * route.by_heads + [shard.key, shard.value]
        kinds = OF_QKV[-len(tensors) :]
        what = "queries, keys and values" if route.by_heads else "keys and values"
        waits = [self.exchanges.start_out(route, tensors, kinds, _purpose(what, phase, route))]
        if shard.real is not None:
            waits.append(self.exchanges.start_out(route, [shard.real], ["mask"], _purpose("padding", phase, route)))

        return lambda: _side_by_side(waits)

    def _span(self, block: int) -> Span:
        return Span(self.options, self.resources, self.query.shape[2], self.real, self.seed).apart(block)

    def _attend_inner(self, block: int) -> tuple[Tensor, Tensor]:
        qkv = [self.shard.query.blocks[block], self.key, self.value]
        # A result where one block is all and nothing is to be rounded; the lse is never rounded.
        of_lse: BufferKind = "output" if self.blocks == 1 else "temp"
        of_out: BufferKind = "temp" if self._rounds() else of_lse
        return forward_tiles(self.kernel, self._span(block), list(self.plan.inner[block]), qkv, (of_out, of_lse))

    def _attend_rows(self, number: int, route: Route, gathered: list[list[Gathered]], out: Rows, lse: Rows) -> None:
        """Merge the rank's own rows with the gathered keys into the sums."""
        for meeting in self.meetings.of(number, route, gathered, self.shard):
            partial = meeting.partial(self.kernel)
            if partial is not None:
                share = meeting.segment.share
                places = (meeting.strip.of_shard(rows.of(meeting.block, share)) for rows in (out, lse))
                merge_tile(partial, *places, all_have_keys=self.real is None)

    def _attend_heads(
        self, number: int, route: Route, gathered: list[list[Gathered]], out: Rows, lse: Rows
    ) -> tuple[Arrivals, Arrivals]:
        """Attend whole heads, and start to send their results to who owns the rows."""
        results = [
            [self.exchanges.room(segment, self.shard.query), self.exchanges.room(segment, lse)]
            for segment in route.segments
        ]
        for meeting in self.meetings.of(number, route, gathered, self.shard):
            partial = meeting.partial(self.kernel)
            places = [meeting.strip.of_segment(room.of(meeting.block)) for room in results[meeting.at]]
            if partial is None:
                places[0].zero_()
                places[1].fill_(-math.inf)
            else:
                for place, rows in zip(places, partial, strict=True):
                    place.copy_(rows.reshape(place.shape))
        outs, lses = ([[rooms[at]] for rooms in results] for at in (0, 1))
        return (
            self.exchanges.start_back(route, outs, [out], self.query, _purpose("results", "forward", route)),
            self.exchanges.start_back(route, lses, [lse], lse.blocks[0], _purpose("lses", "forward", route)),
        )

    def _rounds(self) -> bool:
        """Whether sums are more precise than the results."""
        return accumulation_dtype(self.query.dtype) != self.query.dtype

    def _joined(self, sums: Rows, dtype: torch.dtype, kind: BufferKind) -> Tensor:
        """The blocks' heads in the order of the query's, rounded."""
        if self.blocks == 1:
            return sums.blocks[0].to(dtype)
        first = sums.blocks[0]
        size = (*first.shape[:2], self.query.shape[2], *first.shape[3:])
        joined = self.resources.empty(size, dtype=dtype, device=first.device, kind=kind)
        for block, heads in enumerate(sums.blocks):
            joined[:, :, block :: self.blocks] = heads
        return joined

    # -------------------------------------------------------------------------------------------- backward

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, kept: Kept | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value.

        Args:
            grad_out, out: like query; grad_lse (or None), lse: (batch, local seq, heads).
            kept: what the forward gathered; None to gather it again.
        """
        lse, grad_lse = rows_for_backward(lse, grad_lse)
        halves = [Rows.of_queries(last_stride_1(tensor), self.blocks) for tensor in (grad_out, out)]
        singles = [Rows.of_queries(rows, self.blocks) for rows in (lse, grad_lse) if rows is not None]
        by_query = [*halves, *singles]
        routes = self.plan.routes
        waiting = [self._start_gather(route, "backward") for route in routes] if kept is None else []
        results = [self._start_results(route, halves, singles) if route.by_heads else None for route in routes]
        waiting.reverse()
        results.reverse()
        grad_query, (grad_key, grad_value) = self._differentiate_inner(by_query)
        sums = [grad_query, *(Rows.like_keys(total, self.blocks) for total in (grad_key, grad_value))]
        returning = []
        for number, route in enumerate(routes):
            gathered = waiting.pop()() if kept is None else kept[number]
            result = results.pop()
            if result is None:
                returning.append(self._differentiate_rows(number, route, gathered, by_query, sums))
            else:
                returning.append(self._differentiate_heads(number, route, gathered, result(), sums))
            del gathered, result
        for arrivals in returning:
            for place, rows in arrivals():
                place.add_(rows)
        dtype = self.query.dtype
        return self._joined(grad_query, dtype, "query"), grad_key.to(dtype), grad_value.to(dtype)

    def _start_results(
        self, route: Route, halves: list[Rows], singles: list[Rows]
    ) -> Callable[[], list[list[Gathered]]]:
        """Start to gather the results' gradients and the results, where whole heads are attended."""
        both = {"results and their gradients": halves, "lses": singles}
        waits = [
            self.exchanges.start_out(route, rows, ["temp"] * len(rows), _purpose(what, "backward", route))
            for what, rows in both.items()
        ]

        return lambda: _side_by_side(waits)

    def _differentiate_inner(self, by_query: list[Rows]) -> tuple[Rows, list[Tensor]]:
        grads, kv_sums = [], list[Tensor]()
        kinds = OF_SUMS if self._rounds() else OF_QKV
        if self.blocks > 1:  # each has its own sum of query's, joined in the end
            kinds = ("temp", *kinds[1:])
        for block in range(self.blocks):
            queries = [rows.blocks[block] for rows in (self.shard.query, *by_query)]
            tiles = list(self.plan.inner[block])
            keys = [self.key, self.value]
            grad, *kv_sums = backward_tiles(self._span(block), tiles, queries, keys, kv_sums, kinds)
            grads.append(grad)
        return Rows(grads), kv_sums

    def _differentiate_rows(
        self, number: int, route: Route, gathered: list[list[Gathered]], by_query: list[Rows], sums: list[Rows]
    ) -> Arrivals:
        """Add the gradients of the rank's own rows, and start to send those of the gathered keys to their owners."""
        shard = self.shard
        results = [self._zeros(segment, [shard.key, shard.value]) for segment in route.segments]
        for meeting in self.meetings.of(number, route, gathered, shard):
            at, segment, block, strip, reaches = meeting
            views = (heads_first(strip.of_shard(rows.of(block, segment.share))) for rows in by_query)
            grad_out, out, lse, *grad_lse = views
            if self.options.semantics == "torchscale":
                out = self._own_out(meeting, out)
            for problem, rows in reaches:
                if problem is None:
                    continue
                places = [strip.of_shard(sums[0].of(block, segment.share))]
                if rows is None:
                    places += [strip.of_shard(total.of(block, segment.share)) for total in sums[1:]]
                else:
                    places += [strip.of_segment(room.of(block), *rows) for room in results[at]]
                grads = tile_backward(self.options.kernel, problem, grad_out, _only(grad_lse), out, lse)
                add_tile(grads, places)
        purpose = _purpose("gradients of keys and values", "backward", route)
        return self.exchanges.start_back(route, results, sums[1:], self.query, purpose)

    def _differentiate_heads(
        self,
        number: int,
        route: Route,
        gathered: list[list[Gathered]],
        results: list[list[Gathered]],
        sums: list[Rows],
    ) -> Arrivals:
        """Attend whole heads backwards, and start to send all gradients to who owns the rows."""
        shard = self.shard
        grads = [self._zeros(segment, [shard.query, shard.key, shard.value]) for segment in route.segments]
        for meeting in self.meetings.of(number, route, gathered, shard):
            at, _, block, strip, reaches = meeting
            by_query, totals = results[at], grads[at]
            grad_out, out, lse, *grad_lse = (heads_first(strip.of_segment(room.of(block))) for room in by_query)
            if self.options.semantics == "torchscale":
                out = self._own_out(meeting, out)
            for problem, _ in reaches:
                if problem is not None:
                    rows = tile_backward(self.options.kernel, problem, grad_out, _only(grad_lse), out, lse)
                    add_tile(rows, (strip.of_segment(room.of(block)) for room in totals))
        return self.exchanges.start_back(route, grads, sums, self.query, _purpose("gradients", "backward", route))

    def _zeros(self, segment: Segment, tensors: list[Rows]) -> list[Gathered]:
        """Room for the sums of gradients of gathered rows."""
        dtype = accumulation_dtype(self.query.dtype)
        return [self.exchanges.room(segment, rows, dtype).apply(torch.zero_) for rows in tensors]

    def _own_out(self, meeting: Meeting, out: Tensor) -> Tensor:
        """The branch's own out, since with "torchscale" the weights of the mixture take no gradient."""
        partial = meeting.partial(self.kernel)
        return out if partial is None else partial[0].to(out.dtype)


def _side_by_side(waits: list[Callable[[], list[list[Gathered]]]]) -> list[list[Gathered]]:
    """For each segment, what all exchanges gathered."""
    return [[room for rooms in each for room in rooms] for each in zip(*(wait() for wait in waits), strict=True)]


def _purpose(what: str, phase: str, route: Route) -> Purpose:
    branch = route.branch
    detail = f"segment_length {branch.segment_length}, dilation_rate {branch.rate}"
    return Purpose(what, phase, branch.number, detail)


def _per_head(real: Tensor, key: Tensor) -> Tensor:
    """A mask of positions as one of every key head, in a dtype that all backends send: (batch, local seq, kv_heads)."""
    return real.to(torch.uint8).unsqueeze(-1).expand(*real.shape, key.shape[2])


def _only(rows: list[Tensor]) -> Tensor | None:
    return rows[0] if rows else None
