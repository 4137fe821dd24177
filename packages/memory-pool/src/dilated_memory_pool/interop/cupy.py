"""CuPy arrays over a pool's memory.

CuPy works on a current stream of its own, which need not be the one a block was allocated for. Then CuPy's stream first
waits for the work queued to the other, and the pool is told that CuPy's stream uses the memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import cupy

    from dilated_memory_pool.blocks import Block
    from dilated_memory_pool.pool import MemoryPool


def empty(pool: MemoryPool, shape: int | Sequence[int], dtype: object = float) -> cupy.ndarray:
    """An uninitialised, C-contiguous CuPy array in the pool's memory, ready on CuPy's current stream.

    The memory goes back to the pool when the array and all its views are gone.

    Args:
        pool: of a CUDA device's memory.
        shape: as in ``cupy.empty``.
        dtype: as in ``cupy.empty``.

    Raises:
        ValueError: the pool's memory is not a CUDA device's; ``shape`` is negative.
        ImportError: CuPy is not installed.
        PoolLimitError, PoolMemoryError, RuntimeError: as ``MemoryPool.allocate``.
    """
    index = _device_index(pool, "interop.cupy.empty")
    cupy = import_cupy("interop.cupy.empty")
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"shape: expected no negative length, got {sizes}")
    kind = cupy.dtype(dtype)
    with cupy.cuda.Device(index):
        pointer = _allocate(cupy, pool, index, math.prod(sizes) * kind.itemsize)
        return cupy.ndarray(sizes, dtype=kind, memptr=pointer)


def sharing(pool: MemoryPool) -> AbstractContextManager[None]:
    """See ``MemoryPool.share_with_cupy``. Arrays on other devices go on coming from the allocator there was."""
    index = _device_index(pool, "share_with_cupy")
    cupy = import_cupy("share_with_cupy")
    before = cupy.cuda.get_allocator()

    def allocate(nbytes: int) -> Any:
        if cupy.cuda.runtime.getDevice() != index:
            return before(nbytes)
        return _allocate(cupy, pool, index, nbytes)

    using: AbstractContextManager[None] = cupy.cuda.using_allocator(allocate)
    return using


def array_over(block: Block) -> cupy.ndarray:
    """A CuPy array of unsigned bytes over a block of a CUDA device's memory, which it keeps alive."""
    cupy = import_cupy("a block's DLPack")
    return cupy.ndarray((block.nbytes,), dtype=cupy.uint8, memptr=_pointer(cupy, block))


def import_cupy(user: str) -> Any:
    """CuPy, or an ImportError that names the extras. ``user`` is what needs it."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            f'{user} needs CuPy: pip install "dilated-memory-pool[cuda12x]" for CUDA 12, '
            '"dilated-memory-pool[cuda13x]" for CUDA 13'
        ) from error
    return cupy


def _device_index(pool: MemoryPool, user: str) -> int:
    kind, _, index = pool.device.partition(":")
    if kind != "cuda":
        raise ValueError(f"{user} needs a pool of a CUDA device's memory, got {pool!r}")
    return int(index)


def _allocate(cupy: Any, pool: MemoryPool, index: int, nbytes: int) -> Any:
    """CuPy's kind of pointer to a block of its own."""
    block = pool.allocate(nbytes)
    streams = pool.backend.streams
    assert streams is not None, "a CUDA device has streams"
    stream, allocated_for = cupy.cuda.get_current_stream(index), streams.current()
    # What is not the pool's, in a graph capture, has no past to wait for.
    if streams.handle(stream) != allocated_for and pool.owns(block):
        event = cupy.cuda.Event(disable_timing=True)
        cupy.cuda.runtime.eventRecord(event.ptr, allocated_for)
        stream.wait_event(event)
        pool.record_stream(block, stream)
    return _pointer(cupy, block)


def _pointer(cupy: Any, block: Block) -> Any:
    """CuPy's kind of pointer, which keeps the block alive."""
    index = int(block.device.partition(":")[2])
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(block.address, block.nbytes, block, index), 0)
