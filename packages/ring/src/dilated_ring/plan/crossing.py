"""A segment that crosses from one shard into another: who holds which of its rows, who attends which of its heads.

Row i of a head in a segment is position ``start + phase + i * rate``. A rank's *part* of the segment, cut at its
bounds, holds some rows of each head; as strided views of its tensors these are a few *strips*. Strips of all parts, put
together, are the *gathered* segment: (batch, rows, lanes, ...), where a lane is a head.

Query heads that share a key head are told apart by their number within the group, their *block*: block f has query
heads f, f + group, f + 2 group, ..., so that its heads are numbered like the key heads that they meet.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from dilated_core.plan import Cut, Run, Tile, branch_runs, cut_segments, padded_rows
from dilated_ring.plan.sharding import even_part


class Branch(NamedTuple):
    """One branch of the pattern, and the heads that it has: what its segments share.

    Attributes:
        number: of the branch in the pattern.
        branches: how many the pattern has.
        segment_length: in positions, at most the sequence's length.
        rate: the branch's dilation rate.
        heads: of query.
        kv_heads: of key and value.
        is_causal: whether a row sees only keys at or before it.
        semantics: "paper", "torchscale" or "grouped".
    """

    number: int
    branches: int
    segment_length: int
    rate: int
    heads: int
    kv_heads: int
    is_causal: bool
    semantics: str

    @property
    def blocks(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def runs(self, block: int, share: range) -> tuple[Run, ...]:
        """The block's heads that meet the key heads in ``share``, numbered from 0."""
        chosen = range(block + share.start * self.blocks, block + share.stop * self.blocks, self.blocks)
        return branch_runs(self.semantics, self.number, self.branches, self.rate, self.heads, chosen)

    @property
    def members(self) -> range:
        """The key heads that the branch has a query head for: all, but with "grouped"."""
        return _members(self)

    def key_blocks(self, share: range) -> tuple[int, ...]:
        """Of each block, the first one that meets the same rows of the same key heads: only its keys are sent.

        Blocks that meet some rows alike and others not send those twice. With "paper" there are none. With
        "torchscale" there are where neither of ceil(heads / rate) and the number of blocks divides the other; with
        "grouped" where the heads of a branch begin or end among the query heads of one key head and have another.
        """
        return _key_blocks(self, share)

    @property
    def full_rows(self) -> int:
        """Rows that torchscale's zero keys fill each segment up to."""
        return padded_rows(self.semantics, self.segment_length, self.rate, is_causal=self.is_causal)


@lru_cache(maxsize=1024)
def _members(branch: Branch) -> range:
    every = range(branch.kv_heads)
    present = [
        run.first_head + group * run.group_step + phase * run.phase_step
        for block in range(branch.blocks)
        for run in branch.runs(block, every)
        for group in range(run.groups)
        for phase in range(run.phases)
    ]
    return range(min(present), max(present) + 1) if present else range(0)


@lru_cache(maxsize=1024)
def _key_blocks(branch: Branch, share: range) -> tuple[int, ...]:
    first: dict[tuple[Run, ...], int] = {}
    return tuple(first.setdefault(branch.runs(block, share), block) for block in range(branch.blocks))


class Part(NamedTuple):
    """What one rank holds of a segment.

    Attributes:
        rank: who holds it.
        first: its first position, counted from the segment's start.
        stop: beyond its last one.
        offset: where position ``first`` lies in the rank's shard.
    """

    rank: int
    first: int
    stop: int
    offset: int


class Strip(NamedTuple):
    """Equally many rows of some heads of a segment: where they lie in a shard, and where in the gathered segment.

    Attributes:
        tile: the rows, as a view of the shard.
        row: the first of them, counted in the segment.
        of: how many rows these heads have in the whole segment.
        lane: the first lane.
        lane_step: lanes from one group of heads to the next.
    """

    tile: Tile
    row: int
    of: int
    lane: int
    lane_step: int

    @property
    def size(self) -> int:
        """Rows times heads."""
        return self.tile.rows * self.tile.heads

    def of_shard(self, tensor: Tensor) -> Tensor:
        """View of the shard's (batch, seq, heads, ...): (batch, groups, phases, rows, ...)."""
        return self.tile.view(tensor)[:, 0]

    def of_segment(self, gathered: Tensor, first: int | None = None, stop: int | None = None) -> Tensor:
        """View of (batch, rows, lanes, ...): (batch, groups, phases, rows, ...).

        Args:
            first, stop: other rows of the same heads; the strip's own by default.
        """
        first = self.row if first is None else first
        stop = first + self.tile.rows if stop is None else stop
        batch, row, lane, *rest = gathered.stride()
        size = (gathered.shape[0], self.tile.groups, self.tile.phases, stop - first, *gathered.shape[3:])
        stride = (batch, self.lane_step * lane, lane, row, *rest)
        return gathered.as_strided(size, stride, gathered.storage_offset() + self.lane * lane + first * row)


class Crossing(NamedTuple):
    """A segment that several ranks hold parts of.

    Attributes:
        branch: the branch that it is a segment of.
        start: its first position, in the whole sequence.
        length: in positions.
        parts: in the order of positions; none is empty.
        by_heads: whether ranks attend whole heads; else their own rows, with the keys of all others.
    """

    branch: Branch
    start: int
    length: int
    parts: tuple[Part, ...]
    by_heads: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who holds a part."""
        return tuple(part.rank for part in self.parts)

    def held_by(self, rank: int) -> bool:
        """Whether that rank holds a part."""
        at = bisect_left(self.parts, (rank,))
        return at < len(self.parts) and self.parts[at].rank == rank

    def part(self, rank: int) -> Part:
        """The part of that rank."""
        return self.parts[bisect_left(self.parts, (rank,))]

    def share(self, rank: int) -> range:
        """The key heads that the rank attends: all of them, or its share."""
        members = self.branch.members
        if not self.by_heads:
            return members
        return members[even_part(len(members), len(self.parts), bisect_left(self.parts, (rank,)))]

    def phases_met(self, rank: int) -> tuple[range, ...]:
        """The phases that the rank gathers: all but, of its own rows, those that it has no row of."""
        rate = self.branch.rate
        part = self.part(rank)
        if self.by_heads or part.stop - part.first >= rate:
            return (range(rate),)
        first, stop = part.first % rate, part.first % rate + part.stop - part.first
        return (range(first, stop),) if stop <= rate else (range(stop - rate), range(first, rate))

    def sends(self, source: int, destination: int) -> bool:
        """Whether a rank's rows go to another (or stay, for itself, in what is gathered)."""
        if self.branch.is_causal and not self.by_heads:
            return source < destination
        return True

    def strips(self, rank: int, block: int, share: range, phases: tuple[range, ...] | None = None) -> tuple[Strip, ...]:
        """The rank's part, of one block of heads, and of some phases only where asked."""
        return self._cut(self.part(rank), block, share, phases or (range(self.branch.rate),))

    def whole(self, block: int, share: range) -> tuple[Strip, ...]:
        """The whole segment, of one block of heads, in as few strips as there can be."""
        return self._cut(Part(-1, 0, self.length, 0), block, share, (range(self.branch.rate),))

    def _cut(self, part: Part, block: int, share: range, phases: tuple[range, ...]) -> tuple[Strip, ...]:
        branch = self.branch
        runs = branch.runs(block, share)
        lanes = [0]
        for run in runs:
            lanes.append(lanes[-1] + run.groups * run.phases)
        cuts = cut_segments(
            runs,
            branch.rate,
            start=part.offset,
            segments=1,
            segment_length=branch.segment_length,
            length=self.length,
            first=part.first,
            stop=part.stop,
            full_rows=branch.full_rows,
        )
        return tuple(
            Strip(cut.tile, cut.row, cut.of, lanes[cut.run] + cut.phase, runs[cut.run].phases)
            for whole in cuts
            for cut in _of_phases(whole, runs[whole.run].first_phase + whole.phase, phases)
        )

    def gathered_rows(self, rank: int) -> int:
        """Rows that are gathered at the rank, for the head that has most of them."""
        part = self.part(rank)
        stop = self.length
        if not self.sends(rank, rank):
            stop = part.first
        return -(-stop // self.branch.rate)

    def gathered_lanes(self, block: int, share: range) -> int:
        """Lanes of what is gathered."""
        return sum(run.groups * run.phases for run in self.branch.runs(block, share))


def _of_phases(cut: Cut, first_phase: int, phases: tuple[range, ...]) -> Iterator[Cut]:
    """The heads of a cut, whose first phase is given, that have one of these phases."""
    tile = cut.tile
    for wanted in phases:
        low = max(wanted.start - first_phase, 0)
        high = min(wanted.stop - first_phase, tile.phases)
        if low < high:
            heads = tile._replace(
                start=tile.start + low, first_head=tile.first_head + low * tile.phase_step, phases=high - low
            )
            yield cut._replace(tile=heads, phase=cut.phase + low)


def find_crossings(bounds: tuple[int, ...], branch: Branch, *, by_heads: bool) -> list[Crossing]:
    """The branch's segments that lie on several ranks, in order."""
    members: dict[int, list[Part]] = {}  # of a segment's number, only of those that a shard's bound cuts
    length, seq_len = branch.segment_length, bounds[-1]
    for rank, (low, high) in enumerate(pairwise(bounds)):
        if low == high:
            continue
        for number in sorted({low // length, (high - 1) // length}):
            start = number * length
            stop = min(start + length, seq_len)
            if start < low or stop > high:
                first = max(low, start)
                members.setdefault(number, []).append(Part(rank, first - start, min(high, stop) - start, first - low))
    return [
        Crossing(branch, number * length, min(length, seq_len - number * length), tuple(parts), by_heads)
        for number, parts in sorted(members.items())
    ]


def inner_segments(bounds: tuple[int, ...], branch: Branch, rank: int) -> list[tuple[int, int, int]]:
    """The segments that lie in one shard altogether: (start, how many, length) of the whole ones, then of a short one.

    ``start`` is a position in the whole sequence.
    """
    low, high = bounds[rank : rank + 2]
    length = branch.segment_length
    first = -(-low // length) * length
    whole = max(0, (high - first) // length)
    tail = first + whole * length
    found = [(first, whole, length)] if whole else []
    if low <= tail < high == bounds[-1]:  # the last segment of the sequence may be short
        found.append((tail, 1, high - tail))
    return found
