"""Fail on purpose, to see what a program does about it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import count
from typing import NamedTuple

from dilated_memory_pool.adaptors.adaptor import Adaptor
from dilated_memory_pool.backends import Backend, Memory


class InjectedFault(NamedTuple):
    """A call that was failed.

    Attributes:
        call: its number, the first being 1.
        nbytes: what it asked for.
    """

    call: int
    nbytes: int


class FaultInjectionAdaptor(Adaptor):
    """Raises for chosen calls, and passes the others on.

    A pool meets a MemoryError by trimming, then by collecting garbage, and calls again after each: to have a request
    refused, three calls in a row must fail.

    Args:
        upstream: the backend or adaptor to draw from.
        fail: the numbers of the calls to fail, the first being 1; or called with (number, bytes), whether to.
        error: the type of exception; it is made with a message.

    Attributes:
        failed: what was failed, in order.

    Raises:
        TypeError: ``upstream`` is no backend, ``fail`` or ``error`` is none of the above.

    >>> from dilated_memory_pool import MemoryPool
    >>> from dilated_memory_pool.backends import HostBackend
    >>> flaky = FaultInjectionAdaptor(HostBackend(), fail={1, 2})
    >>> MemoryPool(flaky, mode="lightweight").allocate(8192)
    <Block of 8192 bytes ...>
    >>> flaky.failed
    [InjectedFault(call=1, nbytes=8192), InjectedFault(call=2, nbytes=8192)]
    """

    def __init__(
        self,
        upstream: Backend,
        fail: Collection[int] | Callable[[int, int], bool],
        error: type[BaseException] = MemoryError,
    ) -> None:
        if not callable(fail) and not isinstance(fail, Collection):
            raise TypeError(f"fail: expected a set of call numbers or a callable with (number, nbytes), got {fail!r}")
        if not (isinstance(error, type) and issubclass(error, BaseException)):
            raise TypeError(f"error: expected a type of exception, got {error!r}")
        super().__init__(upstream)
        self.reasons += ("fault injection adaptor: some allocations fail on purpose",)
        self.failed: list[InjectedFault] = []
        self._fail = fail
        self._error = error
        self._numbers = count(1)

    def allocate(self, nbytes: int) -> Memory:
        """As ``Backend.allocate``, where the call is not one of the chosen."""
        number = next(self._numbers)
        if self._fail(number, nbytes) if callable(self._fail) else number in self._fail:
            self.failed.append(InjectedFault(number, nbytes))
            raise self._error(f"fault injected into allocation {number}, of {nbytes} bytes")
        return self.upstream.allocate(nbytes)
