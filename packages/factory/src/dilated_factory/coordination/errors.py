"""What a pool is told when the ranks together have no more memory. Imports the pool's errors and sizes only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dilated_memory_pool import PoolLimitError, PoolMemoryError
from dilated_memory_pool.sizes import format_bytes


class GroupMemoryError(PoolMemoryError):
    """The backend of one rank refused, after the other ranks had given back what lay idle.

    A ``MemoryPool`` raises a ``PoolMemoryError`` of its own, with its own numbers and what this one says; this is its
    ``__cause__``.

    Attributes:
        rank: the rank that was refused.
        requested: bytes it asked for.
        reserved_by_rank: bytes that each rank of the scope reserves.
        reserved: their sum.
        limit: the common limit in bytes, or None.
        given_back: bytes that the other ranks gave back since this rank last got memory.
        silent: the ranks that did not answer in time.
        allocated, largest_free: bytes of this rank's watched pools, as in ``PoolMemoryError``.
    """

    def __init__(
        self,
        rank: int,
        requested: int,
        reserved_by_rank: Mapping[int, int],
        limit: int | None,
        given_back: int,
        silent: tuple[int, ...],
        timeout: float,
        allocated: int = 0,
        largest_free: int = 0,
    ) -> None:
        self.rank, self.requested, self.limit = rank, requested, limit
        self.reserved_by_rank = dict(reserved_by_rank)
        self.reserved = sum(self.reserved_by_rank.values())
        self.given_back, self.silent, self.timeout = given_back, silent, timeout
        self.allocated, self.largest_free = allocated, largest_free
        held = ", ".join(f"rank {other} reserves {format_bytes(n)}" for other, n in self.reserved_by_rank.items())
        message = (
            f"rank {rank}: {self._cause()}: requested {format_bytes(requested)}; {held}; "
            f"the other ranks gave back {format_bytes(given_back)}"
        )
        if silent:
            who = ", ".join(map(str, silent))
            message += f"; no answer within {timeout:g} s from rank {who}: if it is dead, its memory still counts"
        self.why = f"{message}; {self._cure()}"
        MemoryError.__init__(self, self.why)

    def _cause(self) -> str:
        return "the backend has no more memory"

    def _cure(self) -> str:
        return "free tensors on these ranks, or ask for less"

    def __reduce__(self) -> tuple[type[GroupMemoryError], tuple[Any, ...]]:
        """So that it crosses process boundaries with its numbers."""
        return type(self), (
            self.rank,
            self.requested,
            self.reserved_by_rank,
            self.limit,
            self.given_back,
            self.silent,
            self.timeout,
            self.allocated,
            self.largest_free,
        )


class GroupLimitError(GroupMemoryError, PoolLimitError):
    """Serving the request would have taken the ranks together over their common limit."""

    def _cause(self) -> str:
        return f"the common limit of {format_bytes(self.limit or 0)} is reached"

    def _cure(self) -> str:
        return "free tensors on these ranks, ask for less, or raise the limit"
