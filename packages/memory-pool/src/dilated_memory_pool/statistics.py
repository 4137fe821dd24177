"""What a pool has done, as numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PoolStatistics:
    """A pool at one moment. Bytes are those of addresses: what was never touched takes up no physical memory.

    Attributes:
        requested_bytes: asked for by what is alive.
        allocated_bytes: in the spans that serve it; the difference is what size classes waste.
        reserved_bytes: held from the backend, in use or not; never above the limit.
        waiting_bytes: of ``allocated_bytes``, freed by their owners and waiting for a stream to be done with them.
        largest_free_bytes: the largest request that needs no new arena, in its size class.
        peak_requested_bytes: the highest ``requested_bytes`` since the pool was made or ``reset_peaks`` was called.
        peak_allocated_bytes: the same of ``allocated_bytes``.
        peak_reserved_bytes: the same of ``reserved_bytes``.
        hits: requests served from memory the pool already had.
        misses: requests that needed a new arena.
        bypasses: requests left to PyTorch: small ones, under tracing, in graph capture, from within a finaliser.
        trims: arenas given back to the backend.
        ooms: requests refused in the end.
        limit_bytes: the limit, or None.
    """

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    waiting_bytes: int
    largest_free_bytes: int
    peak_requested_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    hits: int
    misses: int
    bypasses: int
    trims: int
    ooms: int
    limit_bytes: int | None

    @property
    def free_bytes(self) -> int:
        """Reserved and not in use."""
        return self.reserved_bytes - self.allocated_bytes

    @property
    def hit_rate(self) -> float:
        """Of the requests the pool served, the part that needed no new arena; 0 where there were none."""
        served = self.hits + self.misses
        return self.hits / served if served else 0.0

    @property
    def waste(self) -> float:
        """Of the allocated bytes, the part nobody asked for; 0 where nothing is allocated."""
        return 1 - self.requested_bytes / self.allocated_bytes if self.allocated_bytes else 0.0

    @property
    def fragmentation(self) -> float:
        """Of the free bytes, the part outside of the largest free span; 0 where all is in one piece, or nothing is."""
        return 1 - self.largest_free_bytes / self.free_bytes if self.free_bytes else 0.0
