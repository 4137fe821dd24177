"""What a fork must not break: a lock held by a thread that the child does not have.

Every pool's lock is taken before a fork and released on both sides after it, so that the child finds every pool
between two operations. Nothing is registered before the first pool is made.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from dilated_memory_pool.heap import Heap

_registry = threading.RLock()  # nobody makes a pool while the others are being locked
_heaps: WeakSet[Heap] = WeakSet()
_held: list[Heap] = []
_kept: list[object] = []


def watch(heap: Heap) -> None:
    """Hold the heap's lock over every fork from now on."""
    with _registry:
        _heaps.add(heap)
    _register()


def keep(*parts: object) -> None:
    """Let them live as long as this process, which is a child and must not give back what is the parent's."""
    _kept.extend(parts)


@cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go_in_child)


def _hold() -> None:
    _registry.acquire()
    for heap in sorted(_heaps, key=id):  # one order for all threads that fork
        heap.lock.acquire()
        _held.append(heap)


def _let_go() -> None:
    while _held:
        _held.pop().lock.release()
    _registry.release()


def _let_go_in_child() -> None:
    for heap in _held:
        heap.forked()
    _let_go()
