"""Finalisers, signal handlers and KeyboardInterrupt, in the middle of the cache's work."""

from __future__ import annotations

import ast
import gc
import random
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache as cached
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from test_processes import run
from test_single_flight import PATIENCE, Held, begin, never, until
from test_threads import FILES, OPERATIONS, AtLine, assert_consistent, filled, in_turn, outcome

from dilated_pattern_cache import PatternCache

# ------------------------------------------------------------------------------------------ at every line


@pytest.mark.slow
@pytest.mark.parametrize("present", [True, False], ids=["present", "absent"])
@pytest.mark.parametrize("ours", OPERATIONS)
def test_an_interrupting_call_is_done_now_or_right_after(ours: str, present: bool) -> None:
    """At every line of our operation a call comes in between by the same thread, as a signal handler's does.

    What it looks for in the middle of a change need not be found, and what it makes then need not be kept. What it
    stores or removes is stored or removed.
    """

    def strike() -> None:
        with suppress(RuntimeError):  # it asks for what the thread is making, or for the next to leave at a bad moment
            outcome(lambda: OPERATIONS[theirs](cache, theirs))

    wrong = []
    for theirs in OPERATIONS:
        allowed = [in_turn(present, ours, theirs)[2], in_turn(present, theirs, ours)[2]]
        if theirs not in ("put", "put another", "del", "pop", "clear"):
            allowed.append(in_turn(present, ours, "get")[2])
        elif ours == "make" and theirs in ("del", "pop"):
            allowed.append(in_turn(present, theirs, "get")[2])
        for at in count():
            cache = filled(present)
            line = AtLine(at, strike, counts=lambda frame: True)
            line.run(lambda: outcome(lambda: OPERATIONS[ours](cache, ours)))  # noqa: B023
            if line.where is None:
                break
            got = dict(cache.items())
            if got not in allowed or cache._store._deferred:
                wrong.append(f"{ours} struck by {theirs} at {line.where}: {got}, allowed are {allowed}")
            else:
                assert_consistent(cache)
        assert at > 2
    assert not wrong, "\n".join(wrong)


# ------------------------------------------------------------------------------------------ finalisers and signals


class Meddler:
    """Uses a cache, and one without limits, in all ways, and remembers what it stored in the latter.

    Attributes:
        stored: what must be found in the latter in the end.
        failures: what it raised.
    """

    def __init__(self, cache: PatternCache[Any, Any], keeper: PatternCache[Any, Any]) -> None:
        self._cache, self._keeper = cache, keeper
        self._numbers, self._dice = count(), random.Random(0)
        self.stored: list[int] = []
        self.failures: list[BaseException] = []

    def __call__(self) -> None:
        try:
            self._meddle(next(self._numbers), self._dice.randrange(8))
        except BaseException as failure:
            self.failures.append(failure)

    def _meddle(self, number: int, key: int) -> None:
        cache, keeper = self._cache, self._keeper
        with suppress(RuntimeError):  # its thread is making this key, or is in the middle of a change
            assert cache.get_or_create(key, lambda: [key])[0] == key
        with suppress(RuntimeError, KeyError):
            cache.popitem()
        cache.put(key, [key])
        cache.pop(key + 1, None)
        with suppress(KeyError):
            del cache[key + 2]
        with suppress(KeyError):
            cache.pin(key)
            cache.unpin(key)
        assert all(key == value[0] for key, value in cache.items())
        cache.info()
        cache.snapshot()
        if number % 50 == 0:
            cache.clear()
        keeper.put(number, number)
        keeper.put(-1, 0)
        keeper.pop(-1, None)
        self.stored.append(number)


class Garbage:
    """A cycle that meddles when it is collected."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        self._meddle, self._me = meddle, self

    def __del__(self) -> None:
        self._meddle()


class Mortal(list[Any]):
    """A value that meddles when it dies."""

    def __init__(self, key: Any, meddle: Callable[[], object]) -> None:
        super().__init__([key])
        self._meddle = meddle

    def __del__(self) -> None:
        self._meddle()


def work(cache: PatternCache[Any, Any], keeper: PatternCache[Any, Any], dice: random.Random) -> None:
    """One turn of what is interrupted."""
    key = dice.randrange(8)
    with suppress(RuntimeError):  # an interruption makes this key
        assert cache.get_or_create(key, lambda: [key])[0] == key
    cache.put(key, [key])
    cache.pop(dice.randrange(8), None)
    cache.get(key)
    assert all(key == value[0] for key, value in cache.items())
    if dice.random() < 0.02:
        cache.clear()
    keeper.put("work", key)
    keeper.get_or_create("more work", lambda: key)
    keeper.pop("more work", None)


def assert_all_done(meddle: Meddler, cache: PatternCache[Any, Any], keeper: PatternCache[Any, Any]) -> None:
    for failure in meddle.failures:
        raise failure
    assert meddle.stored
    assert not cache._store._deferred
    assert not keeper._store._deferred
    assert set(meddle.stored) <= set(keeper)
    assert -1 not in keeper
    for each in (cache, keeper):
        each.put("last", ["last"])
        assert_consistent(each)


@pytest.mark.slow
@pytest.mark.usefixtures("eager_gc")
@pytest.mark.parametrize("threads", [1, 4])
def test_finalisers_may_use_the_cache_at_any_moment(threads: int) -> None:
    cache: PatternCache[Any, Any] = PatternCache(5)
    keeper: PatternCache[Any, Any] = PatternCache(None)
    meddle = Meddler(cache, keeper)

    def turns(seed: int) -> None:
        dice = random.Random(seed)
        for turn in range(60):
            Garbage(meddle)
            with suppress(RuntimeError):
                cache.get_or_create(turn % 8, lambda: Mortal(turn % 8, meddle))  # noqa: B023
            work(cache, keeper, dice)

    for future in [begin(lambda seed=seed: turns(seed)) for seed in range(threads)]:  # type: ignore[misc]
        future.result(PATIENCE)
    gc.collect()
    keeper.put("work", 0)
    assert_all_done(meddle, cache, keeper)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")
def test_signal_handlers_may_use_the_cache_at_any_moment() -> None:
    cache: PatternCache[Any, Any] = PatternCache(5)
    keeper: PatternCache[Any, Any] = PatternCache(None)
    meddle = Meddler(cache, keeper)
    dice = random.Random(1)

    def handle(number: int, frame: FrameType | None) -> None:
        meddle()
        if len(meddle.stored) + len(meddle.failures) < 500:
            arm()  # when all is done: a slow machine must not be interrupted within the interruption

    def arm() -> None:
        signal.setitimer(signal.ITIMER_REAL, 1e-5 + 2e-4 * dice.random())

    before = signal.signal(signal.SIGALRM, handle)
    try:
        last = time.monotonic() + PATIENCE
        arm()
        while len(meddle.stored) + len(meddle.failures) < 500:
            assert time.monotonic() < last
            work(cache, keeper, random.Random(len(meddle.stored)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert_all_done(meddle, cache, keeper)


def test_a_finaliser_may_change_the_cache_while_its_items_are_walked_through() -> None:
    def walk(after: int) -> None:
        Garbage(lambda: cache.put(("garbage", after), 0))
        view = cache.items()
        gc.set_threshold(after)  # allocations from here
        assert set(range(50)) <= {key for key, _ in view}

    cache: PatternCache[Any, int] = PatternCache(None)
    for key in range(50):
        cache.put(key, key)
    threshold = gc.get_threshold()
    try:
        for after in range(2, 60):
            gc.set_threshold(0)
            gc.collect()
            walk(after)
    finally:
        gc.set_threshold(*threshold)


def test_finalisers_of_two_threads_may_each_use_the_cache_that_the_other_changes() -> None:
    run(
        """
        class Key:
            def __init__(self, own, other):
                self.own, self.other, self.met = own, other, False

            def __hash__(self):
                if self.own._store.interrupted and not self.met:  # with the lock held
                    self.met = True
                    together.wait(60)
                    Garbage(self.other)
                return 1

        class Garbage:
            def __init__(self, cache):
                self.cache = cache

            def __del__(self):
                self.cache.put("put", 1)
                self.cache.get_or_create("made", lambda: 1)

        together = threading.Barrier(2)
        one, two = PatternCache(), PatternCache()
        threads = [
            threading.Thread(target=one.put, args=(Key(one, two), 1), daemon=True),
            threading.Thread(target=two.put, args=(Key(two, one), 1), daemon=True),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        if any(thread.is_alive() for thread in threads):
            print("deadlock", file=sys.stderr, flush=True)
            os._exit(1)
        assert one["put"] == two["put"] == 1
        """
    )


# ------------------------------------------------------------------------------------------ KeyboardInterrupt


@cached
def _out_of_reach(filename: str) -> tuple[frozenset[int], frozenset[int]]:
    """(leaving, cleanup): lines of a file where no exception is raised.

    - Leaving: the lines of ``with``, and of ``return`` within one. An exception there, after the body and before
      ``__exit__``, leaks the lock in any Python program. And ``try``, which does nothing: CPython handles no signal
      there.
    - Cleanup: the bodies of ``finally`` and ``except``, and all they call. Who would clean up after the second?
    """
    leaving: set[int] = set()
    cleanup: set[int] = set()
    for node in ast.walk(ast.parse(Path(filename).read_text(encoding="utf-8"))):
        if isinstance(node, ast.With):
            leaving.update(range(node.lineno, node.body[0].lineno))
            leaving.update(inner.lineno for inner in ast.walk(node) if isinstance(inner, ast.Return))
        elif isinstance(node, ast.Try):
            leaving.add(node.lineno)
            for body in (node.finalbody, *(handler.body for handler in node.handlers)):
                if body:
                    cleanup.update(range(body[0].lineno, (body[-1].end_lineno or 0) + 1))
    return frozenset(leaving), frozenset(cleanup)


def in_reach(frame: FrameType) -> bool:
    """Whether the frame is not leaving a ``with``, and neither it nor a caller within the cache is cleaning up."""
    if frame.f_lineno in _out_of_reach(frame.f_code.co_filename)[0]:
        return False
    caller: FrameType | None = frame
    while caller is not None:
        if caller.f_code.co_filename in FILES and caller.f_lineno in _out_of_reach(caller.f_code.co_filename)[1]:
            return False
        caller = caller.f_back
    return True


def interrupt() -> None:
    raise KeyboardInterrupt


def wait(cache: PatternCache[str, str], mine: str) -> str:
    """Get what another thread is making. It goes on as soon as somebody waits for it, or does not any more."""
    held = Held("made")
    maker = held.begin(cache, "new")
    done: list[bool] = []

    def release() -> None:
        until(lambda: cache.info().waits > 0 or bool(done))
        held.let_go()

    releaser = begin(release)
    try:
        return cache.get_or_create("new", never)
    finally:
        done.append(True)
        releaser.result(PATIENCE)
        assert maker.result(PATIENCE) == "made"


def pin(cache: PatternCache[str, str], mine: str) -> None:
    cache.pin("b", "c")
    cache.put("b", mine)
    cache.unpin("b", "c")


STRUCK: dict[str, Callable[[PatternCache[str, str], str], Any]] = {
    **OPERATIONS,
    "fail": lambda cache, mine: cache.get_or_create("new", lambda: dict[str, str]()[mine]),
    "nest": lambda cache, mine: cache.get_or_create("new", lambda: cache.get_or_create("newer", lambda: mine)),
    "recurse": lambda cache, mine: cache.get_or_create("new", lambda: cache.setdefault("new", mine)),
    "wait": wait,
    "pin": pin,
    "warm": lambda cache, mine: cache.warm([("new", lambda: mine), ("newer", lambda: mine)]),
    "look": lambda cache, mine: (cache.info(), cache.snapshot(), list(cache.values()), cache.nbytes, repr(cache)),
}
MAY_GO = {  # what each may remove, replace or evict
    "make": "b", "make another": "b", "put": "ab", "put another": "b", "del": "a", "pop": "a", "popitem": "b",
    "clear": "abcx", "nest": "bca", "wait": "b", "pin": "b", "warm": "bca",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "present"), [(ours, True) for ours in STRUCK] + [(ours, False) for ours in ("make", "put", "pop")]
)
def test_after_a_keyboard_interrupt_at_any_line_all_is_well(ours: str, present: bool) -> None:
    for at in count():
        cache = filled(present)
        before = dict(cache.items())
        line = AtLine(at, interrupt, in_reach)
        with suppress(KeyboardInterrupt, RuntimeError):
            line.run(lambda: outcome(lambda: STRUCK[ours](cache, ours)))  # noqa: B023
        if line.where is None:
            break
        cache.pop("nothing", None)  # tells what was left to tell
        now = dict(cache.items())
        assert {key for key in before if now.get(key) != before[key]} <= set(MAY_GO.get(ours, "")), line.where
        assert not cache._store.interrupted, line.where

        def elsewhere() -> None:
            for key in ("a", "b", "c", "x", "new", "newer"):
                assert cache.get_or_create(key, lambda: "later") is not None  # noqa: B023
                cache.put("last", "last")  # noqa: B023

        begin(elsewhere).result(PATIENCE)
        assert_consistent(cache)
    assert at > 2


@pytest.mark.slow
@pytest.mark.parametrize("ours", ["put", "pin"])
def test_a_keyboard_interrupt_loses_no_value_that_is_being_replaced(ours: str) -> None:
    for at in count():
        cache = filled(present=True)
        line = AtLine(at, interrupt, in_reach)
        with suppress(KeyboardInterrupt):
            line.run(lambda: STRUCK[ours](cache, ours))  # noqa: B023
        if line.where is None:
            break
        assert set(cache) == set("abc"), line.where


@pytest.mark.slow
def test_a_keyboard_interrupt_of_the_maker_leaves_the_work_to_who_waits() -> None:
    for at in count():
        cache: PatternCache[str, str] = PatternCache()
        others: list[Future[str]] = []

        def create() -> str:
            others.extend(begin(lambda: cache.get_or_create("key", lambda: "theirs")) for _ in range(2))  # noqa: B023
            until(lambda: cache.info().waits == 2)  # noqa: B023
            return "ours"

        line = AtLine(at, interrupt, in_reach)
        with suppress(KeyboardInterrupt):
            line.run(lambda: cache.get_or_create("key", create))  # noqa: B023
        if line.where is None:
            break
        values = {other.result(PATIENCE) for other in others}
        assert values <= {"ours"} or values <= {"theirs"}, line.where
        cache.put("last", "last")
        assert_consistent(cache)
