"""A whole cache against a model: a list of entries, the least recently used first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from contract import Cache, check, weigh
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from dilated_pattern_cache import Eviction, PatternCache

KEYS = st.sampled_from("abcdef")
WEIGHTS = st.integers(0, 9)
TOO_LARGE = st.integers(11, 20)  # for the limit of bytes, where there is one
MAX_BYTES = 10


@dataclass(frozen=True)
class Item:
    """An entry of the model."""

    key: str
    weight: int
    pinned: bool = False
    hits: int = 0


class CreateError(Exception):
    """What a ``create`` of the test raises."""


class Program(RuleBasedStateMachine):
    """All that one thread can do to a cache. Every rule does it to the model, too, and compares what comes back."""

    def __init__(self, max_entries: int | None, max_bytes: int | None) -> None:
        super().__init__()
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.told: list[Eviction] = []
        self.cache: Cache = PatternCache(max_entries, max_bytes, size_of=weigh, on_evict=self.told.append)
        self.items: list[Item] = []
        self.evicted: list[tuple[str, str]] = []
        self.counts: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------ the model

    def find(self, key: str) -> Item | None:
        return next((item for item in self.items if item.key == key), None)

    def keep(self, item: Item) -> None:
        """The entry of this key is now this one, and the last to leave; it stays pinned if it was."""
        old = self.find(item.key)
        if old is not None:
            self.items.remove(old)
        self.items.append(item if old is None else replace(item, pinned=old.pinned))

    def use(self, item: Item) -> None:
        self.keep(replace(item, hits=item.hits + 1))
        self.counts["hits"] += 1

    def alter(self, item: Item, pinned: bool) -> None:
        self.items[self.items.index(item)] = replace(item, pinned=pinned)

    def exceeded(self, items: list[Item]) -> str | None:
        if self.max_entries is not None and len(items) > self.max_entries:
            return "max_entries"
        if self.max_bytes is not None and sum(item.weight for item in items) > self.max_bytes:
            return "max_bytes"
        return None

    def fits(self, key: str, weight: int) -> bool:
        """Whether there is room beside what must stay."""
        staying = [item for item in self.items if item.pinned and item.key != key]
        return self.exceeded([*staying, Item(key, weight)]) is None

    def store(self, key: str, weight: int) -> None:
        self.keep(Item(key, weight))
        while (reason := self.exceeded(self.items)) is not None:
            leaver = next(item for item in self.items if not item.pinned and item.key != key)
            self.items.remove(leaver)
            self.evicted.append((leaver.key, reason))
            self.counts["evictions"] += 1

    def make(self, key: str, weight: int) -> int:
        """What get_or_create does, and returns."""
        item = self.find(key)
        if item is not None:
            self.use(item)
            return item.weight
        self.counts.update(misses=1, creations=1)
        if self.fits(key, weight):
            self.store(key, weight)
        else:
            self.counts["rejections"] += 1
        return weight

    # ------------------------------------------------------------------------------------------ looking up

    @rule(key=KEYS, weight=WEIGHTS | TOO_LARGE)
    def get_or_create(self, key: str, weight: int) -> None:
        assert self.cache.get_or_create(key, lambda: weight) == self.make(key, weight)

    @rule(key=KEYS, weight=WEIGHTS)
    def setdefault(self, key: str, weight: int) -> None:
        assert self.cache.setdefault(key, weight) == self.make(key, weight)

    @rule(key=KEYS)
    def create_fails(self, key: str) -> None:
        def fail() -> int:
            raise CreateError

        item = self.find(key)
        if item is not None:
            assert self.cache.get_or_create(key, fail) == item.weight
            self.use(item)
        else:
            with pytest.raises(CreateError):
                self.cache.get_or_create(key, fail)
            self.counts.update(misses=1, failures=1)

    @rule(key=KEYS, subscript=st.booleans())
    def get(self, key: str, subscript: bool) -> None:
        item = self.find(key)
        if item is not None:
            assert (self.cache[key] if subscript else self.cache.get(key, -1)) == item.weight
            self.use(item)
            return
        if subscript:
            with pytest.raises(KeyError):
                self.cache[key]
        else:
            assert self.cache.get(key, -1) == -1
        self.counts["misses"] += 1

    @rule(key=KEYS)
    def contains(self, key: str) -> None:
        assert (key in self.cache) == (self.find(key) is not None)

    # ------------------------------------------------------------------------------------------ storing

    @rule(key=KEYS, weight=WEIGHTS | TOO_LARGE, subscript=st.booleans())
    def put(self, key: str, weight: int, subscript: bool) -> None:
        def put() -> None:
            if subscript:
                self.cache[key] = weight
            else:
                self.cache.put(key, weight)

        if self.fits(key, weight):
            put()
            self.store(key, weight)
        else:
            with pytest.raises(ValueError, match="cannot be stored"):
                put()

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        item = self.find(key)
        if item is None:
            with pytest.raises(KeyError):
                del self.cache[key]
        else:
            del self.cache[key]
            self.items.remove(item)

    @rule(key=KEYS)
    def pop(self, key: str) -> None:
        item = self.find(key)
        assert self.cache.pop(key, None) == (None if item is None else item.weight)
        if item is not None:
            self.items.remove(item)

    @rule()
    def popitem(self) -> None:
        if self.items:
            item = self.items.pop(0)
            assert self.cache.popitem() == (item.key, item.weight)
        else:
            with pytest.raises(KeyError):
                self.cache.popitem()

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.items.clear()

    @rule(key=KEYS, pinned=st.booleans())
    def pin(self, key: str, pinned: bool) -> None:
        call: Callable[[str], None] = self.cache.pin if pinned else self.cache.unpin
        item = self.find(key)
        if item is None:
            with pytest.raises(KeyError):
                call(key)
        else:
            call(key)
            self.alter(item, pinned)

    @rule(patterns=st.dictionaries(KEYS, WEIGHTS | TOO_LARGE, max_size=4), pin=st.booleans())
    def warm(self, patterns: dict[str, int], pin: bool) -> None:
        before, news = Counter(self.counts), []

        def progress(done: int, total: int, key: str) -> None:
            news.append((done, total, key))

        creates: Any = {key: (lambda weight=weight: weight) for key, weight in patterns.items()}
        report = self.cache.warm(creates, pin=pin, progress=progress)
        for key, weight in patterns.items():
            self.make(key, weight)
            item = self.find(key)
            if pin and item is not None:
                self.alter(item, pinned=True)
        counts = self.counts - before
        assert (report.created, report.found) == (counts["creations"], counts["hits"])
        assert (report.rejected, report.evicted) == (counts["rejections"], counts["evictions"])
        assert news == [(done, len(patterns), key) for done, key in enumerate(patterns, start=1)]

    # ------------------------------------------------------------------------------------------ always

    @invariant()
    def cache_and_model_agree(self) -> None:
        check(self.cache)
        entries = [Item(str(entry.key), entry.nbytes, entry.pinned, entry.hits) for entry in self.cache.snapshot()]
        assert entries == self.items
        assert dict(self.cache.items()) == {item.key: item.weight for item in self.items}
        assert [(eviction.entry.key, eviction.reason) for eviction in self.told] == self.evicted
        info = self.cache.info()
        for name in ("hits", "misses", "creations", "failures", "evictions", "rejections"):
            assert getattr(info, name) == self.counts[name], name
        assert info.waits == info.bypasses == 0
        assert (info.entries, info.max_entries) == (len(self.items), self.max_entries)
        assert (info.nbytes, info.max_bytes) == (sum(item.weight for item in self.items), self.max_bytes)
        assert info.devices == {}


LIMITS = pytest.mark.parametrize(
    "limits", [(3, None), (None, MAX_BYTES), (3, MAX_BYTES), (None, None), (0, None)], ids=str
)


@pytest.mark.slow
@LIMITS
def test_a_cache_is_as_its_model(limits: tuple[int | None, int | None]) -> None:
    run_state_machine_as_test(lambda: Program(*limits), settings=settings(max_examples=30, stateful_step_count=40))


@pytest.mark.fuzz
@LIMITS
def test_a_cache_is_as_its_model_for_long(limits: tuple[int | None, int | None]) -> None:
    run_state_machine_as_test(
        lambda: Program(*limits), settings=settings(settings.get_profile("fuzz"), stateful_step_count=100)
    )
