"""Traffic: what a plan puts on the wire, exact to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dilated_core import checks
from dilated_core.partial import accumulation_dtype
from dilated_ring.plan.cost import Exchanged, Rows, between, exchanged
from dilated_ring.plan.crossing import Crossing

PHASES = ("forward", "backward")


@dataclass(frozen=True)
class Traffic:
    """Bytes that ranks receive from and send to others. What a rank keeps for itself is in neither.

    Attributes:
        received: ``received[rank][branch]``, in bytes.
        sent: ``sent[rank][branch]``, in bytes.

    >>> from dilated_ring import make_plan
    >>> plan = make_plan(1 << 20, [1024, 1 << 20], [1, 16], heads=16, world_size=8)
    >>> forward = plan.bytes(torch.bfloat16, 64)
    >>> forward.of(0), forward.received[0]
    (59179008, (0, 59179008))
    >>> both = forward + plan.bytes(torch.bfloat16, 64, phase="backward")
    >>> both.total / forward.total
    2.24...
    """

    received: tuple[tuple[int, ...], ...]
    sent: tuple[tuple[int, ...], ...]

    def of(self, rank: int) -> int:
        """Bytes that the rank receives, of all branches."""
        return sum(self.received[rank])

    @property
    def busiest(self) -> int:
        """The rank that receives most bytes; of several, the first."""
        return max(range(len(self.received)), key=self.of)

    @property
    def total(self) -> int:
        """Bytes that all ranks receive, which is what they send."""
        return sum(map(sum, self.received))

    def __add__(self, other: Traffic) -> Traffic:
        """Both one after the other, such as forward and backward."""
        return Traffic(_sum(self.received, other.received), _sum(self.sent, other.sent))


class Message(NamedTuple):
    """How a phase's rows are sent.

    Attributes:
        dtype, head_dim, batch: of query, key and value.
        backward: whether it is the backward.
        gathers: whether rows are gathered: in a forward, and in a backward that gathers again.
        masked: whether there are key padding masks.
        with_lse: whether the lse was asked for, so that a gradient of it travels.
    """

    dtype: torch.dtype
    head_dim: int
    batch: int
    backward: bool
    gathers: bool
    masked: bool
    with_lse: bool

    def out(self, rows: Rows, by_heads: bool) -> int:
        """Bytes of rows that go to who attends them."""
        row, lse = self._row, self._lse
        query = key = 0
        if self.gathers:
            query, key = by_heads * row, 2 * row + self.masked
        if self.backward and by_heads:
            query += 2 * row + lse * (1 + self.with_lse)
        return self.batch * (rows.queries * query + rows.keys * key)

    def back(self, rows: Rows, by_heads: bool) -> int:
        """Bytes of what is made of rows and comes back to their owner."""
        row = self._row
        if self.backward:
            query, key = by_heads * row, 2 * row
        else:
            query, key = by_heads * (row + self._lse), 0
        return self.batch * (rows.queries * query + rows.keys * key)

    def received(self, what: Exchanged, by_heads: bool) -> int:
        """Bytes that a rank receives."""
        return self.out(what.gathered, by_heads) + self.back(what.lent, by_heads)

    def sent(self, what: Exchanged, by_heads: bool) -> int:
        """Bytes that a rank sends."""
        return self.out(what.lent, by_heads) + self.back(what.gathered, by_heads)

    @property
    def _row(self) -> int:
        return self.head_dim * self.dtype.itemsize

    @property
    def _lse(self) -> int:
        return accumulation_dtype(self.dtype).itemsize


def message(
    dtype: torch.dtype, head_dim: int, *, batch: int, phase: str, masked: bool, refetch: bool, with_lse: bool
) -> Message:
    """Check the arguments of ``RingPlan.bytes``.

    Raises:
        TypeError, ValueError: they are of a wrong type or value.
    """
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype: expected one of {[str(each) for each in checks.FLOATS]}, got {dtype!r}")
    head_dim = checks.positive_integer("head_dim", head_dim)
    batch = checks.length("batch", batch)
    backward = checks.choice("phase", phase, PHASES) == "backward"
    for name, value in (("masked", masked), ("refetch", refetch), ("with_lse", with_lse)):
        checks.boolean(name, value)
    return Message(dtype, head_dim, batch, backward, refetch or not backward, masked, with_lse)


def traffic(branches: Sequence[Sequence[Crossing]], world_size: int, form: Message) -> Traffic:
    """Bytes of all branches, given the crossings of each."""
    received = [[0] * len(branches) for _ in range(world_size)]
    sent = [[0] * len(branches) for _ in range(world_size)]
    for number, crossings in enumerate(branches):
        for crossing in crossings:
            for rank, what in exchanged(crossing):
                received[rank][number] += form.received(what, crossing.by_heads)
                sent[rank][number] += form.sent(what, crossing.by_heads)
    return Traffic(tuple(map(tuple, received)), tuple(map(tuple, sent)))


def matrix(crossings: Sequence[Crossing], world_size: int, form: Message) -> list[list[int]]:
    """Bytes from every rank (row) to every other (column)."""
    found = [[0] * world_size for _ in range(world_size)]
    for crossing in crossings:
        for owner, attending, rows in between(crossing):
            found[owner][attending] += form.out(rows, crossing.by_heads)
            found[attending][owner] += form.back(rows, crossing.by_heads)
    return found


def _sum(one: tuple[tuple[int, ...], ...], other: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(one, other, strict=True))
