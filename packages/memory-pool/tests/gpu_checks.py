"""What the tests on a real device have in common: tensors of one size, and kernels that are late."""

from __future__ import annotations

import torch

from dilated_memory_pool import MemoryPool

COUNT = 2**22  # bytes, and elements of one byte
LATE_CYCLES = 500_000_000  # a quarter of a second or so: far longer than the host takes to get ahead of it
EARLY, LATE, NEXT = 1, 2, 3
SECONDS = 120


def bytes_of(pool: MemoryPool, fill: int | None = None) -> torch.Tensor:
    """``COUNT`` bytes of the pool."""
    tensor = pool.empty(COUNT, dtype=torch.uint8)
    return tensor if fill is None else tensor.fill_(fill)


def late_fill(tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Fill it on another stream, long after the host has gone on."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LATE_CYCLES)
        tensor.fill_(LATE)


def is_all(tensor: torch.Tensor, value: int) -> bool:
    """Whether every element has the value, once the device has done its work."""
    torch.cuda.synchronize()
    return bool(tensor.eq(value).all())
