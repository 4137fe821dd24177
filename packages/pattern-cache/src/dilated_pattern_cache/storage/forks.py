"""What a fork must not break: a lock held, or a value being made, by a thread that the child does not have.

Every cache's lock is taken before a fork and released on both sides after it, so that the child finds every cache
between two operations. Nothing is registered before the first cache is made.
"""

from __future__ import annotations

import os
import threading
import weakref
from functools import cache
from typing import Any, Protocol


class Forkable(Protocol):
    """A cache, as far as a fork is concerned."""

    lock: Any

    def forked(self) -> None:
        """Called in the child, with the lock held."""


# By identity. Changed in single steps, without a lock: a finaliser may make a cache while another thread forks.
_caches: dict[int, weakref.ref[Forkable]] = {}
_forking = threading.RLock()
_held: list[Forkable] = []


def watch(forkable: Forkable) -> None:
    """Hold the lock over every fork from now on."""
    name = id(forkable)
    _caches[name] = weakref.ref(forkable, lambda _: _caches.pop(name, None))
    _register()


@cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_let_go_in_child)


def _hold() -> None:
    _forking.acquire()
    for _, reference in sorted(_caches.copy().items()):  # one order for all threads that fork
        forkable = reference()
        if forkable is not None:
            forkable.lock.acquire()
            _held.append(forkable)


def _let_go() -> None:
    while _held:
        _held.pop().lock.release()
    _forking.release()


def _let_go_in_child() -> None:
    for forkable in _held:
        forkable.forked()
    _let_go()
