"""A device without hardware: host memory, and streams whose work stays queued until a test runs it.

On a GPU a kernel that is too late corrupts now and then. Here a test decides when queued work is done, so that a
hazard corrupts every time, and its absence can be shown by content.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from dilated_memory_pool.backends import Streams
from dilated_memory_pool.backends.host import HostMemory
from dilated_memory_pool.placement.spans import PlainLease

GRANULE = 512  # bytes, as CUDA aligns
PLENTY = 2**40  # bytes: the capacity of a device that was given none


class Work(NamedTuple):
    """One queued call. Numbers grow over all streams, in the order of queueing."""

    number: int
    stream: int
    call: Callable[[], object]


class FakeEvent:
    """Done when all work queued to ``stream`` before it, of a number below ``mark``, was executed."""

    def __init__(self, device: FakeDevice, stream: int, mark: int) -> None:
        self._device, self._stream, self._mark = device, stream, mark

    def done(self) -> bool:
        return not self._device.pending(self._stream, self._mark)

    def wait(self) -> None:
        """Execute that work, as time would."""
        self._device.run(self._stream, before=self._mark)


class FakeDevice:
    """Streams 0, 1, 2, ...; see ``Streams`` for what the pool asks of it.

    Queued work runs in the thread that calls ``run`` or waits for an event, which may be a thread inside a pool: it
    must not call the pool.

    Args:
        capacity: bytes of memory there are.

    Attributes:
        live: bytes of every memory that was not given back yet, by address.
        recorded: the stream of every event that was recorded, in order.
    """

    def __init__(self, capacity: int = PLENTY) -> None:
        self.capacity = capacity
        self.live: dict[int, int] = {}
        self.recorded: list[int] = []
        self._work: list[Work] = []
        self._count = 0
        self._lock = threading.RLock()
        self._thread = threading.local()

    @property
    def live_bytes(self) -> int:
        return sum(list(self.live.values()))

    # ------------------------------------------------------------------------------------------ for tests

    @contextmanager
    def stream(self, stream: int) -> Iterator[None]:
        """Make it the calling thread's current stream."""
        before, self._thread.stream = self.current(), self.handle(stream)
        try:
            yield
        finally:
            self._thread.stream = before

    @contextmanager
    def capture(self) -> Iterator[None]:
        """The calling thread's work is being captured into a graph."""
        self._thread.capturing = True
        try:
            yield
        finally:
            self._thread.capturing = False

    def enqueue(self, call: Callable[[], object], stream: int | None = None) -> None:
        """Have ``call`` executed later, after what is queued to ``stream`` (the current one) already."""
        with self._lock:
            self._work.append(Work(self._count, self.current() if stream is None else stream, call))
            self._count += 1

    def run(self, stream: int | None = None, steps: int | None = None, *, before: int | None = None) -> None:
        """Execute queued work in the order of queueing: of one stream or all, ``steps`` calls or all, and of those
        only calls with a number below ``before``.
        """
        with self._lock:
            for work in self.pending(stream, before)[:steps]:
                self._work.remove(work)  # first, in case the call waits for what is queued
                work.call()

    def pending(self, stream: int | None = None, before: int | None = None) -> list[Work]:
        """What ``run`` would execute."""
        with self._lock:
            return [
                work
                for work in self._work
                if stream in (None, work.stream) and (before is None or work.number < before)
            ]

    # ------------------------------------------------------------------------------------------ for the pool

    def current(self) -> int:
        return getattr(self._thread, "stream", 0)

    def handle(self, stream: object) -> int:
        if not isinstance(stream, int) or isinstance(stream, bool):
            raise TypeError(f"stream: expected a number, got {stream!r}")
        return stream

    def record(self, stream: int) -> FakeEvent:
        if self.capturing():
            raise AssertionError("an event recorded during capture is never done, and breaks the capture")
        with self._lock:
            self.recorded.append(stream)
            return FakeEvent(self, stream, self._count)

    def capturing(self) -> bool:
        return getattr(self._thread, "capturing", False)

    def reserve(self, memory: FakeMemory) -> None:
        """Count it as live until ``release``."""
        with self._lock:
            if self.live_bytes + memory.nbytes > self.capacity:
                raise MemoryError(f"{memory.nbytes} bytes beside {self.live_bytes} are over {self.capacity}")
            self.live[memory.address] = memory.nbytes

    def release(self, memory: FakeMemory) -> None:
        """It is not live any more. One atomic step."""
        self.live.pop(memory.address, None)


class FakeMemory(HostMemory):
    """See ``Memory``. Without ``addressable`` its leases are those of memory the host cannot reach.

    When it dies it waits for all queued work first, as ``cudaFree`` does.
    """

    def __init__(self, nbytes: int, device: FakeDevice, addressable: bool) -> None:
        super().__init__(nbytes, huge_pages=False)
        if not addressable:
            self.lease = PlainLease
        device.reserve(self)
        self._device = device

    def __del__(self) -> None:
        if hasattr(self, "_device"):
            self._device.run()
            self._device.release(self)


class FakeBackend:
    """See ``Backend``: like page-locked memory where ``addressable``, else like a GPU's. Its ``device`` is "cpu" in
    both flavours, so that torch can look at the bytes.
    """

    name = "fake"
    device = "cpu"
    granule = GRANULE
    streams: Streams | None
    reasons: tuple[str, ...] = ("work is queued until a test runs it",)

    def __init__(self, device: FakeDevice, addressable: bool = True) -> None:
        self._device = self.streams = device
        self.addressable = addressable
        self.total_bytes = device.capacity

    def allocate(self, nbytes: int) -> FakeMemory:
        return FakeMemory(nbytes, self._device, self.addressable)
