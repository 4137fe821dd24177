"""What the backends of a CUDA device share: its streams, as PyTorch and as CuPy see them, and memory others own.

A stream is known by its handle, the address of CUDA's own object; 0 is the default stream. A handle alone does not
keep a stream alive, so streams that CuPy would destroy are kept for as long as the backend lives: their handles are
never those of other streams, and events can always be recorded on them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dilated_memory_pool.placement.spans import Lease

if TYPE_CHECKING:
    import torch

GRANULE = 512  # bytes: what PyTorch's and CuPy's own allocators align to

# cuda_runtime_api.h and driver_types.h
_LEGACY_STREAM = 1  # cudaStreamLegacy, another name of the default stream 0
_PER_THREAD_STREAM = 2  # cudaStreamPerThread
_NOT_READY = 600  # cudaErrorNotReady: what a query answers while there is work left
_CAPTURE_IMPLICIT = 906  # cudaErrorStreamCaptureImplicit: asked of the default stream while another is captured


@dataclass(frozen=True)
class CudaEvent:
    """See ``Event``."""

    done: Callable[[], bool]
    wait: Callable[[], None]


# Where a stream has no work left. An event recorded there would be done too, but only after the device saw it: for some
# microseconds memory that nobody uses would not be had.
_PAST = CudaEvent(done=lambda: True, wait=lambda: None)


class HeldMemory:
    """See ``Memory``: memory that belongs to ``owner``, an object of another library: on a device, an array of bytes
    that exports DLPack.

    Before the owner goes, all work of the device is waited for: the owner's library knows nothing of the streams that
    the pool was told of, nor of a pool that was closed while some of them still used the memory. Not so in a forked
    child, where CUDA cannot be asked, nor at the end of the interpreter, when the device's context may be gone and the
    memory with it.
    """

    # The class keeps what ``__del__`` calls: at the end of the interpreter this module may be emptied before.
    _is_finalizing = staticmethod(sys.is_finalizing)
    _this_process = staticmethod(os.getpid)

    def __init__(
        self, owner: Any, address: int, nbytes: int, lease: Callable[[], Lease], synchronize: Callable[[], None]
    ) -> None:
        self._owner, self._synchronize = owner, synchronize
        self._process = os.getpid()
        self._tensor: torch.Tensor | None = None  # over all of it, once somebody asks
        self.address, self.nbytes, self.lease = address, nbytes, lease

    def tensor(self) -> torch.Tensor:
        """Over all of it, made once."""
        if self._tensor is None:
            import torch

            # PyTorch exports none of its own tensors unless their device is the current one.
            own = isinstance(self._owner, torch.Tensor)
            self._tensor = self._owner if own else torch.utils.dlpack.from_dlpack(self._owner)
        return self._tensor

    def __del__(self) -> None:
        if not self._is_finalizing() and self._this_process() == self._process:
            self._synchronize()


class TorchStreams:
    """See ``Streams``: the device's streams by PyTorch.

    Args:
        index: of the device.
    """

    def __init__(self, index: int) -> None:
        import torch

        self._torch, self._index = torch, index
        self._kept: dict[int, object] = {}

    def current(self) -> int:
        """PyTorch's current stream."""
        return canonical(self._torch.cuda.current_stream(self._index).cuda_stream)

    def handle(self, stream: object) -> int:
        """See ``keep``."""
        return keep(stream, self._kept, self._index)

    def record(self, stream: int) -> CudaEvent:
        """An event without timing."""
        cuda = self._torch.cuda
        queue = cuda.get_stream_from_external(stream, self._index)  # ExternalStream(0) would be a new stream
        if queue.query():
            return _PAST
        event = cuda.Event()
        event.record(queue)
        return CudaEvent(event.query, event.synchronize)

    def capturing(self) -> bool:
        """Whether PyTorch's current stream is being captured."""
        return torch_is_capturing()

    def synchronize(self) -> None:
        """Wait for all work of the device; not in a capture, where CUDA does not allow it."""
        if not self.capturing():
            self._torch.cuda.synchronize(self._index)


class CupyStreams:
    """See ``Streams``: the device's streams by CuPy, beside PyTorch or without it.

    The two libraries know nothing of one another's current stream, and a pool's tensors are worked on by PyTorch. So
    the current stream is PyTorch's from the moment PyTorch uses CUDA in this process, and CuPy's until then. Memory for
    CuPy's arrays is ordered on CuPy's stream by ``interop.cupy``, whichever the current one is.

    Args:
        index: of the device.
    """

    def __init__(self, index: int) -> None:
        import cupy

        self._cuda, self._index = cupy.cuda, index
        self._kept: dict[int, object] = {}

    def current(self) -> int:
        """PyTorch's current stream where PyTorch uses CUDA, else CuPy's."""
        torch_cuda = torch_in_use()
        if torch_cuda is not None:
            return canonical(torch_cuda.current_stream(self._index).cuda_stream)
        return self.handle(self._cuda.get_current_stream(self._index))

    def handle(self, stream: object) -> int:
        """See ``keep``."""
        return keep(stream, self._kept, self._index)

    def record(self, stream: int) -> CudaEvent:
        """An event without timing; waiting for it spins, as CuPy's own waits do."""
        runtime = self._cuda.runtime
        with self._cuda.Device(self._index):
            if self._is_ready(runtime.streamQuery(stream)):
                return _PAST
            event = self._cuda.Event(block=False, disable_timing=True)
            runtime.eventRecord(event.ptr, stream)
        return CudaEvent(lambda: self._is_ready(runtime.eventQuery(event.ptr)), event.synchronize)

    def _is_ready(self, status: int) -> bool:
        """The answer to a query. CuPy's own raise nothing, and leave the error where PyTorch may find it next."""
        runtime = self._cuda.runtime
        try:
            runtime.check_status(status)  # takes it off CUDA's record
        except runtime.CUDARuntimeError as error:
            if error.status != _NOT_READY:
                raise
            return False
        return True

    def capturing(self) -> bool:
        """Whether PyTorch's or CuPy's current stream is being captured."""
        if torch_is_capturing():
            return True
        runtime = self._cuda.runtime
        try:
            return bool(runtime.streamIsCapturing(self._cuda.get_current_stream(self._index).ptr))
        except runtime.CUDARuntimeError as error:
            if error.status != _CAPTURE_IMPLICIT:
                raise
            return True

    def synchronize(self) -> None:
        """Wait for all work of the device; not in a capture, where CUDA does not allow it."""
        if not self.capturing():
            self._cuda.Device(self._index).synchronize()


def torch_in_use() -> Any:
    """``torch.cuda`` where PyTorch was imported and uses CUDA, else None. Does not import it."""
    torch_cuda = sys.modules.get("torch.cuda")
    return torch_cuda if torch_cuda is not None and torch_cuda.is_initialized() else None


def torch_is_capturing() -> bool:
    """Whether PyTorch's current stream is being captured into a graph."""
    torch_cuda = torch_in_use()
    return torch_cuda is not None and torch_cuda.is_current_stream_capturing()


def handle_of(stream: object) -> int:
    """The handle of what users call a stream: a handle, PyTorch's or CuPy's stream, or any object with
    ``__cuda_stream__``.

    Raises:
        TypeError: it is none of these.
        ValueError: no handle can be negative; the per-thread default stream is refused, since its one handle means
            another stream in every thread.

    >>> handle_of(0), handle_of(1), handle_of(140002400)
    (0, 0, 140002400)
    """
    found: object = stream
    if hasattr(stream, "__cuda_stream__"):
        found = stream.__cuda_stream__()[1]  # (version of the protocol, handle)
    elif hasattr(stream, "cuda_stream"):
        found = stream.cuda_stream
    elif hasattr(stream, "ptr") and hasattr(stream, "wait_event"):  # CuPy's events and arrays have addresses too
        found = stream.ptr
    if not isinstance(found, int) or isinstance(found, bool):
        raise TypeError(
            "stream: expected a torch.cuda.Stream, a cupy.cuda.Stream, an object with __cuda_stream__ or a handle, "
            f"got {stream!r}"
        )
    return canonical(found)


def canonical(handle: int) -> int:
    """One handle for each stream. ValueError as ``handle_of``."""
    if handle < 0:
        raise ValueError(f"stream: expected a handle of at least 0, got {handle}")
    if handle == _PER_THREAD_STREAM:
        raise ValueError(
            "stream: expected one stream, got the per-thread default stream, which is another one in every thread"
        )
    return 0 if handle == _LEGACY_STREAM else handle


def keep(stream: object, kept: dict[int, object], index: int) -> int:
    """``handle_of(stream)``. The stream stays alive in ``kept``.

    Raises:
        TypeError, ValueError: as ``handle_of``; it says that it is a stream of another device than ``index``, on which
            no event of this one can be recorded.
    """
    handle = handle_of(stream)
    # PyTorch's streams know their device, CuPy's its index, which is -1 for the default stream of any.
    of = getattr(getattr(stream, "device", None), "index", getattr(stream, "device_id", None))
    if of not in (None, -1, index):
        raise ValueError(f"stream: expected one of cuda:{index}, where the memory is, got one of cuda:{of}: {stream!r}")
    kept.setdefault(handle, stream)
    return handle


def device_index(device: int | None, count: int, current: Callable[[], int]) -> int:
    """Which of ``count`` devices ``device`` names; the current one for None.

    Raises:
        TypeError: ``device`` is no whole number.
        ValueError: there is no such device.

    >>> device_index(1, count=2, current=lambda: 0), device_index(None, count=2, current=lambda: 0)
    (1, 0)
    """
    if device is None:
        return current()
    if not isinstance(device, int) or isinstance(device, bool):
        raise TypeError(f"device: expected the index of a CUDA device, got {device!r}")
    if not 0 <= device < count:
        raise ValueError(f"device: expected one of {list(range(count))}, got {device}")
    return device
