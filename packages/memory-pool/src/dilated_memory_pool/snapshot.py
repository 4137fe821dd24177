"""A pool's memory map at one moment: plain data, for reports, logs and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dilated_memory_pool.statistics import PoolStatistics


@dataclass(frozen=True)
class SpanSnapshot:
    """Attributes: offset, nbytes: its place in the arena; requested: bytes asked for, 0 where free; state."""

    offset: int
    nbytes: int
    requested: int
    state: Literal["free", "used", "waiting"]


@dataclass(frozen=True)
class ArenaSnapshot:
    """Attributes: address, nbytes; locality: its stream or NUMA node, None without; spans: in order, without gaps."""

    address: int
    nbytes: int
    locality: str | None
    spans: tuple[SpanSnapshot, ...]


@dataclass(frozen=True)
class PoolSnapshot:
    """Attributes: backend, device, mode: of the pool; reasons: its decisions; statistics; arenas: by address."""

    backend: str
    device: str
    mode: str
    reasons: tuple[str, ...]
    statistics: PoolStatistics
    arenas: tuple[ArenaSnapshot, ...]
