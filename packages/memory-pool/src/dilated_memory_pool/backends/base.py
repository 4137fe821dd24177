"""What a pool draws from. Names and shapes only: a backend of your own needs nothing but these attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from dilated_memory_pool.placement.spans import Lease

if TYPE_CHECKING:
    import torch


class Memory(Protocol):
    """One contiguous piece of memory. It is given back when this object dies, never before.

    A ``__del__`` that gives it back must not do so where ``gc.is_finalized(self)``: there the garbage collector calls
    it, and the next finaliser may still use the memory. Where an object written in C owns it, such as an ``mmap``, no
    ``__del__`` is needed.

    Attributes:
        address: of the first byte, for the device that uses it.
        nbytes: how many bytes the pool may use.
        lease: makes a new lease that has the buffer protocol and covers the whole piece. Asked for where the host can
            address the memory.
    """

    address: int
    nbytes: int
    lease: Callable[[], Lease]

    def tensor(self) -> torch.Tensor:
        """A uint8 tensor over all of it, which keeps it alive. Asked for where the host cannot address the memory."""


class Event(Protocol):
    """A point in a stream's work."""

    def done(self) -> bool:
        """Whether all work before it has finished. Does not wait."""

    def wait(self) -> None:
        """Block the calling thread until it has."""


class Streams(Protocol):
    """The queues of a device. A stream is known by its handle, an integer."""

    def current(self) -> int:
        """The stream that the calling thread's work goes to."""

    def handle(self, stream: object) -> int:
        """Of whatever users call a stream: a torch or CuPy stream, or a handle. TypeError for anything else."""

    def record(self, stream: int) -> Event:
        """An event after all work queued to ``stream`` so far."""

    def capturing(self) -> bool:
        """Whether the current stream's work is being captured into a graph."""


class Backend(Protocol):
    """A source of memory.

    Attributes:
        name: as in ``MemoryPool(backend=name)``.
        device: as PyTorch writes it: "cpu", "cuda:0".
        addressable: whether the host reads and writes the memory directly. With streams, freed memory then waits for
            its own stream too: the host writes at once, behind no queue.
        granule: spans start and end at multiples of it, in bytes.
        total_bytes: what there is altogether, for limits that are fractions.
        streams: None where work is done when a call returns.
        reasons: sentences that say what the backend uses or cannot use here.
    """

    name: str
    device: str
    addressable: bool
    granule: int
    total_bytes: int
    streams: Streams | None
    reasons: tuple[str, ...]

    def allocate(self, nbytes: int) -> Memory:
        """New memory of ``nbytes``. MemoryError where there is none."""
