"""What a cache itself takes, and that nothing of what left it stays behind."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any
from weakref import ref

import pytest
import torch

from dilated_pattern_cache import PatternCache


class Value:
    """Something that can be watched dying."""


@pytest.fixture
def tracing() -> Iterator[None]:
    """Python's own allocations are counted."""
    gc.collect()
    tracemalloc.start()
    yield
    tracemalloc.stop()


def traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


# ------------------------------------------------------------------------------------------ what it takes


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize("policy", ["lru", "gdsf"])
@pytest.mark.parametrize("kind", ["objects", "tensors"])
def test_a_hundred_entries_take_less_than_a_megabyte(policy: str, kind: str) -> None:
    makes: dict[str, Callable[[], Any]] = {"objects": Value, "tensors": lambda: torch.zeros(1)}
    values = [makes[kind]() for _ in range(100)]
    PatternCache(100, policy=policy).put(0, values[0])  # what is imported only now is no part of it
    before = traced_bytes()
    cache: PatternCache[int, Any] = PatternCache(100, policy=policy)
    for turn in range(5):
        for number, value in enumerate(values):
            cache[turn * 100 + number] = value
            assert cache[turn * 100 + number] is value
    assert len(cache) == 100
    assert traced_bytes() - before < 2**20


# ------------------------------------------------------------------------------------------ nothing stays


def removals() -> dict[str, Callable[[PatternCache[Any, Any]], Any]]:
    """Every way in which the value of "a" leaves a full cache of two entries, "a" being the next to leave."""

    def replace(cache: PatternCache[Any, Any]) -> None:
        cache["a"] = None

    def evict(cache: PatternCache[Any, Any]) -> None:
        cache["c"] = None

    def displace(cache: PatternCache[Any, Any]) -> None:
        cache.get_or_create("c", Value)

    def warm(cache: PatternCache[Any, Any]) -> None:
        cache.warm({"c": Value})

    return {
        "del": lambda cache: cache.__delitem__("a"),
        "pop": lambda cache: cache.pop("a"),
        "popitem": lambda cache: cache.popitem(),
        "clear": lambda cache: cache.clear(),
        "replace": replace,
        "evict": evict,
        "displace": displace,
        "warm": warm,
    }


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("remove", removals().values(), ids=list(removals()))
def test_a_value_dies_when_it_leaves(remove: Callable[[PatternCache[Any, Any]], Any]) -> None:
    for policy, guard in product(("lru", "gdsf"), ("version", "contents", None)):
        cache: PatternCache[Any, Any] = PatternCache(2, policy=policy, guard=guard, on_evict=lambda eviction: None)  # type: ignore[arg-type]
        put, made, tensor = Value(), Value(), torch.zeros(3)
        watched = [ref(put), ref(made), ref(tensor)]
        made.tensor = tensor  # type: ignore[attr-defined]
        makers = [made]
        cache["a"] = put
        cache["a"] = cache.get_or_create("other", makers.pop)
        del cache["other"]
        cache["b"] = None
        assert cache.snapshot()[0].key == "a"
        del put, made, tensor
        assert [watch() is None for watch in watched] == [True, False, False]
        remove(cache)
        assert [watch() is None for watch in watched] == [True, True, True]


@pytest.mark.usefixtures("no_gc")
def test_a_value_that_is_not_kept_dies_with_its_user() -> None:
    cache: PatternCache[str, Any] = PatternCache(0)
    value = cache.get_or_create("a", Value)
    watch = ref(value)
    del value
    assert watch() is None
    value = Value()
    watch = ref(value)
    with pytest.raises(ValueError, match="max_entries is 0") as caught:
        cache["a"] = value
    del value, caught
    gc.collect()  # pytest's own record of the error is a cycle
    assert watch() is None


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("use", [False, True])
def test_a_cache_dies_with_its_values_and_without_the_collector(use: bool) -> None:
    cache: PatternCache[str, Any] = PatternCache()
    watched = [ref(cache), ref(cache.get_or_create("a", Value))]
    if use:
        cache.pin("a")
        assert cache["a"] is watched[1]()
        assert list(cache.items()) == [("a", watched[1]())]
        cache.info(), cache.snapshot()
    del cache
    assert [watch() for watch in watched] == [None, None]


class Key:
    """A key that can be watched dying."""


@pytest.mark.usefixtures("no_gc")
def test_a_key_that_was_looked_up_in_vain_is_not_kept() -> None:
    cache: PatternCache[Key, int] = PatternCache(0)
    key = Key()
    watch = ref(key)
    assert cache.get(key) is None
    assert cache.pop(key, None) is None
    assert key not in cache
    assert cache.get_or_create(key, lambda: 1) == 1
    del key
    assert watch() is None


class CreateError(Exception):
    """What a ``create`` of the test raises."""


@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("error", [CreateError, KeyboardInterrupt], ids=["error", "interrupt"])
@pytest.mark.parametrize("method", ["get_or_create", "warm"])
def test_what_create_raises_leaves_nothing_behind(error: type[BaseException], method: str) -> None:
    cache: PatternCache[str, Any] = PatternCache()
    watched: list[ref[Value]] = []

    def fail() -> None:
        local = Value()
        watched.append(ref(local))
        raise error

    for _ in range(3):
        try:
            if method == "warm":
                cache.warm({"a": fail})
            else:
                cache.get_or_create("a", fail)
        except error:
            assert watched[-1]() is not None  # the traceback has it
        else:
            pytest.fail("nothing was raised")
        assert watched[-1]() is None
    assert len(watched) == 3
    assert len(cache) == 0


@pytest.mark.usefixtures("no_gc")
def test_what_on_evict_raises_leaves_nothing_behind() -> None:
    watched: list[ref[Value]] = []

    def fail(eviction: object) -> None:
        local = Value()
        watched.append(ref(local))
        raise CreateError

    cache: PatternCache[int, Any] = PatternCache(1, on_evict=fail)
    cache[0] = evicted = Value()
    watched.append(ref(evicted))
    del evicted
    for number in range(1, 4):
        try:
            cache[number] = None
        except CreateError:
            assert watched[-1]() is not None
        else:
            pytest.fail("nothing was raised")
        assert [watch() for watch in watched] == [None] * len(watched)
    assert dict(cache.items()) == {3: None}


def churn(cache: PatternCache[Any, Any], turns: int) -> None:
    """Make, evict, replace, remove, clear, and fail, again and again."""

    def fail() -> None:
        raise CreateError

    for turn in range(turns):
        cache.get_or_create(("made", turn), Value)
        cache["put", turn % 60] = [turn]
        cache.get(("made", turn - 20))
        cache.pop(("made", turn - 5), None)
        if turn % 10 == 0:
            cache.get_or_create(("tensor", turn), lambda: torch.zeros(2))
            cache.pin(("put", turn % 60))
            cache.unpin(("put", turn % 60))
        if turn % 50 == 0:
            with suppress(CreateError):
                cache.get_or_create("fails", fail)
            cache.warm({("warm", turn): Value})
        if turn % 500 == 0:
            cache.clear()
    cache.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("no_gc")
@pytest.mark.parametrize("options", [{}, {"policy": "gdsf"}, {"guard": "contents"}], ids=["lru", "gdsf", "contents"])
def test_thousands_of_values_leave_no_object_behind(options: dict[str, Any]) -> None:
    cache: PatternCache[Any, Any] = PatternCache(50, on_evict=lambda eviction: None, **options)
    churn(cache, 600)  # what is made once is made now
    gc.collect()
    before = len(gc.get_objects())
    churn(cache, 6000)
    assert gc.collect() == 0  # there was no garbage that only the collector finds
    assert len(gc.get_objects()) - before < 100
    assert cache.info().creations > 6600


@pytest.mark.slow
@pytest.mark.usefixtures("tracing")
def test_thousands_of_values_leave_no_memory_behind() -> None:
    cache: PatternCache[Any, Any] = PatternCache(50, on_evict=lambda eviction: None)
    churn(cache, 500)
    before = traced_bytes()
    churn(cache, 2000)
    assert traced_bytes() - before < 20_000
