"""NumPy arrays over blocks: compared with numpy.empty and numpy.zeros, exactly."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy
import pytest
from fake_device import FakeBackend, FakeDevice
from hypothesis import given
from hypothesis import strategies as st

from dilated_memory_pool import MemoryPool
from dilated_memory_pool.interop.numpy import empty, zeros

DTYPES = [
    "f2",
    "f4",
    "f8",
    "i1",
    "u8",
    "?",
    "c16",
    "S3",
    "U2",
    "M8[s]",
    "m8[ns]",
    "V5",
    [("a", "i4"), ("b", "f8")],
    None,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_are_those_of_numpy_in_memory_that_was_used(make_on_host: Callable[..., MemoryPool], dtype: Any) -> None:
    pool = make_on_host()
    used = pool.allocate(1024)
    memoryview(used).cast("B")[:] = b"\xff" * 1024
    address = used.address
    del used
    array, wanted = zeros(pool, (3, 5), dtype), numpy.zeros((3, 5), dtype)
    assert array.ctypes.data == address
    assert (array.shape, array.strides, array.dtype) == (wanted.shape, wanted.strides, wanted.dtype)
    assert array.tobytes() == wanted.tobytes()


@given(shape=st.lists(st.integers(0, 5), max_size=5), dtype=st.sampled_from(["f4", "u1", "c16", "S3"]))
def test_every_shape_is_writable_and_row_major(shape: list[int], dtype: str) -> None:
    pool = MemoryPool("host")
    array, wanted = empty(pool, shape, dtype), numpy.empty(shape, dtype)
    assert (array.shape, array.flags.c_contiguous) == (wanted.shape, True)
    assert array.strides == wanted.strides or not array.size  # numpy.empty gives zeros where there is nothing
    assert array.flags.writeable
    assert array.flags.aligned
    numbers = numpy.arange(math.prod(shape)).reshape(shape).astype(dtype)
    array[...] = numbers
    assert array.tobytes() == numbers.tobytes()
    assert pool.statistics().requested_bytes == max(array.nbytes, 1)


def test_an_array_and_its_views_keep_the_memory(make_on_host: Callable[..., MemoryPool]) -> None:
    pool = make_on_host()
    array = empty(pool, (10, 10))
    array.fill(3)
    view = array[2:, ::2].T
    del array
    other = empty(pool, (10, 10))
    other.fill(5)
    assert (view == 3).all()
    assert pool.statistics().requested_bytes == 1600
    del view, other
    assert pool.statistics().allocated_bytes == 0


@pytest.mark.parametrize("shape", [7, numpy.int64(7), (), (0, 3), [2, 3]], ids=str)
def test_shapes_mean_what_they_mean_to_numpy(make_on_host: Callable[..., MemoryPool], shape: Any) -> None:
    assert empty(make_on_host(), shape).shape == numpy.empty(shape).shape


NO_SHAPES = {
    "negative": ((3, -1), "f4", ValueError, r"shape: expected no negative length, got \(3, -1\)"),
    "two-negative": ((-3, -1), "f4", ValueError, r"shape: expected no negative length, got \(-3, -1\)"),
    "float": (2.0, "f4", TypeError, r"shape: expected an int or a sequence of ints, got 2\.0"),
    "text": ("ab", "f4", TypeError, "shape: expected an int or a sequence of ints, got 'ab'"),
    "nothing": (None, "f4", TypeError, "shape: expected an int or a sequence of ints, got None"),
    "dimensions": ((1,) * 70, "f4", ValueError, "dimension"),
    "huge": ((2**40, 2**40), "f4", MemoryError, "requested"),
    "objects": (3, object, TypeError, "dtype: expected one that plain memory can hold, got dtype"),
    "no-type": (3, "no type", TypeError, "no type"),
}


@pytest.mark.parametrize(("shape", "dtype", "kind", "message"), NO_SHAPES.values(), ids=list(NO_SHAPES))
def test_what_is_no_shape_or_type_is_an_error_that_says_so(
    make_on_host: Callable[..., MemoryPool], shape: Any, dtype: Any, kind: type[Exception], message: str
) -> None:
    pool = make_on_host()
    for function in (empty, zeros):
        with pytest.raises(kind, match=message):
            function(pool, shape, dtype)
    gc.collect()
    assert pool.statistics().allocated_bytes == 0


def test_memory_that_the_host_cannot_address_is_refused() -> None:
    pool = MemoryPool(FakeBackend(FakeDevice(), addressable=False))
    with pytest.raises(ValueError, match="pool: expected one of memory that the host can address, got one on cpu"):
        empty(pool, 3)


@pytest.mark.parametrize(("missing", "works"), [("torch", True), ("numpy", False)])
def test_numpy_is_needed_and_torch_is_not(missing: str, works: bool) -> None:
    script = f"""if True:
        import sys
        sys.modules["{missing}"] = None
        from dilated_memory_pool import MemoryPool
        from dilated_memory_pool.interop.numpy import zeros
        try:
            array = zeros(MemoryPool("host"), (100, 100))
        except ImportError as error:
            print(error)
        else:
            print(array.sum())
    """
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == ("0.0" if works else 'arrays need NumPy: pip install "dilated-memory-pool[numpy]"')
