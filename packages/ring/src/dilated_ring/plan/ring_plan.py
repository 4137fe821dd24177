"""RingPlan: which rows of which heads every rank needs from every other, and what that costs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch

from dilated_core import checks
from dilated_core.plan import Tile, cut_segments
from dilated_ring.plan import description, picture
from dilated_ring.plan.cost import between
from dilated_ring.plan.crossing import Branch, Crossing, find_crossings, inner_segments
from dilated_ring.plan.ranges import RowRange, ranges_of
from dilated_ring.plan.rank_plan import RankPlan, make_route
from dilated_ring.plan.traffic import Traffic, matrix, message, traffic
from dilated_ring.plan.work import attended_pairs

EXCHANGES = ("auto", "gather", "heads")


def check_exchange(exchange: object, branches: int) -> tuple[str, ...]:
    """Return how each branch is to get its rows: one of EXCHANGES for all of them, or a sequence with one for each.

    Raises:
        TypeError, ValueError: it is neither.
    """
    if isinstance(exchange, str) or not isinstance(exchange, Sequence):
        return (checks.choice("exchange", exchange, EXCHANGES),) * branches
    if len(exchange) != branches:
        raise ValueError(f"exchange: expected one for each of the {branches} branches, got {len(exchange)}")
    return tuple(checks.choice(f"exchange[{index}]", each, EXCHANGES) for index, each in enumerate(exchange))


class Peers(NamedTuple):
    """The ranks that one exchanges rows with, rising.

    Attributes:
        sends_to: in a forward pass; in a backward, these and those of ``receives_from``.
        receives_from: in a forward pass; in a backward, the same as it sends to.
    """

    sends_to: tuple[int, ...]
    receives_from: tuple[int, ...]


@dataclass(frozen=True)
class RingPlan:
    """Dilated attention over shards of one sequence. Made by ``make_plan``; hashable, and equal where all sizes are.

    Attributes:
        bounds: where shards start and end: rank i holds positions bounds[i] to bounds[i + 1].
        segment_lengths: the pattern's, in positions of the whole sequence.
        dilation_rates: the pattern's.
        heads: of query.
        kv_heads: of key and value.
        is_causal: whether a row sees only keys at or before it.
        semantics: "paper", "torchscale" or "grouped", as in ``dilated_core.dilated_attention``.
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
        """The segments of a branch that lie on several ranks.

        Args:
            branch: its number in the pattern.
        """
        return find_crossings(self.bounds, self.branches[branch], by_heads=self.exchanges[branch] == "heads")

    def for_rank(self, rank: int) -> RankPlan:
        """What one rank is to do.

        Args:
            rank: from 0 to world_size - 1.

        Raises:
            TypeError, ValueError: it is none.
        """
        self._check("rank", rank, self.world_size)
        routes = []
        for branch in self.branches:
            own = [crossing for crossing in self.crossings(branch.number) if crossing.held_by(rank)]
            # A rank without a part takes part in the exchange all the same: it is a collective.
            if self.exchanges[branch.number] != "none":
                by_heads = self.exchanges[branch.number] == "heads"
                routes.append(make_route(branch, own, rank, by_heads))
        blocks = range(self.heads // self.kv_heads)
        return RankPlan(rank, self.world_size, tuple(self._inner(rank, block) for block in blocks), tuple(routes))

    @cached_property
    def key(self) -> tuple[str, str]:
        """A short name of all that the plan depends on, the same in every process, as a key for a pattern cache."""
        sizes = repr([getattr(self, field.name) for field in fields(self)])
        return "dilated_ring.plan", hashlib.sha256(sizes.encode()).hexdigest()[:32]

    def bytes(
        self,
        dtype: torch.dtype,
        head_dim: int,
        *,
        batch: int = 1,
        phase: str = "forward",
        masked: bool = False,
        refetch: bool = False,
        with_lse: bool = False,
    ) -> Traffic:
        """What one pass puts on the wire, exact to the byte, but for the agreement before it.

        A row is head_dim numbers of ``dtype``. Out to who attends them go, forward, rows of keys and values, and by
        "heads" of queries too; with a mask a byte for each row of keys; by "heads" come back results and their lses
        (float32, float64 for float64). Backward there go out, by "heads", results, their gradients and lses, and what
        went out forward if it was not kept; gradients of keys and values come back, by "heads" of queries too. Among
        query heads that share a key head, each key is sent once, see ``Branch.key_blocks`` for where it is not.

        Args:
            dtype: of query, key and value.
            head_dim, batch: their sizes.
            phase: "forward" or "backward".
            masked: whether there is a key_padding_mask.
            refetch: whether the backward gathers again what the forward did not keep.
            with_lse: whether the lse is asked for (``return_aux``), whose gradient then travels backward by "heads".

        Returns:
            Traffic, of every rank and branch.

        Raises:
            TypeError, ValueError: an argument of a wrong type or value.

        >>> from dilated_ring import make_plan
        >>> plan = make_plan(1 << 20, [2048, 32768], [1, 12], heads=16, world_size=64)
        >>> plan.bytes(torch.bfloat16, 64).of(0) / 2**20  # a ring would bring 4,032
        5.33...
        """
        form = message(dtype, head_dim, batch=batch, phase=phase, masked=masked, refetch=refetch, with_lse=with_lse)
        return traffic([self.crossings(branch.number) for branch in self.branches], self.world_size, form)

    def matrix(
        self,
        dtype: torch.dtype,
        head_dim: int,
        *,
        branch: int | None = None,
        batch: int = 1,
        phase: str = "forward",
        masked: bool = False,
        refetch: bool = False,
        with_lse: bool = False,
    ) -> list[list[int]]:
        """Bytes from every rank (row) to every other (column).

        Args:
            dtype, head_dim, batch, phase, masked, refetch, with_lse: as of ``bytes``.
            branch: of one branch, by its number; None for all together.

        Returns:
            ``matrix[source][destination]``, in bytes.

        Raises:
            TypeError, ValueError: an argument of a wrong type or value.

        >>> from dilated_ring import make_plan
        >>> plan = make_plan(8, [4], [1], heads=1, world_size=4, is_causal=True)
        >>> plan.matrix(torch.float32, 1)  # keys and values of two rows, 4 bytes a number
        [[0, 16, 0, 0], [0, 0, 0, 0], [0, 0, 0, 16], [0, 0, 0, 0]]
        """
        form = message(dtype, head_dim, batch=batch, phase=phase, masked=masked, refetch=refetch, with_lse=with_lse)
        numbers = range(len(self.branches)) if branch is None else [self._check("branch", branch, len(self.branches))]
        crossings = [crossing for number in numbers for crossing in self.crossings(number)]
        return matrix(crossings, self.world_size, form)

    def pairs(self) -> tuple[tuple[int, ...], ...]:
        """Pairs of a query and a key that each rank attends, ``pairs()[rank][branch]``, over all heads.

        What ranks compute is in proportion: ``4 * head_dim`` operations a pair forward. Bytes are not all that differs
        between exchanges: by "gather" a rank attends its own rows, by "heads" whole heads, as long as there are any.

        >>> from dilated_ring import make_plan
        >>> make_plan(8, [8], [1], heads=2, world_size=4, exchange="heads").pairs()
        ((64,), (64,), (0,), (0,))
        """
        found = [attended_pairs(self.bounds, branch, self.crossings(branch.number)) for branch in self.branches]
        return tuple(zip(*found, strict=True))

    def peers(self, rank: int) -> Peers:
        """Who a rank sends to and receives from.

        Args:
            rank: from 0 to world_size - 1.

        Raises:
            TypeError, ValueError: it is none.

        >>> from dilated_ring import make_plan
        >>> make_plan(8, [4], [1], heads=1, world_size=4, is_causal=True).peers(1)
        Peers(sends_to=(), receives_from=(0,))
        """
        self._check("rank", rank, self.world_size)
        sends_to, receives_from = set[int](), set[int]()
        for branch in self.branches:
            for crossing in self.crossings(branch.number):
                if not crossing.held_by(rank):
                    continue
                for owner, attending, _ in between(crossing, rank):
                    # Rows go out; by heads, results come back.
                    for source, destination in ((owner, attending), (attending, owner))[: 1 + crossing.by_heads]:
                        if source == rank:
                            sends_to.add(destination)
                        else:
                            receives_from.add(source)
        return Peers(tuple(sorted(sends_to)), tuple(sorted(receives_from)))

    def ranges(self, rank: int) -> Iterator[RowRange]:
        """Everything that a rank gets from others in a forward pass, as ranges of positions; results left out.

        By "gather" that is, for every head, each key that it does not hold and its queries meet in a branch, once.

        Args:
            rank: from 0 to world_size - 1.

        Raises:
            TypeError, ValueError: it is none.

        >>> from dilated_ring import make_plan
        >>> plan = make_plan(8, [4], [2], heads=2, world_size=4)
        >>> [tuple(each) for each in plan.ranges(1)]  # of head 0 position 0, of head 1 position 1
        [(0, 0, 'keys', 0, 0, 1, 2, (0,)), (0, 0, 'keys', 1, 1, 2, 2, (1,))]
        """
        return ranges_of(self.for_rank(rank), self.bounds)

    def describe(self, dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> str:
        """A page about the plan: shards, branches and why each gets its rows as it does, and bytes of every rank.

        Args:
            dtype, head_dim: of query, key and value; batch is 1, unmasked, and the backward keeps what it gathered.

        >>> from dilated_ring import make_plan
        >>> print(make_plan(1 << 20, [1024, 1 << 20], [1, 16], heads=16, world_size=8).describe())
        1,048,576 tokens...
        """
        return description.describe(self, dtype, head_dim)

    def save_picture(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.bfloat16,
        head_dim: int = 64,
        phase: str = "forward",
    ) -> None:
        """Draw who sends how much to whom, in all and in each branch, and what each rank receives; a PNG at ``path``.

        Args:
            path: of the PNG file, which is overwritten.
            dtype, head_dim, phase: as of ``bytes``; batch is 1, unmasked, and the backward keeps what it gathered.

        Raises:
            ImportError: matplotlib is not installed; it says what to install.
        """
        picture.save_picture(self, path, dtype, head_dim, phase)

    @staticmethod
    def _check(name: str, number: int, count: int) -> int:
        """Return it if it is a number below ``count``."""
        if checks.length(name, number) >= count:
            raise ValueError(f"{name}: expected a number below {count}, got {number}")
        return number

    def _inner(self, rank: int, block: int) -> tuple[Tile, ...]:
        """The segments that lie in the rank's shard altogether, rate 1 first."""
        low = self.bounds[rank]
        tiles: list[Tile] = []
        for branch in self.branches:
            runs = branch.runs(block, range(self.kv_heads))
            for start, segments, length in inner_segments(self.bounds, branch, rank):
                cuts = cut_segments(
                    runs,
                    branch.rate,
                    start=start - low,
                    segments=segments,
                    segment_length=branch.segment_length,
                    length=length,
                    first=0,
                    stop=length,
                    full_rows=branch.full_rows,
                )
                tiles += [cut.tile for cut in cuts]
        return tuple(sorted(tiles, key=lambda tile: tile.rate))


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
