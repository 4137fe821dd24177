"""Blocks: memory without a tensor, handed to others by the buffer protocol, DLPack and __cuda_array_interface__."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import pickle
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
from fake_device import FakeBackend, FakeDevice
from torch.utils.dlpack import from_dlpack

from dilated_memory_pool import Block, MemoryPool
from dilated_memory_pool.blocks import DeviceBlock
from dilated_memory_pool.interop.dlpack import take_in

CPU, CUDA = 1, 2  # by DLPack's numbering
MakePool = Callable[..., MemoryPool]


def in_use(pool: MemoryPool) -> int:
    return pool.statistics().requested_bytes


# ------------------------------------------------------------------------------------------------ on the host


@pytest.mark.parametrize("nbytes", [1, 13, 4096, 4097, 1_000_003, "64KiB"])
def test_a_block_is_as_long_as_was_asked(pool: MemoryPool, nbytes: int | str) -> None:
    block = pool.allocate(nbytes)
    length = 65536 if nbytes == "64KiB" else nbytes
    assert (block.nbytes, len(block), block.device) == (length, length, pool.device)
    assert in_use(pool) == length
    assert pool.owns(block)
    assert isinstance(block, Block)
    assert repr(block) == f"<Block of {length} bytes at 0x{block.address:x} on {pool.device}>"
    del block
    assert in_use(pool) == 0


def test_no_bytes_are_a_block_too(pool: MemoryPool) -> None:
    block = pool.allocate(0)
    assert (block.nbytes, len(block)) == (0, 0)
    assert from_dlpack(block).shape == (0,)


def test_blocks_alive_at_once_do_not_overlap(pool: MemoryPool) -> None:
    blocks = sorted((pool.allocate(size) for size in (1, 5000, 4096, 5000, 100)), key=lambda block: block.address)
    for one, next_one in pairwise(blocks):
        assert one.address + one.nbytes <= next_one.address


def test_the_buffer_is_writable_bytes_and_keeps_the_memory(make_on_host: MakePool) -> None:
    pool = make_on_host()
    block = pool.allocate(100)
    view = memoryview(block).cast("B")
    assert (view.nbytes, view.readonly, view.itemsize, view.contiguous) == (100, False, 1, True)
    view[:] = bytes(range(100))
    assert bytes(block) == bytes(range(100))
    tail = view[90:]
    del block, view
    other = pool.allocate(100)
    memoryview(other).cast("B")[:] = b"\xff" * 100
    assert bytes(tail) == bytes(range(90, 100))
    assert in_use(pool) == 200
    del tail
    assert in_use(pool) == 100


def test_the_standard_library_takes_it_as_a_buffer(make_on_host: MakePool) -> None:
    block = make_on_host().allocate(64)
    assert io.BytesIO(bytes(range(64))).readinto(memoryview(block).cast("B")) == 64
    assert hashlib.sha256(block).digest() == hashlib.sha256(bytes(range(64))).digest()
    written = io.BytesIO()
    written.write(block)
    assert written.getvalue() == bytes(range(64))


def test_numpy_sees_the_memory_itself(make_on_host: MakePool) -> None:
    pool = make_on_host()
    block: Any = pool.allocate(64)
    array = numpy.frombuffer(block, "i4")
    array[:] = range(16)
    same = numpy.from_dlpack(block)
    assert same.dtype == numpy.uint8
    assert (same.shape, same.ctypes.data) == ((64,), block.address)
    assert (same.view("i4") == numpy.arange(16)).all()
    del block, array
    assert in_use(pool) == 64
    del same
    assert in_use(pool) == 0


def test_blocks_can_be_referred_to_weakly(pool: MemoryPool) -> None:
    block = pool.allocate(10)
    reference = weakref.ref(block)
    assert reference() is block
    del block
    assert reference() is None


@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy, pickle.dumps])
def test_blocks_are_neither_copied_nor_pickled(pool: MemoryPool, copying: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="a block is neither copied nor pickled: copy its bytes"):
        copying(pool.allocate(10))


def test_a_block_outlives_its_pool(make: MakePool) -> None:
    for end in (MemoryPool.close, lambda _: None):
        pool = make()
        tensor = from_dlpack(pool.allocate(100)).fill_(7)
        end(pool)
        del pool
        gc.collect()
        assert tensor.tolist() == [7] * 100


# ------------------------------------------------------------------------------------------------ DLPack


def test_torch_sees_the_memory_itself(pool: MemoryPool) -> None:
    block = pool.allocate(1000)
    tensor = from_dlpack(block)
    assert (tensor.dtype, tensor.shape, tensor.device) == (torch.uint8, (1000,), torch.device(pool.device))
    assert tensor.data_ptr() == block.address
    tensor.fill_(9)
    view = tensor[990:]
    del block, tensor
    assert in_use(pool) == 1000
    assert view.tolist() == [9] * 10
    del view
    assert in_use(pool) == 0


def test_a_capsule_that_nobody_takes_lets_go(pool: MemoryPool) -> None:
    capsule = pool.allocate(1000).__dlpack__()
    assert in_use(pool) == 1000
    del capsule
    assert in_use(pool) == 0


def test_a_block_says_where_it_is(make_on_host: MakePool) -> None:
    assert make_on_host().allocate(1).__dlpack_device__() == (CPU, 0)
    backend = FakeBackend(FakeDevice(), addressable=False)
    backend.device = "cuda:3"
    assert MemoryPool(backend).allocate(1).__dlpack_device__() == (CUDA, 3)


def test_what_a_block_cannot_export_is_a_buffer_error(make_on_host: MakePool) -> None:
    block = make_on_host().allocate(10)
    with pytest.raises(BufferError, match="copy: expected False or None, as a block is shared"):
        block.__dlpack__(copy=True)
    with pytest.raises(BufferError, match=r"dl_device: expected \(1, 0\), where the block is, got \(2, 0\)"):
        block.__dlpack__(dl_device=(2, 0))
    for options in ({"copy": False}, {"dl_device": (1, 0)}, {"max_version": (1, 0)}, {"stream": None}, {}):
        assert from_dlpack(block.__dlpack__(**options)).shape == (10,)


def test_a_device_block_offers_the_array_interface_and_no_buffer() -> None:
    pool = MemoryPool(FakeBackend(FakeDevice(), addressable=False))
    block = pool.allocate(100)
    assert isinstance(block, DeviceBlock)
    interface = block.__cuda_array_interface__
    assert interface["data"] == (block.address, False)
    assert (interface["shape"], interface["typestr"], interface["strides"]) == ((100,), "|u1", None)
    assert interface["version"] == 3
    assert interface["stream"] != 0  # which the interface forbids
    with pytest.raises(TypeError, match="bytes-like"):
        memoryview(block)


# ------------------------------------------------------------------------------------------------ taken in

EXPORTERS: dict[str, Callable[[], Any]] = {
    "float": lambda: numpy.linspace(0, 1, 60, dtype="f4").reshape(3, 4, 5),
    "bool": lambda: numpy.array([True, False]),
    "complex": lambda: numpy.array([1 + 2j, 3j]),
    "half": lambda: numpy.array([1, 2], "f2"),
    "unsigned": lambda: numpy.array([1, 65535], "u2"),
    "transposed": lambda: numpy.arange(6).reshape(2, 3).T,
    "sliced": lambda: numpy.arange(20).reshape(4, 5)[1:, ::2],
    "broadcast": lambda: numpy.broadcast_to(numpy.arange(3.0), (4, 3)),
    "0-dim": lambda: numpy.array(3.0),
    "empty": lambda: numpy.zeros((0, 3)),
}


@pytest.mark.parametrize("export", EXPORTERS.values(), ids=list(EXPORTERS))
def test_what_numpy_exports_is_copied_exactly(pool: MemoryPool, export: Callable[[], Any]) -> None:
    array = export()
    tensor = take_in(pool, array)
    assert pool.owns(tensor) == (array.size > 0)
    assert tensor.is_contiguous()
    assert tensor.device == torch.device(pool.device)
    back = tensor.cpu().numpy()
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_arrays_that_may_not_be_written_are_taken_in(pool: MemoryPool) -> None:
    array = numpy.arange(5)
    array.flags.writeable = False
    assert take_in(pool, array).add_(1).tolist() == [1, 2, 3, 4, 5]
    assert array.tolist() == [0, 1, 2, 3, 4]


def test_tensors_and_blocks_of_other_pools_are_taken_in(pool: MemoryPool, make_on_host: MakePool) -> None:
    other = make_on_host()
    block = other.allocate(3)
    memoryview(block).cast("B")[:] = b"abc"
    half = torch.ones(4, dtype=torch.float8_e5m2)
    leaf = torch.ones(4, requires_grad=True)
    conjugate = torch.tensor([1j]).conj()
    assert take_in(pool, block).tolist() == [97, 98, 99]
    assert take_in(pool, half).dtype == torch.float8_e5m2
    assert not take_in(pool, leaf).requires_grad
    assert take_in(pool, conjugate).tolist() == [-1j]


def test_a_small_copy_is_an_ordinary_tensor(make: MakePool) -> None:
    pool = make(min_bytes=100)
    assert not pool.owns(take_in(pool, numpy.zeros(12)))
    assert pool.owns(take_in(pool, numpy.zeros(13)))


@pytest.mark.parametrize(
    ("exporter", "kind", "message"),
    [
        ([1, 2], TypeError, "exporter: expected __dlpack__ and __dlpack_device__, got list"),
        (numpy.arange(5)[::-1], BufferError, r"exporter: expected no negative strides, got \(-8,\): copy it first"),
        (numpy.array(["text"]), BufferError, "DLPack only supports"),
    ],
    ids=["no-exporter", "negative-strides", "text"],
)
def test_what_cannot_be_taken_in_is_an_error(
    pool: MemoryPool, exporter: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        take_in(pool, exporter)
    assert in_use(pool) == 0
