"""What a cache stores, and how that changes: one thread at a time, and nothing is made twice.

All that changes what is stored goes through ``change``. No code of the user's is called with the lock held, but for
the ``__eq__`` and ``__hash__`` of keys.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from contextlib import suppress
from functools import partial
from inspect import isawaitable
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from dilated_pattern_cache import forks, guards
from dilated_pattern_cache.errors import PatternMutatedError
from dilated_pattern_cache.flights import Flight, Landing, forget_other_threads, this_task, this_thread, waiting
from dilated_pattern_cache.policies import Policy
from dilated_pattern_cache.shelf import Departure, Entry, Shelf
from dilated_pattern_cache.statistics import EntryInfo, Eviction
from dilated_pattern_cache.tracing import outside_of_autograd, watched
from dilated_pattern_cache.values import is_tensor, leaves

if TYPE_CHECKING:
    from torch import device as Device

R = TypeVar("R")


class Store:
    """The values of a cache, on one shelf, and their copies, on a shelf for every device.

    Attributes:
        masters, tiers: the shelves.
        seconds_spent, retired_seconds_saved: see ``CacheInfo``; the latter of entries that are gone.
    """

    def __init__(
        self,
        new_policy: Callable[[], Policy],
        max_entries: int | None,
        max_bytes: int | None,
        max_device_bytes: int | None,
        charges_of: Callable[[Any], dict[Hashable, int]],
        guard: guards.Guard | None,
        on_evict: Callable[[Eviction], object] | None,
        check_key: Callable[[Hashable], None],
    ) -> None:
        self._new_policy, self._max_device_bytes = new_policy, max_device_bytes
        self._charges_of, self._guard, self._on_evict, self._check_key = charges_of, guard, on_evict, check_key
        self.masters = Shelf(new_policy(), max_entries, max_bytes)
        self.tiers: dict[str, Shelf] = {}
        self.seconds_spent = self.retired_seconds_saved = 0.0
        self.find = self.masters.entries.get
        self.lock = threading.RLock()  # asked who owns it, never taken twice by one thread
        self._whole = True  # whether the last change was completed
        self._deferred: deque[Callable[[], object]] = deque()
        self._left: deque[Departure] = deque()
        forks.watch(self)

    @property
    def interrupted(self) -> bool:
        """Whether the caller is a finaliser or a signal handler in the middle of a change by its own thread."""
        owned: bool = self.lock._is_owned()  # type: ignore[attr-defined]
        return owned

    # ---------------------------------------------------------------------------------------------- making

    def fly(self, shelf: Shelf, key: Hashable, make: Callable[[], Entry]) -> Any:
        """The value of what ``make`` returns, by this thread or by the one that is at it."""
        self._check_key(key)
        if self.interrupted or watched():
            shelf.bypasses.add()
            return make().value
        flight = Flight(this_thread())
        found: Entry | Flight = flight
        try:
            while True:
                found = self._board(shelf, key, flight)
                if isinstance(found, Entry):
                    return found.value
                if found is flight:
                    return self._arrive(shelf, flight, make())
                with waiting(this_thread(), found, key):
                    landing = found.result()
                if landing.arrived:
                    return landing.value
        except Exception as error:
            self._crash(shelf, key, flight, error)
            raise
        finally:
            self._leave(shelf, key, flight)
            flight.give_up()
            del flight, found  # an exception that a flight holds would hold this frame

    async def fly_async(self, key: Hashable, create: Callable[[], Any]) -> Any:
        """``fly`` for a task: ``create`` may return an awaitable."""
        from asyncio import wrap_future  # who calls this has it already

        self._check_key(key)
        shelf = self.masters
        if self.interrupted or watched():
            shelf.bypasses.add()
            value = create()
            return await value if isawaitable(value) else value
        flight = Flight(this_task())
        found: Entry | Flight = flight
        try:
            while True:
                found = self._board(shelf, key, flight)
                if isinstance(found, Entry):
                    return found.value
                if found is flight:
                    started = perf_counter()
                    with outside_of_autograd():
                        value = create()
                    if isawaitable(value):
                        value = await value
                    return self._arrive(shelf, flight, self.describe(key, value, perf_counter() - started))
                with waiting(this_task(), found, key):
                    landing = await wrap_future(found)
                if landing.arrived:
                    return landing.value
        except Exception as error:
            self._crash(shelf, key, flight, error)
            raise
        finally:
            self._leave(shelf, key, flight)
            flight.give_up()
            del flight, found

    def _board(self, shelf: Shelf, key: Hashable, flight: Flight) -> Entry | Flight:
        """What there is after all; else the flight that others began; else ``flight``, which has begun now."""
        found: Entry | Flight
        with self.lock:
            entry = shelf.entries.get(key)
            found = shelf.flights.setdefault(key, flight) if entry is None else entry
        if isinstance(found, Entry):
            shelf.hits.add()
            found.add_hit()
            found.used = shelf.policy.clock()
        elif found is flight:
            shelf.misses.add()
        else:
            shelf.waits.add()
        return found

    def _arrive(self, shelf: Shelf, flight: Flight, entry: Entry) -> Any:
        """Keep what was made, if it may be kept; tell those who wait; return the value."""

        def store() -> None:
            self.seconds_spent += entry.seconds
            if flight.superseded or (entry.master is not None and self.find(entry.key) is not entry.master):
                return
            if shelf.refuses(entry) is not None:
                shelf.rejections.add()
                return
            if entry.master is not None:
                entry.pinned = entry.master.pinned
            self._let_go(shelf.insert(entry))

        shelf.creations.add()
        try:
            self._locked(store)
        finally:
            self._leave(shelf, entry.key, flight)
            flight.set_result(Landing(entry.value, arrived=True))
        self._settle()
        return entry.value

    def _crash(self, shelf: Shelf, key: Hashable, flight: Flight, error: Exception) -> None:
        """Tell those who wait for this flight, if it has not landed."""
        if not flight.done() and (flight.superseded or shelf.flights.get(key) is flight):
            shelf.failures.add()
            self._leave(shelf, key, flight)
            flight.set_exception(error)

    def _leave(self, shelf: Shelf, key: Hashable, flight: Flight) -> None:
        """From now on who asks for the key begins anew."""
        if shelf.flights.get(key) is flight:
            del shelf.flights[key]

    def new_entry(self, key: Hashable, create: Callable[[], Any]) -> Entry:
        """An entry for what ``create`` returns."""
        started = perf_counter()
        with outside_of_autograd():
            value = create()
        return self.describe(key, value, perf_counter() - started)

    def describe(self, key: Hashable, value: Any, seconds: float) -> Entry:
        """An entry for the value, with all that must be known of it.

        Raises:
            TypeError: the value has tensors that others could not use; ``size_of`` returns no number.
        """
        tensors = [leaf for leaf in leaves(value) if is_tensor(leaf)]
        if tensors:
            from dilated_pattern_cache.tensors import check, unreal

            if unreal(tensors):
                return Entry(key, value, {}, seconds, unfit="it has tensors without memory")
            check(key, tensors)
        return Entry(
            key,
            value,
            self._charges_of(value),
            seconds,
            intact=guards.watch(key, value, self._guard),
            places=frozenset(str(tensor.device) for tensor in tensors),
        )

    # ---------------------------------------------------------------------------------------------- on devices

    def on_device(self, key: Hashable, value: Any, device: Device | str) -> Any:
        """The value on the device: itself where it lies there, else its copy, made once."""
        from dilated_pattern_cache.devices import canonical, moved

        place = canonical(device)
        name = str(place)
        master = self.find(key)
        if master is None or master.value is not value:  # not kept, or gone meanwhile
            return moved(value, place)
        if master.places <= {name}:
            return value
        tier = self.tiers.get(name)
        if tier is None:
            tier = self.tiers.setdefault(name, Shelf(self._new_policy(), None, self._max_device_bytes))
        copy = tier.entries.get(key)
        if copy is None or copy.master is not master:
            return self.fly(tier, key, partial(self._new_copy, master, place))
        if copy.intact is not None:
            self.intact(copy)
        copy.add_hit()
        copy.used = tier.policy.clock()
        if copy.arrive is not None:
            copy.arrive()
        return copy.value

    def _new_copy(self, master: Entry, place: Device) -> Entry:
        from dilated_pattern_cache.devices import copied

        started = perf_counter()
        value, arrive = copied(master.value, place)
        return Entry(
            master.key,
            value,
            self._charges_of(value),
            perf_counter() - started,
            intact=guards.watch(master.key, value, self._guard),
            places=frozenset({str(place)}),
            master=master,
            arrive=arrive,
        )

    # ---------------------------------------------------------------------------------------------- changing

    def put(self, entry: Entry) -> None:
        """Store an entry. What is being made for its key is not kept any more.

        Raises:
            ValueError: there can be no room for it.
        """
        self._check_key(entry.key)
        if (reason := self.masters.refuses(entry)) is not None:
            raise ValueError(f"the value of {entry.key!r} cannot be stored: {reason}")

        def put() -> None:
            if self.masters.refuses(entry) is not None:  # pinned meanwhile
                self.masters.rejections.add()
                return
            self._supersede(entry.key)
            self._let_go(self.masters.insert(entry))

        self._change(put)

    def discard(self, entry: Entry) -> bool:
        """Remove an entry; whether it was still there. A copy alone, or a master with its copies."""

        def discard() -> bool:
            shelf = self.masters if entry.master is None else self.tiers[next(iter(entry.places))]
            if shelf.entries.get(entry.key) is not entry:
                return False
            if entry.master is None:
                self._supersede(entry.key)
            shelf.remove(entry.key)
            self._let_go([Departure(entry, None)])
            return True

        return self._change(discard) is not False

    def pop_first(self) -> Entry | None:
        """Remove what would leave next, pinned or not; None where there is nothing."""
        if self.interrupted:
            raise RuntimeError("popitem() in the middle of another operation of this thread on the cache")

        def take() -> Entry | None:
            entry = self.masters.pop_first()
            if entry is not None:
                self._let_go([Departure(entry, None)])
            return entry

        return self._change(take)

    def clear(self) -> None:
        """Remove everything, and keep nothing that is being made."""

        def clear() -> None:
            shelves = (self.masters, *self.tiers.values())
            for key in [key for shelf in shelves for key in shelf.flights]:
                self._supersede(key)
            self._let_go([Departure(entry, None) for entry in self.masters.entries.values()])
            for shelf in shelves:
                shelf.clear()

        self._change(clear)

    def _change(self, operation: Callable[[], R]) -> R | None:
        """Run an operation on what is stored, alone.

        A finaliser or a signal handler in the middle of another operation of this very thread cannot wait for it: its
        own is done right after the other, and None is returned.
        """
        if self.interrupted:
            self._deferred.append(operation)
            return None
        result = self._locked(operation)
        self._settle()
        return result

    def _locked(self, operation: Callable[[], R]) -> R:
        with self.lock:
            if not self._whole:  # an exception cut the last change short
                for shelf in (self.masters, *self.tiers.values()):
                    shelf.rebuild()
            self._whole = False
            result = operation()
            self._whole = True
        return result

    def _settle(self) -> None:
        """Without the lock: what was put off, then what must be told; values that left die here."""
        while self._deferred:
            with suppress(IndexError):  # another thread may be at it, too
                self._locked(self._deferred.popleft())
        failed = None
        while self._left:
            try:
                entry, reason = self._left.popleft()
            except IndexError:
                break
            if reason is not None and self._on_evict is not None:
                device = None if entry.master is None else next(iter(entry.places))
                try:
                    self._on_evict(Eviction(self.inform(entry), entry.value, device, reason))
                except Exception as error:
                    failed = failed or error
        try:
            if failed is not None:
                raise failed
        finally:
            del failed

    def _let_go(self, departures: Iterable[Departure]) -> None:
        """Entries have left their shelf. Copies of masters leave theirs."""
        for departure in departures:
            entry = departure.entry
            self._left.append(departure)
            if entry.master is None:
                self.retired_seconds_saved += entry.tally.value * entry.seconds
                copies = [tier.remove(entry.key) for tier in self.tiers.values()]
                self._left.extend(Departure(copy, None) for copy in copies if copy is not None)

    def _supersede(self, key: Hashable) -> None:
        """What is being made of the key is not to be kept, and who asks from now on begins anew."""
        for shelf in (self.masters, *self.tiers.values()):
            flight = shelf.flights.pop(key, None)
            if flight is not None:
                flight.superseded = True

    def intact(self, entry: Entry) -> bool:
        """Whether a value may be given out; not within a dispatch mode.

        Raises:
            PatternMutatedError: it was changed. It is removed.
        """
        try:
            return entry.intact is None or entry.intact()
        except PatternMutatedError:
            self.discard(entry)
            raise

    def with_copies(self, keys: Iterable[Hashable]) -> list[Entry]:
        """The entries of all keys, and their copies.

        Raises:
            KeyError: one is not there.
        """
        keys = list(keys)
        entries = [self.masters.entries[key] for key in keys]
        copies = [tier.entries.get(key) for tier in list(self.tiers.values()) for key in keys]
        return entries + [copy for copy in copies if copy is not None]

    def inform(self, entry: Entry) -> EntryInfo:
        """What is known of an entry."""
        places = [name for name, tier in list(self.tiers.items()) if entry.key in tier.entries]
        return EntryInfo(entry.key, entry.nbytes, entry.tally.value, entry.seconds, entry.pinned, tuple(places))

    def forked(self) -> None:
        """In the child of a fork, with the lock held: forget what other threads were making."""
        for shelf in (self.masters, *self.tiers.values()):
            forget_other_threads(shelf.flights)
