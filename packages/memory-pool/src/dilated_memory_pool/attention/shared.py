"""One tensor for all who ask for it by the same key, for as long as one of them holds it.

No lock is held while a tensor is made, and none exists that a fork could leave locked: the steps that must not be
interrupted are single operations on dictionaries.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from dilated_memory_pool.interop.torch import import_torch

if TYPE_CHECKING:
    import torch

    from dilated_memory_pool.pool import MemoryPool


class _Flight:
    """A tensor being made.

    Attributes:
        author, process: the thread that makes it, and its process.
        finished: set in the end, however it ended.
        tensor: the result; None until then, after an exception, and where there is nothing to share.
    """

    __slots__ = ("author", "finished", "process", "tensor")

    def __init__(self) -> None:
        self.author, self.process = threading.get_ident(), os.getpid()
        self.finished = threading.Event()
        self.tensor: torch.Tensor | None = None


class SharedTensors:
    """Tensors by key. They are held weakly: the last user's death is the tensor's."""

    def __init__(self) -> None:
        self._alive: WeakValueDictionary[Hashable, torch.Tensor] = WeakValueDictionary()
        self._flights: dict[Hashable, _Flight] = {}
        self._awaited: dict[int, _Flight] = {}  # by the thread that waits

    def get(self, key: Hashable, make: Callable[[], tuple[torch.Tensor, bool]]) -> torch.Tensor:
        """The living tensor of ``key``, or a new one.

        ``make`` is called by one thread at a time and returns (tensor, whether it may be shared). What it raises
        reaches its own caller; those who waited then try in turn, each with a ``make`` of its own.

        Raises:
            RuntimeError: the key is being made further up in this thread, or by one that waits for this thread.
        """
        mine = _Flight()
        while True:
            tensor = self._living(key)
            if tensor is None:
                flight = self._flights.setdefault(key, mine)
                tensor = self._fly(key, make, mine) if flight is mine else self._wait(key, flight)
            if tensor is not None:
                return tensor

    def _living(self, key: Hashable) -> torch.Tensor | None:
        tensor = self._alive.get(key)
        if tensor is None:
            return None
        # A tensor that only C++ still holds, as the base of a view, must be told that Python holds it again.
        from torch.utils.weak import TensorWeakRef

        held: torch.Tensor | None = TensorWeakRef(tensor)()
        return held

    def _fly(self, key: Hashable, make: Callable[[], tuple[torch.Tensor, bool]], mine: _Flight) -> torch.Tensor:
        try:
            tensor = self._living(key)  # another flight may have landed since the caller looked
            if tensor is None:
                tensor, sharing = make()
                if sharing:
                    self._alive[key] = mine.tensor = tensor
            return tensor
        finally:
            if self._flights.get(key) is mine:
                del self._flights[key]
            mine.finished.set()

    def _wait(self, key: Hashable, flight: _Flight) -> torch.Tensor | None:
        """The result of another thread; None where it has none."""
        if flight.process != os.getpid():  # this is a forked child, and the author is in the parent
            self._flights.pop(key, None)
            return None
        me = threading.get_ident()
        self._awaited[me] = flight
        try:
            ahead: _Flight | None = flight
            while ahead is not None and not ahead.finished.is_set():
                if ahead.author == me:
                    raise RuntimeError(f"the shared tensor {key!r} is needed to make itself")
                ahead = self._awaited.get(ahead.author)
            flight.finished.wait()
            return flight.tensor
        finally:
            self._awaited.pop(me, None)


def lies_in(pool: MemoryPool, tensor: torch.Tensor) -> bool:
    """Whether the tensor is the pool's. Types of their own, such as FakeTensor, are not: some have no address."""
    return type(tensor) is import_torch().Tensor and pool.owns(tensor)


def make_in(
    pool: MemoryPool,
    empty: Callable[..., torch.Tensor],
    create: Callable[[Callable[..., torch.Tensor]], torch.Tensor],
) -> tuple[torch.Tensor, bool]:
    """(What ``create(empty)`` returns, in the pool's memory, whether it is there).

    It is not where the pool steps aside: under tracing and dispatch modes, in graph capture, for no bytes at all.

    Raises:
        TypeError: the result is no dense tensor.
        ValueError: it requires a gradient.
    """
    torch = import_torch()
    # An inference tensor would break the training of whoever shares it, and a graph would be kept alive by all.
    with torch.inference_mode(False), torch.no_grad():
        tensor = create(empty)
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"create: expected a function that returns a dense tensor, got one that returns {tensor!r}")
        if tensor.requires_grad:
            raise ValueError(
                "create: expected a tensor that requires no gradient, got one that does: return tensor.detach()"
            )
        if tensor.is_inference() or not lies_in(pool, tensor):
            tensor = empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    shared = lies_in(pool, tensor)
    streams = pool.backend.streams
    if shared and streams is not None:
        streams.record(streams.current()).wait()  # others read it on streams of their own
    return tensor, shared
