"""Arenas, the spans they are cut into, and the lease that owns a span while somebody uses it.

A backend hands out arenas. A placement cuts them into spans. Whoever is given a span holds its ``Lease``, and holds
nothing else: when the last reference to the lease goes, from whichever thread and however it came to that, the span
is appended to the arena's ``home``. That is one atomic operation and takes no lock, because a finaliser may run at any
bytecode of the very thread that is inside the pool. The pool looks at what came home when it is next called.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from operator import methodcaller
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dilated_memory_pool.backends import Memory


class Span:
    """One contiguous range of an arena. Its place never changes: splitting and joining make new spans.

    Attributes:
        arena, offset, nbytes: where it lies.
        requested: the bytes that were asked for, of the ``nbytes`` handed out; 0 is what makes a span free.
        joined: free, and known to the placement as one with its free neighbours.
        streams: streams that used the memory beside the one it was allocated for; None while there are none.
    """

    __slots__ = ("arena", "joined", "nbytes", "offset", "requested", "streams")

    def __init__(self, arena: Arena, offset: int, nbytes: int) -> None:
        self.arena, self.offset, self.nbytes = arena, offset, nbytes
        self.requested = 0
        self.joined = False
        self.streams: set[int] | None = None

    @property
    def address(self) -> int:
        """Of its first byte."""
        return self.arena.address + self.offset

    def __repr__(self) -> str:
        return f"Span(0x{self.address:x}, {self.nbytes}, {self.requested or 'free'})"


class Home(SimpleNamespace):
    """Where spans go whose lease has died: ``append(span)`` is C, and can be exchanged while leases refer to it."""

    append: Callable[[Span], object]

    def close(self) -> None:
        """From now on nobody waits for them, and they go for good."""
        self.append = bool  # C too, and does nothing


class Arena:
    """One piece of a backend's memory.

    Attributes:
        memory: the backend's object; the memory is given back when it dies, and leases keep it alive.
        locality: the stream or the NUMA node whose requests it serves; None where there is no such thing.
        spans: its spans, in the order of their addresses, without gaps.
        home: where spans go whose lease has died.
        idle_since: a clock's reading when it last became wholly free.
    """

    __slots__ = ("address", "home", "idle_since", "locality", "memory", "nbytes", "spans")

    def __init__(self, memory: Memory, locality: int | None, home: Home) -> None:
        self.memory, self.locality, self.home = memory, locality, home
        self.address, self.nbytes = memory.address, memory.nbytes
        self.spans = [Span(self, 0, memory.nbytes)]
        self.idle_since = 0

    @property
    def idle(self) -> bool:
        """Whether nothing in it is in use."""
        return len(self.spans) == 1 and not self.spans[0].requested

    def abandon(self) -> None:
        """Let the memory go with the last lease on it. Otherwise it would take the garbage collector: spans and arena
        refer to each other.
        """
        self.spans = []


class Lease:
    """The one owner of a span. One that dies before it was entrusted with a span has none to give back."""

    __slots__ = ()
    span: Span

    def entrust(self, span: Span) -> None:
        """Make it the owner of ``span``. From its last step on, the lease's death brings the span home."""
        raise NotImplementedError


class HiddenLease(Lease):
    """A lease that only C++ holds, inside a tensor's storage; the garbage collector never finds it unreachable.

    Its finaliser, an instance's own in the slot ``__del__``, is C from end to end. A finaliser in Python would be the
    first bytecode after a long operation on a temporary tensor: Ctrl-C would be raised in there, where Python prints
    it and goes on, and the memory would be lost.
    """

    __slots__ = ()
    SLOTS = ("__del__", "span")  # of every subclass; here they would not go together with those of ctypes

    def entrust(self, span: Span) -> None:  # noqa: D102
        self.span = span  # type: ignore[misc]  # a slot of every subclass
        self.__del__ = partial(methodcaller("append", span), span.arena.home)  # type: ignore[misc]  # likewise


class PlainLease(Lease):
    """A lease that Python objects hold.

    The garbage collector runs all finalisers of a cycle before it frees any of it, and the one after ours may still
    use the memory, or save its owner. Such a lease passes its span on to an ``heir``, which lives as long as it does.
    """

    __slots__ = ("heir", "span")

    def entrust(self, span: Span) -> None:  # noqa: D102
        self.span = span

    def __del__(self) -> None:
        try:
            span = self.span
        except AttributeError:
            return
        if gc.is_finalized(self):  # by the garbage collector: of an object that dies by itself this is false until now
            self.heir = PlainLease()
            self.heir.span = span
        else:
            span.arena.home.append(span)


class Placement(Protocol):
    """Which free span serves a request.

    Not thread-safe: the pool holds its lock. Every change of ``arena.spans`` and of ``span.requested`` is one atomic
    step, so that ``rebuild`` finds a consistent state after an exception at any point, a KeyboardInterrupt included.

    Attributes:
        taken: set by ``take`` to the span it takes, before it is out of the caller's reach.
    """

    taken: Span | None

    def take(self, nbytes: int, requested: int, locality: int | None) -> Span | None:
        """A free span of at least ``nbytes``, marked as ``requested``; None where there is none."""

    def give(self, span: Span) -> None:
        """Take back ``span``, whose ``requested`` is 0."""

    def join(self) -> None:
        """Finish what ``give`` put off. Called before arenas are looked at."""

    def add(self, arena: Arena) -> None:
        """Take in a new arena, wholly free."""

    def discard(self, arena: Arena) -> None:
        """Forget an arena that is idle."""

    def arena_bytes(self, nbytes: int) -> int:
        """How much to ask of the backend when no span serves ``nbytes``."""

    def largest_free(self) -> int:
        """Bytes of the largest free span."""

    def rebuild(self, arenas: list[Arena]) -> None:
        """Find out again what is free, from the arenas alone."""
