"""What each rank computes: pairs of a query and a key that it attends, over all heads."""

from __future__ import annotations

from collections.abc import Sequence

from dilated_ring.plan.cost import Heads, heads_of
from dilated_ring.plan.crossing import Branch, Crossing, inner_segments


def attended_pairs(bounds: tuple[int, ...], branch: Branch, crossings: Sequence[Crossing]) -> list[int]:
    """Of one branch, by rank; the zero keys of "torchscale" are left out."""
    everything = heads_of(branch, branch.members)
    totals = [
        sum(
            segments * _pairs(everything, 0, length, 0, is_causal=branch.is_causal)
            for _, segments, length in inner_segments(bounds, branch, rank)
        )
        for rank in range(len(bounds) - 1)
    ]
    for crossing in crossings:
        for part in crossing.parts:
            if crossing.by_heads:
                heads = heads_of(branch, crossing.share(part.rank))
                rows, after = (0, crossing.length), 0
            else:
                heads = everything
                rows, after = (part.first, part.stop), crossing.length - part.stop
            totals[part.rank] += _pairs(heads, *rows, after, is_causal=branch.is_causal)
    return totals


def _pairs(heads: Heads, first: int, stop: int, after: int, *, is_causal: bool) -> int:
    """Pairs of the query rows between two positions of a segment that goes on for ``after`` more."""
    total = 0
    for phase, count in heads.of_each_phase():
        before, until, whole = (-(-(position - phase) // heads.rate) for position in (first, stop, stop + after))
        rows = until - before
        keys = rows * before + rows * (rows + 1) // 2 if is_causal else rows * whole
        total += count * keys
    return total
