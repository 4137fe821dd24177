"""A real device: PyTorch's and CuPy's own streams, kernels that are late, graph captures, and other libraries' eyes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, TypeAlias

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from dilated_memory_pool import MemoryPool, PoolLimitError, PoolMemoryError
from dilated_memory_pool.adaptors import LimitingAdaptor, SharedBackend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COUNT = 2**22  # bytes, and elements of one byte
LATE_CYCLES = 500_000_000  # a quarter of a second or so: far longer than the host takes to get ahead of it
EARLY, LATE, NEXT = 1, 2, 3
SECONDS = 120

MakePool: TypeAlias = Callable[..., MemoryPool]


@pytest.fixture(params=["cupy", "torch"])
def make(request: pytest.FixtureRequest) -> Iterator[MakePool]:
    """Makes pools of device memory."""
    if request.param == "cupy":
        pytest.importorskip("cupy")
    torch.cuda.init()
    yield lambda **options: MemoryPool(request.param, min_bytes=0, **options)
    torch.cuda.synchronize()


@pytest.fixture
def pinned() -> Iterator[MemoryPool]:
    yield MemoryPool("pinned", min_bytes=0)
    torch.cuda.synchronize()


def bytes_of(pool: MemoryPool, fill: int | None = None) -> torch.Tensor:
    tensor = pool.empty(COUNT, dtype=torch.uint8)
    return tensor if fill is None else tensor.fill_(fill)


def late_fill(tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
    """Fill it on another stream, long after the host has gone on."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LATE_CYCLES)
        tensor.fill_(LATE)


def is_all(tensor: torch.Tensor, value: int) -> bool:
    torch.cuda.synchronize()
    return bool(tensor.eq(value).all())


# ------------------------------------------------------------------------------------------------ tensors


@pytest.mark.parametrize("mode", ["lightweight", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_tensors_hold_what_is_written_to_them(make: MakePool, mode: str, dtype: torch.dtype) -> None:
    pool = make(mode=mode)
    wanted = torch.randint(0, 2, (257, 129), generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor = pool.empty(wanted.shape, dtype=dtype)
    assert (tensor.device, tensor.dtype, tensor.shape) == (torch.device(pool.device), dtype, wanted.shape)
    assert tensor.is_contiguous()
    tensor.copy_(wanted)
    assert torch.equal(tensor.cpu(), wanted)
    assert pool.owns(tensor)


def test_memory_is_reused_by_the_next_tensor(make: MakePool) -> None:
    pool = make(arena_bytes=COUNT)
    address = bytes_of(pool).data_ptr()
    assert bytes_of(pool).data_ptr() == address
    assert pool.statistics().reserved_bytes == COUNT


def test_many_threads_may_grow_a_pool_at_once(make: MakePool) -> None:
    pool, start = make(mode="lightweight"), threading.Barrier(8)
    kept: list[torch.Tensor] = []

    def work(number: int) -> None:
        start.wait(SECONDS)
        kept.extend(bytes_of(pool, number) for _ in range(8))

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert len({tensor.data_ptr() for tensor in kept}) == 64, "an error in a thread leaves fewer"
    assert pool.statistics().misses == 64
    torch.cuda.synchronize()
    assert sorted(int(tensor[-1]) for tensor in kept) == sorted(8 * list(range(8)))


class Twice(torch.autograd.Function):
    """Doubles, in a pool's memory on the way back too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, pool: MemoryPool) -> torch.Tensor:
        ctx.pool = pool
        return pool.empty_like(x).copy_(x).mul_(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        [gradient] = gradients
        return ctx.pool.empty_like(gradient).copy_(gradient).mul_(2), None


def test_the_backward_pass_draws_from_the_stream_of_the_forward_pass(make: MakePool) -> None:
    pool, side = make(), torch.cuda.Stream()
    x = torch.arange(1024.0, device=pool.device, requires_grad=True)
    cotangent = torch.arange(1024.0, device=pool.device).flip(0)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        Twice.apply(x, pool).backward(cotangent)
    torch.cuda.synchronize()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * cotangent)
    assert {arena.locality for arena in pool.snapshot().arenas} == {str(side.cuda_stream)}
    assert pool.statistics().hits + pool.statistics().misses == 2


def test_what_autograd_saved_stays_out_of_the_pool(make: MakePool) -> None:
    pool = make()
    numbers = torch.randint(-8, 8, (3, 64, 64), generator=torch.Generator().manual_seed(0)).double()  # exact products
    kept, weight, cotangent = numbers.to(pool.device)
    weight.requires_grad_()
    given = pool.empty(kept.shape, dtype=kept.dtype).copy_(kept)
    output = given @ weight
    del given
    pool.empty(kept.shape, dtype=kept.dtype).fill_(LATE)
    output.backward(cotangent)
    assert weight.grad is not None
    assert torch.equal(weight.grad, kept.T @ cotangent)


def test_a_pool_can_be_of_any_device(make: MakePool) -> None:
    last = torch.cuda.device_count() - 1
    pool = make(device=last)
    assert pool.device == f"cuda:{last}"
    assert bytes_of(pool, EARLY).device.index == last


def test_a_device_that_is_none_is_an_error(make: MakePool) -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"device must be one of .*, got {count}"):
        make(device=count)


# ------------------------------------------------------------------------------------------------ streams


def test_record_stream_keeps_a_late_kernel_from_the_next_owner(make: MakePool) -> None:
    pool, side = make(), torch.cuda.Stream()
    tensor = bytes_of(pool, EARLY)
    address = tensor.data_ptr()
    pool.record_stream(tensor, side)
    late_fill(tensor, side)
    del tensor
    following = bytes_of(pool, NEXT)
    assert following.data_ptr() != address
    assert pool.statistics().waiting_bytes == COUNT
    assert is_all(following, NEXT)
    assert pool.statistics().waiting_bytes == 0
    assert bytes_of(pool).data_ptr() == address


def test_the_default_streams_late_kernel_is_waited_for_too(make: MakePool) -> None:
    pool, side = make(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor = bytes_of(pool, EARLY)
    address = tensor.data_ptr()
    pool.record_stream(tensor, torch.cuda.default_stream())
    torch.cuda.synchronize()
    late_fill(tensor, torch.cuda.default_stream())
    del tensor
    with torch.cuda.stream(side):
        following = bytes_of(pool, NEXT)
        assert following.data_ptr() != address
        assert pool.statistics().waiting_bytes == COUNT
    assert is_all(following, NEXT)
    assert pool.statistics().waiting_bytes == 0


def test_without_record_stream_a_late_kernel_corrupts_the_next_owner(make: MakePool) -> None:
    pool, side = make(), torch.cuda.Stream()
    tensor = bytes_of(pool, EARLY)
    address = tensor.data_ptr()
    late_fill(tensor, side)
    del tensor
    following = bytes_of(pool, NEXT)
    assert following.data_ptr() == address
    assert is_all(following, LATE)


def test_strict_streams_protects_without_record_stream(make: MakePool) -> None:
    pool, side = make(strict_streams=True), torch.cuda.Stream()
    with torch.cuda.stream(side):
        bytes_of(pool)
    tensor = bytes_of(pool, EARLY)
    address = tensor.data_ptr()
    late_fill(tensor, side)
    del tensor
    following = bytes_of(pool, NEXT)
    assert following.data_ptr() != address
    assert is_all(following, NEXT)


def test_each_stream_has_memory_of_its_own(make: MakePool) -> None:
    pool, side = make(), torch.cuda.Stream()
    address = bytes_of(pool).data_ptr()
    with torch.cuda.stream(side):
        other = bytes_of(pool).data_ptr()
        assert other != address
        assert bytes_of(pool).data_ptr() == other
    assert bytes_of(pool).data_ptr() == address
    assert {arena.locality for arena in pool.snapshot().arenas} == {"0", str(side.cuda_stream)}


def test_a_stream_may_be_given_in_many_ways(make: MakePool) -> None:
    pool, side = make(), torch.cuda.Stream()
    streams = [side, side.cuda_stream, torch.cuda.ExternalStream(side.cuda_stream)]
    if find_spec("cupy") is not None:
        cupys = pytest.importorskip("cupy").cuda
        from_external = getattr(cupys.Stream, "from_external", None)  # since CuPy 14, which warns of the other
        streams.append(from_external(side) if from_external else cupys.ExternalStream(side.cuda_stream))
    for stream in streams:
        tensor = bytes_of(pool, EARLY)
        pool.record_stream(tensor, stream)
        late_fill(tensor, side)
        del tensor
        assert pool.statistics().waiting_bytes == COUNT
        torch.cuda.synchronize()
        assert pool.statistics().waiting_bytes == 0
    with pytest.raises(TypeError, match="stream must be"):
        pool.record_stream(bytes_of(pool), torch.cuda.Event())


def test_at_its_limit_the_pool_waits_for_a_late_kernel(make: MakePool) -> None:
    pool, side = make(limit=COUNT), torch.cuda.Stream()
    tensor = bytes_of(pool, EARLY)
    pool.record_stream(tensor, side)
    late_fill(tensor, side)
    del tensor
    assert is_all(bytes_of(pool, NEXT), NEXT)
    assert pool.statistics().ooms == 0


# ------------------------------------------------------------------------------------------------ capture


def test_a_capture_uses_torchs_memory(make: MakePool) -> None:
    pool = make()
    bytes_of(pool)
    given = torch.full((COUNT,), EARLY, dtype=torch.uint8, device=pool.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = bytes_of(pool)
        output.copy_(given).add_(1)
    assert not pool.owns(output)
    assert pool.statistics().bypasses == 1
    given.fill_(NEXT)
    graph.replay()
    assert is_all(output, NEXT + 1)
    assert pool.owns(bytes_of(pool))


def test_a_block_may_be_made_and_dropped_in_a_capture(make: MakePool) -> None:
    pool = make()
    output = torch.zeros(COUNT, dtype=torch.uint8, device=pool.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block = pool.allocate(COUNT)
        assert not pool.owns(block)
        del block
        output.add_(1)
    graph.replay()
    assert is_all(output, 1)
    assert pool.statistics().bypasses == 1


def test_a_block_of_a_capture_can_be_exported_in_it(make: MakePool) -> None:
    pool = make()
    given = torch.full((COUNT,), EARLY, dtype=torch.uint8, device=pool.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = from_dlpack(pool.allocate(COUNT))
        output.copy_(given).add_(1)
    given.fill_(NEXT)
    graph.replay()
    assert is_all(output, NEXT + 1)


def test_a_capture_goes_on_where_memory_dies_and_is_to_be_given_back(make: MakePool) -> None:
    pool, side = make(), torch.cuda.Stream()
    output = torch.zeros(COUNT, dtype=torch.uint8, device=pool.device)
    owned, recorded = bytes_of(pool), bytes_of(pool)
    pool.record_stream(recorded, side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        del owned, recorded
        assert pool.statistics().allocated_bytes == 2 * COUNT
        assert pool.trim() == 0
        output.add_(1)
    graph.replay()
    assert is_all(output, 1)
    assert pool.statistics().allocated_bytes == 0
    assert pool.trim() > 0


# ------------------------------------------------------------------------------------------------ limits


def backend_of(pool: MemoryPool) -> Any:
    """Another backend of its kind."""
    return type(pool.backend)(0)  # type: ignore[call-arg]


def test_two_pools_share_a_budget(make: MakePool) -> None:
    budget = LimitingAdaptor(backend_of(make()), 3 * COUNT)
    first, second = MemoryPool(budget, min_bytes=0, arena_bytes=0), MemoryPool(budget, min_bytes=0, arena_bytes=0)
    budget.reclaim_from(first, second)
    first.reserve(2 * COUNT)
    kept = bytes_of(second, EARLY), bytes_of(second, NEXT)
    assert (first.statistics().reserved_bytes, budget.used_bytes) == (0, 2 * COUNT)
    with pytest.raises(PoolMemoryError) as error:
        first.allocate(2 * COUNT)
    assert "shared by the pools on it is used up" in str(error.value.__cause__)
    assert is_all(kept[0], EARLY)
    assert is_all(kept[1], NEXT)


def test_a_pool_waits_for_late_work_on_memory_that_another_freed(make: MakePool) -> None:
    shared, side = SharedBackend(backend_of(make()), COUNT), torch.cuda.Stream()
    first, second = (MemoryPool(shared, min_bytes=0, arena_bytes=0) for _ in range(2))
    shared.attach("first", first)
    shared.attach("second", second)
    tensor = bytes_of(first, EARLY)
    shared.record_stream(first, tensor, side)
    late_fill(tensor, side)
    del tensor
    assert is_all(bytes_of(second, NEXT), NEXT)
    assert first.statistics().reserved_bytes == 0


def test_a_limit_is_an_error_of_its_own(make: MakePool) -> None:
    pool = make(limit=COUNT)
    kept = bytes_of(pool)
    with pytest.raises(PoolLimitError):
        bytes_of(pool)
    assert kept.numel() == COUNT


def test_a_full_device_is_a_memory_error_and_the_pool_goes_on(make: MakePool) -> None:
    pool = make()
    assert pool.backend.total_bytes == torch.cuda.mem_get_info()[1]
    with pytest.raises(PoolMemoryError) as error:
        pool.allocate(2 * pool.backend.total_bytes)
    assert isinstance(error.value.__cause__, MemoryError)
    assert pool.statistics().ooms == 1
    assert is_all(bytes_of(pool, EARLY), EARLY)


def test_trimmed_memory_serves_another_size_when_the_device_is_nearly_full(make: MakePool) -> None:
    pool = make(size_classes="exact")
    ninth = torch.cuda.mem_get_info()[0] // 9
    for parts in (4, 6):  # the second size is not served from the memory of the first, and does not fit beside it
        pool.allocate(parts * ninth)
    statistics = pool.statistics()
    assert (statistics.ooms, statistics.misses, statistics.trims) == (0, 2, 1)


def test_close_gives_device_memory_back(make: MakePool) -> None:
    pool = make()
    kept = bytes_of(pool, EARLY)
    pool.close()
    assert is_all(kept, EARLY)
    before = torch.cuda.memory_allocated() if pool.backend.name == "torch" else torch.cuda.mem_get_info()[0]
    del kept
    after = torch.cuda.memory_allocated() if pool.backend.name == "torch" else torch.cuda.mem_get_info()[0]
    assert abs(after - before) >= COUNT


# ------------------------------------------------------------------------------------------------ other libraries


def test_blocks_are_seen_through_dlpack(make: MakePool) -> None:
    pool = make()
    block = pool.allocate(COUNT)
    tensor = from_dlpack(block)
    assert (tensor.data_ptr(), tensor.dtype, tensor.shape) == (block.address, torch.uint8, (COUNT,))
    del block
    assert is_all(tensor.fill_(EARLY), EARLY)
    assert pool.statistics().allocated_bytes == COUNT
    del tensor
    assert pool.statistics().allocated_bytes == 0


def torch_reads(block: Any) -> tuple[int, bytes]:
    tensor = torch.as_tensor(block, device=block.device)
    return tensor.data_ptr(), bytes(tensor.tolist())


def cupy_reads(block: Any) -> tuple[int, bytes]:
    array = pytest.importorskip("cupy").asarray(block)
    return array.data.ptr, array.get().tobytes()


def cupy_takes_dlpack(block: Any) -> tuple[int, bytes]:
    array = pytest.importorskip("cupy").from_dlpack(block)
    return array.data.ptr, array.get().tobytes()


def numba_reads(block: Any) -> tuple[int, bytes]:
    cuda = pytest.importorskip("numba.cuda")
    if not cuda.is_available():
        pytest.skip("Numba finds no CUDA device")
    array = cuda.as_cuda_array(block)
    return array.device_ctypes_pointer.value, array.copy_to_host().tobytes()


READERS = [torch_reads, cupy_reads, cupy_takes_dlpack, numba_reads]


@pytest.mark.parametrize("reads", READERS, ids=["torch", "cupy", "cupy-dlpack", "numba"])
def test_blocks_are_seen_by_other_libraries(make: MakePool, reads: Callable[[Any], tuple[int, bytes]]) -> None:
    block = make().allocate("4kB")
    from_dlpack(block).fill_(NEXT)
    torch.cuda.synchronize()
    assert reads(block) == (block.address, bytes([NEXT] * 4000))


# Neither compiles a kernel: CuPy may find no compiler, and a first kernel waits for the late ones.


def fill(array: Any, value: int) -> None:
    """Queue it on CuPy's current stream."""
    array.data.memset_async(value, array.nbytes)


def bytes_in(array: Any) -> set[int]:
    """The different ones, once CuPy's current stream is there."""
    return set(array.get().tobytes())


def test_cupys_arrays_come_from_the_pool_inside_the_context_alone(make: MakePool) -> None:
    cupy = pytest.importorskip("cupy")
    pool = make()
    with pool.share_with_cupy():
        array = cupy.zeros(COUNT, dtype="u1")
        assert pool.statistics().requested_bytes == COUNT
    outside = cupy.zeros(COUNT, dtype="u1")
    assert pool.statistics().requested_bytes == COUNT
    fill(array, NEXT)
    assert bytes_in(array) == {NEXT}
    assert bytes_in(outside) == {0}
    del array
    assert pool.statistics().allocated_bytes == 0


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 5), "f4"), (7, "i8"), ((), "c16"), ((0, 4), "f8")], ids=["2d", "1d", "scalar", "empty"]
)
def test_empty_makes_a_cupy_array_that_returns_its_memory(make: MakePool, shape: Any, dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    from dilated_memory_pool.interop import cupy as interop

    pool = make()
    array = interop.empty(pool, shape, dtype)
    like = cupy.empty(shape, dtype)
    assert (array.shape, array.dtype, array.strides) == (like.shape, like.dtype, like.strides)
    if array.nbytes:
        fill(array, 3)
        assert bytes_in(array) == {3}
    view = array.reshape(-1)
    del array
    assert pool.statistics().allocated_bytes > 0
    del view
    gc.collect()
    assert pool.statistics().allocated_bytes == 0


def test_a_negative_shape_is_an_error(make: MakePool) -> None:
    pytest.importorskip("cupy")
    from dilated_memory_pool.interop import cupy as interop

    with pytest.raises(ValueError, match=r"shape must not be negative, got \(3, -1\)"):
        interop.empty(make(), (3, -1))


def test_an_array_on_cupys_own_stream_waits_for_torchs_late_kernel_and_torch_for_its(make: MakePool) -> None:
    cupy = pytest.importorskip("cupy")
    from dilated_memory_pool.interop import cupy as interop

    pool = make()
    tensor = bytes_of(pool, EARLY)
    address = tensor.data_ptr()
    torch.cuda._sleep(LATE_CYCLES)
    tensor.fill_(LATE)
    del tensor
    with cupy.cuda.Stream(non_blocking=True) as stream:
        array = interop.empty(pool, COUNT, "u1")
        assert array.data.ptr == address
        fill(array, NEXT)
        assert bytes_in(array) == {NEXT}
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
        torch.cuda._sleep(LATE_CYCLES)
    with stream:
        fill(array, LATE)
    del array
    following = bytes_of(pool, NEXT)
    assert following.data_ptr() != address
    assert is_all(following, NEXT)


# ------------------------------------------------------------------------------------------------ pinned


def test_pinned_memory_is_page_locked_and_holds_what_is_written(pinned: MemoryPool) -> None:
    tensor = bytes_of(pinned, EARLY)
    assert tensor.is_pinned()
    assert tensor.device.type == "cpu"
    assert is_all(tensor.to("cuda", non_blocking=True), EARLY)


def test_a_copy_from_pinned_memory_does_not_keep_the_host_waiting(pinned: MemoryPool) -> None:
    tensor, copy = late_copy(pinned)
    assert not torch.cuda.current_stream().query()
    assert is_all(copy, EARLY)
    assert tensor.numel() == COUNT


def late_copy(pool: MemoryPool) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor, and what a copy on the current stream makes of it, long after the host has gone on."""
    tensor = bytes_of(pool, EARLY)
    copy = torch.empty(COUNT, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(LATE_CYCLES)
    copy.copy_(tensor, non_blocking=True)
    return tensor, copy


def test_a_queued_copy_reads_the_owner_it_was_queued_for(pinned: MemoryPool) -> None:
    tensor, copy = late_copy(pinned)
    address = tensor.data_ptr()
    del tensor
    following = bytes_of(pinned, NEXT)
    assert following.data_ptr() != address
    assert is_all(copy, EARLY)
    assert bytes_of(pinned).data_ptr() == address


def test_a_queued_copy_on_another_stream_is_waited_for_once_recorded(pinned: MemoryPool) -> None:
    tensor = bytes_of(pinned)
    address, side = tensor.data_ptr(), torch.cuda.Stream()
    copy = torch.empty(COUNT, dtype=torch.uint8, device="cuda")
    pinned.record_stream(tensor.fill_(EARLY), side)
    with torch.cuda.stream(side):
        torch.cuda._sleep(LATE_CYCLES)
        copy.copy_(tensor, non_blocking=True)
    del tensor
    assert bytes_of(pinned, NEXT).data_ptr() != address
    assert is_all(copy, EARLY)


def test_a_copy_still_queued_when_the_pool_closes_is_waited_for() -> None:
    pinned = MemoryPool("pinned", min_bytes=0, arena_bytes=0)
    tensor, copy = late_copy(pinned)
    pinned.close()
    del tensor
    torch.empty(COUNT, dtype=torch.uint8, pin_memory=True).fill_(NEXT)  # may get the same memory
    assert is_all(copy, EARLY)


# ------------------------------------------------------------------------------------------------ processes


def output_of(program: str) -> str:
    """What a new Python prints, its errors included."""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS, check=False, env=os.environ
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


@pytest.mark.parametrize("backend", ["cupy", "torch", "pinned"])
def test_the_end_of_the_interpreter_is_quiet(backend: str) -> None:
    if backend == "cupy":
        pytest.importorskip("cupy")
    program = f"""if True:
        import torch
        from dilated_memory_pool import MemoryPool
        pool = MemoryPool({backend!r}, min_bytes=0)
        kept, waiting = pool.empty(1000).fill_(1), pool.empty(1000)
        cycle = [pool.allocate(1000), pool.empty(1000)]
        cycle.append(cycle)
        side = torch.cuda.Stream()
        pool.record_stream(waiting, side)
        with torch.cuda.stream(side):
            torch.cuda._sleep({LATE_CYCLES})
        del waiting
        module = torch.nn.Module()
        module.kept = kept[1:]
        torch.of_a_module_that_goes_last = module
    """
    assert output_of(program) == ""


@pytest.mark.parametrize("backend", ["cupy", "torch", "pinned"])
def test_a_forked_child_leaves_the_parents_memory_alone(backend: str) -> None:
    if backend == "cupy":
        pytest.importorskip("cupy")
    program = f"""if True:
        import gc, os, torch, warnings
        warnings.simplefilter("ignore")
        from dilated_memory_pool import MemoryPool
        pool = MemoryPool({backend!r}, min_bytes=0)
        kept = pool.empty(1000).fill_(1)
        pool.reserve("1MiB")
        child = os.fork()
        if child == 0:
            del kept, pool
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert kept.sum().item() == 1000
        assert pool.empty(1000).fill_(2).sum().item() == 2000
    """
    assert output_of(program) == ""
