"""What must be true of a pool at any moment, also in many threads; memory read and written behind everybody's back."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dilated_memory_pool import MemoryPool, PoolSnapshot

PATIENCE = 120  # seconds, before a test calls it a deadlock
_TAG_BYTES = 8


def in_threads(work: Callable[[int], object], threads: int = 4) -> None:
    """Call ``work(number)`` in so many threads at once, and raise what one of them raised."""
    start = threading.Barrier(threads)
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            start.wait(PATIENCE)
            work(number)
        except BaseException as failure:
            failures.append(failure)

    running = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "deadlock"
    if failures:
        raise failures[0]


def until(condition: Callable[[], bool]) -> None:
    """Return once it holds."""
    last = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < last, "it never came to that"
        time.sleep(0.001)


class _CudaBytes:
    """A range of device memory that torch can take in."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class Piece(NamedTuple):
    """A range of memory with a content of its own, known by its tag.

    Reading and writing goes by the address alone: no tensor's version counter sees it, and no owner is kept alive.
    """

    tag: int
    address: int
    nbytes: int
    device: str

    def bytes(self) -> torch.Tensor:
        """Its memory."""
        if self.device.startswith("cuda"):
            return torch.as_tensor(_CudaBytes(self.address, self.nbytes), device=self.device)
        return torch.frombuffer((ctypes.c_ubyte * self.nbytes).from_address(self.address), dtype=torch.uint8)

    def pattern(self) -> torch.Tensor:
        """What nobody else writes."""
        repeated = self.tag.to_bytes(_TAG_BYTES, "little") * (self.nbytes // _TAG_BYTES + 1)
        return torch.frombuffer(bytearray(repeated), dtype=torch.uint8)[: self.nbytes].to(self.device)

    def write(self) -> Piece:
        """Give it its content."""
        self.bytes().copy_(self.pattern())
        return self

    def intact(self) -> bool:
        """Whether the content is what was written."""
        return torch.equal(self.bytes(), self.pattern())


def piece_of(owner: Any, tag: int) -> Piece:
    """The memory of a tensor or a block, written."""
    if isinstance(owner, torch.Tensor):
        return Piece(tag, owner.data_ptr(), owner.nbytes, str(owner.device)).write()
    return Piece(tag, owner.address, owner.nbytes, owner.device).write()


def assert_consistent(pool: MemoryPool, *, quiet: bool = True) -> PoolSnapshot:
    """The books agree with the map: spans tile their arenas, sums are sums, and in full mode no two free spans touch.

    Unless it is ``quiet``, other threads may be mapping memory, which is reserved and in no arena yet.
    """
    snapshot = pool.snapshot()
    numbers, end = snapshot.statistics, 0
    for arena in snapshot.arenas:
        assert arena.address >= end
        end = arena.address + arena.nbytes
        offset, before = 0, "used"
        for span in arena.spans:
            assert span.offset == offset
            assert (span.state == "free") == (span.requested == 0)
            assert 0 <= span.requested <= span.nbytes
            assert not before == span.state == "free", "free neighbours are joined"
            offset, before = offset + span.nbytes, span.state
        assert offset == arena.nbytes
        assert snapshot.mode == "full" or len(arena.spans) == 1
    spans = [span for arena in snapshot.arenas for span in arena.spans]
    assert numbers.requested_bytes == sum(span.requested for span in spans)
    assert numbers.allocated_bytes == sum(span.nbytes for span in spans if span.requested)
    assert numbers.waiting_bytes == sum(span.nbytes for span in spans if span.state == "waiting")
    in_transit = numbers.reserved_bytes - sum(arena.nbytes for arena in snapshot.arenas)
    assert in_transit == 0 if quiet else in_transit >= 0
    assert numbers.largest_free_bytes == max((span.nbytes for span in spans if not span.requested), default=0)
    assert numbers.free_bytes - in_transit == sum(span.nbytes for span in spans if not span.requested)
    assert numbers.requested_bytes <= numbers.peak_requested_bytes <= numbers.peak_allocated_bytes
    assert numbers.allocated_bytes <= numbers.peak_allocated_bytes <= numbers.peak_reserved_bytes
    assert 0 <= numbers.waste <= 1
    assert 0 <= numbers.fragmentation <= 1
    assert 0 <= numbers.hit_rate <= 1
    return snapshot


def assert_disjoint(pool: MemoryPool, pieces: list[Piece]) -> None:
    """No byte is in two of ``pieces``, each lies in a span that is in use, and no other span is in use."""
    snapshot = assert_consistent(pool)
    starts = {
        arena.address + span.offset: span.requested
        for arena in snapshot.arenas
        for span in arena.spans
        if span.state == "used"
    }
    assert starts == {piece.address: piece.nbytes for piece in pieces}
    assert len(starts) == len(pieces)


def assert_drained(pool: MemoryPool) -> None:
    """With all owners gone nothing is lost: all bytes are free, and after a trim there are none."""
    gc.collect()
    numbers = assert_consistent(pool).statistics
    assert (numbers.requested_bytes, numbers.allocated_bytes) == (0, 0)
    assert pool.trim() == numbers.reserved_bytes
    assert pool.statistics().reserved_bytes == 0
    assert pool.snapshot().arenas == ()
