"""Which keys of a branch are kept, and for which query heads. A pure function of sizes, no tensors.

A *lane* is the grid of one phase in one key head: the rows that the query heads of this phase that use this key head
attend, at most ceil(segment length / rate) a segment. A branch keeps each of its lanes once, however many query heads
share it: together never more than the whole segment, each lane rounded up. Lanes lie sorted by phase, then by key head:
what a position touches is a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from dilated_core.plan import head_phases


class Bundle(NamedTuple):
    """Neighbouring lanes of one phase, which one kernel call attends: equally many heads share each, all in a range.

    Attributes:
        lanes: the slice of the branch's lanes.
        kv_heads: the key head of each lane.
        heads: the query heads of each lane in turn.
    """

    lanes: slice
    kv_heads: tuple[int, ...]
    heads: range


class BranchLanes(NamedTuple):
    """The lanes of one branch.

    Attributes:
        segment_length, rate: the branch.
        lanes: how many there are.
        rows: the most that one keeps.
        bundles: by phase, where it has heads.
    """

    segment_length: int
    rate: int
    lanes: int
    rows: int
    bundles: dict[int, tuple[Bundle, ...]]

    def live_rows(self, position: int) -> int:
        """Rows over all lanes that belong to the segment still open after ``position`` tokens.

        >>> plan_lanes((4,), (2,), "paper", heads=2, kv_heads=2)[0].live_rows(7)  # positions 4, 6 and 5
        3
        """
        return sum(
            (bundle.lanes.stop - bundle.lanes.start) * rows_before(position % self.segment_length, phase, self.rate)
            for phase, bundles in self.bundles.items()
            for bundle in bundles
        )


def rows_before(offset: int, phase: int, rate: int) -> int:
    """How many of the offsets 0 .. offset - 1 of a segment lie on the grid of ``phase``.

    >>> rows_before(7, phase=1, rate=3)  # 1 and 4
    2
    """
    return max(0, -((phase - offset) // rate))


@lru_cache(maxsize=64)
def plan_lanes(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int], semantics: str, heads: int, kv_heads: int
) -> tuple[BranchLanes, ...]:
    """The lanes of every branch.

    >>> [branch] = plan_lanes((8,), (2,), "paper", heads=4, kv_heads=2)
    >>> branch.lanes, branch.bundles[1][0]  # heads 1 and 3 start a position later, and use key heads 0 and 1
    (4, Bundle(lanes=slice(2, 4, None), kv_heads=(0, 1), heads=range(1, 4, 2)))
    """
    branches = []
    for index, (segment_length, rate) in enumerate(zip(segment_lengths, dilation_rates, strict=True)):
        sharers: dict[tuple[int, int], list[int]] = {}
        for head, phase in enumerate(head_phases(semantics, index, len(dilation_rates), rate, heads)):
            if phase is not None:
                sharers.setdefault((phase, head * kv_heads // heads), []).append(head)
        bundles: dict[int, list[Bundle]] = {}
        for lane, ((phase, kv_head), members) in enumerate(sorted(sharers.items())):
            bundle = Bundle(slice(lane, lane + 1), (kv_head,), _range(members))
            neighbours = bundles.setdefault(phase, [])
            joined = _join(neighbours[-1], bundle) if neighbours else None
            if joined is None:
                neighbours.append(bundle)
            else:
                neighbours[-1] = joined
        frozen = {phase: tuple(group) for phase, group in bundles.items()}
        branches.append(BranchLanes(segment_length, rate, len(sharers), -(-segment_length // rate), frozen))
    return tuple(branches)


def _range(numbers: Sequence[int]) -> range:
    """Numbers a constant step apart as a range; heads of one phase in one key head always are."""
    return range(numbers[0], numbers[-1] + 1, numbers[1] - numbers[0] if len(numbers) > 1 else 1)


def _join(left: Bundle, right: Bundle) -> Bundle | None:
    """Two neighbours as one bundle, where equally many heads share their lanes and all heads are in one range."""
    share = len(right.heads)
    heads = [*left.heads, *right.heads]
    joined = _range(heads)
    if len(left.heads) != share * len(left.kv_heads) or list(joined) != heads:
        return None
    return Bundle(slice(left.lanes.start, right.lanes.stop), left.kv_heads + right.kv_heads, joined)
