"""What one rank gets from each other, as ranges of positions in the whole sequence: for people, and for audits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dilated_ring.plan.crossing import Branch, Strip
from dilated_ring.plan.rank_plan import Bundle, RankPlan


class RowRange(NamedTuple):
    """Rows of some heads that a rank gets from another.

    Attributes:
        branch: its number in the pattern.
        source: the rank that holds them.
        tensor: "keys", and the values beside them; or "queries", where ranks attend whole heads.
        phase: of the heads: where in a segment their grid starts.
        start: the first position, in the whole sequence.
        stop: beyond the last one.
        step: from one to the next, the branch's dilation rate.
        heads: key heads, or query heads.
    """

    branch: int
    source: int
    tensor: str
    phase: int
    start: int
    stop: int
    step: int
    heads: tuple[int, ...]

    @property
    def positions(self) -> range:
        """start, stop and step as a range."""
        return range(self.start, self.stop, self.step)


def ranges_of(plan: RankPlan, bounds: tuple[int, ...]) -> Iterator[RowRange]:
    """Everything that a rank gets from others in a forward pass, read off the strips that travel."""
    for route in plan.routes:
        for segment in route.segments:
            for bundle in segment.gathered:
                if bundle.peer == plan.rank:
                    continue
                for tensor in ("queries", "keys") if route.by_heads else ("keys",):
                    for block in bundle.blocks(of_keys=tensor == "keys"):
                        for strip in bundle.strips[block]:
                            yield from _of_strip(
                                route.branch, bundle, tensor, block, strip, bounds[bundle.peer], segment.crossing.start
                            )


def _of_strip(
    branch: Branch, bundle: Bundle, tensor: str, block: int, strip: Strip, low: int, segment_start: int
) -> Iterator[RowRange]:
    tile = strip.tile
    for phase in range(tile.phases):
        start = low + tile.start + phase
        first = bundle.share.start + tile.first_head + phase * tile.phase_step
        heads = [first + group * tile.group_step for group in range(tile.groups)]
        if tensor == "queries":
            heads = [block + head * branch.blocks for head in heads]
        yield RowRange(
            branch.number,
            bundle.peer,
            tensor,
            (start - segment_start) % branch.rate,
            start,
            start + (tile.rows - 1) * tile.rate + 1,
            tile.rate,
            tuple(heads),
        )
