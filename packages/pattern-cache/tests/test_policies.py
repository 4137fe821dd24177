"""Which entry leaves: every policy against a model that looks at all entries every time."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from contract import Cache, weigh
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_pattern_cache import Eviction, PatternCache
from dilated_pattern_cache.policies import LRU, EvictionPolicy, GreedyDualSize

KEYS = st.sampled_from("abcdefgh")
WEIGHTS = st.integers(0, 9)
SECONDS = st.sampled_from([0.0, 0.25, 1.0, 3.0, 10.0])
LIMITS = st.sampled_from([(3, None), (None, 12), (4, 12), (1, None)])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, WEIGHTS, SECONDS),
        st.tuples(st.just("put"), KEYS, WEIGHTS, SECONDS),  # so that caches fill up
        st.tuples(st.sampled_from(["get", "get", "del"]), KEYS, st.just(0), st.just(0.0)),
        st.tuples(st.just("popitem"), st.just(""), st.just(0), st.just(0.0)),
    ),
    min_size=20,
    max_size=60,
)


@dataclass
class Model:
    """A cache whose entries are compared one by one. Subclasses say what an entry is worth.

    Attributes:
        entries: what the cache holds: by key.
        left: keys in the order of their eviction.
    """

    max_entries: int | None
    max_bytes: int | None
    entries: dict[str, Item] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    numbers: count[int] = field(default_factory=count)

    def used(self, item: Item) -> None:
        """The entry was stored or found."""

    def worth(self, item: Item) -> Any:
        """What has the least leaves first."""

    def evicted(self, item: Item) -> None:
        """The entry left because of a limit."""

    def order(self) -> list[str]:
        """All keys, the next to leave first."""
        return sorted(self.entries, key=lambda key: self.worth(self.entries[key]))

    def exceeded(self) -> bool:
        """Whether there are too many entries, or bytes."""
        nbytes = sum(item.weight for item in self.entries.values())
        return (self.max_entries is not None and len(self.entries) > self.max_entries) or (
            self.max_bytes is not None and nbytes > self.max_bytes
        )

    def put(self, key: str, weight: int, seconds: float) -> None:
        self.entries.pop(key, None)
        self.entries[key] = item = Item(weight, seconds, next(self.numbers))
        while self.exceeded():
            leaver = next(other for other in self.order() if other != key)
            self.evicted(self.entries.pop(leaver))
            self.left.append(leaver)
        self.used(item)

    def get(self, key: str) -> None:
        if key in self.entries:
            self.entries[key].frequency += 1
            self.used(self.entries[key])


@dataclass
class Item:
    """An entry of a model. Attributes: number: of its arrival; base: what its last use left."""

    weight: int
    seconds: float
    number: int
    frequency: int = 1
    base: float = 0.0


@dataclass
class Recency(Model):
    """Least recently used: entries by the time of their last use."""

    uses: count[int] = field(default_factory=count)

    def used(self, item: Item) -> None:
        item.base = next(self.uses)

    def worth(self, item: Item) -> float:
        return item.base


@dataclass
class Worth(Model):
    """H = L + frequency * seconds / bytes; of two that are equal, the older leaves."""

    inflation: float = 0.0

    def used(self, item: Item) -> None:
        item.base = self.inflation

    def value(self, item: Item) -> float:
        return item.base + item.frequency * item.seconds / max(item.weight, 1)

    def worth(self, item: Item) -> tuple[float, int]:
        return self.value(item), item.number

    def evicted(self, item: Item) -> None:
        self.inflation = max(self.inflation, self.value(item))


def follow(cache: Cache, model: Model, left: list[Eviction], steps: list[tuple[str, str, int, float]]) -> None:
    """Do the same with both, and compare them after every step."""
    for name, key, weight, seconds in steps:
        if name == "put":
            cache.put(key, weight, seconds=seconds)
            model.put(key, weight, seconds)
        elif name == "get":
            cache.get(key)
            model.get(key)
        elif name == "del" and key in model.entries:
            del cache[key]
            del model.entries[key]
        elif name == "popitem" and model.entries:
            first = model.order()[0]
            assert cache.popitem() == (first, model.entries.pop(first).weight)
        assert [eviction.entry.key for eviction in left] == model.left
        assert [entry.key for entry in cache.snapshot()] == model.order()
        assert cache.info().evictions == len(model.left)
    while model.entries:
        first = model.order()[0]
        assert cache.popitem() == (first, model.entries.pop(first).weight)
    assert len(cache) == 0


@given(limits=LIMITS, steps=STEPS)
@settings(max_examples=100)
def test_lru_is_exact(limits: tuple[int | None, int | None], steps: list[tuple[str, str, int, float]]) -> None:
    left: list[Eviction] = []
    cache: Cache = PatternCache(*limits, policy="lru", size_of=weigh, on_evict=left.append)
    follow(cache, Recency(*limits), left, steps)


@given(limits=LIMITS, steps=STEPS)
@settings(max_examples=100)
def test_gdsf_is_exact(limits: tuple[int | None, int | None], steps: list[tuple[str, str, int, float]]) -> None:
    left: list[Eviction] = []
    cache: Cache = PatternCache(*limits, policy="gdsf", size_of=weigh, on_evict=left.append)
    follow(cache, Worth(*limits), left, steps)


def test_lru_keeps_what_was_used_last() -> None:
    cache: PatternCache[int, int] = PatternCache(3)
    cache.update({1: 1, 2: 2, 3: 3})
    assert cache[1] == 1
    assert cache.get_or_create(2, lambda: 0) == 2
    cache[4] = 4
    assert set(cache) == {1, 2, 4}
    cache[1] = 5  # storing is a use
    cache[5] = 5
    assert set(cache) == {1, 4, 5}


def evicted_among(**items: tuple[int, float, int]) -> str:
    """The first to leave of entries by key: (bytes, seconds, hits)."""
    cache: Cache = PatternCache(len(items), policy="gdsf", size_of=weigh)
    for key, (weight, seconds, hits) in items.items():
        cache.put(key, weight, seconds=seconds)
        for _ in range(hits):
            assert cache[key] == weight
    cache.put("new", 1, seconds=1.0)
    (leaver,) = set(items) - set(cache)
    return leaver


def test_gdsf_gives_up_what_is_cheap_large_or_seldom_used() -> None:
    assert evicted_among(dear=(10, 9.0, 0), cheap=(10, 1.0, 0)) == "cheap"
    assert evicted_among(cheap=(10, 1.0, 0), dear=(10, 9.0, 0)) == "cheap"
    assert evicted_among(large=(20, 1.0, 0), small=(10, 1.0, 0)) == "large"
    assert evicted_among(small=(10, 1.0, 0), large=(20, 1.0, 0)) == "large"
    assert evicted_among(seldom=(10, 1.0, 0), often=(10, 1.0, 3)) == "seldom"
    assert evicted_among(often=(10, 1.0, 3), seldom=(10, 1.0, 0)) == "seldom"


def test_gdsf_overtakes_in_time_what_is_not_used_any_more() -> None:
    cache: PatternCache[Any, int] = PatternCache(2, policy="gdsf", size_of=lambda value: 1)
    cache.put("dear", 1, seconds=100.0)
    for number in range(99):
        cache.put(number, 1, seconds=1.0)
        assert "dear" in cache
    cache.put("between", 1, seconds=1.5)
    cache.put("last", 1, seconds=1.0)
    cache.put("very last", 1, seconds=1.0)
    assert "dear" not in cache


def test_gdsf_takes_the_measured_time_of_what_it_made() -> None:
    cache: PatternCache[str, int] = PatternCache(policy="gdsf")
    cache.get_or_create("a", lambda: sum(range(1000)))
    (entry,) = cache.snapshot()
    assert entry.seconds > 0
    assert cache.info().seconds_spent == entry.seconds


@pytest.mark.parametrize("policy", [LRU, GreedyDualSize])
def test_a_policy_instance_serves_one_cache(policy: type[EvictionPolicy]) -> None:
    one: PatternCache[str, int] = PatternCache(2, policy=policy)
    other: PatternCache[str, int] = PatternCache(2, policy=policy)
    assert one._store.masters.policy is not other._store.masters.policy


# ------------------------------------------------------------------------------------------ pinned


@pytest.mark.parametrize("policy", ["lru", "gdsf"])
@pytest.mark.parametrize("limits", [(4, None), (None, 8), (4, 8)], ids=str)
def test_what_is_pinned_stays(policy: str, limits: tuple[int | None, int | None]) -> None:
    cache: Cache = PatternCache(*limits, policy=policy, size_of=weigh)
    cache.update(a=2, b=2)
    cache.pin("a", "b")
    for number in range(50):
        cache.put(number, 2, seconds=number)
        assert {"a", "b", number} <= set(cache)
        assert len(cache) == min(number + 3, 4)
    cache.unpin("a")
    for number in range(50, 60):
        cache.put(number, 2, seconds=number)
    assert "a" not in cache
    assert "b" in cache


@pytest.mark.parametrize("policy", ["lru", "gdsf"])
def test_where_all_is_pinned_there_is_no_room(policy: str) -> None:
    cache: Cache = PatternCache(2, policy=policy, size_of=weigh)
    cache.update(a=1, b=2)
    cache.pin("a", "b")
    order = cache.snapshot()
    with pytest.raises(ValueError, match="the value of 'c' cannot be stored: all 2 entries are pinned"):
        cache["c"] = 1
    assert cache.get_or_create("c", lambda: 1) == 1
    assert cache.snapshot() == order
    assert (cache.info().rejections, cache.info().evictions) == (1, 0)
    cache["a"] = 3  # a key that is there needs no room
    assert [(entry.key, entry.pinned) for entry in cache.snapshot()] == [("b", True), ("a", True)]
    cache.unpin("a")
    cache["c"] = 1
    assert set(cache) == {"b", "c"}


@pytest.mark.parametrize("policy", ["lru", "gdsf"])
def test_what_does_not_fit_beside_the_pinned_is_refused(policy: str) -> None:
    cache: Cache = PatternCache(None, 10, policy=policy, size_of=weigh)
    cache.update(a=4, b=3, c=3)
    cache.pin("a")
    order = cache.snapshot()
    with pytest.raises(ValueError, match="with the pinned entries it takes 11 bytes, more than the limit of 10"):
        cache["d"] = 7
    with pytest.raises(ValueError, match="its 11 bytes are more than the limit of 10"):
        cache["a"] = 11
    assert cache.snapshot() == order
    cache["d"] = 6
    assert set(cache) == {"a", "d"}
    cache["a"] = 10
    assert set(cache) == {"a"}


def test_pinning_is_for_all_keys_or_none() -> None:
    cache: PatternCache[str, int] = PatternCache()
    cache.update(a=1, b=2)
    with pytest.raises(KeyError, match="'x'"):
        cache.pin("a", "x")
    assert not any(entry.pinned for entry in cache.snapshot())
    cache.pin("a", "b")
    with pytest.raises(KeyError, match="'x'"):
        cache.unpin("a", "x")
    assert all(entry.pinned for entry in cache.snapshot())
    cache.pin()
    cache.unpin()


def test_what_is_pinned_can_be_removed_and_comes_back_unpinned() -> None:
    cache: PatternCache[str, int] = PatternCache()
    for remove in (cache.__delitem__, cache.pop, lambda key: cache.popitem(), lambda key: cache.clear()):
        cache["a"] = 1
        cache.pin("a")
        remove("a")
        assert len(cache) == 0
        cache["a"] = 1
        assert not cache.snapshot()[0].pinned
        cache.clear()


# ------------------------------------------------------------------------------------------ the heap


@pytest.mark.parametrize("policy", ["lru", "gdsf"])
def test_the_heap_does_not_grow_with_what_is_replaced_or_removed(policy: str) -> None:
    cache: PatternCache[int, int] = PatternCache(50, policy=policy)
    heap = 0
    for number in range(20_000):
        cache.put(number % 60, number, seconds=number % 7)
        if number % 3 == 0:
            cache.pop((number * 7) % 60, None)
        if number % 5 == 0:
            cache.get((number * 11) % 60)
        heap = max(heap, len(cache._store.masters._heap))
    assert heap <= 2 * 50 + 64 + 1


@pytest.mark.parametrize("policy", ["lru", "gdsf"])
def test_the_heap_shrinks_with_the_cache(policy: str) -> None:
    cache: PatternCache[int, int] = PatternCache(None, policy=policy)
    for number in range(5000):
        cache[number] = number
    for number in range(5000):
        del cache[number]
    cache[0] = 0
    assert len(cache._store.masters._heap) <= 2 + 64 + 1
    for number in range(5000):
        cache[number] = number
    cache.clear()
    assert cache._store.masters._heap == []
