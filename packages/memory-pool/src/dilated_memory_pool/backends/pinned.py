"""Page-locked memory of the host, which a CUDA device copies from and to while the host goes on.

Such a copy may still be queued when the last owner of its memory dies, and the next owner's first write comes from the
host at once, behind no queue. So freed memory waits for the stream it was allocated on, before it serves anybody, and
for every stream that ``record_stream`` named: allocate on the stream that copies, or name the one that does.

PyTorch rounds page-locked memory up to powers of two and keeps what it is given back; CuPy does neither.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from dilated_memory_pool.backends.base import Streams
from dilated_memory_pool.backends.cuda import CupyStreams, HeldMemory, TorchStreams, device_index
from dilated_memory_pool.backends.cupy import import_cuda_cupy, out_of_memory
from dilated_memory_pool.backends.host import HostBackend, leases_at
from dilated_memory_pool.backends.torch import import_cuda_torch, tensor_memory


class PinnedBackend:
    """See ``Backend``. Page-locked by PyTorch where it finds a CUDA device, else by CuPy.

    Args:
        device: index of the CUDA device whose streams copy; None for the current one.

    Raises:
        ImportError: neither is installed.
        RuntimeError: no CUDA device is found.
        TypeError, ValueError: there is no such device.
    """

    name = "pinned"
    device = "cpu"
    addressable = True
    streams: Streams | None
    reasons: tuple[str, ...]

    def __init__(self, device: int | None = None) -> None:
        host = HostBackend(huge_pages=False)
        self.granule, self.total_bytes = host.granule, host.total_bytes
        self._allocate: Callable[[int], HeldMemory]
        has_torch, has_cupy = find_spec("torch") is not None, find_spec("cupy") is not None
        if not has_torch and not has_cupy:
            raise ImportError(
                "backend='pinned' needs PyTorch or CuPy: "
                'pip install "dilated-memory-pool[torch]", or [cuda12x] or [cuda13x] in its place'
            )
        if has_torch and (not has_cupy or _torch_finds_a_device()):
            self._use_torch(device)
        else:
            self._use_cupy(device)

    def allocate(self, nbytes: int) -> HeldMemory:
        """New memory.

        Raises:
            MemoryError: the system locks no more.
        """
        return self._allocate(nbytes)

    def _use_torch(self, device: int | None) -> None:
        torch = import_cuda_torch("backend='pinned'")
        index = device_index(device, torch.cuda.device_count(), torch.cuda.current_device)
        self.streams = streams = TorchStreams(index)
        self.reasons = (f"arenas: page-locked by PyTorch, for copies by cuda:{index}",)
        self._allocate = lambda nbytes: tensor_memory(nbytes, self.device, streams.synchronize)

    def _use_cupy(self, device: int | None) -> None:
        cupy = import_cuda_cupy("backend='pinned'")
        runtime = cupy.cuda.runtime
        index = device_index(device, runtime.getDeviceCount(), runtime.getDevice)
        self.streams = streams = CupyStreams(index)
        self.reasons = (f"arenas: page-locked by CuPy, for copies by cuda:{index}",)

        def allocate(nbytes: int) -> HeldMemory:
            with cupy.cuda.Device(index), out_of_memory(cupy, nbytes):
                memory = cupy.cuda.PinnedMemory(nbytes)
            return HeldMemory(memory, memory.ptr, nbytes, leases_at(memory.ptr, nbytes), streams.synchronize)

        self._allocate = allocate


def _torch_finds_a_device() -> bool:
    import torch

    return torch.cuda.is_available()
