"""A real device's memory as other libraries see it: DLPack, CuPy, Numba."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MakePool
from gpu_checks import COUNT, EARLY, LATE, LATE_CYCLES, NEXT, bytes_of, is_all
from torch.utils.dlpack import from_dlpack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_blocks_are_seen_through_dlpack(make_on_gpu: MakePool) -> None:
    pool = make_on_gpu()
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
def test_blocks_are_seen_by_other_libraries(make_on_gpu: MakePool, reads: Callable[[Any], tuple[int, bytes]]) -> None:
    block = make_on_gpu().allocate("4kB")
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


def test_cupys_arrays_come_from_the_pool_inside_the_context_alone(make_on_gpu: MakePool) -> None:
    cupy = pytest.importorskip("cupy")
    pool = make_on_gpu()
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
def test_empty_makes_a_cupy_array_that_returns_its_memory(make_on_gpu: MakePool, shape: Any, dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    from dilated_memory_pool.interop import cupy as interop

    pool = make_on_gpu()
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


def test_a_negative_shape_is_an_error(make_on_gpu: MakePool) -> None:
    pytest.importorskip("cupy")
    from dilated_memory_pool.interop import cupy as interop

    with pytest.raises(ValueError, match=r"shape: expected no negative length, got \(3, -1\)"):
        interop.empty(make_on_gpu(), (3, -1))


def test_an_array_on_cupys_own_stream_waits_for_torchs_late_kernel_and_torch_for_its(make_on_gpu: MakePool) -> None:
    cupy = pytest.importorskip("cupy")
    from dilated_memory_pool.interop import cupy as interop

    pool = make_on_gpu()
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
