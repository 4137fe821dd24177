"""Corners where a cache could be wrong in silence: an interruption or another thread at the one bad moment."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import FrameType
from typing import Any

import pytest
import torch
from test_single_flight import PATIENCE, begin, until
from torch._subclasses.fake_tensor import FakeTensorMode

from dilated_pattern_cache import PatternCache, PatternMutatedError
from dilated_pattern_cache.values import devices


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A second device of the host: copies on it are clones."""
    place, canonical, move = torch.device("cpu:1"), devices.canonical, devices._Move
    monkeypatch.setattr(devices, "canonical", lambda name: place if name == place else canonical(name))
    monkeypatch.setattr(devices, "moved", lambda value, device: move(device, torch.clone)(value))
    return place


class Nosy:
    """A key that calls ``act`` once, when it is hashed with the cache's lock held."""

    def __init__(self, cache: PatternCache[Any, Any], act: Callable[[], object]) -> None:
        self._cache, self._act = cache, act

    def __hash__(self) -> int:
        if self._cache._store.interrupted:
            act, self._act = self._act, lambda: None
            act()
        return 1

    def __eq__(self, other: object) -> bool:
        return self is other


def at_call(name: str, act: Callable[[], object]) -> Callable[[FrameType, str, object], None]:
    """A trace function that acts when a function of that name is first called."""

    def trace(frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_name == name and event == "call":
            sys.settrace(None)
            act()

    return trace


def interrupt() -> None:
    raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------ interruptions


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")
def test_after_hundreds_of_interrupts_by_signals_a_thread_can_still_change_the_cache() -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    cache: PatternCache[Any, int] = PatternCache(10)
    before, strikes = signal.signal(signal.SIGALRM, handle), 0
    last = time.monotonic() + PATIENCE
    try:
        while strikes < 1000:
            assert time.monotonic() < last
            try:
                signal.setitimer(signal.ITIMER_REAL, 2e-4)
                while True:
                    cache.put(1, 1)
            except KeyboardInterrupt:
                strikes += 1
            assert not cache._store.interrupted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    cache.put("after", 1)
    assert "after" in cache
    assert begin(lambda: cache.setdefault("elsewhere", 2)).result(PATIENCE) == 2


def test_an_interrupt_between_a_value_and_its_copies_leaves_no_copy_of_the_old_one(far: torch.device) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    cache.get_or_create("key", lambda: torch.zeros(2), device=far)
    before = sys.gettrace()
    sys.settrace(at_call("let_go", interrupt))
    try:
        with pytest.raises(KeyboardInterrupt):
            cache.put("key", torch.ones(2))
    finally:
        sys.settrace(before)
    copy = cache.get("key", device=far)
    assert copy is not None
    assert torch.equal(copy, cache["key"])


def test_an_interrupt_between_a_landing_and_its_announcement_leaves_nobody_waiting() -> None:
    cache: PatternCache[str, int] = PatternCache()
    others: list[Future[object]] = []

    def create() -> int:
        others.append(begin(lambda: cache.get_or_create("key", int)))
        flight = cache._store.masters.flights["key"]
        until(lambda: bool(flight._condition._waiters))  # type: ignore[attr-defined]
        sys.settrace(at_call("notify_all", interrupt))
        return 1

    before = sys.gettrace()
    try:
        with pytest.raises(KeyboardInterrupt):
            cache.get_or_create("key", create)
    finally:
        sys.settrace(before)
    assert others[0].result(PATIENCE) == 1


def test_what_interrupts_a_look_up_is_done_and_told_right_after_it() -> None:
    told: list[Any] = []
    other: PatternCache[str, int] = PatternCache()
    cache: PatternCache[Any, Any] = PatternCache(1, on_evict=lambda eviction: told.append(eviction.entry.key))

    class Old:
        pass

    old = weakref.ref(value := Old())
    cache.put("old", value)
    del value

    def fail() -> None:
        raise LookupError

    def meddle() -> None:
        other.put("put", 1)
        cache.put("new", 2)

    with pytest.raises(LookupError):
        cache.get_or_create(Nosy(cache, meddle), fail)
    assert list(cache) == ["new"]
    assert told == ["old"]
    assert old() is None
    assert list(other) == ["put"]


# ------------------------------------------------------------------------------------------ other threads


def test_a_device_may_be_new_in_the_middle_of_a_change(far: torch.device) -> None:
    cache: PatternCache[Any, torch.Tensor] = PatternCache()
    key = Nosy(cache, lambda: None)
    cache.get_or_create(key, lambda: torch.ones(1), device=far)
    key._act = lambda: cache._store.tier("another")  # as another thread's first copy makes it
    cache.put(key, torch.zeros(1))
    assert cache[key] == 0
    copy = cache.get(key, device=far)
    assert copy == 0


def test_a_value_for_which_there_is_no_room_any_more_is_an_error() -> None:
    class Key:
        def __hash__(self) -> int:
            return 1

        def __eq__(self, other: object) -> bool:
            nonlocal armed
            if armed and not cache._store.interrupted:
                armed = False
                cache.pin("other")  # as another thread does, after there was room
            return self is other

    cache: PatternCache[Any, int] = PatternCache(2)
    armed, key = False, Key()
    cache.update({key: 1, "other": 1})
    cache.pin(key)
    armed = True
    with pytest.raises(ValueError, match="all 2 entries are pinned"):
        cache.put("new", 1)
    assert not armed
    assert "new" not in cache
    assert cache.info().rejections == 0


def test_nobody_is_given_a_copy_of_a_value_that_was_seen_to_be_changed(
    far: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    value = cache.get_or_create("key", lambda: torch.ones(2))
    copied, copying, go = devices.copied, threading.Event(), threading.Event()

    def slow(value: Any, device: torch.device) -> Any:
        copy = copied(value, device)
        copying.set()
        assert go.wait(PATIENCE)
        return copy

    value.add_(41)  # after a look-up has passed the guard
    monkeypatch.setattr(devices, "copied", slow)
    author = begin(lambda: cache._maker.on_device("key", value, far))
    assert copying.wait(PATIENCE)
    with pytest.raises(PatternMutatedError):
        cache["key"]
    monkeypatch.setattr(devices, "copied", copied)
    found = begin(lambda: cache.get_or_create("key", lambda: torch.ones(2), device=far))
    go.set()
    author.result(PATIENCE)
    copy = found.result(PATIENCE)
    assert isinstance(copy, torch.Tensor)
    assert copy.tolist() == [1, 1]


# ------------------------------------------------------------------------------------------ tasks


async def ones() -> torch.Tensor:
    return torch.ones(2)


def test_a_task_is_given_a_value_and_no_coroutine_in_a_dispatch_mode_and_when_an_entry_has_just_left() -> None:
    async def main() -> None:
        await cache.aget_or_create("key", ones)
        with FakeTensorMode():
            assert isinstance(await cache.aget_or_create("key", ones), torch.Tensor)
        find = cache._find

        def find_late(key: str) -> Any:
            entry = find(key)
            if entry is not None:
                cache.pop(key)  # as another thread does
            return entry

        cache._find = find_late  # type: ignore[assignment]
        assert isinstance(await cache.aget_or_create("key", ones), torch.Tensor)
        cache._find = find
        assert "key" not in cache

    cache: PatternCache[str, Any] = PatternCache(1)
    asyncio.run(main())


def test_a_coroutine_is_no_value() -> None:
    cache: PatternCache[str, Any] = PatternCache()
    with pytest.raises(TypeError, match="use aget_or_create"):
        cache.get_or_create("key", ones)
    assert len(cache) == 0


def test_a_task_that_its_loop_abandoned_frees_its_key() -> None:
    async def for_ever() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        task = asyncio.ensure_future(cache.aget_or_create("key", for_ever))
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        while not cache.info().misses:
            await asyncio.sleep(0)

    cache: PatternCache[str, Any] = PatternCache()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(main())
    loop.close()
    gc.collect()
    assert begin(lambda: cache.get_or_create("key", lambda: 1)).result(PATIENCE) == 1


# ------------------------------------------------------------------------------------------ guards


@pytest.mark.parametrize("change", ["same identity", "same number"])
def test_contents_are_told_apart_by_what_they_are(change: str) -> None:
    cache: PatternCache[str, list[Any]] = PatternCache(guard="contents")
    value: list[Any] = [{1, 2}, 1]
    cache.put("key", value)
    if change == "same identity":
        value[0] = None
        value[0] = {3}  # often where the other set was
    else:
        value[1] = True
    with pytest.raises(PatternMutatedError):
        cache["key"]


@pytest.mark.parametrize("take", ["pop", "popitem"])
def test_a_changed_value_that_is_taken_out_is_noticed(take: str) -> None:
    cache: PatternCache[str, torch.Tensor] = PatternCache()
    cache.put("key", torch.ones(2))
    cache["key"].add_(1)
    with pytest.raises(PatternMutatedError):
        cache.pop("key") if take == "pop" else cache.popitem()
    assert len(cache) == 0


def test_warming_looks_at_everything_before_it_makes_anything() -> None:
    cache: PatternCache[str, Any] = PatternCache()
    with pytest.raises(TypeError, match="create: expected a callable, got 5 for 'b'"):
        cache.warm([("a", int), ("b", 5)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="progress: expected a callable"):
        cache.warm({"a": int}, progress=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="workers: expected a whole number, got True"):
        cache.warm({"a": int}, workers=True)
    assert len(cache) == 0


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match="policy: expected a function that returns an EvictionPolicy, got one"):
        PatternCache(policy=lambda: None)  # type: ignore[arg-type,return-value]
