"""RingPlan: which rows of which heads every rank needs from every other, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from dilated_core import checks
from dilated_core.plan import Tile, check_torchscale, cut_segments
from dilated_ring.plan.cost import busiest_rows
from dilated_ring.plan.crossing import Branch, Crossing, Part
from dilated_ring.plan.rank_plan import RankPlan, make_route
from dilated_ring.plan.sharding import check_bounds, even_bounds

EXCHANGES = ("auto", "gather", "heads")


@dataclass(frozen=True)
class RingPlan:
    """Dilated attention over shards of one sequence. Made by ``make_plan``; hashable, and equal where all sizes are.

    Attributes:
        bounds: where shards start and end: rank i holds positions bounds[i] to bounds[i + 1].
        segment_lengths, dilation_rates: the pattern.
        heads, kv_heads: of query, and of key and value.
        is_causal, semantics: as in ``dilated_core.dilated_attention``.
        exchanges: how each branch gets its rows: "none", where no segment crosses a bound; "gather", where a rank gets
            the keys and values that its rows attend; "heads", where it gets all rows of some heads, queries too, and
            sends their results back.
    """

    bounds: tuple[int, ...]
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    heads: int
    kv_heads: int
    is_causal: bool
    semantics: str
    exchanges: tuple[str, ...]

    @property
    def seq_len(self) -> int:
        """Positions in the whole sequence."""
        return self.bounds[-1]

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return len(self.bounds) - 1

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """The pattern's branches."""
        return _branches(self)

    def crossings(self, branch: int) -> list[Crossing]:
        """The segments of a branch that lie on several ranks."""
        return find_crossings(self.bounds, self.branches[branch], by_heads=self.exchanges[branch] == "heads")

    def for_rank(self, rank: int) -> RankPlan:
        """What one rank is to do."""
        routes = []
        for branch in self.branches:
            own = [crossing for crossing in self.crossings(branch.number) if rank in crossing.ranks]
            # A rank without a part takes part in the exchange all the same: it is a collective.
            if self.exchanges[branch.number] != "none":
                by_heads = self.exchanges[branch.number] == "heads"
                routes.append(make_route(branch, own, rank, by_heads))
        blocks = range(self.heads // self.kv_heads)
        return RankPlan(rank, self.world_size, tuple(self._inner(rank, block) for block in blocks), tuple(routes))

    def _inner(self, rank: int, block: int) -> tuple[Tile, ...]:
        """The segments that lie in the rank's shard altogether, rate 1 first."""
        low, high = self.bounds[rank : rank + 2]
        tiles: list[Tile] = []
        for branch in self.branches:
            runs = branch.runs(block, range(self.kv_heads))
            length = branch.segment_length
            first = -(-low // length) * length
            whole = max(0, (high - first) // length)
            tail = first + whole * length
            # (start, segments, length): the whole ones, then the short one at the end of the sequence.
            groups = [(first, whole, length)] if whole else []
            if low <= tail < high == self.seq_len:
                groups.append((tail, 1, high - tail))
            for start, segments, stop in groups:
                cuts = cut_segments(
                    runs,
                    branch.rate,
                    start=start - low,
                    segments=segments,
                    segment_length=length,
                    length=stop,
                    first=0,
                    stop=stop,
                    full_rows=branch.full_rows,
                )
                tiles += [cut.tile for cut in cuts]
        return tuple(sorted(tiles, key=lambda tile: tile.rate))


def make_plan(
    sequence: int | Sequence[int],
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    heads: int,
    world_size: int | None = None,
    *,
    kv_heads: int | None = None,
    is_causal: bool = False,
    semantics: str = "paper",
    exchange: str = "auto",
) -> RingPlan:
    """Plan dilated attention over shards of one sequence.

    Args:
        sequence: its length in tokens, for shards as equal as can be; or the bounds of the shards, ``world_size + 1``
            positions that rise from 0 to the length (shards may be empty).
        segment_lengths, dilation_rates: the pattern, as in ``dilated_core.dilated_attention``.
        heads: query heads.
        world_size: how many ranks; needed with a length, and if given with bounds, checked.
        kv_heads: key and value heads, a divisor of heads; None for as many.
        is_causal, semantics: as in ``dilated_core.dilated_attention``.
        exchange: "auto" lets each branch do what brings the busiest rank fewer bytes; "gather" and "heads" force it.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value.

    >>> plan = make_plan(1 << 20, [1024, 32768, 1 << 20], [1, 4, 16], heads=16, world_size=8)
    >>> plan.exchanges
    ('none', 'none', 'heads')
    """
    lengths, rates = checks.branches(segment_lengths, dilation_rates)
    bounds = _bounds(sequence, world_size)
    heads = checks.positive_integer("heads", heads)
    kv_heads = heads if kv_heads is None else checks.positive_integer("kv_heads", kv_heads)
    if heads % kv_heads:
        raise ValueError(f"kv_heads: expected a divisor of the {heads} heads, got {kv_heads}")
    checks.boolean("is_causal", is_causal)
    checks.semantics(semantics)
    checks.choice("exchange", exchange, EXCHANGES)
    draft = RingPlan(bounds, lengths, rates, heads, kv_heads, is_causal, semantics, ("none",) * len(lengths))
    if semantics == "torchscale":
        for branch in draft.branches:
            check_torchscale(branch.number, branch.segment_length, branch.rate, draft.seq_len)
    chosen = tuple(_exchange(bounds, branch, exchange) for branch in draft.branches)
    return RingPlan(bounds, lengths, rates, heads, kv_heads, is_causal, semantics, chosen)


def _branches(plan: RingPlan) -> tuple[Branch, ...]:
    return tuple(
        Branch(
            number,
            len(plan.segment_lengths),
            min(segment_length, max(plan.seq_len, 1)),
            rate,
            plan.heads,
            plan.kv_heads,
            plan.is_causal,
            plan.semantics,
        )
        for number, (segment_length, rate) in enumerate(zip(plan.segment_lengths, plan.dilation_rates, strict=True))
    )


def _bounds(sequence: int | Sequence[int], world_size: int | None) -> tuple[int, ...]:
    if world_size is not None:
        checks.positive_integer("world_size", world_size)
    if not isinstance(sequence, Sequence):
        if world_size is None:
            raise ValueError("world_size: expected a number of ranks beside a length, got None")
        return even_bounds(checks.length("sequence", sequence), world_size)
    return check_bounds(sequence, world_size)


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


def _exchange(bounds: tuple[int, ...], branch: Branch, exchange: str) -> str:
    """How a branch gets its rows: what brings the busiest rank fewer rows, unless told."""
    crossings = find_crossings(bounds, branch, by_heads=False)
    if not crossings:
        return "none"
    if exchange != "auto":
        return exchange
    gathered = busiest_rows(crossings)
    by_heads = busiest_rows([crossing._replace(by_heads=True) for crossing in crossings])
    return "heads" if by_heads < gathered else "gather"
