"""Memory of a CUDA device, drawn from CuPy: an arena is one ``cudaMalloc``, and ``cudaFree`` when it dies.

CuPy's own memory pool is not involved: what this pool holds and CuPy's pool holds is counted by each for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dilated_memory_pool.backends.base import Streams
from dilated_memory_pool.backends.cuda import GRANULE, CupyStreams, HeldMemory, device_index, torch_is_capturing
from dilated_memory_pool.backends.torch import tensor_memory
from dilated_memory_pool.interop.cupy import import_cupy
from dilated_memory_pool.placement.spans import PlainLease

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


class CupyBackend:
    """See ``Backend``, and ``CupyStreams`` for which stream is the current one.

    Args:
        device: index of the CUDA device; None for CuPy's current one.

    Raises:
        ImportError: CuPy is not installed.
        RuntimeError: it finds no CUDA device.
        TypeError, ValueError: there is no such device.
    """

    name = "cupy"
    addressable = False
    granule = GRANULE
    streams: Streams | None
    reasons: tuple[str, ...] = (
        "arenas: cudaMalloc by CuPy",
        "current stream: PyTorch's where PyTorch uses CUDA, else CuPy's",
    )

    def __init__(self, device: int | None = None) -> None:
        self._cupy = cupy = import_cuda_cupy("backend='cupy'")
        runtime = cupy.cuda.runtime
        self._index = device_index(device, runtime.getDeviceCount(), runtime.getDevice)
        self.device = f"cuda:{self._index}"
        self.total_bytes: int = cupy.cuda.Device(self._index).mem_info[1]
        self.streams = self._streams = CupyStreams(self._index)

    def allocate(self, nbytes: int) -> HeldMemory:
        """New memory. While PyTorch captures a graph, when CUDA forbids ``cudaMalloc``, it is the graph's own.

        Raises:
            MemoryError: the device has no more.
        """
        if torch_is_capturing():
            return tensor_memory(nbytes, self.device, self._streams.synchronize)
        cupy = self._cupy
        with cupy.cuda.Device(self._index), out_of_memory(cupy, nbytes):
            memory = cupy.cuda.Memory(nbytes)
            array = cupy.ndarray((nbytes,), dtype=cupy.uint8, memptr=cupy.cuda.MemoryPointer(memory, 0))
        return HeldMemory(array, memory.ptr, nbytes, PlainLease, self._streams.synchronize)


def import_cuda_cupy(user: str) -> Any:
    """CuPy with a CUDA device. ``user`` is what needs it.

    Raises:
        ImportError: CuPy is not installed.
        RuntimeError: it finds no CUDA device.
    """
    cupy = import_cupy(user)
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"{user} needs a CUDA device, and CuPy cannot reach one: {error}") from error
    if count == 0:
        raise RuntimeError(f"{user} needs a CUDA device, and CuPy finds none")
    return cupy


@contextmanager
def out_of_memory(cupy: Any, nbytes: int) -> Iterator[None]:
    """Inside, CUDA's refusal of memory is a MemoryError."""
    try:
        yield
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if error.status != _OUT_OF_MEMORY:
            raise
        raise MemoryError(f"CUDA has no more memory for {nbytes} bytes: {error}") from error
