"""Which backend a pool gets and what it says where one is missing. What can only run on a GPU is in test_gpu.py.

No CUDA library finds a device here. Where a rule of ours has to be shown without one, a stand-in takes CuPy's place.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import FakeBackend, FakeDevice

from dilated_memory_pool import MemoryPool
from dilated_memory_pool.backends import choose
from dilated_memory_pool.backends import cuda as cuda_streams
from dilated_memory_pool.backends.cuda import CupyStreams, HeldMemory, TorchStreams, device_index, handle_of
from dilated_memory_pool.backends.cupy import CupyBackend
from dilated_memory_pool.backends.host import HostMemory
from dilated_memory_pool.backends.pinned import PinnedBackend
from dilated_memory_pool.backends.torch import TorchBackend, tensor_memory
from dilated_memory_pool.interop import cupy as interop
from dilated_memory_pool.placement.spans import PlainLease

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")

# of cudaError_t
MEMORY_ALLOCATION, INSUFFICIENT_DRIVER, NOT_READY, ILLEGAL_ADDRESS, CAPTURE_IMPLICIT = 2, 35, 600, 700, 906
TORCHS_STREAM, CUPYS_STREAM, EVENT = 4096, 8192, 12288


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)


class CudaError(RuntimeError):
    """As CUDARuntimeError: known by its status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class StandIn:
    """As much of CuPy as the backends call. ``fails`` is the status that CUDA answers with, where it is not 0, and
    ``busy`` the one of streams and events.
    """

    __spec__ = ModuleSpec("cupy", None)

    def __init__(self, devices: int) -> None:
        self.devices, self.device = devices, 0
        self.fails = 0
        self.capturing = False
        self.busy = NOT_READY
        self.recorded: list[tuple[int, int]] = []
        self.waited: list[int] = []
        self.stream = SimpleNamespace(ptr=CUPYS_STREAM, wait_event=lambda event: self.waited.append(event.ptr))
        stand_in = self

        class Device:
            mem_info = (2**20, 2**30)

            def __init__(self, index: int) -> None:
                self.index = index

            def __enter__(self) -> None:
                self.before, stand_in.device = stand_in.device, self.index

            def __exit__(self, *error: object) -> None:
                stand_in.device = self.before

            def synchronize(self) -> None: ...

        class Memory(HostMemory):
            def __init__(self, nbytes: int) -> None:
                stand_in.answer()
                super().__init__(nbytes, huge_pages=False)
                self.ptr = self.address
                self.device = stand_in.device

        self.uint8 = "uint8"
        self.ndarray = lambda shape, dtype, memptr: memptr
        self.is_available = lambda: self.devices > 0
        self.cuda = SimpleNamespace(
            Device=Device,
            Memory=Memory,
            PinnedMemory=Memory,
            UnownedMemory=lambda *memory: memory,
            MemoryPointer=lambda memory, offset: memory,
            Event=lambda **options: SimpleNamespace(ptr=EVENT, synchronize=lambda: None),
            get_current_stream=lambda index: self.stream,
            runtime=SimpleNamespace(
                CUDARuntimeError=CudaError,
                getDeviceCount=lambda: self.answer(self.devices),
                getDevice=lambda: self.device,
                eventRecord=lambda event, stream: self.recorded.append((self.device, stream)),
                streamIsCapturing=lambda stream: self.answer(self.capturing),
                streamQuery=lambda stream: self.busy,
                eventQuery=lambda event: self.busy,
                check_status=self.check,
            ),
        )

    def check(self, status: int) -> None:
        if status:
            raise CudaError(status)

    def answer(self, value: int = 0) -> int:
        if self.fails:
            raise CudaError(self.fails)
        return value


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    cupy = StandIn(devices=2)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return cupy


@pytest.fixture
def torch_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=TORCHS_STREAM + index))


# ------------------------------------------------------------------------------------------------ choosing


@pytest.mark.usefixtures("no_cupy", "no_torch")
def test_auto_without_cupy_and_torch_is_the_host() -> None:
    backend, why = choose("auto", None)
    assert backend.name == "host"
    assert why == "backend: host, because CuPy is not installed and PyTorch is not installed"


@without_a_gpu
@pytest.mark.usefixtures("no_cupy")
def test_auto_with_a_torch_that_finds_no_device_is_the_host() -> None:
    pool = MemoryPool()
    assert (pool.backend.name, pool.device) == ("host", "cpu")
    assert pool.reasons[0] == "backend: host, because CuPy is not installed and PyTorch finds no CUDA device"


@pytest.mark.usefixtures("no_torch")
def test_auto_with_a_cupy_that_finds_no_device_is_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", StandIn(devices=0))
    assert choose("auto", None)[1] == "backend: host, because CuPy finds no CUDA device and PyTorch is not installed"


def test_auto_prefers_cupys_device_memory(cupy: StandIn) -> None:
    backend, why = choose("auto", 1)
    assert isinstance(backend, CupyBackend)
    assert backend.device == "cuda:1"
    assert why == "backend: cupy, because CuPy is installed and finds a CUDA device"


def test_a_backend_object_is_taken_as_it_is() -> None:
    backend = FakeBackend(FakeDevice())
    assert choose(backend, None) == (backend, "backend: fake, as given")
    assert MemoryPool(backend).reasons[:2] == ("backend: fake, as given", *backend.reasons)


def test_a_backend_object_has_its_device_already() -> None:
    with pytest.raises(ValueError, match="device: expected None beside a backend object, got 0 beside"):
        MemoryPool(FakeBackend(FakeDevice()), device=0)


def test_an_unknown_name_is_an_error_that_tells_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"\['auto', 'host', 'pinned', 'cupy', 'torch'\] or a backend object, got 'x'"):
        MemoryPool("x")


@pytest.mark.usefixtures("no_cupy", "no_torch")
@pytest.mark.parametrize("backend", ["auto", "host"])
def test_the_host_has_no_device_to_choose(backend: str) -> None:
    with pytest.raises(ValueError, match="device: expected None for memory of the host, got 0"):
        MemoryPool(backend, device=0)


# ------------------------------------------------------------------------------------------------ missing


@pytest.mark.usefixtures("no_cupy")
def test_missing_cupy_is_an_error_that_names_both_extras() -> None:
    with pytest.raises(ImportError) as error:
        MemoryPool("cupy")
    assert str(error.value) == (
        "backend='cupy' needs CuPy: pip install \"dilated-memory-pool[cuda12x]\" for CUDA 12, "
        '"dilated-memory-pool[cuda13x]" for CUDA 13'
    )


@pytest.mark.usefixtures("no_torch")
def test_missing_torch_is_an_error_that_names_the_extra() -> None:
    with pytest.raises(ImportError, match=r'PyTorch: pip install "dilated-memory-pool\[torch\]"'):
        MemoryPool("torch")


@pytest.mark.usefixtures("no_cupy", "no_torch")
def test_pinned_memory_needs_one_of_both() -> None:
    with pytest.raises(ImportError, match=r"backend='pinned' needs PyTorch or CuPy: pip install .*\[cuda13x\]"):
        MemoryPool("pinned")


@without_a_gpu
@pytest.mark.usefixtures("no_cupy")
@pytest.mark.parametrize("backend", ["torch", "pinned"])
@pytest.mark.parametrize(
    ("build", "why"), [(None, "is a build without CUDA"), ("13.0", "finds no CUDA device")], ids=["cpu", "cuda"]
)
def test_torch_without_a_device_is_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch, backend: str, build: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", build)
    with pytest.raises(RuntimeError, match=f"backend='{backend}' needs a CUDA device, and this PyTorch .* {why}"):
        MemoryPool(backend)


@without_a_gpu
def test_the_real_cupy_without_a_device_is_an_error_that_says_why() -> None:
    pytest.importorskip("cupy")
    with pytest.raises(RuntimeError, match="backend='cupy' needs a CUDA device, and CuPy"):
        MemoryPool("cupy")


def test_cupy_without_a_driver_passes_on_cudas_reason(cupy: StandIn) -> None:
    cupy.fails = INSUFFICIENT_DRIVER
    with pytest.raises(RuntimeError, match="backend='cupy' needs a CUDA device, and CuPy cannot reach one: status 35"):
        MemoryPool("cupy")


def test_cupy_with_a_driver_and_no_device_says_so(cupy: StandIn) -> None:
    cupy.devices = 0
    with pytest.raises(RuntimeError, match="backend='cupy' needs a CUDA device, and CuPy finds none"):
        MemoryPool("cupy")


@pytest.mark.parametrize(
    ("device", "error"), [(2, ValueError), (-1, ValueError), (True, TypeError), ("cuda:0", TypeError)]
)
def test_a_device_that_is_none_is_an_error(cupy: StandIn, device: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"device: expected .*, got {device!r}"):
        MemoryPool("cupy", device=device)


def test_without_a_device_the_current_one_is_taken() -> None:
    assert device_index(None, 4, lambda: 3) == 3
    assert device_index(1, 4, lambda: 3) == 1


def test_arrays_need_a_pool_of_device_memory() -> None:
    with pytest.raises(ValueError, match=r"interop.cupy.empty needs a pool of a CUDA device's memory, got <MemoryPool"):
        interop.empty(MemoryPool("host"), 3)
    with pytest.raises(ValueError, match="share_with_cupy needs a pool of a CUDA device's memory, got <MemoryPool"):
        MemoryPool("host").share_with_cupy()


# ------------------------------------------------------------------------------------------------ streams


class Protocol:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 77


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (0, 0),
        (1, 0),  # two names of the default stream
        (77, 77),
        (Protocol(), 77),
        (SimpleNamespace(cuda_stream=78), 78),
        (SimpleNamespace(cuda_stream=0), 0),
        (SimpleNamespace(ptr=79, wait_event=None), 79),
        (SimpleNamespace(ptr=1, wait_event=None), 0),
    ],
    ids=["default", "legacy", "handle", "protocol", "torch", "torch-default", "cupy", "cupy-legacy"],
)
def test_every_kind_of_stream_has_its_handle(stream: object, handle: int) -> None:
    assert handle_of(stream) == handle


@pytest.mark.parametrize(
    "stream", [None, True, 1.0, "0", SimpleNamespace(ptr=5), SimpleNamespace(cuda_stream=None)], ids=repr
)
def test_what_is_no_stream_is_an_error(stream: object) -> None:
    with pytest.raises(TypeError, match=r"stream: expected a torch.cuda.Stream, .* or a handle, got"):
        handle_of(stream)


def test_a_negative_handle_is_an_error() -> None:
    with pytest.raises(ValueError, match="stream: expected a handle of at least 0, got -1"):
        handle_of(-1)


def test_the_per_thread_default_stream_is_refused() -> None:
    with pytest.raises(ValueError, match="stream: expected one stream, got the per-thread default stream"):
        handle_of(2)


def test_a_stream_that_was_named_stays_alive() -> None:
    class Stream(Protocol): ...

    kept: dict[int, object] = {}
    stream = Stream()
    alive = weakref.ref(stream)
    assert cuda_streams.keep(stream, kept, 0) == 77
    del stream
    gc.collect()
    assert alive() is kept[77]


@pytest.mark.parametrize(
    "stream",
    [
        SimpleNamespace(cuda_stream=77, device=torch.device("cuda:1")),
        SimpleNamespace(ptr=77, wait_event=None, device_id=1),
    ],
    ids=["torch", "cupy"],
)
def test_a_stream_of_another_device_is_refused(stream: object) -> None:
    kept: dict[int, object] = {}
    assert cuda_streams.keep(stream, kept, 1) == 77
    with pytest.raises(ValueError, match="stream: expected one of cuda:0, where the memory is, got one of cuda:1"):
        cuda_streams.keep(stream, kept, 0)


def test_cupys_default_stream_is_that_of_any_device() -> None:
    assert cuda_streams.keep(SimpleNamespace(ptr=0, wait_event=None, device_id=-1), {}, 3) == 0


def test_cupys_stream_is_current_until_torch_uses_cuda(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert CupyStreams(1).current() == CUPYS_STREAM


@pytest.mark.usefixtures("torch_in_use")
def test_torchs_stream_of_the_same_device_is_current_once_it_uses_cuda(cupy: StandIn) -> None:
    assert CupyStreams(1).current() == TORCHS_STREAM + 1


@pytest.mark.usefixtures("no_torch")
def test_without_torch_cupys_stream_is_current(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.cuda", raising=False)
    assert CupyStreams(0).current() == CUPYS_STREAM


def test_events_are_recorded_on_the_pools_device(cupy: StandIn) -> None:
    event = CupyStreams(1).record(77)
    assert cupy.recorded == [(1, 77)]
    assert cupy.device == 0
    assert not event.done()
    cupy.busy = 0
    assert event.done()
    event.wait()


def test_a_stream_without_work_needs_no_event(cupy: StandIn) -> None:
    cupy.busy = 0
    event = CupyStreams(1).record(77)
    assert event.done()
    event.wait()
    assert cupy.recorded == []


def test_an_error_is_not_taken_for_work_that_goes_on(cupy: StandIn) -> None:
    event = CupyStreams(0).record(77)
    cupy.busy = ILLEGAL_ADDRESS
    with pytest.raises(CudaError):
        event.done()
    with pytest.raises(CudaError):
        CupyStreams(0).record(77)


class TorchCuda:
    """As much of ``torch.cuda`` as events need: its streams, known by their handles."""

    def __init__(self) -> None:
        self.busy = True
        self.recorded: list[tuple[int, int]] = []

    def get_stream_from_external(self, handle: int, device: int) -> SimpleNamespace:
        return SimpleNamespace(handle=handle, device=device, query=self.is_idle)

    def Event(self) -> SimpleNamespace:  # noqa: N802  # its name in torch.cuda
        return SimpleNamespace(record=self.record, query=self.is_idle, synchronize=lambda: None)

    def record(self, stream: SimpleNamespace) -> None:
        self.recorded.append((stream.device, stream.handle))

    def is_idle(self) -> bool:
        return not self.busy


@pytest.mark.parametrize("handle", [0, 77])
def test_torchs_events_are_recorded_on_that_very_stream_while_it_has_work(handle: int) -> None:
    streams, cuda = TorchStreams(1), TorchCuda()
    streams._torch = SimpleNamespace(cuda=cuda)
    event = streams.record(handle)
    assert cuda.recorded == [(1, handle)]
    assert not event.done()
    cuda.busy = False
    assert event.done()
    assert streams.record(handle).done()
    assert cuda.recorded == [(1, handle)]


def test_a_capture_by_either_library_is_a_capture(
    cupy: StandIn, torch_in_use: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = CupyStreams(0)
    assert not streams.capturing()
    cupy.capturing = True
    assert streams.capturing()
    cupy.capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert streams.capturing()


def test_a_default_stream_beside_a_capture_counts_as_captured(cupy: StandIn) -> None:
    streams = CupyStreams(0)
    cupy.fails = CAPTURE_IMPLICIT
    assert streams.capturing()
    cupy.fails = ILLEGAL_ADDRESS
    with pytest.raises(CudaError):
        streams.capturing()


def test_memory_for_an_array_is_ordered_between_the_two_current_streams(cupy: StandIn, torch_in_use: None) -> None:
    pool = MemoryPool("cupy", device=1)
    address, nbytes, owner, index = interop._allocate(cupy, pool, 1, 4096)
    assert (owner.address, owner.nbytes, nbytes, index) == (address, 4096, 4096, 1)
    assert cupy.recorded == [(0, TORCHS_STREAM + 1)], "what was queued before"
    assert cupy.waited == [EVENT]
    del owner
    assert pool.statistics().waiting_bytes == 4096
    assert cupy.recorded[1:] == [(1, CUPYS_STREAM)], "what CuPy queued since"
    cupy.busy = 0
    assert pool.statistics().allocated_bytes == 0


@pytest.mark.usefixtures("no_torch")
def test_memory_for_an_array_needs_no_order_where_cupy_is_alone(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.cuda", raising=False)
    pool = MemoryPool("cupy")
    interop._allocate(cupy, pool, 0, 4096)
    assert pool.statistics().allocated_bytes == 0
    assert (cupy.recorded, cupy.waited) == ([], [])


# ------------------------------------------------------------------------------------------------ memory


def test_memory_is_given_back_after_the_work_of_the_device() -> None:
    class Owner:
        def __del__(self) -> None:
            order.append("owner")

    order: list[str] = []
    memory = HeldMemory(Owner(), 4096, 512, PlainLease, lambda: order.append("device"))
    assert (memory.address, memory.nbytes, order) == (4096, 512, [])
    del memory
    assert order == ["device", "owner"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_asks_the_device_nothing() -> None:
    asked: list[str] = []
    memory = HeldMemory(object(), 4096, 512, PlainLease, lambda: asked.append("device"))
    child = os.fork()
    if child == 0:
        del memory
        os._exit(len(asked))
    assert os.waitpid(child, 0)[1] == 0
    del memory
    assert asked == ["device"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_gives_back_nothing_of_a_device() -> None:
    device = FakeDevice()
    pool = MemoryPool(FakeBackend(device, addressable=False), min_bytes=0, arena_bytes=0)
    owned, waiting = pool.allocate(4096), pool.allocate(4096)
    pool.record_stream(waiting, 5)
    device.enqueue(int, 5)
    del waiting
    pool.statistics()
    child = os.fork()
    if child == 0:
        del owned, pool
        gc.collect()
        os._exit(device.live_bytes != 8192 or len(device.pending()) != 1)
    assert os.waitpid(child, 0)[1] == 0
    del owned, pool
    gc.collect()
    assert device.live_bytes == 0


def test_a_tensor_that_holds_memory_is_not_exported_for_it() -> None:
    owner = torch.empty(512, dtype=torch.uint8)  # of another device than the current one it could not be exported
    memory = HeldMemory(owner, owner.data_ptr(), 512, PlainLease, lambda: None)
    assert memory.tensor() is owner


class MemPools:
    """As much of ``torch.cuda`` as allocations need. As the real one it refuses a MemPool that is in use."""

    OutOfMemoryError = torch.OutOfMemoryError

    def __init__(self) -> None:
        self.made = 0
        self.in_use: list[object] = []

    def device(self, index: int) -> AbstractContextManager[object]:
        return nullcontext()

    def MemPool(self) -> object:  # noqa: N802  # its name in torch.cuda
        self.made += 1
        return object()

    @contextmanager
    def use_mem_pool(self, pool: object, device: int) -> Iterator[None]:
        if pool in self.in_use:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.in_use.append(pool)
        yield
        self.in_use.remove(pool)


def torch_backend(cuda: MemPools, monkeypatch: pytest.MonkeyPatch, allocate: Callable[[], object]) -> TorchBackend:
    """One whose device memory is what ``allocate`` makes."""
    module = sys.modules[TorchBackend.__module__]
    monkeypatch.setattr(module, "tensor_memory", lambda *_: allocate())
    backend = object.__new__(TorchBackend)
    backend._torch, backend._index, backend.device = SimpleNamespace(cuda=cuda), 0, "cuda:0"
    backend._streams, backend._idle = TorchStreams(0), deque()
    return backend


def test_an_allocation_amid_another_has_a_mempool_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = MemPools()

    def twice() -> object:
        return backend.allocate(512) if len(cuda.in_use) == 1 else "memory"  # as in a finaliser, or another thread

    backend = torch_backend(cuda, monkeypatch, twice)
    for _ in range(3):
        assert backend.allocate(512) == "memory"
    assert (cuda.made, cuda.in_use) == (2, [])


def test_cudas_refusal_is_a_memory_error(cupy: StandIn) -> None:
    backend = CupyBackend(0)
    cupy.fails = MEMORY_ALLOCATION
    with pytest.raises(MemoryError, match="CUDA has no more memory for 512 bytes: status 2"):
        backend.allocate(512)
    cupy.fails = ILLEGAL_ADDRESS
    with pytest.raises(CudaError):
        backend.allocate(512)


def test_arenas_are_made_on_the_pools_device(cupy: StandIn) -> None:
    backend = CupyBackend(1)
    assert (backend.device, backend.total_bytes, backend.granule) == ("cuda:1", 2**30, 512)
    memory = backend.allocate(512)
    assert memory._owner.device == 1  # type: ignore[attr-defined]
    assert cupy.device == 0
    assert type(memory.lease()) is PlainLease
    del memory
    gc.collect()


@pytest.mark.parametrize("refusal", [torch.OutOfMemoryError("full"), RuntimeError("CUDA error: out of memory")])
@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_torchs_refusal_is_a_memory_error(monkeypatch: pytest.MonkeyPatch, refusal: Exception, device: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise refusal

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(MemoryError, match=f"PyTorch has no more memory for 512 bytes on {device}: {refusal}"):
        tensor_memory(512, device, lambda: None)


def test_another_error_of_torchs_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(RuntimeError, match="illegal"):
        tensor_memory(512, "cuda:0", lambda: None)


@without_a_gpu
@pytest.mark.parametrize("torch_is_installed", [True, False])
def test_pinned_memory_by_cupy_is_the_hosts_and_waits_for_streams(
    cupy: StandIn, monkeypatch: pytest.MonkeyPatch, torch_is_installed: bool
) -> None:
    if not torch_is_installed:
        monkeypatch.setitem(sys.modules, "torch", None)
        monkeypatch.delitem(sys.modules, "torch.cuda", raising=False)
    pool = MemoryPool("pinned", device=1)
    assert isinstance(pool.backend, PinnedBackend)
    assert pool.device == "cpu"
    assert "arenas: page-locked by CuPy, for copies by cuda:1" in pool.reasons
    block = pool.allocate(4096)
    ctypes.memset(block.address, 7, block.nbytes)
    address = block.address
    del block
    assert pool.allocate(4096).address != address
    assert (1, CUPYS_STREAM) in cupy.recorded, "by its own stream, before the host may write again"
    cupy.busy = 0
    assert pool.statistics().waiting_bytes == 0
    assert pool.allocate(4096).address == address


def test_every_backend_says_what_it_is() -> None:
    for backend in (CupyBackend, TorchBackend):
        assert (backend.addressable, backend.granule) == (False, 512)
    assert PinnedBackend.addressable
