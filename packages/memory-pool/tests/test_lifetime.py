"""When memory returns, byte-exactly, and what of its earlier life a tensor must not bring along."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakePool
from fake_device import FakeBackend, FakeDevice
from pool_checks import assert_consistent, assert_drained, piece_of
from torch.utils.dlpack import from_dlpack

from dilated_memory_pool import Block, MemoryPool
from dilated_memory_pool.adaptors import LimitingAdaptor
from dilated_memory_pool.backends import HostBackend

SHAPE = (64, 1024)
NBYTES = 4 * 64 * 1024
LARGE = 64 * 2**20
ROUNDS = 3

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def tensor(pool: MemoryPool) -> torch.Tensor:
    return pool.empty(SHAPE, dtype=torch.float32)


def allocated(pool: MemoryPool) -> int:
    return pool.statistics().allocated_bytes


# ------------------------------------------------------------------------------------------ when it returns


@pytest.mark.usefixtures("no_gc")
def test_memory_returns_with_its_last_owner_and_without_the_collector(pool: MemoryPool) -> None:
    owners: list[Callable[[torch.Tensor], Any]] = [
        lambda x: x[3:5],
        lambda x: x.t(),
        lambda x: x.detach(),
        lambda x: x.untyped_storage(),
        lambda x: x.unbind(),
        lambda x: x.__dlpack__(),
        from_dlpack,
        lambda x: torch.ones(SHAPE, device=x.device, requires_grad=True) * x,
        lambda x: torch.nn.Parameter(x),
        lambda x: [{"deep": (x,)}],
    ]
    if pool.device == "cpu":
        owners += [lambda x: x.numpy(), lambda x: x.numpy()[1:].T, lambda x: x.numpy().data]
    for make_owner in owners:
        x = tensor(pool)
        assert allocated(pool) == pool.statistics().requested_bytes == NBYTES
        owner = make_owner(x)
        del x
        assert allocated(pool) == NBYTES
        del owner
        assert allocated(pool) == 0
    assert pool.trim() > 0
    assert pool.statistics().reserved_bytes == 0


@pytest.mark.usefixtures("no_gc")
def test_a_block_returns_with_its_last_export(pool: MemoryPool) -> None:
    exports: list[Callable[[Block], Any]] = [lambda block: block.__dlpack__(), from_dlpack]
    if pool.backend.addressable:
        exports += [
            memoryview,
            lambda block: memoryview(block).cast("B")[5:9],
            lambda block: np.frombuffer(memoryview(block), np.uint8),
            lambda block: torch.frombuffer(block, dtype=torch.uint8),
        ]
    for make_export in exports:
        block = pool.allocate(NBYTES)
        export = make_export(block)
        del block
        assert allocated(pool) == NBYTES
        del export
        assert allocated(pool) == 0


@pytest.mark.usefixtures("no_gc")
def test_in_a_cycle_memory_waits_for_the_collector(pool: MemoryPool) -> None:
    cycle: list[Any] = [tensor(pool), pool.allocate(NBYTES)]
    cycle.append(cycle)
    del cycle
    assert allocated(pool) == 2 * NBYTES
    gc.collect()
    assert allocated(pool) == 0


@pytest.mark.usefixtures("no_gc")
def test_saved_tensors_keep_memory_until_the_backward_pass(pool: MemoryPool) -> None:
    x = tensor(pool).fill_(3)
    weight = torch.ones(SHAPE, device=pool.device, requires_grad=True)
    product = weight * x
    del x
    assert allocated(pool) == NBYTES
    product.backward(torch.full(SHAPE, 2.0, device=pool.device))
    assert allocated(pool) == 0
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full(SHAPE, 6.0, device=pool.device))


@pytest.mark.usefixtures("no_gc")
def test_a_traceback_keeps_the_tensors_of_its_frames(pool: MemoryPool) -> None:
    def fail() -> None:
        local = tensor(pool)
        raise ArithmeticError(local.shape)

    with pytest.raises(ArithmeticError) as caught:
        fail()
    assert allocated(pool) == NBYTES
    del caught
    gc.collect()  # pytest's own record of the error is a cycle
    assert allocated(pool) == 0


class Holder:
    """Garbage in a cycle that still uses its block when it is finalised."""

    def __init__(self, pool: MemoryPool, block: Block) -> None:
        self.pool, self.block, self.me = pool, block, self
        self.piece = piece_of(block, tag=1)
        self.news: list[Block] = []

    def __del__(self) -> None:
        self.news.append(self.pool.allocate(self.block.nbytes))
        piece_of(self.news[-1], tag=2)
        finalised.append((self, self.piece.intact()))


finalised: list[tuple[Holder, bool]] = []


@pytest.mark.usefixtures("no_gc")
def test_a_finaliser_in_a_cycle_may_use_and_save_its_block(pool: MemoryPool) -> None:
    # The collector finalises all of a cycle, oldest first, before any of it is freed: the block's lease before Holder.
    Holder(pool, pool.allocate(NBYTES))
    gc.collect()
    assert [intact for _, intact in finalised] == [True]
    again = pool.allocate(NBYTES)
    assert allocated(pool) == 3 * NBYTES
    assert len({again.address, finalised[0][0].block.address, finalised[0][0].news[0].address}) == 3
    finalised.clear()
    del again
    gc.collect()  # the holder was saved, and is now garbage for the second time
    assert allocated(pool) == 0
    assert_drained(pool)


@pytest.mark.usefixtures("no_gc")
def test_a_finaliser_in_a_cycle_may_use_memory_that_nobody_else_keeps(make_on_host: MakePool) -> None:
    # Arena and charge are older than Holder, and finalised first; the pool is gone before.
    budget = LimitingAdaptor(HostBackend(), "1MiB")
    pool, heir = make_on_host(backend=budget), make_on_host()
    Holder(heir, pool.allocate(NBYTES))
    del pool
    gc.collect()
    assert [intact for _, intact in finalised] == [True]
    assert finalised[0][0].piece.intact()
    assert budget.used_bytes == NBYTES
    finalised.clear()
    gc.collect()
    assert budget.used_bytes == 0


class Owner:
    """Garbage that has a pool of its own, in a cycle with it, and saves itself."""

    def __init__(self, make: MakePool) -> None:
        self.me = self
        self.pool = make(size_classes=self)
        self.block = self.pool.allocate(NBYTES)

    def round_up(self, nbytes: int) -> int:
        return nbytes

    def __del__(self) -> None:
        saved.append(self)


saved: list[Owner] = []


@pytest.mark.usefixtures("no_gc")
def test_a_pool_that_a_finaliser_saved_is_as_before(make_on_host: MakePool) -> None:
    budget = LimitingAdaptor(HostBackend(), 4 * NBYTES)
    Owner(partial(make_on_host, backend=budget))
    gc.collect()
    pool = saved[0].pool
    assert pool.owns(saved[0].block)
    assert budget.used_bytes == pool.statistics().reserved_bytes == NBYTES
    blocks = [pool.allocate(NBYTES) for _ in range(3)]
    assert allocated(pool) == budget.used_bytes == 4 * NBYTES
    blocks.clear()
    assert allocated(pool) == NBYTES
    assert_consistent(pool)
    saved.clear()
    del pool
    gc.collect()  # it is garbage for the second time
    assert budget.used_bytes == 0


# ------------------------------------------------------------------------------------------ nothing of an earlier life


def test_the_version_counter_is_fresh(pool: MemoryPool) -> None:
    first = tensor(pool)
    address, at_birth = first.data_ptr(), first._version
    for _ in range(10):
        first.add_(1)
    assert first._version == at_birth + 10
    del first
    second = tensor(pool)
    assert second.data_ptr() == address
    assert second._version == at_birth


def test_an_owner_that_was_saved_is_not_disturbed_by_the_next_one(pool: MemoryPool) -> None:
    weight = torch.ones(SHAPE, device=pool.device, requires_grad=True)
    first = (weight * tensor(pool).fill_(2)).sum()
    first.backward()
    second = weight * tensor(pool).fill_(3)  # the same memory
    third = tensor(pool).fill_(4)  # other memory
    second.backward(torch.ones_like(second))
    assert torch.equal(weight.grad, torch.full(SHAPE, 5.0, device=pool.device))  # type: ignore[arg-type]
    del third


def test_memory_first_used_in_inference_mode_trains_later(pool: MemoryPool) -> None:
    with torch.inference_mode():
        first = tensor(pool).fill_(1)
        assert first.is_inference()
        address = first.data_ptr()
        del first
    second = tensor(pool).fill_(2)
    assert second.data_ptr() == address
    assert not second.is_inference()
    second.requires_grad_()
    (second * second).backward(torch.ones_like(second))
    assert torch.equal(second.grad, torch.full(SHAPE, 4.0, device=pool.device))  # type: ignore[arg-type]


def test_memory_first_used_in_training_serves_inference_mode(pool: MemoryPool) -> None:
    tensor(pool).requires_grad_()
    with torch.inference_mode():
        assert tensor(pool).is_inference()


def test_a_tensor_made_without_grad_can_be_filled_by_one_with_grad(pool: MemoryPool) -> None:
    with torch.no_grad():
        x = tensor(pool)
    weight = torch.ones(SHAPE, device=pool.device, requires_grad=True)
    x.copy_(weight)
    x.mul_(3)
    x.backward(torch.ones_like(x))
    assert torch.equal(weight.grad, torch.full(SHAPE, 3.0, device=pool.device))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(), 0, 7, (5,), (3, 4), (2, 0, 3), (2, 3, 4, 5)], ids=str)
def test_a_tensor_is_a_leaf_and_no_view(pool: MemoryPool, size: int | tuple[int, ...]) -> None:
    for x in (pool.empty(size), pool.zeros(size), pool.empty_like(torch.empty(size, device=pool.device))):
        assert not x._is_view()
        assert x._base is None
        assert x.is_leaf
        assert not x.requires_grad
        assert x.is_contiguous()
        assert x.storage_offset() == 0
        assert x.shape == torch.empty(size).shape


# ------------------------------------------------------------------------------------------ without the pool


@pytest.mark.parametrize("end", ["close", "drop"])
def test_contents_survive_their_pool(make: MakePool, end: str) -> None:
    pool = make()
    owners: list[Any] = [tensor(pool), pool.allocate(NBYTES), tensor(pool)[1:]]
    pieces = [piece_of(owners[0], 1), piece_of(owners[1], 2)]
    if end == "close":
        pool.close()
        with pytest.raises(RuntimeError, match="the pool is closed"):
            pool.allocate(NBYTES)
        with pytest.raises(RuntimeError, match="the pool is closed"):
            tensor(pool)
        assert pool.statistics().reserved_bytes == 0
        pool.close()
        assert_consistent(pool)
    del pool
    gc.collect()
    assert all(piece.intact() for piece in pieces)
    assert float(owners[2].fill_(7).sum()) == 7 * owners[2].numel()


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("mode", ["lightweight", "full"])
@pytest.mark.parametrize("addressable", [True, False], ids=["addressable", "opaque"])
@pytest.mark.parametrize("end", ["close", "drop"])
def test_memory_goes_with_its_last_owner_when_the_pool_is_gone(mode: Any, addressable: bool, end: str) -> None:
    device = FakeDevice()
    pool = MemoryPool(FakeBackend(device, addressable), mode=mode, min_bytes=0)
    owners: list[Any] = [tensor(pool), pool.allocate(NBYTES), tensor(pool)[1:]]
    tensor(pool)  # idle
    assert device.live_bytes == pool.statistics().reserved_bytes > 0
    if end == "close":
        pool.close()
    del pool
    while owners:
        assert device.live_bytes >= NBYTES * len(owners)
        del owners[-1]
    assert device.live_bytes == 0


def mapped(address: int) -> bool:
    """Whether this process has memory at ``address``."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return True
    return False


def memory_bytes() -> tuple[int, int]:
    """What this process has mapped, and what of it is resident."""
    mapped, resident, *_ = Path("/proc/self/statm").read_text().split()
    return int(mapped) * os.sysconf("SC_PAGE_SIZE"), int(resident) * os.sysconf("SC_PAGE_SIZE")


@linux
@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("end", ["trim", "close", "drop"])
def test_memory_is_really_unmapped(make_on_host: MakePool, end: str) -> None:
    pool = make_on_host()
    block = pool.allocate(LARGE)
    memoryview(block).cast("B")[::4096] = bytes(LARGE // 4096)
    before, address = memory_bytes()[0], block.address  # not what is resident: the kernel may swap, or merge pages
    if end == "trim":
        del block
        assert pool.trim() == LARGE
    elif end == "close":
        pool.close()
        assert mapped(address)
        del block
    else:
        del pool
        assert mapped(address)
        del block
    assert not mapped(address)
    assert before - memory_bytes()[0] > LARGE * 0.9


# ------------------------------------------------------------------------------------------ for long


def endure(pool: MemoryPool, times: int) -> None:
    """Allocate and free; neither the process nor Python may hold more after it than before.

    Of the rounds the one that grows least counts: a leak grows in all, and what else a process takes now and then,
    such as a page that the kernel makes a huge one, in some.
    """

    def work(turns: int) -> None:
        for turn in range(turns):
            pool.empty((turn % 5 + 1, 1024), dtype=torch.float32)
            pool.allocate(4096 * (turn % 7 + 1))
        gc.collect()

    work(times // 100)  # caches and freed memory of the allocators below settle
    grown = []
    for _ in range(ROUNDS):
        blocks_before, resident_before = sys.getallocatedblocks(), memory_bytes()[1]
        work(times // ROUNDS)
        grown.append((sys.getallocatedblocks() - blocks_before, memory_bytes()[1] - resident_before))
    least_blocks, least_bytes = map(min, zip(*grown, strict=True))
    assert least_blocks < 500
    assert least_bytes < 2**18
    assert allocated(pool) == 0


@linux
@pytest.mark.slow
def test_allocating_and_freeing_does_not_grow(make_on_host: MakePool) -> None:
    endure(make_on_host(), 60_000)


@linux
@pytest.mark.fuzz
def test_allocating_and_freeing_ten_million_times_does_not_grow(make_on_host: MakePool) -> None:
    endure(make_on_host(), 10_000_000)
