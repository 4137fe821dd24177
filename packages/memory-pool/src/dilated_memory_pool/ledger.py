"""The books of a heap: bytes in use and bytes reserved, their peaks, and what became of requests.

Everything but the counts of requests can be found again from the arenas, which is what ``recount`` does after an
exception. Imports nothing of the heap.
"""

from __future__ import annotations

from collections.abc import Sequence

from dilated_memory_pool.placement.spans import Arena, Span
from dilated_memory_pool.statistics import PoolStatistics


class Ledger:
    """Numbers of one heap. Not thread-safe: the heap holds its lock.

    Attributes:
        requested, allocated: bytes asked for by what is alive, and in the spans that serve it.
        reserved: bytes of all arenas, and of those that are being mapped or unmapped.
        in_transit: bytes being mapped or unmapped, and in no arena, by operation.
        hits, misses, trims, ooms: see ``PoolStatistics``.
    """

    __slots__ = (
        "_peak_allocated", "_peak_requested", "_peak_reserved", "allocated", "hits", "in_transit", "misses", "ooms",
        "requested", "reserved", "trims",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requested = self.allocated = self.reserved = 0
        self._peak_requested = self._peak_allocated = self._peak_reserved = 0
        self.hits = self.misses = self.trims = self.ooms = 0
        self.in_transit: dict[object, int] = {}

    def lend(self, span: Span) -> None:
        """The span is in use from now on."""
        self.requested += span.requested
        self.allocated += span.nbytes
        if self.requested > self._peak_requested:
            self._peak_requested = self.requested
        if self.allocated > self._peak_allocated:
            self._peak_allocated = self.allocated

    def take_back(self, span: Span) -> None:
        """The span is free from now on; ``span.requested`` still says what was asked for."""
        self.requested -= span.requested
        self.allocated -= span.nbytes

    def settle(self, arenas: Sequence[Arena]) -> None:
        """Count the reserved bytes."""
        self.reserved = sum(self.in_transit.values()) + sum(arena.nbytes for arena in arenas)
        self._peak_reserved = max(self._peak_reserved, self.reserved)

    def recount(self, arenas: Sequence[Arena]) -> None:
        """Find out all bytes again, from the arenas alone."""
        used = [span for arena in arenas for span in arena.spans if span.requested]
        self.requested = sum(span.requested for span in used)
        self.allocated = sum(span.nbytes for span in used)
        self._peak_requested = max(self._peak_requested, self.requested)
        self._peak_allocated = max(self._peak_allocated, self.allocated)
        self.settle(arenas)

    def reset_peaks(self) -> None:
        """Let the peaks start again from what is now."""
        self._peak_requested, self._peak_allocated = self.requested, self.allocated
        self._peak_reserved = self.reserved

    def statistics(
        self, *, waiting_bytes: int, largest_free_bytes: int, bypasses: int, limit_bytes: int | None
    ) -> PoolStatistics:
        """The numbers of this moment, with those that the heap knows."""
        return PoolStatistics(
            requested_bytes=self.requested,
            allocated_bytes=self.allocated,
            reserved_bytes=self.reserved,
            waiting_bytes=waiting_bytes,
            largest_free_bytes=largest_free_bytes,
            peak_requested_bytes=self._peak_requested,
            peak_allocated_bytes=self._peak_allocated,
            peak_reserved_bytes=self._peak_reserved,
            hits=self.hits,
            misses=self.misses,
            bypasses=bypasses,
            trims=self.trims,
            ooms=self.ooms,
            limit_bytes=limit_bytes,
        )
