"""One backend under many pools: where it refuses, what lies idle in any of them is given back first."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

from dilated_memory_pool.adaptors.failure import FailureCallbackAdaptor
from dilated_memory_pool.adaptors.limiting import LimitingAdaptor
from dilated_memory_pool.backends import Backend, Memory
from dilated_memory_pool.errors import PoolLimitError, PoolMemoryError
from dilated_memory_pool.sizes import parse_limit
from dilated_memory_pool.statistics import PoolStatistics

if TYPE_CHECKING:
    import torch

    from dilated_memory_pool import MemoryPool
    from dilated_memory_pool.blocks import Block


class SharedBackend(FailureCallbackAdaptor):
    """One backend for pools that make room for each other. They are not kept alive by it.

    A pool asks for memory without holding its lock, so that any pool can be trimmed meanwhile.

    Args:
        upstream: where memory comes from.
        limit: what all pools together may reserve, as in ``MemoryPool``.

    Attributes:
        limit: in bytes; None for no limit.

    Raises:
        TypeError, ValueError: ``upstream`` is no backend, or ``limit`` no limit.

    >>> from dilated_memory_pool import MemoryPool
    >>> from dilated_memory_pool.backends import HostBackend
    >>> shared = SharedBackend(HostBackend(), "3MiB")
    >>> first, second = MemoryPool(shared, arena_bytes=0), MemoryPool(shared, mode="lightweight")
    >>> shared.attach("first", first)
    >>> shared.attach("second", second)
    >>> first.reserve("2MiB")
    >>> block = second.allocate("2MiB")
    >>> first.statistics().reserved_bytes
    0
    """

    def __init__(self, upstream: Backend, limit: float | str | None) -> None:
        self.limit = parse_limit(limit, upstream.total_bytes)
        self._budget = LimitingAdaptor(upstream, sys.maxsize if self.limit is None else self.limit)
        self._pools: dict[Hashable, weakref.ref[MemoryPool]] = {}  # weak, for they hold this backend
        self._streams_seen: set[int] = set()
        super().__init__(self._budget, self._make_room)
        self.total_bytes, self.reasons = upstream.total_bytes, upstream.reasons

    def attach(self, name: Hashable, pool: MemoryPool) -> None:
        """Know ``pool``, which draws from here, by a name of its own."""
        for other, reference in list(self._pools.items()):
            if reference() is None:
                self._pools.pop(other, None)
        self._pools[name] = weakref.ref(pool)

    def allocate(self, nbytes: int) -> Memory:
        """As ``Backend.allocate``; MemoryError when nothing is idle in any pool."""
        if self.streams is not None:
            self._streams_seen.add(self.streams.current())
        return super().allocate(nbytes)

    def record_stream(self, pool: MemoryPool, owner: torch.Tensor | Block, stream: object) -> None:
        """As ``pool.record_stream``; and know the stream, to wait for it when another pool needs the memory."""
        pool.record_stream(owner, stream)
        if self.streams is not None:
            self._streams_seen.add(self.streams.handle(stream))

    def set_limit(self, limit: float | str | None) -> None:
        """A new limit. What is over it and unused is given back; what is in use stays."""
        self.limit = parse_limit(limit, self.total_bytes)
        self._budget.limit = sys.maxsize if self.limit is None else self.limit
        for _, pool in self._moments():
            pool.set_limit(self.limit)
        self._give_back(self._budget.used_bytes - self._budget.limit)

    def failure(self, last: PoolMemoryError) -> PoolMemoryError:
        """What one pool raised, ``last``, as an error with the numbers of all of them."""
        limited = isinstance(last, PoolLimitError) or isinstance(last.__cause__, PoolLimitError)
        return self._refusal(PoolLimitError if limited else PoolMemoryError, last.requested, last.why)

    def _refusal(self, error: type[PoolMemoryError], requested: int, why: str = "") -> PoolMemoryError:
        moments = [now for now, _ in self._moments()]
        return error(
            requested,
            sum(now.allocated_bytes for now in moments),
            sum(now.reserved_bytes for now in moments),
            self.limit,
            max((now.largest_free_bytes for now in moments), default=0),
            why,
        )

    def _moments(self) -> list[tuple[PoolStatistics, MemoryPool]]:
        pools = [reference() for reference in list(self._pools.values())]
        return [(pool.statistics(), pool) for pool in pools if pool is not None]

    def _make_room(self, nbytes: int, _: MemoryError) -> bool:
        """Whether to try again, after some memory was given back. PoolLimitError if it is the limit that refuses."""
        over = self._budget.used_bytes + nbytes - self._budget.limit
        missing = over if over > 0 else nbytes
        if self._give_back(missing) or (self._waited() and self._give_back(missing)):
            return True
        if over > 0:
            raise self._refusal(PoolLimitError, nbytes)
        return False

    def _waited(self) -> bool:
        """Wait for the streams, if freed memory waits for them; whether it did."""
        if self.streams is None or self.streams.capturing():
            return False
        if not any(now.waiting_bytes for now, _ in self._moments()):
            return False
        for stream in list(self._streams_seen):
            self.streams.record(stream).wait()
        return True

    def _give_back(self, missing: int) -> int:
        """Trim until so many bytes are given back, or nothing is idle, beginning where most is; the bytes given."""
        given = 0
        for now, pool in sorted(self._moments(), key=lambda moment: moment[0].free_bytes, reverse=True):
            if given < missing:
                given += pool.trim(max(now.reserved_bytes - (missing - given), 0))
        return given
