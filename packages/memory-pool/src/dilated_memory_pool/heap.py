"""The machinery under a pool: leases on spans of arenas, for many threads, within a limit.

What makes it safe, in four rules:

- A finaliser takes no lock. A dying lease appends its span to ``_returned``; the next call takes it from there.
- The lock is re-entrant, and ``_busy`` says whether this thread is already inside: garbage collection and signal
  handlers run code in the middle of ours. Such a call is served by others (``lease`` returns None).
- A step that can be interrupted leaves the arenas consistent, and ``_salvage`` recomputes all else from them.
- Bytes are charged before they are mapped and credited after they are unmapped, so that a limit holds at all times.
"""

from __future__ import annotations

import gc
import threading
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from sys import is_finalizing as _is_finalizing
from typing import Literal, cast

from dilated_memory_pool import forks
from dilated_memory_pool.backends import Backend, Event
from dilated_memory_pool.errors import PoolLimitError, PoolMemoryError
from dilated_memory_pool.events import Bulletin, Observer
from dilated_memory_pool.ledger import Ledger
from dilated_memory_pool.numa import Numa
from dilated_memory_pool.placement.spans import Arena, Home, Lease, Placement, PlainLease, Span
from dilated_memory_pool.sizes import SizeClasses
from dilated_memory_pool.snapshot import ArenaSnapshot, SpanSnapshot
from dilated_memory_pool.statistics import PoolStatistics

_REMEMBERED_SIZES = 4096

_address, _offset, _idle_since = attrgetter("address"), attrgetter("offset"), attrgetter("idle_since")


class Heap:
    """Spans of a backend's memory.

    Args:
        backend: where arenas come from.
        placement: which span serves a request.
        classes: what requests are rounded up to, before the backend's granule.
        limit: bytes that may be reserved, None for no limit.
        numa: the machine's nodes, where arenas shall be local to one; None where they need not.
        strict_streams: wait for all streams that were seen.
        observers: told everything.
    """

    def __init__(
        self,
        backend: Backend,
        placement: Placement,
        classes: SizeClasses,
        limit: int | None,
        numa: Numa | None,
        strict_streams: bool,
        observers: tuple[Observer, ...],
    ) -> None:
        self.backend, self.limit = backend, limit
        self.bypasses = 0
        self.closed = False
        self.lock = threading.RLock()

        self._placement, self._classes, self._granule = placement, classes, backend.granule
        self._addressable = backend.addressable
        self._streams, self._strict_streams = backend.streams, strict_streams
        self._numa = numa if numa is not None and numa.active else None
        self._locality: Callable[[], int] | None = None
        if self._streams is not None:
            self._locality = self._streams.current
        elif self._numa is not None:
            self._locality = self._numa.current_node

        self._rounded: dict[int, int] = {}
        self._returned: deque[Span] = deque()
        self._home = Home(append=self._returned.append)
        self._waiting: deque[tuple[Span, list[Event]]] = deque()
        self._arenas: list[Arena] = []  # by address
        self._streams_seen: set[int] = set()
        self._ledger = Ledger()
        self._busy = False
        self._hand: Lease | None = None  # the lease being handed out
        self._bulletin = Bulletin(observers)
        self._let_go = partial(_let_go, self._arenas, self._home, self._returned, self._waiting)
        self._heir: _Heir | None = None

        forks.watch(self)

    # ------------------------------------------------------------------------------------------ leases

    def lease(self, nbytes: int, *, hidden: bool = False) -> Lease | None:
        """The owner of at least ``nbytes`` > 0; ``hidden`` if no Python object will hold it.

        None where the pool steps aside: the stream is being captured into a graph; this thread is inside the pool
        already, in a finaliser or a signal handler; the interpreter ends, and a thread that is no more may hold a lock.

        Raises:
            PoolLimitError, PoolMemoryError: there is no more, after trimming and collecting garbage.
            RuntimeError: the pool is closed.
        """
        if _is_finalizing() or (self._streams is not None and self._streams.capturing()):
            self._step_aside(nbytes)
            return None
        lease = self._reuse(nbytes, hidden)
        if lease is None:
            with self.lock:  # so that only this thread can be the busy one
                if self._busy:
                    self._step_aside(nbytes)
                    return None
            lease = self._grow(nbytes, hidden)
        if self._bulletin.observers:
            self._bulletin.publish()
        return lease

    def _step_aside(self, nbytes: int) -> None:
        self.bypasses += 1
        self._bulletin.note("bypass", 0, nbytes, nbytes)

    def _reuse(self, nbytes: int, hidden: bool) -> Lease | None:
        """A lease on a free span; None where none fits, or this thread is inside already."""
        with self.lock:
            if self._busy:
                return None
            if self.closed:
                raise RuntimeError("the pool is closed")
            try:
                self._busy = True
                if self._returned or self._waiting:
                    self._welcome()
                locality = self._locality() if self._locality is not None else None
                span = self._placement.take(self._round_up(nbytes), nbytes, locality)
                if span is None:
                    return None
                self._ledger.hits += 1
                return self._hand_out(span, hidden)
            except BaseException:
                self._salvage()
                raise
            finally:
                self._placement.taken = self._hand = None
                self._busy = False

    def _round_up(self, nbytes: int) -> int:
        """The size class of a request, in whole granules."""
        size = self._rounded.get(nbytes)
        if size is None:
            if len(self._rounded) >= _REMEMBERED_SIZES:
                self._rounded.clear()
            size = self._classes.round_up(nbytes)
            if size < nbytes:
                raise ValueError(f"size_classes: expected to round up, got {size} for {nbytes} by {self._classes!r}")
            size = -(-size // self._granule) * self._granule
            self._rounded[nbytes] = size
        return size

    def _hand_out(self, span: Span, hidden: bool) -> Lease:
        """A lease on the span, and the books kept."""
        lease = self._hand = span.arena.memory.lease() if hidden and self._addressable else PlainLease()
        lease.entrust(span)
        self._ledger.lend(span)
        if self._bulletin.observers:
            self._bulletin.note("allocate", span.address, span.nbytes, span.requested)
        return lease

    def _salvage(self) -> None:
        """After an exception inside the pool: take back a span that has no lease yet, and find out all else again."""
        taken = self._placement.taken
        if taken is not None and not (hasattr(self._hand, "span") and hasattr(self._hand, "__del__")):
            taken.requested = 0
        # What was taken back already, or waits already, must not be taken back once more.
        returned = self._returned
        if returned and (not returned[0].requested or any(span is returned[0] for span, _ in self._waiting)):
            returned.popleft()
        if self._waiting and not self._waiting[0][0].requested:
            self._waiting.popleft()
        self._placement.rebuild(self._arenas)
        self._ledger.recount(self._arenas)

    def stray(self, nbytes: int) -> Lease:
        """The owner of memory of its own that never belongs to the pool, for when the pool steps aside."""
        memory = self.backend.allocate(self._round_up(nbytes))
        lease = PlainLease()
        lease.entrust(Arena(memory, None, Home(append=bool)).spans.pop())
        return lease

    # ------------------------------------------------------------------------------------------ coming home

    def _welcome(self) -> None:
        """Take back the spans that came home, except while a stream may still be using them."""
        if self._streams is not None and self._streams.capturing():
            return  # an event that is recorded or asked now would become part of the graph
        returned, waiting = self._returned, self._waiting
        while returned:
            span = returned[0]  # removed when all is done, so that an exception in between loses nothing
            if span.requested:  # else it was taken back before such an exception
                events = self._events(span) if self._streams is not None else None
                if events:
                    waiting.append((span, events))
                else:
                    self._take_back(span)
            returned.popleft()
        for _ in range(len(waiting)):
            span, events = waiting[0]
            if all(event.done() for event in events):
                if span.requested:
                    self._take_back(span)
                waiting.popleft()
            else:
                waiting.rotate(-1)

    def _tidy(self) -> None:
        """Take back what came home, and have free neighbours joined, before the arenas are looked at."""
        self._welcome()
        self._placement.join()

    def _events(self, span: Span) -> list[Event]:
        """What to wait for before the span can be used again.

        Its own stream's next work comes after what is queued there and needs no waiting. But where the host reaches
        the memory, it writes at once, into what a queued copy is still to read: then its own stream counts too.
        """
        assert self._streams is not None
        streams = (self._streams_seen if self._strict_streams else span.streams) or set()
        own = {cast("int", span.arena.locality)}
        streams = streams | own if self.backend.addressable else streams - own
        return [self._streams.record(stream) for stream in streams]

    def _take_back(self, span: Span) -> None:
        if self._bulletin.observers:
            self._bulletin.note("free", span.address, span.nbytes, span.requested)
        self._ledger.take_back(span)
        span.streams = None
        span.requested = 0
        self._placement.give(span)

    # ------------------------------------------------------------------------------------------ growing, shrinking

    def _grow(self, nbytes: int, hidden: bool) -> Lease:
        """A lease on a new arena, or on what trimming, collecting garbage and waiting for streams brought back."""
        size = self._round_up(nbytes)
        refusal: MemoryError | None = None
        failure: PoolMemoryError | None = None
        try:
            for remedies in (), (self._make_room,), (self._collect, self._make_room):
                for remedy in remedies:
                    remedy(size, refusal is not None)
                    lease = self._reuse(nbytes, hidden)
                    if lease is not None:
                        return lease
                for arena_bytes in dict.fromkeys((self._placement.arena_bytes(size), size)):
                    operation = object()
                    try:
                        if self._charge(operation, arena_bytes):
                            return self._open(operation, arena_bytes, nbytes, hidden)
                    except MemoryError as error:
                        refusal = error
                    finally:
                        self._discharge(operation)
            with self.lock:
                self._ledger.ooms += 1
                limited = refusal is None or isinstance(refusal, PoolLimitError)
                kind = PoolLimitError if limited else PoolMemoryError
                largest = self._placement.largest_free()
                why = refusal.why if isinstance(refusal, PoolMemoryError) else ""
                failure = kind(nbytes, self._ledger.allocated, self._ledger.reserved, self.limit, largest, why)
                self._bulletin.note("failure", 0, nbytes, nbytes)
            self._bulletin.publish()
            raise failure from refusal
        finally:  # also where it was served after a refusal
            del failure, refusal  # or they and this frame refer to each other, and keep the callers' tensors alive

    def _charge(self, operation: object, arena_bytes: int) -> bool:
        """Count them as reserved from now on, if the limit allows it."""
        with self.lock:
            if self.limit is not None and self._ledger.reserved + arena_bytes > self.limit:
                return False
            self._ledger.in_transit[operation] = arena_bytes
            self._ledger.settle(self._arenas)
            return True

    def _discharge(self, operation: object) -> None:
        """Its bytes are no longer in transit."""
        with self.lock:
            self._ledger.in_transit.pop(operation, None)
            self._ledger.settle(self._arenas)

    def _open(self, operation: object, arena_bytes: int, nbytes: int, hidden: bool) -> Lease:
        """A lease on a new arena. The lock is not held while it is mapped."""
        locality = self._locality() if self._locality is not None else None
        memory = self.backend.allocate(arena_bytes)
        if self._numa is not None:
            self._numa.bind(memory.address, memory.nbytes, cast("int", locality))
        with self._inside():
            if self.closed:
                raise RuntimeError("the pool is closed")
            arena = Arena(memory, locality, self._home)
            insort(self._arenas, arena, key=_address)
            self._discharge(operation)
            if self._streams is not None:
                self._streams_seen.add(cast("int", locality))
            self._bulletin.note("reserve", arena.address, arena.nbytes, 0)
            self._placement.add(arena)
            span = self._placement.take(self._round_up(nbytes), nbytes, locality)
            assert span is not None, "a new arena serves the request it was made for"
            self._ledger.misses += 1
            return self._hand_out(span, hidden)

    def _make_room(self, size: int, refused: bool) -> None:
        """Give back what is idle: as much as the limit needs, or all where the backend itself ``refused``."""
        limit = self.limit
        self.trim(0 if refused or limit is None else max(limit - size, 0))

    def _collect(self, size: int, refused: bool) -> None:
        """Free what only reference cycles keep alive, and wait for the streams that memory waits for."""
        gc.collect()
        with self._inside() as inside:
            if inside:
                self._tidy()
                for _, events in self._waiting:
                    for event in events:
                        event.wait()
                self._tidy()

    def trim(self, keep: int) -> int:
        """Give back idle arenas, the longest unused first, until ``keep`` bytes are reserved; the bytes given back.

        None while a graph is captured, which CUDA ends where memory is given back.
        """
        if self._streams is not None and self._streams.capturing():
            return 0
        released: list[Arena] = []
        idle: list[Arena] = []
        operation, leaving = object(), 0
        try:
            with self._inside() as inside:
                if inside:
                    self._tidy()
                    idle += sorted((arena for arena in self._arenas if arena.idle), key=_idle_since, reverse=True)
                    while idle and self._ledger.reserved - leaving > keep:
                        released.append(idle.pop())
                        # Still mapped: it counts as reserved, in transit, until the memory is really gone.
                        leaving += released[-1].nbytes
                        self._ledger.in_transit[operation] = leaving
                        self._drop(released[-1])
        finally:
            idle.clear()
            released.clear()  # unmapping a large arena takes milliseconds: nobody waits for the lock meanwhile
            if leaving:
                self._discharge(operation)
        if inside:
            self._bulletin.publish()
        return leaving

    def _drop(self, arena: Arena) -> None:
        """Part with an idle arena."""
        self._arenas.remove(arena)
        self._placement.discard(arena)
        arena.abandon()
        self._ledger.trims += 1
        self._bulletin.note("release", arena.address, arena.nbytes, 0)

    def close(self) -> None:
        """Give back what is idle, and let go of the rest: it is freed when its owners die."""
        self.closed = True
        self.trim(0)
        with self._inside() as inside:
            if inside:
                self._let_go()
                self._salvage()
        if inside:
            self._bulletin.publish()

    def __del__(self) -> None:
        # Without the lock, which a finaliser must not take: nobody is inside a heap that nobody holds.
        if not hasattr(self, "_let_go"):
            return
        if gc.is_finalized(self):  # by the garbage collector: the next finaliser may use the heap, see PlainLease
            self._heir = _Heir(self._let_go)
        else:
            self._let_go()

    # ------------------------------------------------------------------------------------------ looking

    def span_of(self, address: int) -> Span | None:
        """The span in use that ``address`` lies in."""
        with self.lock:
            place = bisect_right(self._arenas, address, key=_address) - 1
            if place < 0 or address >= self._arenas[place].address + self._arenas[place].nbytes:
                return None
            arena = self._arenas[place]
            span = arena.spans[bisect_right(arena.spans, address - arena.address, key=_offset) - 1]
            return span if span.requested else None

    def record_stream(self, address: int, stream: int) -> bool:
        """Wait for ``stream`` before the memory at ``address`` is used again; False where it is not the heap's."""
        with self.lock:
            span = self.span_of(address)
            if span is not None:
                span.streams = (span.streams or set()) | {stream}
                self._streams_seen.add(stream)
            return span is not None

    def statistics(self) -> PoolStatistics:
        """See ``PoolStatistics``."""
        with self._inside() as inside:
            if inside:
                self._tidy()
            numbers = self._numbers()
        if inside:
            self._bulletin.publish()
        return numbers

    def snapshot(self) -> tuple[PoolStatistics, tuple[ArenaSnapshot, ...]]:
        """The numbers and the map of one moment."""
        with self._inside() as inside:
            if inside:
                self._tidy()
            waiting = {id(span) for span, _ in self._waiting}
            moment = self._numbers(), tuple(_drawn(arena, waiting) for arena in self._arenas)
        if inside:
            self._bulletin.publish()
        return moment

    def reset_peaks(self) -> None:
        """Let the peaks start again from what is now."""
        with self._inside() as inside:
            if inside:
                self._tidy()
            self._ledger.reset_peaks()
        if inside:
            self._bulletin.publish()

    def _numbers(self) -> PoolStatistics:
        return self._ledger.statistics(
            waiting_bytes=sum(span.nbytes for span, _ in self._waiting),
            largest_free_bytes=self._placement.largest_free(),
            bypasses=self.bypasses,
            limit_bytes=self.limit,
        )

    # ------------------------------------------------------------------------------------------ helpers

    @contextmanager
    def _inside(self) -> Iterator[bool]:
        """Hold the lock and be busy. Yields False, and changes nothing, where this thread is busy here already, and
        where the interpreter ends: a thread that is no more may hold the lock, and no other runs.
        """
        if _is_finalizing():
            yield False
            return
        with self.lock:
            if self._busy:
                yield False
                return
            try:
                self._busy = True
                yield True
            except BaseException:
                self._salvage()
                raise
            finally:
                self._placement.taken = self._hand = None
                self._busy = False

    def forked(self) -> None:
        """In a child: threads that may have been telling observers, or mapping memory, are not here. Nor is a device:
        its memory is the parent's, and PyTorch ends a child that gives any back.
        """
        if self._streams is not None:
            forks.keep(self.backend, [arena.memory for arena in self._arenas], list(self._waiting))
        self._bulletin.forked()
        self._ledger.in_transit.clear()
        self._ledger.settle(self._arenas)


def _let_go(arenas: list[Arena], home: Home, returned: deque[Span], waiting: deque[tuple[Span, list[Event]]]) -> None:
    """Have no arenas any more. What is in use is freed when its owners die."""
    for arena in arenas:
        arena.abandon()
    arenas.clear()
    home.close()
    returned.clear()
    waiting.clear()


class _Heir:
    """Lets go of what was a heap's, when the heap is really gone."""

    def __init__(self, let_go: Callable[[], None]) -> None:
        self._let_go = let_go

    def __del__(self) -> None:
        self._let_go()


def _drawn(arena: Arena, waiting: set[int]) -> ArenaSnapshot:
    def state(span: Span) -> Literal["free", "used", "waiting"]:
        if not span.requested:
            return "free"
        return "waiting" if id(span) in waiting else "used"

    spans = tuple(SpanSnapshot(span.offset, span.nbytes, span.requested, state(span)) for span in arena.spans)
    return ArenaSnapshot(arena.address, arena.nbytes, None if arena.locality is None else str(arena.locality), spans)
