"""What crossings cost: how many rows of one head travel, in time that does not depend on the sequence's length.

A row is head_dim numbers. For a segment of n positions on each of m ranks, a branch of rate r and as many key heads as
query heads, a rank receives, for every head and forward,

- by "gather": 2 (m - 1) n / r rows, the keys and values of the others (causal: the last rank does, the first none);
- by "heads": 4 (m - 1) / m n / r rows, being (m - 1) / m n / r of queries, of keys, of values and of results: less
  from three ranks on, and never more than 4 n / r.

The busiest rank decides, as all wait for it; a tie is for "gather", which exchanges once where "heads" does twice.
Backward, without gathering again, "gather" receives 2 (m - 1) n / r rows and "heads" 5 (m - 1) / m n / r, so that what
is less forward is less in all. Shards that do not align blur this: of a segment that a bound cuts into unequal halves
"heads" brings up to a quarter less forward and up to a quarter more in all. Causal, the first ranks receive less by
"gather", and in sum "heads" is less from five ranks on.

Left out are the lses that come back beside results, 4 bytes to a row's ``head_dim * itemsize``, and padding masks, a
byte to two rows. Nor does it weigh who computes: by "heads" of more ranks than key heads, some attend nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from dilated_ring.plan.crossing import Branch, Crossing, Part


class Rows(NamedTuple):
    """Rows of one head; every row of keys has one of values too."""

    queries: int = 0
    keys: int = 0

    def times(self, count: int) -> Rows:
        """As many of them ``count`` times."""
        return Rows(self.queries * count, self.keys * count)

    def plus(self, other: Rows) -> Rows:
        """Both together."""
        return Rows(self.queries + other.queries, self.keys + other.keys)


class Exchanged(NamedTuple):
    """What a rank exchanges with others.

    Attributes:
        lent: its own rows that go to who attends them; as many results or gradients come back.
        gathered: the rows that it attends; as many results or gradients it returns.
    """

    lent: Rows = Rows()
    gathered: Rows = Rows()

    def plus(self, other: Exchanged) -> Exchanged:
        """Both together."""
        return Exchanged(self.lent.plus(other.lent), self.gathered.plus(other.gathered))


class Heads(NamedTuple):
    """Heads by their phase.

    Attributes:
        rate: of the branch.
        phases: those there are, rising.
        before: of each phase, how many heads have an earlier one; at last, how many there are.
    """

    rate: int
    phases: tuple[int, ...]
    before: tuple[int, ...]

    def rows(self, first: int, stop: int) -> int:
        """Their rows between two positions of a segment."""
        return self._rows_before(stop) - self._rows_before(first)

    def of_each_phase(self) -> Iterator[tuple[int, int]]:
        """Every phase, and how many heads have it."""
        counts = (stop - start for start, stop in pairwise(self.before))
        return zip(self.phases, counts, strict=True)

    def _rows_before(self, position: int) -> int:
        # Phases below the remainder have a row more than the others.
        whole, rest = divmod(position, self.rate)
        return whole * self.before[-1] + self.before[bisect_left(self.phases, rest)]


class Taken(NamedTuple):
    """The heads of which a rank gathers rows."""

    queries: Heads
    keys: Heads

    def rows(self, first: int, stop: int) -> Rows:
        """Their rows between two positions of the segment."""
        return Rows(self.queries.rows(first, stop), self.keys.rows(first, stop))


def heads_of(branch: Branch, share: range) -> Heads:
    """The query heads that meet the key heads in ``share``."""
    return _taken(branch, share, (range(branch.rate),), True).queries


@lru_cache(maxsize=4096)
def _taken(branch: Branch, share: range, phases: tuple[range, ...], with_queries: bool) -> Taken:
    key_blocks = branch.key_blocks(share)
    blocks = range(branch.blocks)
    queries = _heads(branch, share, phases, blocks if with_queries else ())
    return Taken(queries, _heads(branch, share, phases, (block for block in blocks if key_blocks[block] == block)))


def _heads(branch: Branch, share: range, phases: tuple[range, ...], blocks: Iterable[int]) -> Heads:
    found: Counter[int] = Counter()
    for block in blocks:
        for run in branch.runs(block, share):
            for phase in range(run.first_phase, run.first_phase + run.phases):
                if any(phase in wanted for wanted in phases):
                    found[phase] += run.groups
    rising = sorted(found)
    return Heads(branch.rate, tuple(rising), tuple(accumulate((found[phase] for phase in rising), initial=0)))


def taken_by(crossing: Crossing, part: Part) -> Taken:
    """The heads of which a rank gathers rows; by "gather" no queries."""
    rank = part.rank
    return _taken(crossing.branch, crossing.share(rank), crossing.phases_met(rank), crossing.by_heads)


def exchanged(crossing: Crossing) -> Iterator[tuple[int, Exchanged]]:
    """What every rank of a segment exchanges."""
    parts = crossing.parts
    taken = [taken_by(crossing, part) for part in parts]
    back_only = crossing.branch.is_causal and not crossing.by_heads
    takers = Counter(taken)  # few kinds: many ranks take the same heads
    for part, own in zip(parts, taken, strict=True):
        takers[own] -= 1  # what stays is not exchanged
        lent, gathered = Rows(), own.rows(0, part.first)
        for kind, ranks in takers.items():
            lent = lent.plus(kind.rows(part.first, part.stop).times(ranks))
        if not back_only:
            gathered = gathered.plus(own.rows(part.stop, crossing.length))
            takers[own] += 1
        yield part.rank, Exchanged(lent, gathered)


def between(crossing: Crossing, rank: int | None = None) -> Iterator[tuple[int, int, Rows]]:
    """(owner, who attends, rows) of every two ranks of a segment that exchange any; of one rank where asked."""
    only = None if rank is None else crossing.part(rank)
    for attending in crossing.parts:
        taken = taken_by(crossing, attending)
        for owner in crossing.parts if only is None or only == attending else (only,):
            if owner.rank != attending.rank and crossing.sends(owner.rank, attending.rank):
                rows = taken.rows(owner.first, owner.stop)
                if any(rows):
                    yield owner.rank, attending.rank, rows


def busiest_rows(crossings: Iterable[Crossing]) -> int:
    """Rows that the busiest rank receives in one forward pass: queries, keys, values and results."""
    total: Counter[int] = Counter()
    for crossing in crossings:
        for rank, (lent, gathered) in exchanged(crossing):
            total[rank] += gathered.queries + 2 * gathered.keys + lent.queries
    return max(total.values())
