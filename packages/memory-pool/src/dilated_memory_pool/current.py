"""The pool that code further down should draw from, if it asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dilated_memory_pool.pool import MemoryPool

_current: ContextVar[MemoryPool | None] = ContextVar("dilated_memory_pool.current", default=None)


@contextmanager
def use_pool(pool: MemoryPool | None) -> Iterator[MemoryPool | None]:
    """Make ``pool`` what ``current_pool`` returns inside the block, in this thread or asyncio task only.

    PyTorch runs the backward pass of CUDA operations in threads of its own: there is no current pool in them.
    None hides an outer pool.

    >>> from dilated_memory_pool import MemoryPool
    >>> with use_pool(MemoryPool("host")) as pool:
    ...     current_pool() is pool
    True
    >>> current_pool() is None
    True
    """
    token = _current.set(pool)
    try:
        yield pool
    finally:
        _current.reset(token)


def current_pool() -> MemoryPool | None:
    """The pool of the innermost ``use_pool`` around the call; None outside of all."""
    return _current.get()
