"""What each rank reserves, as one text under one key: a change of it is one compare-and-set.

A sum alone, kept by ``add``, would have to be exceeded for a moment to find out that a charge does not fit, and would
refuse others meanwhile. And it could not say who holds what. Pure data: imports the standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Table:
    """One state of the books.

    Attributes:
        reserved: bytes of every rank, by rank.
        left: the ranks whose coordinator is closed.
        stamp: differs in every state ever written, so that a text stands for one state only.
    """

    reserved: dict[int, int]
    left: frozenset[int]
    stamp: str

    @classmethod
    def blank(cls, ranks: Iterable[int]) -> Table:
        """The first state, the same for whoever writes it."""
        return cls(dict.fromkeys(ranks, 0), frozenset(), "")

    @classmethod
    def read(cls, text: str) -> Table:
        """The state that ``text`` stands for."""
        stamp, reserved, left = json.loads(text)
        return cls({int(rank): nbytes for rank, nbytes in reserved.items()}, frozenset(left), stamp)

    @cached_property
    def text(self) -> str:
        """What is stored; the same for the same state, as compare-and-set needs."""
        return json.dumps([self.stamp, self.reserved, sorted(self.left)])

    @cached_property
    def total(self) -> int:
        """Bytes of all ranks."""
        return sum(self.reserved.values())

    def changed(self, stamp: str, rank: int, nbytes: int, *, left: bool) -> Table:
        """The state in which ``rank`` reserves ``nbytes``, and has left or not."""
        gone = self.left | {rank} if left else self.left - {rank}
        return Table({**self.reserved, rank: nbytes}, gone, stamp)
