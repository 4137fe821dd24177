"""PatternCache: a bounded mapping that computes what it lacks, once.

This is its face: arguments, the mapping, statistics. A hit takes no lock: one look into a dictionary, and three calls
into C to count it. All that changes what is stored is in ``storage``.
"""

from __future__ import annotations

from collections.abc import (
    Awaitable,
    Callable,
    Hashable,
    ItemsView,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    ValuesView,
)
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from dilated_pattern_cache.checks import duration, limit, policy_named
from dilated_pattern_cache.errors import PatternMutatedError
from dilated_pattern_cache.policies import EvictionPolicy
from dilated_pattern_cache.statistics import CacheInfo, DeviceInfo, EntryInfo, Eviction, WarmReport
from dilated_pattern_cache.storage.making import Maker
from dilated_pattern_cache.storage.store import Store
from dilated_pattern_cache.values import devices
from dilated_pattern_cache.values.guards import GUARDS, Guard
from dilated_pattern_cache.values.leaves import charges_of, measured_by
from dilated_pattern_cache.values.tracing import compiling
from dilated_pattern_cache.views import Items, Values
from dilated_pattern_cache.warming import warm

if TYPE_CHECKING:
    from torch import device as Device

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
D = TypeVar("D")

_NONE: Any = object()  # no default was given


class PatternCache(MutableMapping[K, V]):
    """A mapping of bounded size that computes what it lacks, once, however many threads ask at the same time.

    ``get_or_create(key, create)`` is the way to use it. It is also a mutable mapping, as every cache of cachetools is:
    a look-up by ``[]`` or ``get`` is a use, ``in`` and iteration are none, ``popitem`` takes what would leave next.

    Args:
        max_entries: how many values it holds; None for any number.
        max_bytes: how much memory these may take; None for any amount.
        max_device_bytes: the same for the copies on each device other than where the values were made.
        policy: what leaves first: "lru", what was not used for the longest time; "gdsf", what is cheap to make, large
            and seldom used (see ``policies.GreedyDualSize``); or a function that returns a ``policies.EvictionPolicy``.
        size_of: the bytes of a value. By default those of the tensors, arrays and buffers in it, where memory that
            several share counts once, also when they belong to several values.
        guard: how a change of a cached value is noticed when it is next looked up or taken out: "version", by the
            version counters of its tensors, NumPy arrays being made read-only; "contents", by a copy, to find a fault;
            None, not at all.
        on_evict: called with an ``Eviction`` after a value has left because of a limit, by the thread whose value
            displaced it. What it raises reaches that caller; the new value is stored.

    Values must not depend on anything that is not in their key. ``create`` is called outside of the lock, without
    recording gradients, and not at all while another thread makes the same value.

    Under ``torch.compile`` and ``torch.export``, ``get_or_create`` is ``create()``: tensors become part of the graph.
    It is also in dispatch modes, transforms of ``torch.func`` and traces, where tensors are not what they seem.

    A fork leaves the child with a cache of the same content. Copies by ``copy`` and ``deepcopy`` are the cache itself,
    which modules may share; a pickle brings its options over, and no content.

    >>> cache = PatternCache(max_entries=2)
    >>> cache.get_or_create(("squares", 4), lambda: [n * n for n in range(4)])
    [0, 1, 4, 9]
    >>> cache.get_or_create(("squares", 4), lambda: 1 / 0)
    [0, 1, 4, 9]
    >>> cache.info().hits, cache.info().misses
    (1, 1)
    """

    def __init__(
        self,
        max_entries: int | None = 100,
        max_bytes: int | None = None,
        *,
        max_device_bytes: int | None = None,
        policy: str | Callable[[], EvictionPolicy] = "lru",
        size_of: Callable[[V], int] | None = None,
        guard: Guard | None = "version",
        on_evict: Callable[[Eviction], object] | None = None,
    ) -> None:
        if guard not in GUARDS:
            raise ValueError(f"guard: expected 'version', 'contents' or None, got {guard!r}")
        for name, call in (("size_of", size_of), ("on_evict", on_evict)):
            if call is not None and not callable(call):
                raise TypeError(f"{name}: expected a callable, got {call!r}")
        self._options: dict[str, Any] = {
            "max_entries": limit("max_entries", max_entries),
            "max_bytes": limit("max_bytes", max_bytes),
            "max_device_bytes": limit("max_device_bytes", max_device_bytes),
            "policy": policy,
            "size_of": size_of,
            "guard": guard,
            "on_evict": on_evict,
        }
        self._store = Store(policy_named(policy), max_entries, max_bytes, max_device_bytes, on_evict)
        self._maker = Maker(
            self._store, charges_of if size_of is None else measured_by(size_of), guard, self._check_key
        )
        # What a hit needs, looked up once.
        masters = self._store.masters
        self._find, self._add_hit, self._clock = self._store.find, masters.hits.add, masters.policy.clock
        self._compiling = compiling()

    # ---------------------------------------------------------------------------------------------- looking up

    def get_or_create(self, key: K, create: Callable[[], V], *, device: Device | str | None = None) -> V:
        """The value of ``key``; where there is none, ``create()``, which is kept.

        Of all who ask for one key at a time, one calls ``create``, and the others wait for its result, or get its
        exception, which is not kept. An exception that is no ``Exception``, such as KeyboardInterrupt, is for its own
        thread alone: one of the others then calls its own ``create``.

        A value that cannot be kept, because it is too large or all else is pinned, is returned all the same.

        Args:
            key: hashable.
            create: called without arguments.
            device: where the tensors of the value must lie. A copy is made once and kept beside the value; it is
                ready for the caller's current stream.

        Raises:
            RuntimeError: ``create`` asks for its own key, itself or by way of others who make what it asks for.
            PatternMutatedError: somebody changed the value in place.
            TypeError: ``create`` cannot be called; the value has tensors that others could not use, or that cannot be
                moved to ``device`` with what they are in.
            ValueError, RuntimeError: there is no such device.
            ImportError: ``device`` is given, and PyTorch is not installed.
        """
        if self._compiling():
            return _step_aside(create, device)
        entry = self._find(key)
        if entry is None:
            value = cast(V, self._maker.make(key, create, device))
        else:
            try:
                if entry.intact is not None and not entry.intact():
                    self._store.masters.bypasses.add()
                    return _step_aside(create, device)
            except PatternMutatedError:
                self._store.discard(entry)
                raise
            self._add_hit()
            entry.add_hit()
            entry.used = self._clock()
            value = entry.value
        return value if device is None else cast(V, self._maker.on_device(key, value, device))

    async def aget_or_create(
        self, key: K, create: Callable[[], V | Awaitable[V]], *, device: Device | str | None = None
    ) -> V:
        """``get_or_create`` for asyncio: ``create`` may return an awaitable, and waiting lets other tasks run.

        Threads and tasks, of any event loop, wait for one another. A task that is cancelled while it creates leaves
        the work to one of those who wait. What is awaited runs in the gradient mode of the task.
        """
        entry = self._find(key)
        if entry is not None and self._maker.intact(entry):
            self._add_hit()
            entry.add_hit()
            entry.used = self._clock()
            value = cast(V, entry.value)
        else:
            value = cast(V, await self._maker.make_async(key, create, device))
        return value if device is None else cast(V, self._maker.on_device(key, value, device))

    @overload
    def get(self, key: K, /) -> V | None: ...
    @overload
    def get(self, key: K, /, default: D, *, device: Device | str | None = ...) -> V | D: ...
    @overload
    def get(self, key: K, /, *, device: Device | str | None) -> V | None: ...
    def get(self, key: K, /, default: Any = None, *, device: Device | str | None = None) -> Any:
        """The value of ``key``, or ``default``; on ``device``, where it is copied if need be."""
        try:
            value = self[key]
        except KeyError:
            return default
        return value if device is None else cast(V, self._maker.on_device(key, value, device))

    def __getitem__(self, key: K) -> V:
        if self._compiling():
            raise KeyError(key)
        entry = self._find(key)
        if entry is None:
            self._store.masters.misses.add()
            raise KeyError(key)
        if entry.intact is not None and not self._maker.intact(entry):
            self._store.masters.bypasses.add()
            raise KeyError(key)
        self._add_hit()
        entry.add_hit()
        entry.used = self._clock()
        return cast(V, entry.value)

    # ---------------------------------------------------------------------------------------------- storing

    def put(self, key: K, value: V, *, seconds: float = 0.0) -> None:
        """Store a value, as ``cache[key] = value`` does. What is being made for the key is not kept any more.

        Args:
            key: hashable. An entry of this key is replaced, and stays pinned if it was.
            value: shared from now on: not to be changed.
            seconds: what it took to make, for the statistics and for "gdsf", which gives up first what took none.

        Raises:
            ValueError: there can be no room for it: it is too large, or all else is pinned. The cache is as before.
                ``seconds`` is negative or not finite.
            TypeError: the value has tensors that others could not use.
        """
        if self._compiling():
            return
        self._maker.put(key, value, duration("seconds", seconds))

    def __setitem__(self, key: K, value: V) -> None:
        self.put(key, value)

    def setdefault(self, key: K, default: Any = None) -> V:
        """The value of ``key``; where there is none, ``default``, which is stored."""
        return self.get_or_create(key, lambda: default)

    def __delitem__(self, key: K) -> None:
        if self._store.remove(key) is None:
            raise KeyError(key)

    @overload
    def pop(self, key: K, /) -> V: ...
    @overload
    def pop(self, key: K, /, default: V | D) -> V | D: ...
    def pop(self, key: K, /, default: Any = _NONE) -> Any:
        """Remove ``key`` and return its value; ``default``, if given, where there is none.

        Raises:
            KeyError: there is neither.
        """
        entry = self._store.remove(key)
        if entry is not None:
            self._maker.intact(entry)
            return entry.value
        if default is _NONE:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[K, V]:
        """Remove what would leave next, pinned or not, and return its (key, value).

        Raises:
            KeyError: the cache is empty.
        """
        entry = self._store.pop_first()
        if entry is None:
            raise KeyError("the cache is empty")
        self._maker.intact(entry)
        return cast(K, entry.key), entry.value

    def clear(self) -> None:
        """Remove all values, and keep nothing that is being made. The statistics go on."""
        self._store.clear()

    def pin(self, *keys: K) -> None:
        """Keep these from being evicted, with their copies, until they are unpinned or removed.

        Raises:
            KeyError: one is not there. None is pinned then.
        """
        self._store.pin(keys, True)

    def unpin(self, *keys: K) -> None:
        """Let these be evicted again.

        Raises:
            KeyError: one is not there.
        """
        self._store.pin(keys, False)

    def warm(
        self,
        patterns: Mapping[K, Callable[[], V]] | Iterable[tuple[K, Callable[[], V]]],
        *,
        device: Device | str | None = None,
        pin: bool = False,
        workers: int = 1,
        progress: Callable[[int, int, K], object] | None = None,
    ) -> WarmReport:
        """Make many values before they are needed.

        Args:
            patterns: ``create`` by key, or pairs of both.
            device: where copies are wanted, too. They are there when this returns.
            pin: whether the values are pinned.
            workers: how many threads make them; 1 for the caller's own.
            progress: called with (how many are done, of how many, the key just done) by the caller's thread.

        Raises:
            TypeError, ValueError: ``workers``, ``progress`` or a pair is none of the above; nothing is made.
            Exception: the first that a ``create`` raises; what was not begun by then is not made.
        """
        return warm(self, patterns, device=device, pin=pin, workers=workers, progress=progress)

    @staticmethod
    def _check_key(key: Hashable) -> None:
        """Raise where the key cannot be one. Called before anything is made or stored."""

    # ---------------------------------------------------------------------------------------------- looking at it

    def __contains__(self, key: object) -> bool:
        return key in self._store.masters.entries

    def __len__(self) -> int:
        return len(self._store.masters.entries)

    def __iter__(self) -> Iterator[K]:
        return iter(cast(list[K], list(self._store.masters.entries)))  # as it is now, whatever other threads do

    def items(self) -> ItemsView[K, V]:
        """A view of (key, value). Looking through it is no use of any."""
        return Items(self)

    def values(self) -> ValuesView[V]:
        """A view of the values. Looking through it is no use of any."""
        return Values(self)

    __eq__ = object.__eq__  # a cache is itself and no other, whatever it holds
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        limit = "" if self._store.masters.max_entries is None else f" of {self._store.masters.max_entries}"
        return f"<{type(self).__name__}: {len(self)}{limit} entries, {self._store.masters.nbytes:,} bytes>"

    @property
    def max_entries(self) -> int | None:
        """How many values it holds at most."""
        return self._store.masters.max_entries

    @property
    def max_bytes(self) -> int | None:
        """How many bytes its values take at most."""
        return self._store.masters.max_bytes

    @property
    def nbytes(self) -> int:
        """How many bytes its values take now."""
        return self._store.masters.nbytes

    def info(self) -> CacheInfo:
        """The statistics: totals since the cache was made, and its size now."""
        masters = self._store.masters
        saved = sum(entry.tally.value * entry.seconds for entry in list(masters.entries.values()))
        return CacheInfo(
            hits=masters.hits.value,
            misses=masters.misses.value,
            waits=masters.waits.value,
            bypasses=masters.bypasses.value,
            creations=masters.creations.value,
            failures=masters.failures.value,
            evictions=masters.evictions,
            rejections=masters.rejections.value,
            entries=len(masters.entries),
            max_entries=masters.max_entries,
            nbytes=masters.nbytes,
            max_bytes=masters.max_bytes,
            seconds_spent=self._store.seconds_spent,
            seconds_saved=self._store.retired_seconds_saved + saved,
            devices={
                name: DeviceInfo(
                    entries=len(tier.entries),
                    nbytes=tier.nbytes,
                    max_bytes=tier.max_bytes,
                    copies=tier.creations.value,
                    evictions=tier.evictions,
                )
                for name, tier in self._store.tiers.copy().items()
            },
        )

    def snapshot(self) -> list[EntryInfo]:
        """Every entry, the next to leave first."""
        return [self._store.inform(entry) for entry in self._store.masters.ranked()]

    # ---------------------------------------------------------------------------------------------- copying it

    def __copy__(self) -> PatternCache[K, V]:
        return self

    def __deepcopy__(self, memo: object) -> PatternCache[K, V]:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._options), ()


def _step_aside(create: Callable[[], V], device: Device | str | None) -> V:
    value = create()
    if device is None:
        return value
    return cast(V, devices.moved(value, devices.canonical(device)))
