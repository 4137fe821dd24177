"""Eight threads on a few keys, and two that meet at every line of the cache's own code."""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
from test_single_flight import PATIENCE, assert_nothing_in_flight, begin, until

import dilated_pattern_cache
from dilated_pattern_cache import PatternCache
from dilated_pattern_cache.storage.shelf import Ledger

THREADS = 8
KEYS = 8
MAX_ENTRIES, MAX_BYTES = 5, 100
ROUNDS = 6

_SOURCE = Path(dilated_pattern_cache.__file__).parent
_STRUCK = (
    "cache.py",
    "views.py",
    "warming.py",
    "storage/making.py",
    "storage/store.py",
    "storage/shelf.py",
    "storage/flights.py",
)
FILES = {str(_SOURCE / name) for name in _STRUCK}


class Value(NamedTuple):
    """Attributes: key: whose it is; number: of its creation, or 0 where it was put; size: in bytes."""

    key: int
    number: int
    size: int


def size_of(value: Value) -> int:
    return value.size


@pytest.fixture
def hasty_switches() -> Iterator[None]:
    """Threads take turns every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def assert_consistent(cache: PatternCache[Any, Any]) -> None:
    """What the books say of a cache that nobody uses now is what a recount says. The policy knows every entry."""
    shelf = cache._store.masters
    assert all(entry.key == key for key, entry in shelf.entries.items())
    assert len(cache) == len(list(cache)) == len(cache.snapshot()) == cache.info().entries
    recount = Ledger(entry.charges for entry in shelf.entries.values())
    assert cache.nbytes == cache.info().nbytes == recount.total
    assert shelf._ledger._holders == recount._holders
    assert {key for _, _, key in shelf._heap} >= set(shelf.entries)
    assert cache.max_entries is None or len(cache) <= cache.max_entries
    assert cache.max_bytes is None or cache.nbytes <= cache.max_bytes
    assert not cache._store._deferred
    assert not any(cache._store._left.values())
    assert_nothing_in_flight(cache)


class Hammer:
    """All that eight threads do to one cache, and what they saw of it.

    Attributes:
        overtaking: whether they put and remove as well, so that a key may be made twice at the same time.
        evicted: how often ``on_evict`` was called.
    """

    def __init__(self, policy: str, overtaking: bool) -> None:
        self.overtaking = overtaking
        self.evicted = count()
        self.cache: PatternCache[int, Value] = PatternCache(
            MAX_ENTRIES,
            MAX_BYTES,
            policy=policy,
            size_of=size_of,
            on_evict=lambda eviction: next(self.evicted),
        )
        self._numbers = count(1)
        self._being_made: set[int] = set()
        self.done: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        """Some rounds of it, with a look at the books after each."""
        for number in range(ROUNDS):
            seeds = range(THREADS * number, THREADS * (number + 1))
            futures = [begin(partial(self._work, seed, time.monotonic() + seconds / ROUNDS)) for seed in seeds]
            for future in futures:
                self.done.update(future.result(seconds + PATIENCE))
            self.cache.unpin(*self.cache)
            assert_consistent(self.cache)
        info, done = self.cache.info(), self.done
        assert info.hits + info.misses + info.waits == done["lookups"]
        assert info.bypasses == 0
        assert info.creations == done["creations"]
        assert info.failures == done["failures"]
        assert info.misses == done["creations"] + done["failures"] + done["missing"]
        assert info.evictions == next(self.evicted)
        if not self.overtaking:
            assert info.creations == info.entries + info.evictions + info.rejections

    def _work(self, seed: int, end: float) -> Counter[str]:
        dice, done = random.Random(seed), Counter[str]()
        ways = [self._create] * 6 + [self._look] * 3 + [self._walk, self._pin] + [self._overtake] * 2 * self.overtaking
        while time.monotonic() < end:
            dice.choice(ways)(dice, dice.randrange(KEYS), done)
        return done

    def _create(self, dice: random.Random, key: int, done: Counter[str]) -> None:
        fails, size = dice.random() < 0.05, dice.choice([0, 1, 20, 60, 200])

        def create() -> Value:
            assert self.overtaking or key not in self._being_made, "made twice at the same time"
            self._being_made.add(key)
            number = next(self._numbers)
            if number % 16 == 0:
                time.sleep(1e-4)
            self._being_made.discard(key)
            done["failures" if fails else "creations"] += 1
            if fails:
                raise LookupError(key)
            return Value(key, number, size)

        done["lookups"] += 1
        with suppress(LookupError):
            assert self.cache.get_or_create(key, create).key == key

    def _look(self, dice: random.Random, key: int, done: Counter[str]) -> None:
        done["lookups"] += 1
        value = self.cache.get(key)
        done["missing"] += value is None
        assert value is None or value.key == key

    def _walk(self, dice: random.Random, key: int, done: Counter[str]) -> None:
        assert all(key == value.key for key, value in self.cache.items())
        assert all(value.key in range(KEYS) for value in self.cache.values())
        assert len(set(self.cache)) <= KEYS
        assert len({entry.key for entry in self.cache.snapshot()}) <= KEYS
        self.cache.info()

    def _pin(self, dice: random.Random, key: int, done: Counter[str]) -> None:
        with suppress(KeyError):
            self.cache.pin(key)
        with suppress(KeyError):
            self.cache.unpin(key, dice.randrange(KEYS))

    def _overtake(self, dice: random.Random, key: int, done: Counter[str]) -> None:
        way = dice.randrange(20)
        if way < 10:
            with suppress(ValueError):  # no room beside what is pinned
                self.cache.put(key, Value(key, 0, dice.choice([0, 1, 20])))
        elif way < 14:
            value = self.cache.pop(key, None)
            assert value is None or value.key == key
        elif way < 17:
            with suppress(KeyError):
                del self.cache[key]
        elif way < 19:
            with suppress(KeyError):
                key, value = self.cache.popitem()
                assert value.key == key
        else:
            self.cache.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("hasty_switches")
@pytest.mark.parametrize("overtaking", [False, True], ids=["making", "overtaking"])
@pytest.mark.parametrize("policy", ["lru", "gdsf"])
def test_nothing_is_lost_or_doubled_under_eight_threads(policy: str, overtaking: bool) -> None:
    Hammer(policy, overtaking).run(0.4)


@pytest.mark.fuzz
@pytest.mark.usefixtures("hasty_switches")
@pytest.mark.parametrize("overtaking", [False, True], ids=["making", "overtaking"])
@pytest.mark.parametrize("policy", ["lru", "gdsf"])
def test_nothing_is_lost_or_doubled_under_eight_threads_for_long(policy: str, overtaking: bool) -> None:
    Hammer(policy, overtaking).run(15)


def test_hits_of_many_threads_are_counted_exactly() -> None:
    cache: PatternCache[str, int] = PatternCache()
    cache.put("key", 1)
    turns = 2000

    def work() -> None:
        for _ in range(turns):
            assert cache.get_or_create("key", lambda: 2) + cache["key"] == 2

    for future in [begin(work) for _ in range(THREADS)]:
        future.result(PATIENCE)
    assert cache.info().hits == cache.snapshot()[0].hits == 2 * turns * THREADS


# ------------------------------------------------------------------------------------------ at every line


class AtLine:
    """Runs a call, and ``strike`` before the ``at``-th line of the cache's own code that it executes.

    Lines are counted where ``counts(frame)``. Only the caller's thread is watched.

    Attributes:
        where: file, line and function of the strike; None where the call had fewer lines.
    """

    def __init__(self, at: int, strike: Callable[[], object], counts: Callable[[FrameType], bool]) -> None:
        self._at, self._strike, self._counts = at, strike, counts
        self._passed = 0
        self.where: str | None = None

    def run(self, call: Callable[[], Any]) -> Any:
        """The call; what was traced before, by a debugger or a coverage tool, goes on after."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            return call()
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in FILES or self.where is not None:
            return None
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and self.where is None and self._counts(frame):
            if self._passed == self._at:
                code = frame.f_code
                self.where = f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
                self._strike()
            self._passed += 1
        return self._step


def outcome(call: Callable[[], Any]) -> Any:
    """What it returns, or the type of what it raises."""
    try:
        return call()
    except (KeyError, ValueError) as error:
        return type(error)


OPERATIONS: dict[str, Callable[[PatternCache[str, str], str], Any]] = {
    "make": lambda cache, mine: cache.get_or_create("a", lambda: mine),
    "make another": lambda cache, mine: cache.get_or_create("new", lambda: mine),
    "get": lambda cache, mine: cache.get("a"),
    "put": lambda cache, mine: cache.put("a", mine),
    "put another": lambda cache, mine: cache.put("new", mine),
    "del": lambda cache, mine: cache.__delitem__("a"),
    "pop": lambda cache, mine: cache.pop("a", None),
    "popitem": lambda cache, mine: cache.popitem(),
    "clear": lambda cache, mine: cache.clear(),
    "items": lambda cache, mine: set(cache.items()),
}


def filled(present: bool) -> PatternCache[str, str]:
    """A cache at its limit, with or without the key that both operations are about.

    It is the last that was used: a hit takes no lock, and may count as one a little later than its value was taken.
    """
    cache: PatternCache[str, str] = PatternCache(3)
    for key in "bca" if present else "bcx":
        cache.put(key, key)
    return cache


def in_turn(present: bool, first: str, second: str) -> tuple[Any, Any, dict[str, str]]:
    """What two operations return one after the other, and what they leave."""
    cache = filled(present)
    values = [outcome(lambda name=name: OPERATIONS[name](cache, name)) for name in (first, second)]  # type: ignore[misc]
    return values[0], values[1], dict(cache.items())


@pytest.mark.slow
@pytest.mark.parametrize("present", [True, False], ids=["present", "absent"])
@pytest.mark.parametrize("ours", OPERATIONS)
def test_it_is_as_if_one_came_after_the_other(ours: str, present: bool) -> None:
    """At every line of our operation that does not hold the lock, another thread does one of its own.

    It comes to its end there, unless it waits for the value that ours is making. What it removes while ours is making
    it is not kept.
    """

    def strike() -> None:
        future = begin(lambda: outcome(lambda: OPERATIONS[theirs](cache, theirs)))
        struck.append(future)
        until(lambda: future.done() or cache.info().waits == 1)

    wrong = []
    for theirs in OPERATIONS:
        after, before = in_turn(present, ours, theirs), in_turn(present, theirs, ours)
        allowed = [after, (before[1], before[0], before[2])]
        if ours == "make" and theirs in ("del", "pop"):
            allowed.append((after[0], before[0], in_turn(present, theirs, "get")[2]))
        for at in count():
            cache, struck = filled(present), list[Future[Any]]()
            line = AtLine(at, strike, counts=lambda frame: not cache._store.interrupted)  # noqa: B023
            value = line.run(lambda: outcome(lambda: OPERATIONS[ours](cache, ours)))  # noqa: B023
            if line.where is None:
                break
            got = value, struck[0].result(PATIENCE), dict(cache.items())
            assert_consistent(cache)
            if got not in allowed:
                wrong.append(f"{ours} struck by {theirs} at {line.where}: {got}, allowed are {allowed}")
        assert at > 2
    assert not wrong, "\n".join(wrong)
