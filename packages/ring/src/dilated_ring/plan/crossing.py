"""A segment that crosses from one shard into another: who holds which of its rows, who attends which of its heads.

Row i of a head in a segment is position ``start + phase + i * rate``. A rank's *part* of the segment, cut at its
bounds, holds some rows of each head; as strided views of its tensors these are a few *strips*. Strips of all parts, put
together, are the *gathered* segment: (batch, rows, lanes, ...), where a lane is a head.

Query heads that share a key head are told apart by their number within the group, their *block*: block f has query
heads f, f + group, f + 2 group, ..., so that its heads are numbered like the key heads that they meet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from dilated_core.plan import Run, Tile, branch_runs, cut_segments, padded_rows
from dilated_ring.plan.sharding import even_bounds


class Branch(NamedTuple):
    """One branch of the pattern, and the heads that it has: what its segments share."""

    number: int
    branches: int
    segment_length: int  # at most the sequence's length
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

    def key_block(self, block: int, share: range) -> int:
        """The first block that meets the same rows of the same key heads: only its keys are sent."""
        runs = self.runs(block, share)
        return next(earlier for earlier in range(block + 1) if self.runs(earlier, share) == runs)

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


class Part(NamedTuple):
    """What one rank holds of a segment: positions ``first`` to ``stop``, counted from the segment's start."""

    rank: int
    first: int
    stop: int
    offset: int  # where position ``first`` lies in the rank's shard


class Strip(NamedTuple):
    """Equally many rows of some heads of a segment: where they lie in a shard, and where in the gathered segment."""

    tile: Tile
    row: int  # first row, counted in the segment
    of: int  # rows of these heads in the whole segment
    lane: int  # first lane
    lane_step: int  # lanes from one group of heads to the next

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
    """A segment that several ranks hold parts of."""

    branch: Branch
    start: int  # position in the whole sequence
    length: int
    parts: tuple[Part, ...]  # in the order of positions; none is empty
    by_heads: bool  # whether ranks attend whole heads, or their own rows with the keys of all others

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who holds a part."""
        return tuple(part.rank for part in self.parts)

    def part(self, rank: int) -> Part:
        """The part of that rank."""
        return next(part for part in self.parts if part.rank == rank)

    def share(self, rank: int) -> range:
        """The key heads that the rank attends: all of them, or its share."""
        members = self.branch.members
        if not self.by_heads:
            return members
        bounds = even_bounds(len(members), len(self.parts))
        at = self.ranks.index(rank)
        return range(members.start + bounds[at], members.start + bounds[at + 1])

    def sends(self, source: int, destination: int) -> bool:
        """Whether a rank's rows go to another (or stay, for itself, in what is gathered)."""
        if self.branch.is_causal and not self.by_heads:
            return source < destination
        return True

    def strips(self, rank: int, block: int, share: range) -> tuple[Strip, ...]:
        """The rank's part, of one block of heads."""
        return self.cut(self.part(rank), block, share)

    def whole(self, block: int, share: range) -> tuple[Strip, ...]:
        """The whole segment, of one block of heads, in as few strips as there can be."""
        return self.cut(Part(-1, 0, self.length, 0), block, share)

    def cut(self, part: Part, block: int, share: range) -> tuple[Strip, ...]:
        """Any part, of one block of heads."""
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
        return tuple(Strip(cut.tile, cut.row, cut.of, lanes[cut.run] + cut.phase, runs[cut.run].phases) for cut in cuts)

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
