"""Tasks and threads wait for one another, and no event loop waits for itself."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest
import torch
from test_single_flight import PATIENCE, Held, assert_nothing_in_flight, begin, never, until

from dilated_pattern_cache import PatternCache

T = TypeVar("T")


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """In an event loop and a thread of its own, which must come to an end."""
    return begin(lambda: asyncio.run(main())).result(PATIENCE)


class HeldTask:
    """A ``create`` that awaits in its middle, until it is let go, and returns or raises ``outcome``."""

    def __init__(self, outcome: Any) -> None:
        self._outcome, self.calls = outcome, 0
        self._begun, self._go = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> Any:
        self.calls += 1
        self._begun.set()
        await asyncio.wait_for(self._go.wait(), PATIENCE)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    async def begin(self, cache: PatternCache[Any, Any], key: Any) -> asyncio.Task[Any]:
        """Have a task make ``key`` by it; return when it is in the middle of that."""
        task = asyncio.create_task(cache.aget_or_create(key, self))
        await asyncio.wait_for(self._begun.wait(), PATIENCE)
        return task

    def let_go(self) -> None:
        self._go.set()


async def reaches(condition: Callable[[], bool]) -> None:
    """Let other tasks run until it holds."""
    for _ in range(PATIENCE * 1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came to that")


async def waiters(
    cache: PatternCache[Any, Any], key: Any, number: int, create: Callable[[], Any] = never
) -> list[asyncio.Task[Any]]:
    """Tasks that wait for a key that is being made."""
    before = cache.info().waits
    tasks = [asyncio.create_task(cache.aget_or_create(key, create)) for _ in range(number)]
    await reaches(lambda: cache.info().waits == before + number)
    return tasks


async def with_patience(*tasks: asyncio.Task[Any], return_exceptions: bool = False) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=return_exceptions), PATIENCE)


# ------------------------------------------------------------------------------------------ one computation


def test_create_may_be_a_function_or_a_coroutine_function() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    async def main() -> None:
        assert await cache.aget_or_create("plain", lambda: 1) == 1
        assert await cache.aget_or_create("coroutine", lambda: double(1)) == 2
        assert await cache.aget_or_create("future", lambda: asyncio.ensure_future(double(2))) == 4
        assert await cache.aget_or_create("plain", never) == 1
        assert await cache.aget_or_create("coroutine", never) == 2

    cache: PatternCache[str, int] = PatternCache()
    run(main)
    info = cache.info()
    assert (info.misses, info.creations, info.hits, info.waits) == (3, 3, 2, 0)
    assert cache.get_or_create("future", never) == 4


def test_of_many_tasks_one_computes() -> None:
    async def main() -> None:
        held = HeldTask(value := object())
        tasks = [await held.begin(cache, "key"), *await waiters(cache, "key", 63)]
        held.let_go()
        assert all(result is value for result in await with_patience(*tasks))
        assert held.calls == 1

    cache: PatternCache[str, object] = PatternCache()
    run(main)
    info = cache.info()
    assert (info.misses, info.waits, info.hits) == (1, 63, 0)
    assert_nothing_in_flight(cache)


def test_different_keys_do_not_wait_for_one_another() -> None:
    async def main() -> None:
        held = HeldTask(1)
        first = await held.begin(cache, "first")
        assert await cache.aget_or_create("second", lambda: 2) == 2
        held.let_go()
        assert await with_patience(first) == [1]

    cache: PatternCache[str, int] = PatternCache()
    run(main)


def test_a_task_may_make_other_keys() -> None:
    async def fibonacci(n: int) -> int:
        async def create() -> int:
            return n if n < 2 else sum(await asyncio.gather(fibonacci(n - 1), fibonacci(n - 2)))

        return await cache.aget_or_create(n, create)

    cache: PatternCache[int, int] = PatternCache()
    assert run(lambda: fibonacci(15)) == 610
    assert cache.info().creations == len(cache) == 16


def test_what_is_cleared_while_it_is_made_is_not_kept() -> None:
    async def main() -> None:
        held = HeldTask("early")
        tasks = [await held.begin(cache, "key"), *await waiters(cache, "key", 2)]
        cache.clear()
        assert await cache.aget_or_create("key", lambda: "late") == "late"
        held.let_go()
        assert await with_patience(*tasks) == ["early"] * 3
        assert cache["key"] == "late"

    cache: PatternCache[str, str] = PatternCache()
    run(main)


def test_what_a_function_makes_has_no_graph() -> None:
    async def main() -> None:
        weight = torch.ones(3, requires_grad=True)
        assert not (await cache.aget_or_create("key", lambda: weight * 2)).requires_grad
        assert torch.is_grad_enabled()

    cache: PatternCache[str, torch.Tensor] = PatternCache()
    run(main)


# ------------------------------------------------------------------------------------------ exceptions


def test_a_waiter_gets_the_exception() -> None:
    async def main() -> None:
        held = HeldTask(error := ValueError("no such pattern"))
        tasks = [await held.begin(cache, "key"), *await waiters(cache, "key", 4)]
        in_a_thread = begin(lambda: cache.get_or_create("key", never))
        await reaches(lambda: cache.info().waits == 5)
        held.let_go()
        assert all(result is error for result in await with_patience(*tasks, return_exceptions=True))
        assert in_a_thread.exception(PATIENCE) is error
        assert await cache.aget_or_create("key", lambda: 1) == 1

    cache: PatternCache[str, int] = PatternCache()
    run(main)
    assert cache.info().failures == 1
    assert_nothing_in_flight(cache)


@pytest.mark.parametrize("error", [StopIteration(5), TimeoutError("late")], ids=repr)
def test_a_waiting_task_hears_of_every_exception_of_a_thread(error: Exception) -> None:
    async def main() -> None:
        held = Held(error)
        thread = held.begin(cache, "key")
        task = asyncio.create_task(cache.aget_or_create("key", never))
        await reaches(lambda: cache.info().waits == 1)
        held.let_go()
        assert thread.exception(PATIENCE) is error
        (result,) = await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), PATIENCE)
        assert isinstance(result, RuntimeError) if isinstance(error, StopIteration) else result is error

    cache: PatternCache[str, int] = PatternCache()
    run(main)


def test_a_task_that_is_cancelled_while_it_creates_hands_over_to_one_that_waits() -> None:
    async def main() -> None:
        held = HeldTask("never made")
        made = []

        async def create() -> object:
            made.append(value := object())
            await asyncio.sleep(0)
            return value

        first, others = await held.begin(cache, "key"), await waiters(cache, "key", 4, create)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        values = await with_patience(*others)
        assert len(made) == 1
        assert all(value is made[0] for value in values)
        assert cache["key"] is made[0]

    cache: PatternCache[str, object] = PatternCache()
    run(main)
    assert_nothing_in_flight(cache)


def test_a_task_that_is_cancelled_hands_over_to_a_thread_that_waits() -> None:
    async def main() -> None:
        held = HeldTask("never made")
        first = await held.begin(cache, "key")
        other = begin(lambda: cache.get_or_create("key", lambda: "made"))
        await reaches(lambda: cache.info().waits == 1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert other.result(PATIENCE) == "made"

    cache: PatternCache[str, str] = PatternCache()
    run(main)
    assert_nothing_in_flight(cache)


def test_a_waiting_task_that_is_cancelled_disturbs_nobody() -> None:
    async def main() -> None:
        held = HeldTask("value")
        first, others = await held.begin(cache, "key"), await waiters(cache, "key", 4)
        others[0].cancel()
        others[2].cancel()
        await asyncio.wait([others[0], others[2]], timeout=PATIENCE)
        assert others[0].cancelled()
        assert others[2].cancelled()
        assert not first.done()
        held.let_go()
        assert await with_patience(first, others[1], others[3]) == ["value"] * 3
        assert held.calls == 1

    cache: PatternCache[str, str] = PatternCache()
    run(main)
    assert_nothing_in_flight(cache)


def test_a_loop_that_ends_leaves_nothing_being_made() -> None:
    async def main() -> None:
        await HeldTask("never made").begin(cache, "key")

    cache: PatternCache[str, str] = PatternCache()
    run(main)
    assert_nothing_in_flight(cache)
    assert cache.get_or_create("key", lambda: "made") == "made"


# ------------------------------------------------------------------------------------------ circles


def test_a_task_that_asks_for_its_own_key_raises() -> None:
    async def recurse() -> Any:
        return await cache.aget_or_create("key", never)

    async def main() -> None:
        with pytest.raises(RuntimeError, match="'key' is needed to make itself"):
            await asyncio.wait_for(cache.aget_or_create("key", recurse), PATIENCE)
        assert await cache.aget_or_create("key", lambda: 1) == 1

    cache: PatternCache[str, int] = PatternCache()
    run(main)


@pytest.mark.parametrize("length", [2, 3])
def test_a_circle_of_tasks_is_an_error_and_no_silence(length: int) -> None:
    async def make(number: int) -> Any:
        async def create() -> Any:
            await asyncio.sleep(0.01)
            return await cache.aget_or_create((number + 1) % length, never)

        return await cache.aget_or_create(number, create)

    async def main() -> None:
        tasks = [asyncio.create_task(make(number)) for number in range(length)]
        results = await with_patience(*tasks, return_exceptions=True)
        assert all(isinstance(result, RuntimeError) for result in results)

    cache: PatternCache[int, Any] = PatternCache()
    run(main)
    assert_nothing_in_flight(cache)


def test_a_circle_of_a_task_and_a_thread_is_an_error_and_no_silence() -> None:
    async def main() -> None:
        held = HeldTask("never made")

        async def create() -> Any:
            await held()
            return await cache.aget_or_create("thread", never)

        task = asyncio.create_task(cache.aget_or_create("task", create))
        await reaches(lambda: held.calls == 1)
        thread = begin(lambda: cache.get_or_create("thread", lambda: cache.get_or_create("task", never)))
        await reaches(lambda: cache.info().waits == 1)
        held.let_go()
        (result,) = await with_patience(task, return_exceptions=True)
        assert isinstance(result, RuntimeError)
        assert isinstance(thread.exception(PATIENCE), RuntimeError)

    cache: PatternCache[str, Any] = PatternCache()
    run(main)
    assert_nothing_in_flight(cache)


def test_to_block_on_a_task_of_the_same_loop_raises() -> None:
    async def main() -> None:
        held = HeldTask("value")
        first = await held.begin(cache, "key")
        with pytest.raises(RuntimeError, match="'key' is needed to make itself"):
            cache.get_or_create("key", never)
        held.let_go()
        assert await with_patience(first) == ["value"]
        assert cache.get_or_create("key", never) == "value"

    cache: PatternCache[str, str] = PatternCache()
    run(main)


def test_to_block_on_a_thread_that_waits_for_a_task_of_the_same_loop_raises() -> None:
    async def main() -> None:
        held = HeldTask("task")
        first = await held.begin(cache, "task")
        other = begin(lambda: cache.get_or_create("thread", lambda: cache.get_or_create("task", never)))
        await reaches(lambda: cache.info().waits == 1)
        with pytest.raises(RuntimeError, match="'thread' is needed to make itself"):
            cache.get_or_create("thread", never)
        held.let_go()
        assert await with_patience(first) == ["task"]
        assert other.result(PATIENCE) == "task"

    cache: PatternCache[str, str] = PatternCache()
    run(main)


# ------------------------------------------------------------------------------------------ threads and loops


def test_tasks_wait_for_a_thread() -> None:
    async def main() -> None:
        held = Held(value := object())
        thread = held.begin(cache, "key")
        tasks = await waiters(cache, "key", 4)  # the loop goes on meanwhile
        held.let_go()
        assert all(result is value for result in await with_patience(*tasks))
        assert thread.result(PATIENCE) is value

    cache: PatternCache[str, object] = PatternCache()
    run(main)


def test_threads_wait_for_a_task() -> None:
    async def main() -> None:
        held = HeldTask(value := object())
        task = await held.begin(cache, "key")
        threads = [begin(lambda: cache.get_or_create("key", never)) for _ in range(4)]
        await reaches(lambda: cache.info().waits == 4)
        held.let_go()
        assert (await with_patience(task))[0] is value
        assert all(thread.result(PATIENCE) is value for thread in threads)

    cache: PatternCache[str, object] = PatternCache()
    run(main)


def test_a_task_waits_for_a_task_of_another_loop() -> None:
    begun, go = threading.Event(), threading.Event()

    async def make() -> str:
        async def create() -> str:
            begun.set()
            await reaches(go.is_set)
            return "value"

        return await cache.aget_or_create("key", create)

    async def wait() -> list[str]:
        tasks = await waiters(cache, "key", 4)
        go.set()
        return await with_patience(*tasks)

    cache: PatternCache[str, str] = PatternCache()
    maker = begin(lambda: asyncio.run(make()))
    assert begun.wait(PATIENCE)
    assert run(wait) == ["value"] * 4
    assert maker.result(PATIENCE) == "value"


def test_a_circle_of_two_loops_is_an_error_and_no_silence() -> None:
    together = threading.Barrier(2)

    async def make(mine: str, other: str) -> Any:
        async def create() -> Any:
            await asyncio.get_running_loop().run_in_executor(None, together.wait, PATIENCE)
            return await cache.aget_or_create(other, never)

        return await cache.aget_or_create(mine, create)

    cache: PatternCache[str, Any] = PatternCache()
    futures = [begin(lambda: asyncio.run(make("a", "b"))), begin(lambda: asyncio.run(make("b", "a")))]
    assert all(isinstance(future.exception(PATIENCE), RuntimeError) for future in futures)
    assert_nothing_in_flight(cache)


def test_two_loops_and_four_threads_make_every_key_once() -> None:
    keys, made = range(200), []

    async def create(key: int) -> int:
        made.append(key)
        await asyncio.sleep(0)
        return -key

    def create_here(key: int) -> int:
        made.append(key)
        return -key

    async def tasks() -> list[int]:
        wanted = [cache.aget_or_create(key, lambda key=key: create(key)) for key in keys]  # type: ignore[misc]
        return await asyncio.wait_for(asyncio.gather(*wanted), PATIENCE)

    def thread() -> list[int]:
        return [cache.get_or_create(key, lambda key=key: create_here(key)) for key in keys]  # type: ignore[misc]

    cache: PatternCache[int, int] = PatternCache(None)
    futures = [begin(lambda: asyncio.run(tasks())) for _ in range(2)] + [begin(thread) for _ in range(4)]
    assert all(future.result(PATIENCE) == [-key for key in keys] for future in futures)
    assert sorted(made) == list(keys)
    info = cache.info()
    assert info.hits + info.misses + info.waits == 6 * len(keys)
    until(lambda: not cache._store.masters.flights)
    assert_nothing_in_flight(cache)
