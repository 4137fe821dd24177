"""A limit holds at every moment, in every thread; what is asked for at it comes from what nobody uses."""

from __future__ import annotations

import random
import threading
import weakref
from contextlib import suppress
from typing import Any

import pytest
from conftest import MODES, SMALL_ARENA, MakePool, Mode
from pool_checks import PATIENCE, assert_consistent, assert_drained, in_threads
from test_conformance import Cycle

from dilated_memory_pool import MemoryPool, PoolLimitError, PoolStatistics
from dilated_memory_pool.backends import HostBackend
from dilated_memory_pool.backends.host import HostMemory

LIMIT = 2**20
HALF = LIMIT // 2


class CountingBackend(HostBackend):
    """Counts what is mapped, from before a mapping is made until after it is gone; a lock that nobody else takes."""

    def __init__(self) -> None:
        super().__init__(huge_pages=False)
        self.live = self.most = 0
        self._lock = threading.RLock()

    def allocate(self, nbytes: int) -> HostMemory:
        self._add(nbytes)
        memory = super().allocate(nbytes)
        weakref.finalize(memory, self._add, -nbytes)
        return memory

    def _add(self, nbytes: int) -> None:
        with self._lock:
            self.live += nbytes
            self.most = max(self.most, self.live)


def counted(mode: Mode) -> tuple[MemoryPool, CountingBackend]:
    backend = CountingBackend()
    options: dict[str, Any] = {"arena_bytes": SMALL_ARENA} if mode == "full" else {}
    return MemoryPool(backend, mode=mode, limit=LIMIT, min_bytes=0, **options), backend


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_limit_is_never_exceeded_under_eight_threads(mode: Mode) -> None:
    pool, backend = counted(mode)
    sampled, done = threading.Event(), threading.Event()
    samples: list[int] = []

    def sample() -> None:
        while True:
            samples.append(pool.statistics().reserved_bytes)
            samples.append(backend.live)
            sampled.set()
            if done.wait(0.001):
                break

    def work(number: int) -> None:
        dice = random.Random(number)
        kept: list[Any] = []
        for _ in range(150):
            with suppress(PoolLimitError):
                kept.append(pool.allocate(dice.choice([1, 5000, 20_000, 90_000, 300_000])))
            if dice.random() < 0.6 and kept:
                owner = kept.pop(dice.randrange(len(kept)))
                if dice.random() < 0.1:
                    Cycle(owner)
                del owner

    kept_all_along = pool.allocate(1)
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    assert sampled.wait(PATIENCE)
    try:
        in_threads(work, 8)
    finally:
        done.set()
    sampler.join(PATIENCE)
    assert not sampler.is_alive(), "deadlock"
    assert 0 < max(samples) <= LIMIT
    assert HALF < backend.most <= LIMIT
    assert pool.statistics().peak_reserved_bytes <= LIMIT
    del kept_all_along
    assert_drained(pool)
    assert backend.live == 0


def test_the_error_tells_the_numbers_and_the_pool_goes_on(make: MakePool) -> None:
    pool = make(limit=LIMIT, size_classes="exact")
    block = pool.allocate(HALF)
    with pytest.raises(PoolLimitError, match="the pool's limit is reached") as caught:
        pool.allocate(HALF + 1)
    error = caught.value
    assert (error.requested, error.allocated, error.reserved, error.limit) == (HALF + 1, HALF, HALF, LIMIT)
    assert error.largest_free == 0
    assert pool.statistics().ooms == 1
    assert_consistent(pool)
    smaller = pool.allocate(HALF)
    assert pool.statistics().reserved_bytes == LIMIT
    del block, smaller, error, caught
    assert_drained(pool)


@pytest.mark.parametrize("nbytes", [LIMIT + 1, 2**80])
def test_more_than_the_limit_is_refused(make: MakePool, nbytes: int) -> None:
    pool = make(limit=LIMIT)
    with pytest.raises(PoolLimitError):
        pool.allocate(nbytes)
    assert_drained(pool)


def test_the_whole_limit_can_be_used(make: MakePool) -> None:
    pool = make(limit=LIMIT)
    block = pool.allocate(LIMIT)
    assert block.nbytes == pool.statistics().reserved_bytes == LIMIT


@pytest.mark.usefixtures("no_gc")
def test_at_the_limit_idle_memory_of_other_sizes_is_given_back(make: MakePool) -> None:
    pool = make(limit=LIMIT)
    for nbytes in (100_000, 200_000, 300_000):
        pool.allocate(nbytes)
    assert pool.allocate(LIMIT).nbytes == LIMIT
    assert pool.statistics().trims > 0
    assert pool.statistics().ooms == 0


@pytest.mark.usefixtures("no_gc")
def test_at_the_limit_garbage_is_collected(make: MakePool) -> None:
    pool = make(limit=LIMIT)
    Cycle(pool.allocate(HALF))
    Cycle(pool.empty(HALF // 8))
    assert pool.allocate(LIMIT).nbytes == LIMIT
    assert pool.statistics().ooms == 0


def test_a_lower_limit_gives_back_what_is_idle_and_leaves_the_rest(make: MakePool) -> None:
    pool = make(size_classes="exact")
    kept = pool.allocate(HALF)
    pool.allocate(LIMIT)
    pool.set_limit(HALF // 2)
    assert pool.statistics().reserved_bytes == HALF
    with pytest.raises(PoolLimitError):
        pool.allocate(HALF // 4)
    del kept
    assert pool.allocate(HALF // 4).nbytes == HALF // 4
    pool.set_limit(None)
    assert pool.allocate(2 * LIMIT).nbytes == 2 * LIMIT


@pytest.mark.usefixtures("no_gc")
def test_the_same_requests_give_the_same_numbers(make: MakePool) -> None:
    def outcome() -> PoolStatistics:
        pool, dice, requests = make(), random.Random(0), 0
        kept: list[Any] = []
        for _ in range(300):
            if dice.random() < 0.6:
                kept.append(pool.allocate(dice.randint(1, 50_000)))
                requests += 1
            elif kept:
                del kept[dice.randrange(len(kept))]
        numbers = assert_consistent(pool).statistics
        assert numbers.hits + numbers.misses == requests
        assert numbers.hits > 0
        return numbers

    assert outcome() == outcome()
