"""What stands between a pool and its memory, where ranks share that memory. Imports the pool's backends."""

from __future__ import annotations

import gc
import time
import warnings
from typing import TYPE_CHECKING

from dilated_factory.coordination.errors import GroupLimitError, GroupMemoryError
from dilated_factory.coordination.ledger import Ledger
from dilated_factory.coordination.pressure import Pressure
from dilated_memory_pool.adaptors import Adaptor
from dilated_memory_pool.backends import Backend, Memory
from dilated_memory_pool.sizes import format_bytes

if TYPE_CHECKING:
    import torch

    from dilated_factory.coordination.coordinator import PoolCoordinator


class CoordinatedBackend(Adaptor):
    """See ``Backend``; made by ``PoolCoordinator.coordinated``.

    Args:
        upstream: where memory comes from.
        coordinator: kept alive for as long as this backend is.
        ledger, pressure: the coordinator's.
        timeout: seconds that one allocation may take for all its attempts.
    """

    def __init__(
        self, upstream: Backend, coordinator: PoolCoordinator, ledger: Ledger, pressure: Pressure, timeout: float
    ) -> None:
        super().__init__(upstream)
        self.coordinator = coordinator
        self._ledger, self._pressure, self._timeout = ledger, pressure, timeout
        if ledger.limit is not None:
            self.total_bytes = min(ledger.limit, upstream.total_bytes)
        budget = "no common limit" if ledger.limit is None else f"a common limit of {format_bytes(ledger.limit)}"
        who = ", ".join(map(str, ledger.ranks))
        self.reasons += (f"coordinated: rank {ledger.rank}, {budget} with ranks {who}",)
        self._given = 0  # by other ranks since this backend last mapped something: a pool tries several times
        self._warned = False

    def allocate(self, nbytes: int) -> Memory:
        """As ``Backend.allocate``.

        Raises:
            GroupLimitError: the common limit does not allow it, after all ranks gave back what was idle.
            GroupMemoryError: the upstream has no more memory, after the same.
            RuntimeError: the coordinator is closed, or its store does not answer.

        A forked child is no rank: what it maps is not counted, and it is warned once.
        """
        if self._ledger.foreign:
            self._warn()
            return self.upstream.allocate(nbytes)
        deadline = time.monotonic() + self._timeout
        silent: tuple[int, ...] = ()
        last = False
        while True:
            ticket, refusal = self._ledger.ticket(), None
            try:
                missing = self._ledger.charge(ticket, nbytes)
                if not missing:
                    memory = _Charged(self.upstream.allocate(nbytes), self._ledger, ticket)
                    self._given = 0
                    return memory
            except MemoryError as error:
                self._ledger.discharge(ticket)
                missing, refusal = nbytes, error
            except BaseException:
                self._ledger.discharge(ticket)
                raise
            try:
                if last or nbytes > self._ledger.ceiling:
                    raise self._error(nbytes, silent, limited=refusal is None) from refusal
            finally:
                del refusal  # or it and this frame refer to each other, and keep the callers' tensors alive
            if self._pressure.give_back(missing) and time.monotonic() < deadline:
                continue
            given, silent = self._pressure.relieve(missing)
            self._given += given
            last = not given or time.monotonic() >= deadline

    def _error(self, nbytes: int, silent: tuple[int, ...], *, limited: bool) -> GroupMemoryError:
        numbers = self._pressure.numbers()
        return (GroupLimitError if limited else GroupMemoryError)(
            self._ledger.rank,
            nbytes,
            self._ledger.table().reserved,
            self._ledger.limit,
            self._given,
            silent,
            self._timeout,
            sum(pool.allocated_bytes for pool in numbers),
            max((pool.largest_free_bytes for pool in numbers), default=0),
        )

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"this process was forked from rank {self._ledger.rank} and is no rank: the memory its pools map does "
                "not count against the common limit",
                RuntimeWarning,
                stacklevel=3,
            )


class _Charged:
    """The upstream's memory, and its charge for exactly as long."""

    __slots__ = ("_ledger", "_memory", "_ticket", "address", "lease", "nbytes")

    def __init__(self, memory: Memory, ledger: Ledger, ticket: int) -> None:
        self._memory, self._ledger, self._ticket = memory, ledger, ticket
        self.address, self.nbytes, self.lease = memory.address, memory.nbytes, memory.lease

    def tensor(self) -> torch.Tensor:
        """The upstream's."""
        return self._memory.tensor()

    def __del__(self) -> None:
        if gc.is_finalized(self):  # by the garbage collector: the next finaliser may use the memory, see ``Memory``
            heir = _Charged(self._memory, self._ledger, self._ticket)
            self._memory, self.lease = heir, lambda: heir.lease()  # the heir alone holds what is the upstream's
            return
        # In this order: a charge that went first would let others map before this is unmapped.
        del self.lease, self._memory
        self._ledger.discharge(self._ticket)
