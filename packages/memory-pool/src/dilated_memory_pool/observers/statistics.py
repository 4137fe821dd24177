"""Counts and bytes of what was allocated, altogether and within blocks of code."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dilated_memory_pool.events import PoolEvent

if TYPE_CHECKING:
    from dilated_memory_pool import MemoryPool


@dataclass
class Counters:
    """Allocations and the bytes they asked for, from the moment the counters were made.

    Attributes:
        current_count: allocations alive now; below zero where a section freed what is older than itself.
        current_bytes: bytes of these.
        peak_count: the highest ``current_count``.
        peak_bytes: the highest ``current_bytes``.
        total_count: everything allocated, dead or alive.
        total_bytes: bytes of these.
    """

    current_count: int = 0
    current_bytes: int = 0
    peak_count: int = 0
    peak_bytes: int = 0
    total_count: int = 0
    total_bytes: int = 0

    def _allocated(self, nbytes: int) -> None:
        self.current_count += 1
        self.current_bytes += nbytes
        self.total_count += 1
        self.total_bytes += nbytes
        self.peak_count = max(self.peak_count, self.current_count)
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _freed(self, nbytes: int) -> None:
        self.current_count -= 1
        self.current_bytes -= nbytes


class StatisticsObserver:
    """Counts allocations of one or more pools, in all threads; bytes are those asked for, before rounding up.

    >>> from dilated_memory_pool import MemoryPool
    >>> observer = StatisticsObserver()
    >>> pool = MemoryPool("host", mode="full", observers=[observer])
    >>> weights = pool.allocate(4096)
    >>> with observer.section(pool) as counters:
    ...     scratch = [pool.allocate(100), pool.allocate(200)]
    ...     del scratch
    >>> counters.total_count, counters.peak_bytes, counters.current_bytes, observer.counters.peak_bytes
    (2, 300, 0, 4396)
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._all = Counters()
        self._open: tuple[Counters, ...] = (self._all,)

    def __call__(self, event: PoolEvent) -> None:
        """Count an "allocate" or a "free"; other events change nothing."""
        if event.kind == "allocate":
            with self._guard:
                for counters in self._open:
                    counters._allocated(event.requested)
        elif event.kind == "free":
            with self._guard:
                for counters in self._open:
                    counters._freed(event.requested)

    @property
    def counters(self) -> Counters:
        """A copy of the counters since the observer was made."""
        with self._guard:
            return replace(self._all)

    @contextmanager
    def section(self, *pools: MemoryPool) -> Iterator[Counters]:
        """Counters of the block alone, in all threads, while those around it go on counting.

        Sections may be nested, and may overlap in different threads. The counters move until the block ends.

        Args:
            pools: asked for what they have not told yet when the block begins and when it ends, so that memory that
                died before the block is not counted in it, and memory that died in it is.
        """
        counters = Counters()
        _hear_from(pools)
        with self._guard:
            self._open += (counters,)
        try:
            yield counters
        finally:
            _hear_from(pools)
            with self._guard:
                self._open = tuple(other for other in self._open if other is not counters)

    @property
    def _guard(self) -> threading.RLock:
        """Re-entrant, for a finaliser may allocate in the middle; new in a forked child, which lacks the holder."""
        if self._pid != os.getpid():
            self._pid, self._lock = os.getpid(), threading.RLock()
        return self._lock


def _hear_from(pools: tuple[MemoryPool, ...]) -> None:
    for pool in pools:
        pool.statistics()
