"""One rank's charges, and its line in the common table.

Memory counts from before it is mapped until after it is unmapped. A finaliser that unmaps takes no lock and makes no
call: it removes its charge from a dictionary, one atomic step, and the table hears of it later, from the thread that
watches or from the next charge. Only after the coordinator is closed, when there is no such thread, the finaliser asks
the store itself. So the table may say more than is mapped, and never less, and its sum never exceeds the limit.

There is no lock at all, so that none can be held while the store is asked, over a fork, or when the garbage collector
runs an allocation in the middle of another. A charge adds to what the table says. Settling replaces it by the sum of
the charges, and only while no charge of this rank is under way. A charge that was granted after that look has written
to the table, so that the compare-and-set of the settlement fails and it looks again. An interrupt between grant and
entry leaves a difference that the next settlement removes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from itertools import count

from dilated_factory.coordination.line import Line
from dilated_factory.coordination.table import Table

# How long a charge waits for those of other threads that are under way. They take one round trip each, and longer
# where the machine lets their thread wait. It ends because two threads whose charges wait for each other's, each in
# the middle of a charge of its own, would wait for ever.
_PATIENCE_SECONDS = 10.0


class Ledger:
    """See above.

    Args:
        line: to the store.
        ranks: that share the memory, this one included.
        limit: bytes that all of them may reserve together.

    Attributes:
        rank, ranks, limit: as given.
        key: of the table in the store.
        ceiling: the limit, or more than there ever is.
        closed: whether this rank has left: charges are refused, and what is freed settles at once.
        lost: whether the store was found not to answer when this rank left: it is not asked again.
    """

    def __init__(self, line: Line, ranks: tuple[int, ...], limit: int | None) -> None:
        self.rank, self.ranks, self.limit = line.rank, ranks, limit
        self.closed = self.lost = False
        self.ceiling = sys.maxsize if limit is None else limit
        self._line = line
        self.key = f"table of {ranks[0]}"
        self._process = os.getpid()
        self._tickets, self._stamps = count(), count()
        self._charges: dict[int, int] = {}
        self._under_way: dict[int, int] = {}  # the thread of each
        self._seen = Table.read(line.exchange(self.key, "", Table.blank(ranks).text))

    @property
    def foreign(self) -> bool:
        """Whether this is a forked child's copy, which must not speak to the store: the connection is its parent's."""
        return os.getpid() != self._process

    @property
    def own_bytes(self) -> int:
        """What this rank reserves now."""
        return sum(self._charges.copy().values())

    def table(self) -> Table:
        """What the store says now."""
        self._seen = Table.read(self._line.get(self.key))
        return self._seen

    def ticket(self) -> int:
        """A new number for a charge."""
        return next(self._tickets)

    def charge(self, ticket: int, nbytes: int) -> int:
        """Enter a charge where it fits, and return 0; else by how many bytes it does not fit.

        Raises:
            RuntimeError: the coordinator is closed, or the store does not answer.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            missing = self._charge(ticket, nbytes)
            if not missing:
                return 0
            # What this rank has freed may not be in the table yet. Only a table with nothing to settle refuses.
            before = self._seen
            if self.settle(before):
                if self._seen is before:
                    return missing
            elif threading.get_ident() in self._under_way.copy().values():
                # A finaliser or a signal handler interrupts a charge, which does not end before this one.
                return missing
            else:
                time.sleep(0.0005)
            if time.monotonic() > deadline:
                return missing

    def _charge(self, ticket: int, nbytes: int) -> int:
        self._under_way[ticket] = threading.get_ident()
        try:
            if self.closed:  # looked at after the entry above: who closes and then settles sees one or the other
                raise RuntimeError(f"rank {self.rank}: the pool coordinator is closed; make its pools anew without it")
            table, fresh = self._seen, False
            while True:
                missing = table.total + nbytes - self.ceiling
                if missing > 0:
                    if fresh:
                        return missing
                    table, fresh = self.table(), True
                    continue
                wanted = self._changed(table, table.reserved[self.rank] + nbytes)
                table, fresh = Table.read(self._line.exchange(self.key, table.text, wanted.text)), True
                self._seen = table
                if table.stamp == wanted.stamp:
                    self._charges[ticket] = nbytes
                    return 0
        finally:
            self._under_way.pop(ticket, None)

    def discharge(self, ticket: int) -> None:
        """Remove a charge. Called by finalisers, in any thread."""
        self._charges.pop(ticket, None)
        if self.closed and not (self.lost or self.foreign or sys.is_finalizing()):  # no thread is left that would
            try:
                self.settle(self.table())
            except RuntimeError:
                return  # the store is gone, and with it the limit that these bytes counted against

    def settle(self, table: Table) -> bool:
        """Make the table say what this rank reserves; whether it does. It does not while a charge is under way.

        Args:
            table: as it was read not long ago.
        """
        while not self._under_way:
            own = self.own_bytes
            if table.reserved[self.rank] == own and (self.rank in table.left) == self.closed:
                return True
            wanted = self._changed(table, own)
            table = Table.read(self._line.exchange(self.key, table.text, wanted.text))
            self._seen = table
            if table.stamp == wanted.stamp:
                return True
        return False

    def leave(self, timeout: float) -> None:
        """Charge no more, and say so in the table, once no charge is under way or ``timeout`` seconds have passed."""
        self.closed = True
        deadline = time.monotonic() + timeout
        while not self.settle(self.table()) and time.monotonic() < deadline:
            time.sleep(0.001)

    def abandon(self) -> None:
        """Give back all charges, mapped or not: the process ends."""
        self.closed = True
        self._under_way.clear()
        self._charges.clear()
        self.settle(self.table())

    def _changed(self, table: Table, own: int) -> Table:
        return table.changed(f"{self.rank}.{next(self._stamps)}", self.rank, own, left=self.closed)
