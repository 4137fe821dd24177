"""What a pool in full mode tells its observers."""

from __future__ import annotations

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
