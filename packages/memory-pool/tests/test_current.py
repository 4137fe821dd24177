"""The current pool: nested, by thread, by asyncio task."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from pool_checks import PATIENCE

from dilated_memory_pool import MemoryPool, current_pool, use_pool


@pytest.fixture
def pools() -> tuple[MemoryPool, MemoryPool]:
    return MemoryPool("host"), MemoryPool("host")


def test_there_is_none_at_first() -> None:
    assert current_pool() is None


def test_the_innermost_wins_and_the_outer_comes_back(pools: tuple[MemoryPool, MemoryPool]) -> None:
    outer, inner = pools
    with use_pool(outer) as given:
        assert given is outer
        with use_pool(inner):
            assert current_pool() is inner
            with use_pool(None) as hidden:
                assert hidden is None
                assert current_pool() is None
            assert current_pool() is inner
        assert current_pool() is outer
        with use_pool(outer):
            assert current_pool() is outer
        assert current_pool() is outer
    assert current_pool() is None


def test_an_exception_passes_and_restores(pools: tuple[MemoryPool, MemoryPool]) -> None:
    with use_pool(pools[0]):
        with pytest.raises(KeyError, match="mine"), use_pool(pools[1]):
            raise KeyError("mine")
        assert current_pool() is pools[0]


def test_a_current_pool_may_be_closed_inside(pools: tuple[MemoryPool, MemoryPool]) -> None:
    with pools[0] as pool, use_pool(pool):
        pass
    with use_pool(pool):
        assert current_pool() is pool
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.allocate(1)


def test_other_threads_have_their_own(pools: tuple[MemoryPool, MemoryPool]) -> None:
    seen: list[MemoryPool | None] = []
    barrier = threading.Barrier(2)

    def work(pool: MemoryPool) -> bool:
        seen.append(current_pool())
        with use_pool(pool):
            barrier.wait(PATIENCE)
            inside = current_pool() is pool
            barrier.wait(PATIENCE)
        return inside and current_pool() is None

    with use_pool(MemoryPool("host")), ThreadPoolExecutor(2) as executor:
        assert list(executor.map(work, pools)) == [True, True]
    assert seen == [None, None]


def test_a_thread_may_be_given_a_copy_of_the_context(pools: tuple[MemoryPool, MemoryPool]) -> None:
    with use_pool(pools[0]), ThreadPoolExecutor(1) as executor:
        context = contextvars.copy_context()
        assert executor.submit(context.run, current_pool).result() is pools[0]


def test_tasks_inherit_and_do_not_disturb_each_other(pools: tuple[MemoryPool, MemoryPool]) -> None:
    async def task(pool: MemoryPool, inherited: MemoryPool) -> bool:
        before = current_pool() is inherited
        with use_pool(pool):
            await asyncio.sleep(0)
            during = current_pool() is pool
            await asyncio.sleep(0)
        return before and during and current_pool() is inherited

    async def main() -> list[bool]:
        outer = MemoryPool("host")
        with use_pool(outer):
            results = await asyncio.gather(*(task(pool, outer) for pool in pools * 5))
            assert current_pool() is outer
            assert await asyncio.to_thread(current_pool) is outer
        return results

    assert asyncio.run(main()) == [True] * 10
    assert current_pool() is None


def test_a_generator_in_one_task_is_as_a_block_in_it(pools: tuple[MemoryPool, MemoryPool]) -> None:
    async def steps() -> AsyncIterator[MemoryPool | None]:
        with use_pool(pools[0]):
            yield current_pool()
        yield current_pool()

    async def main() -> list[MemoryPool | None]:
        return [pool async for pool in steps()]

    assert asyncio.run(main()) == [pools[0], None]
