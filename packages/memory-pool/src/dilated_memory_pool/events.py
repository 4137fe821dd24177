"""What a pool in full mode tells its observers, and when."""

from __future__ import annotations

import threading
from collections import deque
from typing import Literal, NamedTuple, Protocol, TypeAlias

Kind: TypeAlias = Literal["allocate", "free", "reserve", "release", "bypass", "failure"]


class PoolEvent(NamedTuple):
    """One thing that happened to a pool's memory.

    Attributes:
        kind: "allocate" and "free" of a span, "reserve" and "release" of an arena, "bypass" to PyTorch, "failure".
        address: of the memory; 0 where there is none. No two live spans have one, so it pairs a free with its
            allocate.
        nbytes: of the span or the arena; of the request for "bypass" and "failure".
        requested: bytes asked for; 0 for arenas.
        thread: ``threading.get_ident()`` of the thread that caused it; of a free, the one that took the memory back.
    """

    kind: Kind
    address: int
    nbytes: int
    requested: int
    thread: int


class Observer(Protocol):
    """Called with every event in the order of events, by some thread that uses the pool, outside the pool's lock.

    A "free" is told when the pool takes the memory back, at its next call after the last owner died. Nothing is told
    after ``close``. What an observer raises reaches the pool's caller, once all observers know of the event; the pool
    itself has finished by then, and the memory just allocated returns.
    """

    def __call__(self, event: PoolEvent, /) -> None:
        """Take note."""


class Bulletin:
    """Events in the order in which they happened, kept until nobody holds the pool's lock.

    Args:
        observers: who is told.
    """

    def __init__(self, observers: tuple[Observer, ...]) -> None:
        self.observers = observers
        self._news: deque[PoolEvent] = deque()
        self._telling = threading.RLock()
        self._is_telling = False

    def note(self, kind: Kind, address: int, nbytes: int, requested: int) -> None:
        """Keep an event of this thread's. Takes no lock."""
        if self.observers:
            self._news.append(PoolEvent(kind, address, nbytes, requested, threading.get_ident()))

    def publish(self) -> None:
        """Tell the observers what happened. Never called with a pool's lock held, since they may use the pool.

        All are told an event before the first error of one is raised, and an observer that uses the pool is told what
        came of that later, after this event.
        """
        if not self.observers:
            return
        with self._telling:
            if self._is_telling:
                return
            try:
                self._is_telling = True
                while self._news:
                    self._tell(self._news.popleft())
            finally:
                self._is_telling = False

    def _tell(self, event: PoolEvent) -> None:
        first: Exception | None = None
        for observer in self.observers:
            try:
                observer(event)
            except Exception as error:
                first = first or error
        try:
            if first is not None:
                raise first
        finally:
            del first  # or it and this frame refer to each other, and keep what was allocated alive

    def forked(self) -> None:
        """In a child: the thread that may have been telling is not here."""
        self._telling, self._is_telling = threading.RLock(), False
