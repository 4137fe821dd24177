"""What many want at once is made once: who waits, who gets what, and who is told that it waits for itself."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from types import FrameType
from typing import Any, TypeVar

import pytest

from dilated_pattern_cache import Eviction, PatternCache
from dilated_pattern_cache.storage.flights import _awaited

T = TypeVar("T")
PATIENCE = 60  # seconds, before a test calls it a deadlock
TRAMPLING = 64


def begin(call: Callable[[], T]) -> Future[T]:
    """Run it in a thread of its own, which nobody waits for but through ``result(PATIENCE)``."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            value = call()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(value)

    threading.Thread(target=run, daemon=True).start()
    return future


def until(condition: Callable[[], bool]) -> None:
    """Return once it holds."""
    last = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < last, "it never came to that"
        time.sleep(0.001)


class Held:
    """A ``create`` that waits in its middle, until it is let go, and returns or raises ``outcome``."""

    def __init__(self, outcome: Any) -> None:
        self._outcome, self.calls = outcome, 0
        self.begun, self._go = threading.Event(), threading.Event()

    def __call__(self) -> Any:
        self.calls += 1
        self.begun.set()
        assert self._go.wait(PATIENCE)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def begin(self, cache: PatternCache[Any, Any], key: Any) -> Future[Any]:
        """Have a thread make ``key`` by it; return when it is in the middle of that."""
        future = begin(lambda: cache.get_or_create(key, self))
        assert self.begun.wait(PATIENCE)
        return future

    def let_go(self) -> None:
        self._go.set()


def never() -> Any:
    raise AssertionError("nobody needs this")


def waiters(cache: PatternCache[Any, Any], key: Any, number: int) -> list[Future[Any]]:
    """Threads that wait for a key that is being made."""
    before = cache.info().waits
    futures = [begin(lambda: cache.get_or_create(key, never)) for _ in range(number)]
    until(lambda: cache.info().waits == before + number)
    return futures


def assert_nothing_in_flight(cache: PatternCache[Any, Any]) -> None:
    assert cache._store.masters.flights == {}
    assert _awaited == {}


# ------------------------------------------------------------------------------------------ one computation


def test_a_stampede_on_one_key_makes_it_once() -> None:
    cache: PatternCache[str, object] = PatternCache()
    start = threading.Barrier(TRAMPLING)

    def create() -> object:
        made.append(threading.get_ident())
        return object()

    def trample() -> object:
        start.wait(PATIENCE)
        return cache.get_or_create("key", create)

    made: list[int] = []
    futures = [begin(trample) for _ in range(TRAMPLING)]
    assert len({id(future.result(PATIENCE)) for future in futures}) == len(made) == 1
    info = cache.info()
    assert (info.misses, info.creations, info.bypasses, info.failures) == (1, 1, 0, 0)
    assert info.hits + info.misses + info.waits == TRAMPLING
    assert_nothing_in_flight(cache)


def test_all_who_come_meanwhile_wait() -> None:
    cache: PatternCache[str, object] = PatternCache()
    held = Held(value := object())
    first = held.begin(cache, "key")
    others = waiters(cache, "key", TRAMPLING - 1)
    held.let_go()
    assert all(future.result(PATIENCE) is value for future in [first, *others])
    info = cache.info()
    assert (held.calls, info.misses, info.waits, info.hits) == (1, 1, TRAMPLING - 1, 0)


def test_different_keys_do_not_wait_for_one_another() -> None:
    cache: PatternCache[int, int] = PatternCache()
    together = threading.Barrier(8)  # passed only when all eight are in their create

    def make(number: int) -> int:
        def create() -> int:
            together.wait(PATIENCE)
            return number

        return cache.get_or_create(number, create)

    futures = [begin(lambda number=number: make(number)) for number in range(8)]  # type: ignore[misc]
    assert [future.result(PATIENCE) for future in futures] == list(range(8))


def test_a_create_runs_outside_of_the_lock() -> None:
    cache: PatternCache[str, Any] = PatternCache()
    cache.put("there", 1)
    held = Held(2)
    first = held.begin(cache, "key")

    def everything() -> None:
        assert cache["there"] == 1
        cache.put("new", 3)
        assert cache.get_or_create("other", lambda: 4) == 4
        cache.pin("new")
        cache.unpin("new")
        del cache["other"]
        assert cache.popitem()[0] in ("there", "new")
        assert "key" not in cache
        cache.info()
        cache.snapshot()
        cache.clear()

    begin(everything).result(PATIENCE)
    held.let_go()
    assert first.result(PATIENCE) == 2


# ------------------------------------------------------------------------------------------ exceptions


def test_a_waiter_gets_the_exception() -> None:
    cache: PatternCache[str, int] = PatternCache()
    held = Held(error := ValueError("no such pattern"))
    futures = [held.begin(cache, "key"), *waiters(cache, "key", 8)]
    held.let_go()
    assert all(future.exception(PATIENCE) is error for future in futures)
    assert cache.info().failures == held.calls == 1
    assert_nothing_in_flight(cache)


def test_an_exception_is_not_kept() -> None:
    cache: PatternCache[str, int] = PatternCache()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            cache.get_or_create("key", lambda: 1 // 0)
    assert cache.get_or_create("key", lambda: 5) == 5
    assert (cache.info().failures, cache.info().misses) == (2, 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_is_for_its_own_thread_and_a_waiter_goes_on(error: type[BaseException]) -> None:
    cache: PatternCache[str, Any] = PatternCache()
    interrupted, made = Held(error()), []

    def create() -> object:
        made.append(value := object())
        return value

    first = interrupted.begin(cache, "key")
    others = [begin(lambda: cache.get_or_create("key", create)) for _ in range(8)]
    until(lambda: cache.info().waits == 8)
    interrupted.let_go()
    assert isinstance(first.exception(PATIENCE), error)
    assert {id(future.result(PATIENCE)) for future in others} == {id(value) for value in made}
    assert len(made) == 1
    assert_nothing_in_flight(cache)


# ------------------------------------------------------------------------------------------ circles


def test_a_create_that_asks_for_its_own_key_raises() -> None:
    cache: PatternCache[str, int] = PatternCache()
    with pytest.raises(RuntimeError, match="'key' is needed to make itself"):
        cache.get_or_create("key", lambda: cache.get_or_create("key", never))
    assert cache.get_or_create("key", lambda: 1) == 1
    assert_nothing_in_flight(cache)


def test_a_create_may_do_without_its_own_key() -> None:
    cache: PatternCache[str, int] = PatternCache()

    def create() -> int:
        with pytest.raises(RuntimeError):
            cache.get_or_create("key", never)
        return 7

    assert cache.get_or_create("key", create) == 7
    assert cache["key"] == 7


def test_recursion_through_another_key_raises() -> None:
    cache: PatternCache[str, int] = PatternCache()

    def one() -> int:
        return cache.get_or_create("two", two)

    def two() -> int:
        return cache.get_or_create("one", one)

    with pytest.raises(RuntimeError, match="'one' is needed"):
        cache.get_or_create("one", one)
    assert list(cache) == []
    assert_nothing_in_flight(cache)


def test_a_create_may_make_other_keys() -> None:
    cache: PatternCache[int, int] = PatternCache()

    def fibonacci(n: int) -> int:
        return cache.get_or_create(n, lambda: n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2))

    assert fibonacci(30) == 832040
    assert cache.info().creations == len(cache) == 31


@pytest.mark.parametrize("length", [2, 3])
@pytest.mark.parametrize("shared", [True, False], ids=["one cache", "a cache each"])
def test_a_circle_of_threads_is_an_error_and_no_silence(length: int, shared: bool) -> None:
    cache: PatternCache[int, Any] = PatternCache()
    caches = [cache if shared else PatternCache() for _ in range(length)]
    together = threading.Barrier(length)

    def make(number: int) -> Any:
        def create() -> Any:
            together.wait(PATIENCE)
            after = (number + 1) % length
            return caches[after].get_or_create(after, never)

        return caches[number].get_or_create(number, create)

    for _ in range(10):
        futures = [begin(lambda number=number: make(number)) for number in range(length)]  # type: ignore[misc]
        assert all(isinstance(future.exception(PATIENCE), RuntimeError) for future in futures)
        for each in caches:
            assert_nothing_in_flight(each)
    assert [each.get_or_create(number, lambda: 1) for number, each in enumerate(caches)] == [1] * length


def test_one_of_a_circle_may_do_without_and_all_get_their_values() -> None:
    cache: PatternCache[str, str] = PatternCache()
    together = threading.Barrier(2)

    def make(mine: str, other: str) -> str:
        def create() -> str:
            together.wait(PATIENCE)
            try:
                return mine + cache.get_or_create(other, never)
            except RuntimeError:
                return mine

        return cache.get_or_create(mine, create)

    futures = [begin(lambda: make("a", "b")), begin(lambda: make("b", "a"))]
    values = [future.result(PATIENCE) for future in futures]
    assert values in (["a", "ba"], ["ab", "b"], ["a", "b"])
    assert dict(cache.items()) == dict(zip("ab", values, strict=True))


def test_a_long_chain_is_no_circle() -> None:
    cache: PatternCache[int, int] = PatternCache()
    held = Held(0)
    last = held.begin(cache, 0)

    def link(number: int) -> int:
        return cache.get_or_create(number, lambda: cache.get_or_create(number - 1, never) + 1)

    chain = []
    for number in range(1, 20):
        chain.append(begin(lambda number=number: link(number)))  # type: ignore[misc]
        until(lambda number=number: cache.info().waits == number)  # type: ignore[misc]
    held.let_go()
    assert last.result(PATIENCE) == 0
    assert [future.result(PATIENCE) for future in chain] == list(range(1, 20))


def test_who_has_landed_and_waits_for_something_else_closes_no_circle() -> None:
    """At every line of the search, the other lands what is waited for, and then waits for the one who searches."""

    def first_then_second(cache: PatternCache[str, int], held: Held) -> int:
        return cache.get_or_create("first", held) + cache.get_or_create("second", never)

    def attempt(at: int) -> bool:
        passed = 0

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            return step if frame.f_code.co_name == "waiting" else None

        def step(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal passed
            passed += event == "line"
            if event == "line" and passed == at + 1:
                held.let_go()
                until(lambda: any(worker.thread != threading.get_ident() for worker in list(_awaited)))
            elif event == "return":  # it found nothing, and waits now
                held.let_go()
            return step

        def second() -> int:
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                return cache.get_or_create("first", never)
            finally:
                sys.settrace(before)

        cache: PatternCache[str, int] = PatternCache()
        held = Held(1)
        other = begin(lambda: first_then_second(cache, held))
        assert held.begun.wait(PATIENCE)
        assert cache.get_or_create("second", second) == 1
        assert other.result(PATIENCE) == 2
        return passed > at

    at = 0
    while attempt(at):
        at += 1
    assert at > 4


# ------------------------------------------------------------------------------------------ overtaken


@pytest.mark.parametrize("overtake", ["put", "clear"])
def test_what_is_overtaken_goes_to_its_waiters_and_is_not_kept(overtake: str) -> None:
    cache: PatternCache[str, str] = PatternCache()
    early, late = Held("early"), Held("late")
    futures, anew = [early.begin(cache, "key"), *waiters(cache, "key", 4)], list[Future[Any]]()
    if overtake == "put":
        cache.put("key", "put")
        assert cache.get_or_create("key", never) == "put"
    else:
        cache.clear()
        anew = [late.begin(cache, "key"), *waiters(cache, "key", 4)]  # they do not wait for the early one
    early.let_go()
    assert [future.result(PATIENCE) for future in futures] == ["early"] * 5
    if overtake == "put":
        assert cache["key"] == "put"
    else:
        assert "key" not in cache
        late.let_go()
        assert [future.result(PATIENCE) for future in anew] == ["late"] * 5
        assert cache["key"] == "late"
    assert_nothing_in_flight(cache)


@pytest.mark.parametrize("delete", ["del", "pop", "put and del"])
def test_what_is_deleted_while_it_is_made_is_not_kept(delete: str) -> None:
    cache: PatternCache[str, str] = PatternCache()
    early = Held("early")
    futures = [early.begin(cache, "key"), *waiters(cache, "key", 4)]
    if delete == "del":
        with pytest.raises(KeyError):
            del cache["key"]
    elif delete == "pop":
        assert cache.pop("key", "nothing") == "nothing"
    else:
        cache.put("key", "put")
        del cache["key"]
    early.let_go()
    assert [future.result(PATIENCE) for future in futures] == ["early"] * 5
    assert "key" not in cache
    assert cache.get_or_create("key", lambda: "late") == "late"


def test_an_exception_of_what_is_overtaken_reaches_its_waiters_alone() -> None:
    cache: PatternCache[str, str] = PatternCache()
    held = Held(error := ValueError("late"))
    futures = [held.begin(cache, "key"), *waiters(cache, "key", 4)]
    cache.put("key", "put")
    held.let_go()
    assert all(future.exception(PATIENCE) is error for future in futures)
    assert cache.get_or_create("key", never) == "put"


@pytest.mark.parametrize("reason", ["too large", "all pinned", "no entries"])
def test_what_cannot_be_kept_reaches_all_waiters(reason: str) -> None:
    cache: PatternCache[str, bytes] = PatternCache(0 if reason == "no entries" else 1, max_bytes=100)
    if reason == "all pinned":
        cache.put("pinned", b"")
        cache.pin("pinned")
    value = bytes(1000 if reason == "too large" else 1)
    held = Held(value)
    futures = [held.begin(cache, "key"), *waiters(cache, "key", 4)]
    held.let_go()
    assert all(future.result(PATIENCE) is value for future in futures)
    assert "key" not in cache
    assert cache.info().rejections == 1
    assert_nothing_in_flight(cache)


# ------------------------------------------------------------------------------------------ callbacks


def test_an_exception_of_on_evict_reaches_who_evicts_and_no_waiter() -> None:
    def refuse(eviction: Eviction) -> None:
        raise LookupError(eviction.entry.key)

    cache: PatternCache[str, int] = PatternCache(1, on_evict=refuse)
    cache.put("old", 1)
    held = Held(2)
    first, others = held.begin(cache, "new"), waiters(cache, "new", 4)
    held.let_go()
    assert repr(first.exception(PATIENCE)) == "LookupError('old')"
    assert [future.result(PATIENCE) for future in others] == [2] * 4
    assert dict(cache.items()) == {"new": 2}
    assert (cache.info().creations, cache.info().failures) == (1, 0)
    assert_nothing_in_flight(cache)


def test_callbacks_may_use_the_cache() -> None:
    seen: list[Any] = []

    def meddle(eviction: Eviction) -> None:
        key = eviction.entry.key
        seen.append(key)
        assert key not in cache
        cache.info()
        cache.snapshot()
        if len(seen) < 5:
            cache.put(("again", key), 0)
            cache.get_or_create(("more", key), lambda: 0)
        else:
            cache.clear()

    def size_of(value: int) -> int:
        return len(cache) + 1

    cache: PatternCache[Any, int] = PatternCache(2, on_evict=meddle, size_of=size_of)
    for number in range(3):
        begin(lambda number=number: cache.put(number, 0)).result(PATIENCE)  # type: ignore[misc]
    assert len(seen) >= 5
    assert len(cache) <= 2


def test_another_thread_may_use_the_cache_while_a_callback_waits_for_it() -> None:
    def ask(eviction: Eviction) -> None:
        seen.append(begin(lambda: cache.get_or_create("other", lambda: 3)).result(PATIENCE))

    seen: list[int] = []
    cache: PatternCache[str, int] = PatternCache(1, on_evict=ask)
    cache.put("one", 1)
    cache.put("two", 2)
    assert seen[0] == 3


# ------------------------------------------------------------------------------------------ warming


@pytest.mark.parametrize("workers", [1, 4])
def test_warm_makes_what_is_not_there(workers: int) -> None:
    cache: PatternCache[int, int] = PatternCache()
    cache.put(3, 33)
    here, told = threading.get_ident(), []

    def progress(done: int, total: int, key: int) -> None:
        assert threading.get_ident() == here
        assert key in cache
        told.append((done, total, key))

    patterns = {key: (lambda key=key: key * 10) for key in range(20)}
    report = cache.warm(patterns, workers=workers, progress=progress)
    assert (report.created, report.found, report.rejected, report.evicted) == (19, 1, 0, 0)
    assert dict(cache.items()) == {key: 33 if key == 3 else key * 10 for key in range(20)}
    assert [(done, total) for done, total, _ in told] == [(done, 20) for done in range(1, 21)]
    assert {key for _, _, key in told} == set(range(20))
    if workers == 1:
        assert all(before[2] < after[2] for before, after in pairwise(told))
    again = cache.warm(patterns.items(), workers=workers)
    assert (again.created, again.found) == (0, 20)


@pytest.mark.parametrize("workers", [1, 4])
def test_warm_counts_what_it_could_not_keep(workers: int) -> None:
    cache: PatternCache[int, bytes] = PatternCache(4, max_bytes=100)
    report = cache.warm(((key, lambda: bytes(1000)) for key in range(3)), workers=workers)
    assert (report.created, report.rejected, report.evicted) == (3, 3, 0)
    report = cache.warm(((key, lambda: b"x") for key in range(10)), workers=workers)
    assert (report.created, report.rejected, report.evicted) == (10, 0, 6)


@pytest.mark.parametrize("workers", [1, 4])
def test_warm_may_pin(workers: int) -> None:
    cache: PatternCache[int, int] = PatternCache(4)
    report = cache.warm(((key, lambda: 0) for key in range(4)), workers=workers, pin=True)
    assert report.created == 4
    assert all(entry.pinned for entry in cache.snapshot())


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once what no worker of warming has begun is cancelled."""
    cancelled = threading.Event()

    class Watched(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            cancelled.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr("dilated_pattern_cache.warming.ThreadPoolExecutor", Watched)
    return cancelled


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_stops_warming(stopped: threading.Event, workers: int) -> None:
    cache: PatternCache[int, int] = PatternCache(max_entries=None)

    def create() -> int:
        assert stopped.wait(PATIENCE)
        return 0

    patterns = [(0, lambda: 1 // 0)] + [(key, create) for key in range(1, 100)]
    with pytest.raises(ZeroDivisionError):
        cache.warm(patterns, workers=workers)
    assert len(cache) <= (0 if workers == 1 else workers)
    assert_nothing_in_flight(cache)


@pytest.mark.parametrize("workers", [1, 4])
def test_what_progress_raises_stops_warming(stopped: threading.Event, workers: int) -> None:
    cache: PatternCache[int, int] = PatternCache(max_entries=None)

    def create(key: int) -> int:
        assert key == 0 or stopped.wait(PATIENCE)
        return 0

    def progress(done: int, total: int, key: int) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        cache.warm([(key, partial(create, key)) for key in range(100)], workers=workers, progress=progress)
    assert len(cache) <= (1 if workers == 1 else 1 + workers)


def test_two_may_warm_the_same_at_once() -> None:
    cache: PatternCache[int, int] = PatternCache()
    patterns = {key: (lambda key=key: key) for key in range(50)}
    futures = [begin(lambda: cache.warm(patterns, workers=2)) for _ in range(4)]
    reports = [future.result(PATIENCE) for future in futures]
    assert sum(report.created for report in reports) == cache.info().creations == 50
    assert all(report.created + report.found == 50 for report in reports)
