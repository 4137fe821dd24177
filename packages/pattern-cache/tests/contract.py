"""What a cache promises as a mutable mapping of bounded size, whatever its policy and its limits.

A class of tests inherits from ``CacheContract`` and has a fixture ``cache``: an empty cache whose values are numbers,
or None, and weigh what ``weigh`` says.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from random import Random
from typing import Any, TypeAlias

import pytest

from dilated_pattern_cache import PatternCache

Cache: TypeAlias = "PatternCache[Any, int | None]"

FULL = 4  # how many values of WEIGHT every limit of the tests has room for, and no more
WEIGHT = 3
MAX_BYTES = FULL * WEIGHT


def weigh(value: int | None) -> int:
    """The value is its own weight."""
    return value or 0


def check(cache: Cache) -> None:
    """Assert that it is within its limits, and that all it says of its size agrees."""
    content = dict(cache.items())
    assert len(cache) == len(content) == len(list(cache)) == cache.info().entries
    assert {entry.key for entry in cache.snapshot()} == set(cache) == set(content)
    assert len(cache.snapshot()) == len(cache)
    assert cache.nbytes == cache.info().nbytes == sum(map(weigh, content.values()))
    assert cache.max_entries is None or len(cache) <= cache.max_entries
    assert cache.max_bytes is None or cache.nbytes <= cache.max_bytes


def fill(cache: Cache) -> dict[str, int | None]:
    """Store as much as there is room for; return it."""
    for key in "abcd":
        cache[key] = WEIGHT
    assert len(cache) == FULL
    return dict(cache.items())


def uses(cache: Cache) -> tuple[int, int, list[tuple[Any, int]]]:
    """All that a use would change."""
    info = cache.info()
    return info.hits, info.misses, [(entry.key, entry.hits) for entry in cache.snapshot()]


class CacheContract:
    """Tests of a cache as a mapping."""

    def test_it_begins_empty(self, cache: Cache) -> None:
        assert isinstance(cache, MutableMapping)
        assert not cache
        assert len(cache) == cache.nbytes == 0
        assert list(cache) == cache.snapshot() == []
        check(cache)

    def test_what_was_stored_is_found(self, cache: Cache) -> None:
        cache["a"] = 1
        cache.put("b", 2)
        assert cache
        assert "a" in cache
        assert "c" not in cache
        assert (cache["a"], cache["b"], cache.get("a"), cache.get("a", 5)) == (1, 2, 1, 1)
        check(cache)

    @pytest.mark.parametrize("value", [None, 0])
    def test_a_value_that_is_false_is_a_value(self, cache: Cache, value: int | None) -> None:
        cache["a"] = value
        assert "a" in cache
        assert (
            cache["a"] == cache.get("a", 5) == cache.setdefault("a", 5) == cache.get_or_create("a", lambda: 5) == value
        )
        assert cache.pop("a", 5) == value
        check(cache)

    def test_keys_are_told_apart_as_in_a_dictionary(self, cache: Cache) -> None:
        cache[1] = 1
        cache[1.0] = 2
        cache[True] = 3
        cache["1"] = 4
        assert dict(cache.items()) == {1: 3, "1": 4}
        cache[None] = 1
        cache[("causal", 8, None)] = 2
        assert (cache[None], cache["causal", 8, None]) == (1, 2)
        check(cache)

    @pytest.mark.parametrize(
        "call",
        [
            lambda cache: cache[[]],
            lambda cache: cache.get([]),
            lambda cache: cache.put([], 1),
            lambda cache: cache.pop([], 1),
            lambda cache: cache.setdefault([], 1),
            lambda cache: cache.get_or_create([], lambda: 1),
            lambda cache: cache.__delitem__([]),
            lambda cache: [] in cache,
        ],
        ids=["[]", "get", "put", "pop", "setdefault", "get_or_create", "del", "in"],
    )
    def test_a_key_that_cannot_be_hashed_is_an_error_and_changes_nothing(
        self, cache: Cache, call: Callable[[Cache], Any]
    ) -> None:
        before = fill(cache)
        with pytest.raises(TypeError, match="unhashable type: 'list'"):
            call(cache)
        assert dict(cache.items()) == before
        cache["e"] = WEIGHT
        check(cache)

    @pytest.mark.parametrize("key", ["x", ("x", 1), None])
    def test_a_missing_key_is_an_error_that_names_it(self, cache: Cache, key: Any) -> None:
        before = fill(cache)
        for call in (cache.__getitem__, cache.__delitem__, cache.pop, cache.pin, cache.unpin):
            with pytest.raises(KeyError) as caught:
                call(key)
            assert caught.value.args == (key,)
        assert dict(cache.items()) == before

    def test_a_missing_key_has_the_default(self, cache: Cache) -> None:
        assert cache.get("x") is None
        assert (cache.get("x", 7), cache.pop("x", 7), cache.pop("x", None)) == (7, 7, None)
        assert "x" not in cache
        check(cache)

    def test_del_removes(self, cache: Cache) -> None:
        before = fill(cache)
        for key in before:
            del cache[key]
            assert key not in cache
            assert cache.get(key) is None
            check(cache)
        assert len(cache) == cache.nbytes == 0

    def test_pop_removes_and_returns(self, cache: Cache) -> None:
        before = fill(cache)
        for key, value in before.items():
            assert cache.pop(key, 99) == value
            assert key not in cache
            check(cache)
        assert len(cache) == cache.nbytes == 0

    def test_popitem_takes_what_would_leave_next_until_nothing_is_there(self, cache: Cache) -> None:
        before = fill(cache)
        cache.pin("b")
        taken: dict[Any, int | None] = {}
        while cache:
            expected = cache.snapshot()[0].key
            key, value = cache.popitem()
            assert key == expected
            assert key not in taken
            taken[key] = value
            check(cache)
        assert taken == before
        with pytest.raises(KeyError, match="the cache is empty"):
            cache.popitem()

    def test_setdefault_stores_where_there_is_none(self, cache: Cache) -> None:
        assert cache.setdefault("a", 1) == 1
        assert cache.setdefault("a", 2) == 1
        assert cache["a"] == 1
        check(cache)

    def test_update_takes_mappings_pairs_and_keywords(self, cache: Cache) -> None:
        cache.update({"a": 1})
        cache.update([("a", 2), ("b", 1)], c=3)
        cache.update(d=1)
        cache.update()
        assert dict(cache.items()) == {"a": 2, "b": 1, "c": 3, "d": 1}
        check(cache)

    def test_clear_removes_all(self, cache: Cache) -> None:
        cache.clear()
        before = fill(cache)
        cache.pin("a")
        cache.clear()
        assert len(cache) == cache.nbytes == 0
        assert cache.snapshot() == []
        assert fill(cache) == before
        check(cache)

    def test_views_follow_the_cache(self, cache: Cache) -> None:
        keys, values, items = cache.keys(), cache.values(), cache.items()
        assert (list(keys), list(values), list(items)) == ([], [], [])
        cache.update(a=1, b=2, c=3)
        del cache["b"]
        assert (len(keys), len(values), len(items)) == (2, 2, 2)
        assert set(keys) == {"a", "c"}
        assert sorted(number for number in values if number) == [1, 3]
        assert set(items) == {("a", 1), ("c", 3)}
        assert "a" in keys
        assert "b" not in keys
        assert 3 in values
        assert 2 not in values
        assert ("a", 1) in items
        assert ("a", 3) not in items
        assert "a" not in items
        assert keys & {"a", "b"} == {"a"}
        assert items - {("a", 1)} == {("c", 3)}

    def test_the_cache_may_change_while_it_is_looked_through(self, cache: Cache) -> None:
        for view in (cache, cache.keys(), cache.values(), cache.items()):
            cache.clear()
            fill(cache)
            seen = 0
            for _ in view:
                cache.clear()
                cache["new"] = 1
                seen += 1
            assert seen == FULL

    def test_looking_at_it_is_no_use(self, cache: Cache) -> None:
        fill(cache)
        before = uses(cache)
        assert "a" in cache
        assert "x" not in cache
        assert len(list(cache)) == len(list(reversed(list(cache)))) == FULL
        for view in (cache.keys(), cache.values(), cache.items()):
            assert len(list(view)) == FULL
        assert "a" in cache.keys()  # noqa: SIM118
        assert WEIGHT in cache.values()
        assert ("a", WEIGHT) in cache.items()
        repr(cache), str(cache.info()), cache.snapshot(), bool(cache)
        assert uses(cache) == before

    def test_looking_a_key_up_is_a_use(self, cache: Cache) -> None:
        fill(cache)
        lookups: list[Callable[[], Any]] = [
            lambda: cache["a"],
            lambda: cache.get("a"),
            lambda: cache.setdefault("a", 9),
            lambda: cache.get_or_create("a", lambda: 9),
        ]
        for number, lookup in enumerate(lookups, start=1):
            assert lookup() == WEIGHT
            assert cache.info().hits == number
            assert {entry.key: entry.hits for entry in cache.snapshot()} == {"a": number, "b": 0, "c": 0, "d": 0}

    def test_a_key_looked_up_in_vain_is_a_miss(self, cache: Cache) -> None:
        cache.get("x")
        with pytest.raises(KeyError):
            cache["x"]
        assert (cache.info().hits, cache.info().misses) == (0, 2)

    def test_replacing_a_value_replaces_no_other(self, cache: Cache) -> None:
        before = fill(cache)
        for key in before:
            cache[key] = WEIGHT - 1
            assert cache.nbytes == sum(map(weigh, cache.values()))
        assert dict(cache.items()) == dict.fromkeys(before, WEIGHT - 1)
        for key in before:
            cache[key] = WEIGHT
        assert dict(cache.items()) == before
        assert cache.info().evictions == 0

    def test_one_too_many_displaces_the_first_to_leave(self, cache: Cache) -> None:
        fill(cache)
        expected = [entry.key for entry in cache.snapshot()]
        for key, leaver in zip("efgh", expected, strict=True):
            cache[key] = WEIGHT
            assert key in cache
            if (cache.max_entries, cache.max_bytes) != (None, None):
                assert leaver not in cache
                assert len(cache) == FULL
            check(cache)

    def test_a_larger_value_for_a_key_displaces_others_and_not_the_key(self, cache: Cache) -> None:
        for key in "abcd":
            cache.clear()
            fill(cache)
            cache[key] = MAX_BYTES - WEIGHT
            assert cache[key] == MAX_BYTES - WEIGHT
            assert len(cache) == (FULL if cache.max_bytes is None else 2)
            check(cache)

    def test_a_value_as_large_as_the_limit_is_alone(self, cache: Cache) -> None:
        for key in "ax":
            cache.clear()
            fill(cache)
            cache[key] = MAX_BYTES
            assert cache[key] == MAX_BYTES
            if cache.max_bytes is not None:
                assert list(cache) == [key]
            check(cache)

    def test_a_value_too_large_is_an_error_and_changes_nothing(self, cache: Cache) -> None:
        if cache.max_bytes is None:
            pytest.skip("no value is too large")
        before, order = fill(cache), cache.snapshot()
        stores: list[Callable[[str], None]] = [
            lambda key: cache.__setitem__(key, MAX_BYTES + 1),
            lambda key: cache.put(key, MAX_BYTES + 1),
            lambda key: cache.update({key: MAX_BYTES + 1}),
        ]
        for key in "ax":
            for store in stores:
                message = f"the value of '{key}' cannot be stored: its {MAX_BYTES + 1} bytes are more than the limit"
                with pytest.raises(ValueError, match=message):
                    store(key)
                assert dict(cache.items()) == before
                assert cache.snapshot() == order
                check(cache)

    def test_a_value_too_large_is_given_and_not_kept(self, cache: Cache) -> None:
        if cache.max_bytes is None:
            pytest.skip("no value is too large")
        before = fill(cache)
        assert cache.get_or_create("x", lambda: MAX_BYTES + 1) == MAX_BYTES + 1
        assert cache.setdefault("x", MAX_BYTES + 1) == MAX_BYTES + 1
        assert dict(cache.items()) == before
        assert cache.info().rejections == 2
        check(cache)

    def test_update_keeps_what_came_before_an_error(self, cache: Cache) -> None:
        if cache.max_bytes is None:
            pytest.skip("no value is too large")
        with pytest.raises(ValueError, match="'b'"):
            cache.update([("a", 1), ("b", MAX_BYTES + 1), ("c", 1)])
        assert dict(cache.items()) == {"a": 1}
        check(cache)

    def test_the_limits_hold_after_every_call(self, cache: Cache) -> None:
        random = Random(1)
        for _ in range(500):
            key, value = random.choice("abcdefgh"), random.randrange(MAX_BYTES + 1)
            calls: list[Callable[[], Any]] = [
                lambda key=key, value=value: cache.put(key, value, seconds=value % 3),  # type: ignore[misc]
                lambda key=key, value=value: cache.get_or_create(key, lambda: value),  # type: ignore[misc]
                lambda key=key: cache.pop(key, None),  # type: ignore[misc]
                lambda key=key: cache.get(key),  # type: ignore[misc]
            ]
            random.choices(calls, [6, 6, 1, 4])[0]()
            check(cache)
