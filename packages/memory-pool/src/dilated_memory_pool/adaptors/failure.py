"""Ask the program what to do when there is no more memory."""

from __future__ import annotations

from collections.abc import Callable

from dilated_memory_pool.adaptors.adaptor import Adaptor
from dilated_memory_pool.backends import Backend, Memory


class FailureCallbackAdaptor(Adaptor):
    """Calls ``callback`` when the upstream is out of memory, and tries again for as long as it returns True.

    The pool asks the upstream before it trims its own idle memory and collects garbage, and again after each: the
    callback may hear of one request more than once. No lock of the pool is held while it runs, so that it may free
    tensors, trim this pool and others, or empty a cache. What it raises reaches the caller instead.

    Args:
        upstream: the backend or adaptor to draw from.
        callback: called with the bytes asked for and the MemoryError; whether to try again.

    Raises:
        TypeError: ``upstream`` is no backend, or ``callback`` cannot be called.

    >>> from dilated_memory_pool import MemoryPool
    >>> from dilated_memory_pool.adaptors import LimitingAdaptor
    >>> from dilated_memory_pool.backends import HostBackend
    >>> cache = [MemoryPool("host").allocate("1MiB")]
    >>> def give_up_cache(nbytes, error):
    ...     held = bool(cache)
    ...     cache.clear()
    ...     return held
    >>> pool = MemoryPool(FailureCallbackAdaptor(LimitingAdaptor(HostBackend(), "1MiB"), give_up_cache))
    >>> pool.allocate("2MiB")
    Traceback (most recent call last):
    dilated_memory_pool.errors.PoolMemoryError: the backend has no more memory: requested 2 MiB, ...
    >>> cache
    []
    """

    def __init__(self, upstream: Backend, callback: Callable[[int, MemoryError], bool]) -> None:
        if not callable(callback):
            raise TypeError(f"callback: expected a callable with (nbytes, error), got {callback!r}")
        super().__init__(upstream)
        self.reasons += ("failure callback adaptor: asks the program before memory is refused",)
        self._callback = callback

    def allocate(self, nbytes: int) -> Memory:
        """As ``Backend.allocate``; MemoryError when the callback gives up."""
        while True:
            try:
                return self.upstream.allocate(nbytes)
            except MemoryError as error:
                if not self._callback(nbytes, error):
                    raise
