"""What a cache stores, and how that changes: by one thread at a time.

No code of the user's is called with the lock held, but for the ``__eq__`` and ``__hash__`` of keys and the methods of
a policy. A finaliser or a signal handler may still run in the middle of a change, in the very thread that is at it, and
use the cache: what it finds, it gets; what it would change is changed right after.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from threading import get_ident
from typing import TypeVar

from dilated_pattern_cache.policies import EvictionPolicy
from dilated_pattern_cache.statistics import EntryInfo, Eviction
from dilated_pattern_cache.storage import forks
from dilated_pattern_cache.storage.flights import forget_other_threads
from dilated_pattern_cache.storage.shelf import Departure, Entry, Shelf

R = TypeVar("R")


class _Here(threading.local):
    """What is known of the calling thread.

    Attributes:
        changing: held while it changes a cache. A lock, since ``with`` lets go of one in a single call into C: a mark
            that Python code takes away would stay for good where a signal handler raises just before.
        owed: the caches that it was asked to change in the middle of a change of another, or of the same.
    """

    def __init__(self) -> None:
        self.changing = threading.RLock()
        self.owed: list[Store] = []


_here = _Here()


class Store:
    """The values of a cache, on one shelf, and their copies, on a shelf for every device.

    Attributes:
        masters, tiers: the shelves.
        find: the entry of a key, or None; needs no lock.
        lock: held while something changes.
        seconds_spent, retired_seconds_saved: see ``CacheInfo``; the latter of entries that are gone.
    """

    def __init__(
        self,
        new_policy: Callable[[], EvictionPolicy],
        max_entries: int | None,
        max_bytes: int | None,
        max_device_bytes: int | None,
        on_evict: Callable[[Eviction], object] | None,
    ) -> None:
        self._new_policy, self._max_device_bytes, self._on_evict = new_policy, max_device_bytes, on_evict
        self.masters = Shelf(new_policy(), max_entries, max_bytes)
        self.tiers: dict[str, Shelf] = {}
        self.find = self.masters.entries.get
        self.lock = threading.RLock()  # taken twice by one thread over a fork only
        self.seconds_spent = self.retired_seconds_saved = 0.0
        self._whole = True  # whether the last change was completed
        self._deferred: deque[Callable[[], object]] = deque()
        self._owed: deque[Store] = deque()  # who was asked to change in the middle of a change of this one
        self._left: dict[int, deque[Departure]] = {}  # by the thread that is to tell of them
        forks.watch(self)

    @property
    def interrupted(self) -> bool:
        """Whether the caller must not wait for the lock.

        It is a finaliser or a signal handler in the middle of a change by its own thread, of this cache or of another:
        the lock is its own, or its holder may be waiting for that other's. Or the interpreter ends: the holder may be
        a thread that was stopped for ever.
        """
        return _here.changing._is_owned() or sys.is_finalizing()  # type: ignore[attr-defined]

    def tier(self, device: str) -> Shelf:
        """The shelf of a device."""
        tier = self.tiers.get(device)
        if tier is None:
            tier = self.tiers.setdefault(device, Shelf(self._new_policy(), None, self._max_device_bytes))
        return tier

    # ---------------------------------------------------------------------------------------------- changes

    def put(self, entry: Entry) -> None:
        """Store an entry. What is being made for its key is not kept any more.

        Raises:
            ValueError: there can be no room for it.
        """
        if (reason := self.masters.refuses(entry)) is not None:
            raise ValueError(f"the value of {entry.key!r} cannot be stored: {reason}")

        def put() -> str | None:
            reason = self.masters.refuses(entry)  # others may have been pinned meanwhile
            if reason is None:
                self._supersede(entry.key)
                self.let_go(self.masters.insert(entry))
            return reason

        if (reason := self._change(put)) is not None:
            raise ValueError(f"the value of {entry.key!r} cannot be stored: {reason}")

    def remove(self, key: Hashable) -> Entry | None:
        """Remove an entry and its copies, and keep nothing that is being made of it; None where there was none."""

        def remove() -> Entry | None:
            self._supersede(key)
            entry = self.masters.remove(key)
            if entry is not None:
                self.let_go([Departure(entry, None)])
            return entry

        found = self.find(key)
        return found if self.put_off(remove) else self._change(remove)

    def discard(self, entry: Entry) -> None:
        """Remove this very entry: a copy alone, or a master with its copies."""

        def discard() -> None:
            shelf = self.masters if entry.master is None else self.tiers[entry.device]
            if shelf.entries.get(entry.key) is entry:
                self._supersede(entry.key)  # a copy that is being made may be one of the changed value
                shelf.remove(entry.key)
                self.let_go([Departure(entry, None)])

        self._change(discard)

    def pop_first(self) -> Entry | None:
        """Remove what would leave next, pinned or not; None where there is nothing."""
        if self.interrupted:
            raise RuntimeError("popitem() must not interrupt another operation of its thread, or the interpreter's end")

        def take() -> Entry | None:
            entry = self.masters.pop_first()
            if entry is not None:
                self.let_go([Departure(entry, None)])
            return entry

        return self._change(take)

    def clear(self) -> None:
        """Remove everything, and keep nothing that is being made."""

        def clear() -> None:
            shelves = (self.masters, *self.tiers.values())
            for key in [key for shelf in shelves for key in shelf.flights]:
                self._supersede(key)
            self.let_go([Departure(entry, None) for entry in self.masters.entries.values()])
            for shelf in shelves:
                shelf.clear()

        self._change(clear)

    def pin(self, keys: Iterable[Hashable], pinned: bool) -> None:
        """Pin entries and their copies, or unpin them.

        Raises:
            KeyError: one is not there.
        """
        keys = list(keys)
        for key in keys:
            if key not in self.masters.entries:
                raise KeyError(key)

        def pin() -> None:
            for shelf in (self.masters, *self.tiers.values()):
                for key in keys:
                    shelf.pin(key, pinned)

        self._change(pin)

    def inform(self, entry: Entry) -> EntryInfo:
        """What is known of an entry."""
        places = [name for name, tier in self.tiers.copy().items() if entry.key in tier.entries]
        return EntryInfo(entry.key, entry.nbytes, entry.tally.value, entry.seconds, entry.pinned, tuple(places))

    # ---------------------------------------------------------------------------------------------- one at a time

    def _change(self, operation: Callable[[], R]) -> R | None:
        """Run an operation on what is stored, alone; None where it is put off."""
        if self.put_off(operation):
            return None
        result = self.alone(operation)
        self.settle()
        return result

    def put_off(self, operation: Callable[[], object]) -> bool:
        """Where the caller must not wait: leave the operation to be done right after what it interrupts."""
        if self.interrupted:
            self._deferred.append(operation)
            _here.owed.append(self)
            return True
        return False

    def alone(self, operation: Callable[[], R]) -> R:
        """Run an operation with the lock held. ``settle`` must follow."""
        owed = _here.owed
        try:
            with _here.changing, self.lock:
                if not self._whole:
                    self._repair()
                self._whole = False
                result = operation()
                self._whole = True
        finally:
            while owed:
                self._owed.append(owed.pop())
        return result

    def _repair(self) -> None:
        """An exception cut the last change short."""
        self.masters.rebuild()
        for tier in self.tiers.copy().values():
            for key, copy in list(tier.entries.items()):
                if self.masters.entries.get(key) is not copy.master:
                    del tier.entries[key]
            tier.rebuild()

    def catch_up(self) -> None:
        """Without the lock: what was put off, here and in other caches."""
        for store in (self, *self._owed.copy()):
            for operation in _taken(store._deferred):
                store.alone(operation)

    def settle(self) -> None:
        """Without the lock: what was put off, then what must be told. Values that left die here."""
        self.catch_up()
        failed = None
        for store in _taken(self._owed):
            try:
                store.settle()
            except Exception as error:
                failed = failed or error
        left = self._left.pop(get_ident(), deque())
        while left:
            entry, reason = left.popleft()
            if reason is not None and self._on_evict is not None:
                try:
                    self._on_evict(Eviction(self.inform(entry), entry.value, entry.device, reason))
                except Exception as error:
                    failed = failed or error
        try:
            if failed is not None:
                raise failed
        finally:
            del failed

    def let_go(self, departures: Iterable[Departure]) -> None:
        """Within an operation: entries have left their shelf. Copies of masters leave theirs."""
        left = self._left.setdefault(get_ident(), deque())
        for departure in departures:
            entry = departure.entry
            left.append(departure)
            if entry.master is None:
                self.retired_seconds_saved += entry.tally.value * entry.seconds
                copies = [tier.remove(entry.key) for tier in self.tiers.copy().values()]  # others may add one
                left.extend(Departure(copy, None) for copy in copies if copy is not None)

    def _supersede(self, key: Hashable) -> None:
        """What is being made of the key is not to be kept, and who asks from now on begins anew."""
        for shelf in (self.masters, *self.tiers.values()):
            flight = shelf.flights.get(key)
            if flight is not None:
                flight.superseded = True  # before it is nowhere to be found: it may be landing
                del shelf.flights[key]

    def forked(self) -> None:
        """In the child of a fork, with the lock held: forget what other threads were at."""
        for thread in list(self._left):
            if thread != get_ident():
                del self._left[thread]
        for shelf in (self.masters, *self.tiers.values()):
            forget_other_threads(shelf.flights)


def _taken(queue: deque[R]) -> Iterator[R]:
    """What is in the queue, taken out one by one. Another thread may be at it, too."""
    while True:
        try:
            item = queue.popleft()
        except IndexError:
            return
        yield item
