"""What a fork must not break: a lock held, or a value being made, by a thread that the child does not have.

Every cache's lock is taken before a fork and released on both sides after it, so that the child finds every cache
between two operations. Nothing is registered before the first cache is made.
"""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import Any, Protocol
from weakref import WeakSet


class Forkable(Protocol):
    """A cache, as far as a fork is concerned."""

    lock: Any

    def forked(self) -> None:
        """Called in the child, with the lock held."""


_registry = threading.RLock()  # nobody makes a cache while the others are being locked
_caches: WeakSet[Forkable] = WeakSet()
_held: list[Forkable] = []


def watch(forkable: Forkable) -> None:
    """Hold the lock over every fork from now on."""
    with _registry:
        _caches.add(forkable)
    _register()


@cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go_in_child)


def _hold() -> None:
    _registry.acquire()
    for forkable in sorted(_caches, key=id):  # one order for all threads that fork
        forkable.lock.acquire()
        _held.append(forkable)


def _let_go() -> None:
    while _held:
        _held.pop().lock.release()
    _registry.release()


def _let_go_in_child() -> None:
    for forkable in _held:
        forkable.forked()
    _let_go()
