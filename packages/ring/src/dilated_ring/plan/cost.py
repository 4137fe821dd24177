"""What crossings cost: rows of one head that each rank receives, in time that does not depend on the length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dilated_ring.plan.crossing import Crossing, Part


class Received(NamedTuple):
    """Rows of one head, each head_dim numbers.

    Attributes:
        queries, keys: rows that come to be attended; every row of keys brings one of values too.
        results: rows of output that come back, each with its lse.
    """

    queries: int = 0
    keys: int = 0
    results: int = 0

    def rows(self) -> int:
        """All of them, in a forward pass."""
        return self.queries + 2 * self.keys + self.results


def received(crossing: Crossing) -> dict[int, Received]:
    """What every rank receives from others in one forward pass, by its number."""
    found = {}
    parts = crossing.parts
    if crossing.by_heads:
        for part in parts:
            share = crossing.share(part.rank)
            queries, keys = _rows(crossing, share, 0, crossing.length)
            own_queries, own_keys = _rows(crossing, share, part.first, part.stop)
            all_results, _ = _rows(crossing, crossing.branch.members, part.first, part.stop)
            found[part.rank] = Received(queries - own_queries, keys - own_keys, all_results - own_queries)
        return found
    members = crossing.branch.members
    for part in parts:
        _, before = _rows(crossing, members, 0, part.first)
        after = 0
        if not crossing.branch.is_causal:
            _, after = _rows(crossing, members, part.stop, crossing.length)
        found[part.rank] = Received(keys=before + after)
    return found


def _rows(crossing: Crossing, share: range, first: int, stop: int) -> tuple[int, int]:
    """(query rows, key rows) of these key heads between two positions of the segment."""
    if not share or first == stop:
        return 0, 0
    branch, part = crossing.branch, Part(-1, first, stop, 0)
    queries = keys = 0
    for block in range(branch.blocks):
        size = sum(strip.size for strip in crossing.cut(part, block, share))
        queries += size
        if branch.key_block(block, share) == block:
            keys += size
    return queries, keys


def busiest_rows(crossings: Iterable[Crossing]) -> int:
    """Rows that the busiest rank receives in one forward pass."""
    total: dict[int, int] = {}
    for crossing in crossings:
        for rank, rows in received(crossing).items():
            total[rank] = total.get(rank, 0) + rows.rows()
    return max(total.values())
