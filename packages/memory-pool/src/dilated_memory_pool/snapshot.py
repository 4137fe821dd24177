"""A pool's memory map at one moment: plain data, for reports, logs and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dilated_memory_pool.statistics import PoolStatistics


@dataclass(frozen=True)
class SpanSnapshot:
    """One contiguous range of an arena.

    Attributes:
        offset: of its first byte in the arena.
        nbytes: its length.
        requested: bytes asked for; 0 where it is free.
        state: "free", "used", or "waiting" for a stream to be done with it.
    """

    offset: int
    nbytes: int
    requested: int
    state: Literal["free", "used", "waiting"]


@dataclass(frozen=True)
class ArenaSnapshot:
    """One piece of memory that the pool was given by its backend.

    Attributes:
        address: of its first byte.
        nbytes: its length.
        locality: the stream or the NUMA node that it serves, as text; None where there is no such thing.
        spans: what it is cut into, in order and without gaps.
    """

    address: int
    nbytes: int
    locality: str | None
    spans: tuple[SpanSnapshot, ...]


@dataclass(frozen=True)
class PoolSnapshot:
    """A pool at one moment.

    Attributes:
        backend: the name of the pool's backend.
        device: of the pool, as PyTorch writes it.
        mode: of the pool.
        reasons: the pool's decisions, and why.
        statistics: the numbers of the same moment.
        arenas: by address.
    """

    backend: str
    device: str
    mode: str
    reasons: tuple[str, ...]
    statistics: PoolStatistics
    arenas: tuple[ArenaSnapshot, ...]
