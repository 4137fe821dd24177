"""Pools of different modes, and a manager's kinds, on one backend: what is idle anywhere makes room everywhere."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch

from dilated_memory_pool import MemoryPool, PoolLimitError, PoolMemoryError
from dilated_memory_pool.adaptors import Adaptor, LimitingAdaptor, SharedBackend
from dilated_memory_pool.attention import AttentionBufferManager
from dilated_memory_pool.backends import HostBackend, Memory

MIB = 2**20


def test_pools_of_both_modes_make_room_for_each_other() -> None:
    shared = SharedBackend(HostBackend(), "8MiB")
    full = MemoryPool(shared, arena_bytes=0)
    light = MemoryPool(shared, mode="lightweight")
    shared.attach("full", full)
    shared.attach("lightweight", light)
    for _ in range(3):
        for pool in (full, light):
            block = pool.allocate(6 * MIB)
            assert full.statistics().reserved_bytes + light.statistics().reserved_bytes <= 8 * MIB
            del block


def test_a_manager_shares_the_backend_of_other_pools() -> None:
    shared = SharedBackend(HostBackend(), "8MiB")
    pool = MemoryPool(shared, arena_bytes=0)
    shared.attach("pool", pool)
    with AttentionBufferManager(shared) as manager:
        scores = manager.empty(6 * MIB, dtype=torch.uint8, kind="scores")
        with pytest.raises(MemoryError) as refusal:
            pool.allocate(4 * MIB)
        del scores, refusal
        gc.collect()
        block = pool.allocate(4 * MIB)  # what lay idle in the kind has made room
        assert manager.statistics("scores").reserved_bytes == 0
        with pytest.raises(PoolLimitError) as failure:
            manager.empty(6 * MIB, dtype=torch.uint8, kind="scores")
        assert (failure.value.requested, failure.value.reserved, failure.value.limit) == (6 * MIB, 4 * MIB, 8 * MIB)
        assert block.nbytes == 4 * MIB


def test_two_managers_on_one_backend_do_not_hide_each_other() -> None:
    shared = SharedBackend(HostBackend(), "8MiB")
    first, second = AttentionBufferManager(shared), AttentionBufferManager(shared)
    for manager in (first, second, first, second):
        tensor = manager.empty(6 * MIB, dtype=torch.uint8, kind="weights")
        del tensor


def test_a_limit_beside_a_shared_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="limit: expected None beside a SharedBackend"):
        AttentionBufferManager(SharedBackend(HostBackend(), None), limit="1GiB")


def test_the_limit_can_be_changed() -> None:
    shared = SharedBackend(HostBackend(), "2MiB")
    pool = MemoryPool(shared, arena_bytes=0)
    shared.attach("pool", pool)
    with pytest.raises(MemoryError):
        pool.allocate(4 * MIB)
    shared.set_limit("8MiB")
    del pool, shared


class Talkative(Adaptor):
    """Refuses all memory, and knows why."""

    def allocate(self, nbytes: int) -> Memory:
        raise PoolMemoryError(nbytes, 0, 0, None, 0, why="rank 1 reserves it all; ask rank 1")


def test_what_an_adaptor_knows_reaches_the_user() -> None:
    shared = SharedBackend(Talkative(HostBackend()), None)
    with pytest.raises(PoolMemoryError, match=r"requested 4 MiB, .*; rank 1 reserves it all; ask rank 1$") as refusal:
        MemoryPool(shared).allocate("4MiB")
    assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)
    with (
        AttentionBufferManager(shared) as manager,
        pytest.raises(PoolMemoryError, match=r"; rank 1 reserves it all; ask rank 1$"),
    ):
        manager.empty(4 * MIB, dtype=torch.uint8, kind="scores")


def test_a_request_that_is_refused_at_first_and_then_served_leaves_no_cycle() -> None:
    pool = MemoryPool(LimitingAdaptor(HostBackend(), "2MiB"), mode="lightweight")
    gc.collect()
    gc.disable()
    try:
        cycle: list[object] = [pool.allocate("2MiB")]
        cycle.append(cycle)
        del cycle  # idle only after a collection, which the pool makes
        block = pool.allocate("2MiB")
        del block
        assert pool.statistics().allocated_bytes == 0
    finally:
        gc.enable()
