"""The mapping: its contract over every policy and limit, its arguments, what it is when copied, printed, compared."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from itertools import product, repeat
from typing import Any

import pytest
from contract import FULL, MAX_BYTES, Cache, CacheContract, weigh

from dilated_pattern_cache import PatternCache
from dilated_pattern_cache.policies import LRU, EvictionPolicy, GreedyDualSize
from dilated_pattern_cache.storage.shelf import Entry


class FirstInFirstOut:
    """A user's policy: nothing is worth more than another, so what came first leaves first."""

    def __init__(self) -> None:
        self.clock: Callable[[], float] = repeat(0.0).__next__

    def rank(self, entry: Entry) -> float:
        return 0.0

    def evicted(self, entry: Entry) -> None:
        pass


POLICIES: dict[str, str | Callable[[], EvictionPolicy]] = {"lru": "lru", "gdsf": "gdsf", "fifo": FirstInFirstOut}
LIMITS: dict[str, tuple[int | None, int | None]] = {
    "entries": (FULL, None),
    "bytes": (None, MAX_BYTES),
    "both": (FULL, MAX_BYTES),
    "unlimited": (None, None),
}


class TestMapping(CacheContract):
    """Every policy under every limit."""

    @pytest.fixture(params=product(POLICIES, LIMITS), ids="-".join)
    def cache(self, request: pytest.FixtureRequest) -> Cache:
        policy, limits = request.param
        return PatternCache(*LIMITS[limits], policy=POLICIES[policy], size_of=weigh)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_a_cache_of_no_entries_keeps_nothing_and_gives_what_is_made(policy: str | Callable[[], EvictionPolicy]) -> None:
    cache: PatternCache[str, int] = PatternCache(0, policy=policy)
    assert cache.get_or_create("a", lambda: 1) == 1
    assert cache.setdefault("a", 2) == 2
    with pytest.raises(ValueError, match="the value of 'a' cannot be stored: max_entries is 0"):
        cache["a"] = 1
    assert len(cache) == 0
    assert cache.info().rejections == 2


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_a_cache_of_no_bytes_keeps_what_weighs_nothing(policy: str | Callable[[], EvictionPolicy]) -> None:
    cache: PatternCache[str, Any] = PatternCache(None, 0, policy=policy)
    cache["a"] = 1
    with pytest.raises(ValueError, match="its 3 bytes are more than the limit of 0"):
        cache["b"] = b"abc"
    assert list(cache) == ["a"]


def test_a_user_s_policy_is_followed() -> None:
    cache: PatternCache[int, int] = PatternCache(3, policy=FirstInFirstOut)
    for key in range(3):
        cache[key] = key
    assert cache[0] == 0
    cache[3] = 3
    assert set(cache) == {1, 2, 3}
    assert cache[1] == 1
    cache[4] = 4
    assert set(cache) == {2, 3, 4}


def test_a_value_that_was_replaced_or_removed_and_stored_again_came_last() -> None:
    cache: PatternCache[str, int] = PatternCache(policy=FirstInFirstOut)
    cache.update(a=1, b=2, c=3)
    cache["a"] = 4
    del cache["b"]
    cache["b"] = 5
    assert [entry.key for entry in cache.snapshot()] == ["c", "a", "b"]
    assert [cache.popitem() for _ in range(3)] == [("c", 3), ("a", 4), ("b", 5)]


# ------------------------------------------------------------------------------------------ arguments


class NoFunction:
    """Cannot be called."""

    def __repr__(self) -> str:
        return "NoFunction()"


CONSTRUCTOR: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "entries-negative": ({"max_entries": -1}, ValueError, "max_entries: expected at least 0, got -1"),
    "entries-float": (
        {"max_entries": 1.0},
        TypeError,
        "max_entries: expected a whole number, or None for no limit, got 1.0",
    ),
    "entries-bool": ({"max_entries": True}, TypeError, "max_entries: expected a whole number, or None for no limit"),
    "entries-text": ({"max_entries": "10"}, TypeError, "max_entries: expected a whole number, or None for no limit"),
    "bytes-negative": ({"max_bytes": -5}, ValueError, "max_bytes: expected at least 0, got -5"),
    "bytes-float": ({"max_bytes": 1e9}, TypeError, "max_bytes: expected a whole number, or None for no limit"),
    "bytes-bool": ({"max_bytes": False}, TypeError, "max_bytes: expected a whole number, or None for no limit"),
    "device-bytes-negative": ({"max_device_bytes": -1}, ValueError, "max_device_bytes: expected at least 0, got -1"),
    "device-bytes-float": ({"max_device_bytes": 0.5}, TypeError, "max_device_bytes: expected a whole number, or None"),
    "policy-unknown": (
        {"policy": "lfu"},
        ValueError,
        "policy: expected one of ['lru', 'gdsf'] or a function that returns an EvictionPolicy, got 'lfu'",
    ),
    "policy-none": (
        {"policy": None},
        TypeError,
        "policy: expected a name or a function that returns an EvictionPolicy, got None",
    ),
    "policy-object": (
        {"policy": LRU()},
        TypeError,
        "policy: expected a name or a function that returns an EvictionPolicy",
    ),
    "size-of": ({"size_of": NoFunction()}, TypeError, "size_of: expected a callable, got NoFunction()"),
    "on-evict": ({"on_evict": NoFunction()}, TypeError, "on_evict: expected a callable, got NoFunction()"),
    "guard": ({"guard": "hash"}, ValueError, "guard: expected 'version', 'contents' or None, got 'hash'"),
    "guard-bool": ({"guard": True}, ValueError, "guard: expected 'version', 'contents' or None, got True"),
}


@pytest.mark.parametrize(("options", "kind", "message"), CONSTRUCTOR.values(), ids=list(CONSTRUCTOR))
def test_the_constructor_says_what_is_wrong(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        PatternCache(**options)
    assert str(caught.value).startswith(message)


def test_all_but_the_two_limits_go_by_name() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        PatternCache(1, 1, 1)  # type: ignore[misc]


METHODS: dict[str, tuple[Callable[[Cache], Any], type[Exception], str]] = {
    "workers-zero": (lambda cache: cache.warm({}, workers=0), ValueError, "workers: expected at least 1, got 0"),
    "workers-float": (
        lambda cache: cache.warm({}, workers=1.5),
        TypeError,
        "workers: expected a whole number, got 1.5",
    ),  # type: ignore[arg-type]
    "seconds-negative": (lambda cache: cache.put("x", 1, seconds=-1.0), ValueError, "seconds: expected"),
    "seconds-nan": (lambda cache: cache.put("x", 1, seconds=float("nan")), ValueError, "seconds: expected"),
    "seconds-infinite": (lambda cache: cache.put("x", 1, seconds=float("inf")), ValueError, "seconds: expected"),
    "seconds-text": (lambda cache: cache.put("x", 1, seconds="1"), TypeError, "seconds: expected"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("call", "kind", "message"), METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("policy", ["lru", "gdsf"])
def test_the_methods_say_what_is_wrong(
    policy: str, call: Callable[[Cache], Any], kind: type[Exception], message: str
) -> None:
    cache: Cache = PatternCache(policy=policy)
    cache["a"] = 1
    with pytest.raises(kind) as caught:
        call(cache)
    assert str(caught.value).startswith(message)
    assert dict(cache.items()) == {"a": 1}
    assert cache.popitem() == ("a", 1)


def test_defaults_are_those_of_every_mapping() -> None:
    cache: PatternCache[str, int | None] = PatternCache()
    assert cache.get("x", default=1) == 1
    assert cache.pop("x", default=1) == 1
    with pytest.raises(TypeError, match="pop"):
        cache.pop("x", 1, 2)  # type: ignore[call-overload]
    assert cache.setdefault("x") is None
    assert "x" in cache


# ------------------------------------------------------------------------------------------ what it is


def test_repr_says_how_full_it_is() -> None:
    cache: PatternCache[str, bytes] = PatternCache(10)
    assert repr(cache) == "<PatternCache: 0 of 10 entries, 0 bytes>"
    cache["a"] = bytes(12_345)
    assert repr(cache) == "<PatternCache: 1 of 10 entries, 12,345 bytes>"
    assert repr(PatternCache(None)) == "<PatternCache: 0 entries, 0 bytes>"


class Patterns(PatternCache[str, int]):
    """A subclass."""


def test_repr_names_a_subclass() -> None:
    assert repr(Patterns(1)) == "<Patterns: 0 of 1 entries, 0 bytes>"


def test_a_cache_equals_itself_alone() -> None:
    one: PatternCache[str, int] = PatternCache()
    other: PatternCache[str, int] = PatternCache()
    one["a"] = other["a"] = 1
    assert one == one
    assert one != other
    assert one != {"a": 1}
    assert len({one, other, one}) == 2


def test_a_copy_is_the_cache_itself() -> None:
    cache: PatternCache[str, int] = PatternCache()
    cache["a"] = 1
    assert copy(cache) is cache
    assert deepcopy({"cache": cache})["cache"] is cache


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_brings_the_options_and_no_content(protocol: int) -> None:
    cache: PatternCache[str, int] = Patterns(
        5, 1000, max_device_bytes=7, policy="gdsf", size_of=weigh, guard="contents", on_evict=print
    )
    cache["a"] = 1
    twin: PatternCache[str, int] = pickle.loads(pickle.dumps(cache, protocol))
    assert type(twin) is Patterns
    assert twin != cache
    assert dict(twin.items()) == {}
    assert (twin.max_entries, twin.max_bytes) == (5, 1000)
    assert twin._options == cache._options
    assert twin.info().misses == twin.info().hits == 0
    twin["b"] = 2
    assert twin.nbytes == 2
    assert "b" not in cache


@pytest.mark.parametrize("policy", [GreedyDualSize, FirstInFirstOut, "lru"], ids=["class", "user-class", "name"])
def test_a_pickle_brings_any_policy_that_can_be_found_by_name(policy: str | Callable[[], EvictionPolicy]) -> None:
    twin = pickle.loads(pickle.dumps(PatternCache(3, policy=policy)))
    twin.update(a=1, b=2, c=3, d=4)
    assert len(twin) == 3


def test_what_cannot_be_pickled_says_so() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(PatternCache(size_of=lambda value: 1))
