"""Memory of a CUDA device, drawn from PyTorch, for machines without CuPy.

Arenas are tensors of a ``torch.cuda.MemPool``: they lie in segments of their own, apart from PyTorch's other tensors,
and count in ``torch.cuda.memory_reserved()``. An arena is allocated on the stream it will serve, since a segment is
PyTorch's for that stream. When an arena dies its segment stays with the MemPool, for the next arena; CUDA has it back
when memory runs out, or when the pool is gone and ``torch.cuda.empty_cache()`` was called.

PyTorch allocates from one MemPool for one caller at a time and refuses a second. So there are as many as there were
callers at once, in threads or in finalisers amid an allocation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from dilated_memory_pool.backends.base import Streams
from dilated_memory_pool.backends.cuda import GRANULE, HeldMemory, TorchStreams, device_index, torch_is_capturing
from dilated_memory_pool.backends.host import leases_at
from dilated_memory_pool.interop.torch import import_torch
from dilated_memory_pool.placement.spans import PlainLease


class TorchBackend:
    """See ``Backend``.

    Args:
        device: index of the CUDA device; None for PyTorch's current one.

    Raises:
        ImportError: PyTorch is not installed.
        RuntimeError: it finds no CUDA device.
        TypeError, ValueError: there is no such device.
    """

    name = "torch"
    addressable = False
    granule = GRANULE
    streams: Streams | None
    reasons: tuple[str, ...] = ("arenas: tensors of a torch.cuda.MemPool",)

    def __init__(self, device: int | None = None) -> None:
        self._torch = torch = import_cuda_torch("backend='torch'")
        self._index = device_index(device, torch.cuda.device_count(), torch.cuda.current_device)
        self.device = f"cuda:{self._index}"
        self.total_bytes: int = torch.cuda.mem_get_info(self._index)[1]
        self.streams = self._streams = TorchStreams(self._index)
        self._idle: deque[Any] = deque()  # the MemPools that nobody allocates from now

    def allocate(self, nbytes: int) -> HeldMemory:
        """New memory for PyTorch's current stream. While it captures a graph, it is the graph's own.

        Raises:
            MemoryError: the device has no more.
        """
        if torch_is_capturing():
            return tensor_memory(nbytes, self.device, self._streams.synchronize)
        try:
            return self._from_pool(nbytes)
        except MemoryError:
            # Arenas that died left segments of other sizes in the MemPools, which PyTorch does not give up by itself:
            # they go with the MemPools, where no arena uses them.
            self._idle.clear()
            self._torch.cuda.empty_cache()
        return self._from_pool(nbytes)

    def _from_pool(self, nbytes: int) -> HeldMemory:
        try:
            pool = self._idle.pop()
        except IndexError:
            with self._torch.cuda.device(self._index):
                pool = self._torch.cuda.MemPool()
        try:
            with self._torch.cuda.use_mem_pool(pool, device=self._index):
                return tensor_memory(nbytes, self.device, self._streams.synchronize)
        finally:
            self._idle.append(pool)


def import_cuda_torch(user: str) -> Any:
    """PyTorch with a CUDA device. ``user`` is what needs it.

    Raises:
        ImportError: PyTorch is not installed.
        RuntimeError: it finds no CUDA device.
    """
    torch = import_torch()
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        why = "finds no CUDA device" if build else "is a build without CUDA"
        raise RuntimeError(f"{user} needs a CUDA device, and this PyTorch {torch.__version__} {why}")
    return torch


def tensor_memory(nbytes: int, device: str, synchronize: Callable[[], None]) -> HeldMemory:
    """Memory that is a tensor's, on a CUDA device or, page-locked, on "cpu". MemoryError where there is no more."""
    import torch

    host = device == "cpu"
    try:
        tensor = torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=host)
    except RuntimeError as error:
        # Of page-locked memory PyTorch tells CUDA's error alone, which has no class of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        raise MemoryError(f"PyTorch has no more memory for {nbytes} bytes on {device}: {error}") from error
    address = tensor.data_ptr()
    return HeldMemory(tensor, address, nbytes, leases_at(address, nbytes) if host else PlainLease, synchronize)
