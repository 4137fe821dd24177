"""How a value comes about: by one thread or task, while all others who want it wait for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from inspect import isawaitable, iscoroutine
from time import perf_counter
from typing import TYPE_CHECKING, Any

from dilated_pattern_cache.errors import PatternMutatedError
from dilated_pattern_cache.storage.flights import Flight, this_task, this_thread, waiting
from dilated_pattern_cache.storage.shelf import Entry, Shelf
from dilated_pattern_cache.storage.store import Store
from dilated_pattern_cache.values import devices, guards
from dilated_pattern_cache.values.leaves import is_tensor, leaves
from dilated_pattern_cache.values.tracing import outside_of_autograd, watched

if TYPE_CHECKING:
    from torch import device as Device


class Maker:
    """Makes what a store lacks.

    Args:
        store: where it is kept.
        charges_of: the memory of a value.
        guard: how its changes are noticed.
        check_key: raises where a key cannot be one.
    """

    def __init__(
        self,
        store: Store,
        charges_of: Callable[[Any], dict[Hashable, int]],
        guard: guards.Guard | None,
        check_key: Callable[[Hashable], None],
    ) -> None:
        self._store, self._charges_of, self._guard, self._check_key = store, charges_of, guard, check_key

    # ---------------------------------------------------------------------------------------------- values

    def make(self, key: Hashable, create: Callable[[], Any], device: Device | str | None) -> Any:
        """The value of a key that was not found, where ``create`` makes it. ``device`` is only looked at."""
        self._check(key, create, device)
        return self._fly(self._store.masters, key, partial(self._create, key, create), create).value

    async def make_async(self, key: Hashable, create: Callable[[], Any], device: Device | str | None) -> Any:
        """The same for a task: ``create`` may return an awaitable."""
        self._check(key, create, device)
        shelf = self._store.masters
        if self._store.interrupted or watched():
            shelf.bypasses.add()
            value = create()
            return await value if isawaitable(value) else value
        flight = Flight(this_task())
        found: Entry | Flight = flight
        try:
            while True:
                found = self._board(shelf, key, flight)
                if found is not flight:
                    self._store.settle()
                if isinstance(found, Entry):
                    return found.value
                if found is flight:
                    started = perf_counter()
                    with outside_of_autograd():
                        value = create()
                    if isawaitable(value):
                        value = await value
                    return self._arrive(shelf, flight, self._describe(key, value, perf_counter() - started)).value
                with waiting(this_task(), found, key):
                    await found.landed()
                if (entry := found.result()) is not None:
                    return entry.value
        except Exception as error:
            self._crash(shelf, key, flight, error)
            raise
        finally:
            self._leave(shelf, key, flight)
            flight.land(None)
            del flight, found

    def put(self, key: Hashable, value: Any, seconds: float) -> None:
        """Store a value that the caller has."""
        self._check_key(key)
        self._store.put(self._describe(key, value, seconds))

    def intact(self, entry: Entry) -> bool:
        """Whether a value may be given out; not within a dispatch mode.

        Raises:
            PatternMutatedError: it was changed. It is removed.
        """
        try:
            return entry.intact is None or entry.intact()
        except PatternMutatedError:
            self._store.discard(entry)
            raise

    def _check(self, key: Hashable, create: object, device: Device | str | None) -> None:
        self._check_key(key)
        if not callable(create):
            raise TypeError(f"create: expected a callable, got {create!r}")
        if device is not None:
            devices.canonical(device)

    def _create(self, key: Hashable, create: Callable[[], Any]) -> Entry:
        started = perf_counter()
        with outside_of_autograd():
            value = create()
        return self._describe(key, value, perf_counter() - started)

    def _describe(self, key: Hashable, value: Any, seconds: float) -> Entry:
        """An entry for the value, with all that must be known of it.

        Raises:
            TypeError: the value has tensors that others could not use; ``size_of`` returns no number.
        """
        if iscoroutine(value):
            value.close()
            raise TypeError(f"the value of {key!r} is a coroutine, which can be awaited once: use aget_or_create()")
        tensors = [leaf for leaf in leaves(value) if is_tensor(leaf)]
        if tensors:
            from dilated_pattern_cache.values.tensors import check, unreal

            if unreal(tensors):
                return Entry(key, value, {}, seconds, unfit="it has tensors without memory")
            check(key, tensors)
        entry = Entry(key, value, self._charges_of(value), seconds, guards.watch(key, value, self._guard))
        entry.places = frozenset(str(tensor.device) for tensor in tensors)
        return entry

    # ---------------------------------------------------------------------------------------------- copies

    def on_device(self, key: Hashable, value: Any, device: Device | str) -> Any:
        """The value on the device: itself where it lies there, else its copy, made once."""
        place = devices.canonical(device)
        name = str(place)
        master = self._store.find(key)
        if master is None or master.value is not value:  # not kept, or gone meanwhile
            return devices.moved(value, place)
        if master.places <= {name}:
            return value
        tier = self._store.tier(name)
        copy = tier.entries.get(key)
        if copy is None or copy.master is not master:
            devices.check_copying(place)
            copy = self._fly(tier, key, partial(self._copy, master, place), partial(devices.moved, value, place))
        else:
            self.intact(copy)
            copy.add_hit()
            copy.used = tier.policy.clock()
        if copy.arrive is not None:
            copy.arrive()
        return copy.value

    def finish(self, device: Device | str) -> None:
        """Wait for all copies that are on their way to the device."""
        tier = self._store.tier(str(devices.canonical(device)))
        for copy in list(tier.entries.values()):
            if copy.arrive is not None:
                copy.arrive.finish()

    def _copy(self, master: Entry, place: Device) -> Entry:
        started = perf_counter()
        value, arrive = devices.copied(master.value, place)
        seconds, intact = perf_counter() - started, guards.watch(master.key, value, self._guard)
        entry = Entry(master.key, value, self._charges_of(value), seconds, intact)
        entry.master, entry.device, entry.arrive = master, str(place), arrive
        return entry

    # ---------------------------------------------------------------------------------------------- flights

    def _fly(self, shelf: Shelf, key: Hashable, make: Callable[[], Entry], step_aside: Callable[[], Any]) -> Entry:
        """What ``make`` returns, by this thread or by the one that is at it."""
        if self._store.interrupted or watched():
            shelf.bypasses.add()
            return Entry(key, step_aside(), {})
        flight = Flight(this_thread())
        found: Entry | Flight = flight
        try:
            while True:
                found = self._board(shelf, key, flight)
                if found is not flight:
                    self._store.settle()
                if isinstance(found, Entry):
                    return found
                if found is flight:
                    return self._arrive(shelf, flight, make())
                with waiting(this_thread(), found, key):
                    entry = found.result()
                if entry is not None:
                    return entry
        except Exception as error:
            self._crash(shelf, key, flight, error)
            raise
        finally:
            self._leave(shelf, key, flight)
            flight.land(None)
            del flight, found  # an exception that a flight holds would hold this frame

    def _board(self, shelf: Shelf, key: Hashable, flight: Flight) -> Entry | Flight:
        """What there is after all; else the flight that others began; else ``flight``, which has begun now."""

        def board() -> Entry | Flight:
            return shelf.entries.get(key) or shelf.flights.setdefault(key, flight)

        found = self._store.alone(board)
        self._store.catch_up()
        if isinstance(found, Entry):
            shelf.hits.add()
            found.add_hit()
            found.used = shelf.policy.clock()
        elif found is flight:
            shelf.misses.add()
        else:
            shelf.waits.add()
        return found

    def _arrive(self, shelf: Shelf, flight: Flight, entry: Entry) -> Entry:
        """Keep what was made, if it may be kept, and tell those who wait."""
        store = self._store

        def keep() -> None:
            if entry.master is None:
                store.seconds_spent += entry.seconds
            elif store.find(entry.key) is not entry.master:
                return
            else:
                entry.pinned = entry.master.pinned
            if flight.superseded:
                return
            if shelf.refuses(entry) is not None:
                shelf.rejections.add()
                return
            store.let_go(shelf.insert(entry))

        shelf.creations.add()
        try:
            store.alone(keep)
        finally:
            self._leave(shelf, entry.key, flight)
            flight.land(entry)
        store.settle()
        return entry

    def _crash(self, shelf: Shelf, key: Hashable, flight: Flight, error: Exception) -> None:
        """Tell those who wait for this flight, if it has begun and has not landed."""
        if flight.superseded or shelf.flights.get(key) is flight:
            shelf.failures.add()
            self._leave(shelf, key, flight)
            flight.crash(error)
            self._store.settle()

    def _leave(self, shelf: Shelf, key: Hashable, flight: Flight) -> None:
        """From now on who asks for the key begins anew."""

        def leave() -> None:
            if shelf.flights.get(key) is flight:
                del shelf.flights[key]

        if shelf.flights.get(key) is flight and not self._store.put_off(leave):  # a coroutine may die in a finaliser
            self._store.alone(leave)
            self._store.catch_up()
