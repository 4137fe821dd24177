"""Where to begin: one object for each rank, made by all of them together."""

from __future__ import annotations

import math
import weakref
from multiprocessing.util import Finalize
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from dilated_factory.coordination.backend import CoordinatedBackend
from dilated_factory.coordination.ledger import Ledger
from dilated_factory.coordination.members import SCOPES, Scope, meet, place_of, take_seat
from dilated_factory.coordination.pressure import Pressure, expect_questions
from dilated_memory_pool import MemoryPool
from dilated_memory_pool.attention import AttentionBufferManager
from dilated_memory_pool.backends import Backend, choose
from dilated_memory_pool.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.distributed_c10d import Store


class PoolCoordinator:
    """One budget for the pools of all ranks that share a memory, and help between them when one is short.

    Making one is collective: every rank of the group makes its own, in the same order where there are several. What a
    rank's pools reserve counts from before it is mapped until after it is unmapped. Where a request does not fit the
    limit, or the memory itself refuses, this rank trims its own pools, then has the others trim theirs, and tries
    again; only then it fails, and says what each rank reserves. The pools to trim are those that ``watch`` or ``pool``
    know.

    A rank that closes its coordinator or ends gives its charges back when its memory goes. The memory of a rank that
    was killed counts until all ranks have gone: nobody knows whether it is really free.

    Args:
        group: whose ranks take part; the default group by default. Its store carries the messages.
        limit: bytes, or text such as "16GiB", that the ranks of one scope may reserve together; the same on all of
            them. None for no limit: they help each other where the memory itself refuses.
        scope: which of the group's ranks share a memory. "host": those on this machine, by host name and boot id.
            "device": those that use the same device. "group": all.
        device: for scope "device", which one: the current CUDA device by default.
        timeout: seconds to wait for the other ranks, at the beginning and for each request.
        store: a ``torch.distributed`` store in place of the group's. The process that serves it must live longest.
        rank, world_size: of this process, to go with ``store`` where no process group is initialised.

    Attributes:
        rank: of this process, in the default group.
        ranks: those of this rank's scope, itself included.
        limit: in bytes, or None.
        scope, device, timeout: as given.

    Raises:
        TypeError, ValueError: an argument is none of the above; no process group is initialised and no store given;
            the ranks were given different scopes or limits.
        TimeoutError: not all ranks made theirs in time; then it is raised on all of them, however late.
        RuntimeError: the store does not answer; or PyTorch knows no such device.

    >>> from torch.distributed import HashStore
    >>> with PoolCoordinator(store=HashStore(), rank=0, world_size=1, limit="8MiB") as coordinator:
    ...     pool = coordinator.pool("host")
    ...     block = pool.allocate("6MiB")
    ...     coordinator.reserved()
    {0: 6291456}
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        *,
        limit: int | str | None = None,
        scope: Scope = "host",
        device: torch.device | str | None = None,
        timeout: float = 10.0,
        store: Store | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.limit = None if limit is None else parse_bytes(limit, "limit")
        if scope not in SCOPES:
            raise ValueError(f"scope: expected one of {SCOPES}, got {scope!r}")
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(f"timeout: expected seconds, got {timeout!r}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout: expected positive, finite seconds, got {timeout}")
        self.scope, self.timeout = scope, float(timeout)
        self.device = _device(scope, device)
        seat = take_seat(group, store, rank, world_size)
        self.rank = seat.line.rank
        expect_questions(seat.line)
        self.ranks = meet(seat, scope, place_of(scope, self.device), self.limit, self.timeout)
        self._ledger = Ledger(seat.line, self.ranks, self.limit)
        self._pressure = Pressure(seat.line, self._ledger, self.timeout, len(seat.ranks))
        self._pressure.start()
        self._close = weakref.finalize(self, _leave, self._pressure, self._ledger, self.timeout)
        self._close.atexit = False
        # At exit, and at the end of a process of multiprocessing, which runs no atexit handlers. The thread must have
        # ended by then: one that wakes up in an interpreter that is gone takes the process down.
        Finalize(None, _end, (weakref.ref(self._pressure), weakref.ref(self._ledger)), exitpriority=0)

    def coordinated(self, upstream: str | Backend, device: int | None = None) -> CoordinatedBackend:
        """A backend that draws from ``upstream`` and counts; for any number of pools, which ``watch`` must know.

        Args:
            upstream, device: as ``backend`` and ``device`` in ``MemoryPool``. Adaptors may stand on either side.

        Raises:
            ValueError: its memory is not what the ranks of this scope share; or as ``MemoryPool``.
            TypeError, ImportError, RuntimeError: as ``MemoryPool``.
        """
        source, _ = choose(upstream, device)
        if not self.covers(source):
            shared = "host memory" if self.device is None else f"memory of {self.device}"
            got = f"{source.name} on {source.device}"
            raise ValueError(f"upstream: expected {shared}, which scope={self.scope!r} counts, got {got}")
        return CoordinatedBackend(source, self, self._ledger, self._pressure, self.timeout)

    def covers(self, backend: Backend) -> bool:
        """Whether the memory of ``backend`` is what the ranks of this scope share. With scope "group", any is."""
        if self.scope == "group":
            return True
        return torch.device(backend.device) == (torch.device("cpu") if self.device is None else self.device)

    def watch(self, pool: MemoryPool | AttentionBufferManager) -> None:
        """Let ``pool`` be trimmed when a rank of this scope is short. It is not kept alive.

        Raises:
            TypeError: it is neither a ``MemoryPool`` nor an ``AttentionBufferManager``.
        """
        given: object = pool
        if not isinstance(given, (MemoryPool, AttentionBufferManager)):
            raise TypeError(f"pool: expected a MemoryPool or an AttentionBufferManager, got {pool!r}")
        self._pressure.watch(pool)

    def pool(self, backend: str | Backend = "host", **options: Any) -> MemoryPool:
        """A ``MemoryPool`` over ``backend``, counted and watched. ``options`` are those of ``MemoryPool``."""
        pool = MemoryPool(self.coordinated(backend, options.pop("device", None)), **options)
        self.watch(pool)
        return pool

    def reserved(self) -> dict[int, int]:
        """Bytes that each rank of this scope reserves, as the store says now: never less than is mapped.

        Raises:
            RuntimeError: the store does not answer, or this is a forked child, which is no rank.
        """
        if self._ledger.foreign:
            raise RuntimeError(f"this process was forked from rank {self.rank} and must not use its connection")
        return dict(self._ledger.table().reserved)

    def close(self) -> None:
        """Leave: give back what lies idle, end the thread, and charge no more.

        What is in use counts until it is freed. Pools over this coordinator raise RuntimeError where they would need
        new memory. Others do not wait for this rank any more.
        """
        self._close()

    def __enter__(self) -> PoolCoordinator:  # noqa: PYI034  # Self is Python 3.11's
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        limit = "no limit" if self.limit is None else format_bytes(self.limit)
        state = ", closed" if self._ledger.closed else ""
        return f"<PoolCoordinator rank {self.rank} of {list(self.ranks)}, {self.scope}, {limit}{state}>"


def _device(scope: Scope, device: torch.device | str | None) -> torch.device | None:
    """The device that is shared; None for the host's memory, or any."""
    if scope != "device":
        if device is not None:
            raise ValueError(f"device: expected with scope='device' alone, got {device!r} with scope={scope!r}")
        return None
    if device is None:
        if not torch.cuda.is_available():
            raise ValueError("device: expected one where there is no CUDA device; scope='host' counts host memory")
        device = "cuda"
    device = torch.device(device)
    if str(device) == "cuda":  # without an index
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _leave(pressure: Pressure, ledger: Ledger, timeout: float) -> None:
    """End the thread and give back what is idle; what is in use settles when it dies."""
    ledger.closed = True
    if ledger.foreign:
        return
    ledger.lost = not pressure.stop()
    pressure.give_back(ledger.own_bytes)
    if ledger.lost:
        return  # as below, or it may never say a word: closing does not wait for that
    try:
        ledger.leave(timeout)
    except RuntimeError:
        return  # the store is gone, and with it the limit


def _end(pressure: weakref.ref[Pressure], ledger: weakref.ref[Ledger]) -> None:
    """Before the process ends: the thread has ended, and no charge is left."""
    watching, books = pressure(), ledger()
    if watching is not None and not watching.stop():
        return  # the store does not answer: a process must be able to end
    if books is not None and not (books.foreign or books.lost):
        try:
            books.abandon()
        except RuntimeError:
            return  # as above
