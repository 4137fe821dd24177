"""Entries under one limit: which there are, what they weigh, which leaves first.

A shelf has no lock of its own. It changes with its cache's lock held; it is read, and its entries are marked as used,
by anyone at any time. ``entries`` alone is the truth: the heap, the ledger and the list of what is pinned are derived
from it, and are made anew after a change that was interrupted half-way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count, repeat
from operator import length_hint
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from dilated_pattern_cache.policies import EvictionPolicy
from dilated_pattern_cache.storage.flights import Flight

if TYPE_CHECKING:
    from dilated_pattern_cache.values.streams import Arrival

Reason: TypeAlias = Literal["max_entries", "max_bytes"]


class Tally:
    """A count that any thread may raise without a lock: ``add()`` is a single call into C, which the GIL keeps whole.

    >>> tally = Tally()
    >>> tally.add(), tally.add(), tally.value
    (None, None, 2)
    """

    __slots__ = ("_left", "add")

    def __init__(self) -> None:
        self._left = repeat(None, sys.maxsize)
        self.add: Callable[[], None] = self._left.__next__

    @property
    def value(self) -> int:
        """How often so far."""
        return sys.maxsize - length_hint(self._left)


class Entry:
    """One value, and all that is known about it.

    Attributes:
        key, value: what was stored.
        charges: bytes by the identity of the memory they are in, so that memory shared with other entries is known.
        seconds: what it took to make.
        intact: raises where the value was changed since, returns False where it must not be used now; None where
            there is nothing to watch.
        unfit: why it cannot be stored at all; None where it can.
        places: the devices that its tensors lie on.
        pinned: whether it may not be evicted.
        used: what the policy's clock said when the entry was last used.
        number: of its arrival on the shelf. Of two entries of one rank, the one that came first leaves first.
        master, device: what it is a copy of, and where; None for a master.
        arrive: for a copy that is not waited for: makes the caller's stream wait.
    """

    __slots__ = (
        "add_hit", "arrive", "charges", "device", "intact", "key", "master", "number", "pinned", "places", "seconds",
        "tally", "unfit", "used", "value",
    )  # fmt: skip

    def __init__(
        self,
        key: Hashable,
        value: Any,
        charges: Mapping[Hashable, int],
        seconds: float = 0.0,
        intact: Callable[[], bool] | None = None,
        unfit: str | None = None,
    ) -> None:
        self.key, self.value, self.charges, self.seconds = key, value, charges, seconds
        self.intact, self.unfit = intact, unfit
        self.places: frozenset[str] = frozenset()
        self.pinned, self.used, self.number = False, 0.0, 0
        self.master: Entry | None = None
        self.device: Any = None
        self.arrive: Arrival | None = None
        self.tally = Tally()
        self.add_hit = self.tally.add

    @property
    def nbytes(self) -> int:
        """What it weighs alone."""
        return sum(self.charges.values())


class Departure(NamedTuple):
    """An entry that left. Attributes: reason: the limit that was reached; None where it was replaced or removed."""

    entry: Entry
    reason: Reason | None


class Ledger:
    """Bytes in use, where memory that several entries share counts once.

    >>> ledger = Ledger()
    >>> ledger.add({"a": 100, "b": 20}); ledger.add({"a": 100}); ledger.total
    120
    >>> ledger.remove({"a": 100, "b": 20}); ledger.total
    100
    """

    __slots__ = ("_holders", "total")

    def __init__(self, all_charges: Iterable[Mapping[Hashable, int]] = ()) -> None:
        self._holders: dict[Hashable, tuple[int, int]] = {}  # how many, and the most bytes that one of them said
        self.total = 0
        for charges in all_charges:
            self.add(charges)

    def add(self, charges: Mapping[Hashable, int]) -> None:
        """One more holder of this memory."""
        for memory, nbytes in charges.items():
            holders, counted = self._holders.get(memory, (0, 0))
            self._holders[memory] = holders + 1, max(nbytes, counted)
            self.total += max(nbytes - counted, 0)

    def remove(self, charges: Mapping[Hashable, int]) -> None:
        """One holder fewer; ``charges`` as when they were added."""
        for memory in charges:
            holders, counted = self._holders[memory]
            if holders > 1:
                self._holders[memory] = holders - 1, counted
            else:
                del self._holders[memory]
                self.total -= counted


class Shelf:
    """Entries by key, at most ``max_entries`` of them and at most ``max_bytes`` in all.

    Attributes:
        entries: by key.
        flights: what is being made for this shelf, by key.
        evictions: how many left because of a limit.
        hits, misses, waits, bypasses, creations, failures, rejections: see ``CacheInfo``.
    """

    def __init__(self, policy: EvictionPolicy, max_entries: int | None, max_bytes: int | None) -> None:
        self.policy, self.max_entries, self.max_bytes = policy, max_entries, max_bytes
        self.entries: dict[Hashable, Entry] = {}
        self.flights: dict[Hashable, Flight] = {}
        self.evictions = 0
        self.hits, self.misses, self.waits, self.bypasses = Tally(), Tally(), Tally(), Tally()
        self.creations, self.failures, self.rejections = Tally(), Tally(), Tally()
        self._numbers = count()
        self.rebuild()

    @property
    def nbytes(self) -> int:
        """What all entries weigh together, in bytes; memory that several share counts once."""
        return self._ledger.total

    def rebuild(self) -> None:
        """Make from the entries what is derived from them."""
        self._ledger = Ledger(entry.charges for entry in self.entries.values())
        self._pinned = {key: entry for key, entry in self.entries.items() if entry.pinned}
        self._heap = [(self.policy.rank(entry), entry.number, entry.key) for entry in self.entries.values()]
        heapify(self._heap)

    def refuses(self, entry: Entry) -> str | None:
        """Why there can be no room for the entry, whatever else is evicted; None where there can be."""
        if entry.unfit is not None:
            return entry.unfit
        if self.max_bytes is not None and entry.nbytes > self.max_bytes:
            return f"its {entry.nbytes} bytes are more than the limit of {self.max_bytes}"
        if self.max_entries == 0:
            return "max_entries is 0"
        pinned = [other for other in list(self._pinned.values()) if other.key != entry.key]
        if self.max_entries is not None and len(pinned) >= self.max_entries:
            return f"all {self.max_entries} entries are pinned"
        if pinned and self.max_bytes is not None:
            nbytes = Ledger([entry.charges, *(other.charges for other in pinned)]).total
            if nbytes > self.max_bytes:
                return f"with the pinned entries it takes {nbytes} bytes, more than the limit of {self.max_bytes}"
        return None

    def insert(self, entry: Entry) -> list[Departure]:
        """Put an entry that is not refused on the shelf; return the entries that leave for it."""
        old = self.entries.get(entry.key)
        left = []
        entry.number = next(self._numbers)
        if old is not None:
            entry.pinned = old.pinned
            left.append(Departure(old, None))
        self.entries[entry.key] = entry  # in one step: an interrupt leaves the old one or the new one
        if old is not None:
            self._ledger.remove(old.charges)
        self._ledger.add(entry.charges)
        self.pin(entry.key, entry.pinned)
        left += self._evict()  # the new entry is not on the heap yet
        entry.used = self.policy.clock()
        if len(self._heap) > 2 * len(self.entries) + 64:  # most of it speaks of entries that were removed
            self.rebuild()
        else:
            heappush(self._heap, (self.policy.rank(entry), entry.number, entry.key))
        return left

    def remove(self, key: Hashable) -> Entry | None:
        """Take an entry off the shelf; None where there is none."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self._pinned.pop(key, None)
            self._ledger.remove(entry.charges)
        return entry

    def pin(self, key: Hashable, pinned: bool) -> None:
        """Keep the entry of ``key``, if there is one, from being evicted; or no longer."""
        entry = self.entries.get(key)
        if entry is not None:
            entry.pinned = pinned
            if pinned:
                self._pinned[key] = entry
            else:
                self._pinned.pop(key, None)

    def pop_first(self) -> Entry | None:
        """Take off the entry that the policy gives up first, pinned or not; None on an empty shelf."""
        entry = self._first(lambda entry: True)
        return None if entry is None else self.remove(entry.key)

    def clear(self) -> None:
        """Take all off."""
        self.entries.clear()
        self.rebuild()

    def ranked(self) -> list[Entry]:
        """All entries, the next to leave first."""
        entries = list(self.entries.values())  # at one moment, whatever other threads do
        return sorted(entries, key=lambda entry: (self.policy.rank(entry), entry.number))

    def _evict(self) -> Iterator[Departure]:
        while (reason := self._exceeded()) is not None:
            entry = self._first(lambda entry: not entry.pinned)
            if entry is None:
                return
            self.policy.evicted(entry)
            self.remove(entry.key)
            self.evictions += 1
            yield Departure(entry, reason)

    def _exceeded(self) -> Reason | None:
        if self.max_entries is not None and len(self.entries) > self.max_entries:
            return "max_entries"
        if self.max_bytes is not None and self._ledger.total > self.max_bytes:
            return "max_bytes"
        return None

    def _first(self, leaves: Callable[[Entry], bool]) -> Entry | None:
        """The entry of the lowest rank among those that may leave.

        Ranks only rise, so what the heap says of an entry is a lower bound. An entry that was used since it was last
        looked at goes back with its rank of now; the first whose rank still holds is the lowest of all.
        """
        heap, passed = self._heap, []
        found = None
        while heap and found is None:
            said, number, key = heap[0]
            entry = self.entries.get(key)
            if entry is None or entry.number != number:  # it is gone, or another has taken its place
                heappop(heap)
            elif (rank := self.policy.rank(entry)) > said:
                heapreplace(heap, (rank, number, key))
            elif leaves(entry):
                found = entry
            else:
                passed.append(heappop(heap))
        for item in passed:
            heappush(heap, item)
        return found
