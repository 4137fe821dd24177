"""One budget for everything drawn through it, by however many pools.

Memory counts from before it is mapped until after it is unmapped. Finalisers give it back, and a finaliser must not
take a lock: it may run in the middle of the very thread that holds it. So there is no lock and no running sum, only a
dictionary of charges, in which entering, removing and copying are each one atomic step. A request enters its charge
first and looks afterwards: it is granted where the charges entered before it, and its own, are within the limit.
Charges of any two requests stand in the same order for both of them, so that they cannot both be granted the same
bytes. A request that is just being refused counts until it has looked; another may be refused because of it, and none
granted too much.
"""

from __future__ import annotations

import gc
import weakref
from itertools import count
from typing import TYPE_CHECKING

from dilated_memory_pool.adaptors.adaptor import Adaptor
from dilated_memory_pool.backends import Backend, Memory
from dilated_memory_pool.sizes import format_bytes, parse_limit

if TYPE_CHECKING:
    import torch

    from dilated_memory_pool import MemoryPool


class LimitingAdaptor(Adaptor):
    """Refuses what would take the memory drawn through it over ``limit``. Several pools may share one adaptor.

    A pool that is refused gives back its own idle memory, then collects garbage, and asks again each time. What other
    pools on the same budget hold idle is not its to give: name them to ``reclaim_from``, or it stays theirs.

    Args:
        upstream: the backend or adaptor to draw from.
        limit: bytes, text such as "2GiB", or a float, the fraction of the upstream's memory.

    Attributes:
        limit: in bytes.
        total_bytes: the limit, or the upstream's where that is less: what limits of pools are fractions of.

    Raises:
        TypeError, ValueError: ``upstream`` is no backend, or ``limit`` no limit.

    >>> from dilated_memory_pool import MemoryPool
    >>> from dilated_memory_pool.backends import HostBackend
    >>> budget = LimitingAdaptor(HostBackend(), "3MiB")
    >>> first, second = MemoryPool(budget), MemoryPool(budget)
    >>> budget.reclaim_from(first, second)
    >>> first.reserve("2MiB")
    >>> block = second.allocate("2MiB")
    >>> first.statistics().reserved_bytes, budget.used_bytes
    (0, 2097152)
    """

    def __init__(self, upstream: Backend, limit: float | str) -> None:
        super().__init__(upstream)
        budget = parse_limit(limit, upstream.total_bytes)
        if budget is None:
            raise TypeError("limit: expected a number of bytes, text such as '2GiB' or a fraction, got None")
        self.limit = budget
        self.total_bytes = min(budget, upstream.total_bytes)
        self.reasons += (f"limiting adaptor: {format_bytes(budget)} for all pools on it",)
        self._tickets = count()
        self._charges: dict[int, int] = {}
        self._pools: list[weakref.ref[MemoryPool]] = []

    @property
    def used_bytes(self) -> int:
        """What counts against the limit now."""
        return sum(self._charges.copy().values())

    def reclaim_from(self, *pools: MemoryPool) -> None:
        """Let idle memory of these pools be given back when any pool on this budget needs it. They are not kept alive.

        The pools are asked in this order, each for no more than what is still missing.
        """
        self._pools.extend([weakref.ref(pool) for pool in pools])

    def allocate(self, nbytes: int) -> Memory:
        """As ``Backend.allocate``; MemoryError also where the budget does not allow it."""
        ticket = next(self._tickets)
        try:
            missing = self._charge(ticket, nbytes)
            for reference in self._pools if nbytes <= self.limit else ():
                pool = reference()
                if missing and pool is not None:
                    pool.trim(max(pool.statistics().reserved_bytes - missing, 0))
                    missing = self._charge(ticket, nbytes)
            if missing:
                raise MemoryError(
                    f"the budget of {format_bytes(self.limit)} shared by the pools on it is used up: "
                    f"{format_bytes(nbytes)} requested, {format_bytes(missing)} too many"
                )
            return _Charged(self.upstream.allocate(nbytes), self._charges, ticket)
        except BaseException:
            self._charges.pop(ticket, None)
            raise

    def _charge(self, ticket: int, nbytes: int) -> int:
        """Enter a charge if it is within the limit, else return by how many bytes it is not."""
        if nbytes > self.limit:  # not even looked at, or others would be refused for it meanwhile
            return nbytes - self.limit
        self._charges[ticket] = nbytes
        counted = 0
        for other, charge in self._charges.copy().items():
            counted += charge
            if other == ticket:
                break
        if counted <= self.limit:
            return 0
        del self._charges[ticket]
        return counted - self.limit


class _Charged:
    """The upstream's memory, and its charge for exactly as long."""

    __slots__ = ("_charges", "_memory", "_ticket", "address", "lease", "nbytes")

    def __init__(self, memory: Memory, charges: dict[int, int], ticket: int) -> None:
        self._memory, self._charges, self._ticket = memory, charges, ticket
        self.address, self.nbytes, self.lease = memory.address, memory.nbytes, memory.lease

    def tensor(self) -> torch.Tensor:
        """The upstream's."""
        return self._memory.tensor()

    def __del__(self) -> None:
        if gc.is_finalized(self):  # by the garbage collector: the next finaliser may use the memory, see PlainLease
            heir = _Charged(self._memory, self._charges, self._ticket)
            self._memory, self.lease = heir, lambda: heir.lease()  # the heir alone holds what is the upstream's
            return
        # In this order: a charge that went first would let others map before this is unmapped. A weak reference's
        # callback would be too early for the same reason.
        del self.lease, self._memory
        self._charges.pop(self._ticket, None)
