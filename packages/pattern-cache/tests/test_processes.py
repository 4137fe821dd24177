"""Forks, other processes and the end of the interpreter. Each test is a process of its own: a deadlock stays there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import dilated_pattern_cache

SOURCE = Path(dilated_pattern_cache.__file__).parents[1]
PREAMBLE = """
import asyncio, atexit, copy, gc, os, sys, threading, time, warnings
from dilated_pattern_cache import PatternCache
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)

def begin(call, *arguments):
    thread = threading.Thread(target=call, args=arguments, daemon=True)
    thread.start()
    return thread

def in_child(check):
    '''Fork; the child runs the check, which must hold there and come to an end.'''
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        finally:
            os._exit(status)
    return child

def assert_left_well(child):
    last = time.monotonic() + 60
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, status
            return
        if time.monotonic() > last:
            os.kill(child, 9)
            os.waitpid(child, 0)
            raise AssertionError("the child hangs")
        time.sleep(0.001)
"""
WATCHDOG_SECONDS = 180

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def run(program: str) -> None:
    """Exit code 0, and not a word on stderr."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-W", "error", "-c", PREAMBLE + textwrap.dedent(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WATCHDOG_SECONDS)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------ forks


@forks
def test_a_forked_child_finds_the_same_content_in_a_cache_of_its_own() -> None:
    run(
        """
        cache = PatternCache(3)
        for key in range(5):
            cache.put(key, bytes(key))
        cache.pin(2)
        before = cache.snapshot()

        def check():
            assert cache.snapshot() == before
            assert dict(cache.items()) == {2: bytes(2), 3: bytes(3), 4: bytes(4)}
            cache.put(9, b"")
            assert set(cache) == {2, 4, 9}
            cache.clear()

        assert_left_well(in_child(check))
        assert cache.snapshot() == before
        """
    )


@forks
def test_a_forked_child_makes_what_another_thread_was_making() -> None:
    run(
        """
        cache = PatternCache()
        begun, go = threading.Event(), threading.Event()

        def create():
            begun.set()
            go.wait(60)
            return "parent"

        maker = begin(cache.get_or_create, "key", create)
        assert begun.wait(60)
        waiter = begin(cache.get_or_create, "key", create)
        while cache.info().waits < 1:
            time.sleep(0.001)

        def check():
            assert cache.get_or_create("key", lambda: "child") == "child"
            assert cache["key"] == "child"

        assert_left_well(in_child(check))
        go.set()
        maker.join(60)
        waiter.join(60)
        assert cache["key"] == "parent"
        """
    )


@forks
@pytest.mark.slow
def test_a_child_of_a_fork_while_others_change_the_cache_does_not_hang() -> None:
    run(
        """
        caches = [PatternCache(4, on_evict=lambda eviction: None), PatternCache(4, policy="gdsf")]
        done = False

        def hammer(number):
            turn = number
            while not done:
                turn += 1
                cache = caches[turn % 2]
                cache.get_or_create(turn % 7, lambda: [turn])
                cache.put(turn % 5, [turn])
                cache.pop(turn % 3, None)
                if turn % 50 == 0:
                    cache.clear()
                    PatternCache().put(1, 1)

        def check():
            for cache in caches:
                for key in range(10):
                    cache.get_or_create(key, lambda: [key])
                cache.put(1, [1])
                assert len(cache) == len(list(cache)) == len(cache.snapshot()) <= 4
                thread = begin(cache.get_or_create, "elsewhere", list)
                thread.join(60)
                assert not thread.is_alive()
                cache.clear()
                assert len(cache) == cache.nbytes == 0

        sys.setswitchinterval(1e-5)
        threads = [begin(hammer, number) for number in range(4)]
        for _ in range(50):
            assert_left_well(in_child(check))
        done = True
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        """
    )


@forks
def test_a_fork_inside_of_create_goes_on_on_both_sides() -> None:
    run(
        """
        cache = PatternCache()
        children = []

        def create():
            children.append(os.fork())
            return "child" if children[0] == 0 else "parent"

        status = 1
        try:
            value = cache.get_or_create("key", create)
            assert cache["key"] == value
            assert cache.get_or_create("other", lambda: 1) == 1
            assert cache.info().creations == 2
            status = 0
        finally:
            if children[0] == 0:
                os._exit(status)
        assert_left_well(children[0])
        assert value == "parent"
        """
    )


@forks
@pytest.mark.slow
def test_a_fork_inside_of_create_while_others_wait_for_it_goes_on_on_both_sides() -> None:
    run(
        """
        sys.setswitchinterval(1e-6)
        for turn in range(50):
            cache = PatternCache()
            children = []

            def create():
                threads.extend(begin(cache.get_or_create, "key", int) for _ in range(8))
                children.append(os.fork())
                return turn

            threads, status = [], 1
            try:
                assert cache.get_or_create("key", create) == cache["key"] == turn
                status = 0
            finally:
                if children[0] == 0:
                    os._exit(status)
            assert_left_well(children[0])
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
        """
    )


@forks
def test_a_fork_inside_of_create_while_another_begins_to_wait_for_it_goes_on_on_both_sides() -> None:
    run(
        """
        cache = PatternCache()
        children = []
        inside, go = threading.Event(), threading.Event()

        def look(flight):
            with flight._condition:  # as a thread does that begins to wait
                inside.set()
                go.wait(60)

        def create():
            begin(look, cache._store.masters.flights["key"])
            assert inside.wait(60)
            children.append(os.fork())
            go.set()
            return "child" if children[0] == 0 else "parent"

        status = 1
        try:
            if cache.get_or_create("key", create) == cache["key"]:
                status = 0
        finally:
            if children[0] == 0:
                os._exit(status)
        assert_left_well(children[0])
        """
    )


@forks
def test_a_fork_in_a_callback_goes_on_on_both_sides() -> None:
    run(
        """
        def fork(eviction):
            children.append(os.fork())

        children, status = [], 1
        cache = PatternCache(1, on_evict=fork)
        cache.put("old", 1)
        try:
            cache.put("new", 2)
            assert dict(cache.items()) == {"new": 2}
            status = 0
        finally:
            if children[0] == 0:
                os._exit(status)
        assert_left_well(children[0])
        """
    )


@forks
def test_a_cache_that_is_gone_is_no_matter_to_a_fork() -> None:
    run(
        """
        PatternCache().put(1, 1)
        gc.collect()
        cache = PatternCache()
        cache.put("key", 1)

        def check():
            assert cache["key"] == 1

        assert_left_well(in_child(check))
        """
    )


# ------------------------------------------------------------------------------------------ other processes


@pytest.mark.slow
def test_a_spawned_process_gets_the_options_and_no_content() -> None:
    run(
        """
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        cache = PatternCache(7, 1000, max_device_bytes=500, policy="gdsf", size_of=len, guard=None, on_evict=repr)
        cache.put("key", b"value")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            assert executor.submit(repr, cache).result(60) == "<PatternCache: 0 of 7 entries, 0 bytes>"
            back = executor.submit(copy.copy, cache).result(60)
        assert dict(cache.items()) == {"key": b"value"}
        assert (back.max_entries, back.max_bytes, len(back)) == (7, 1000, 0)
        assert back._options == cache._options
        assert back.get_or_create("other", lambda: b"made") == b"made"
        assert back.nbytes == 4
        """
    )


# ------------------------------------------------------------------------------------------ the end


LAST_WORDS = """
class Last:
    '''Used by the interpreter's end: it lives in a cycle, and nothing is collected before.'''

    def __init__(self, cache):
        self.me, self.cache = self, cache

    def __del__(self):
        self.cache.put("last", 1)
        self.cache.get_or_create("made last", lambda: 2)
        self.cache.info()
        self.cache.pop("last", None)
        self.cache.clear()

gc.disable()
"""


@pytest.mark.parametrize("finaliser", [False, True], ids=["", "finaliser"])
def test_the_interpreter_ends_though_daemons_make_and_wait(finaliser: bool) -> None:
    run(
        (LAST_WORDS if finaliser else "Last = list")
        + """
cache = PatternCache()
cache.put("key", 1)
begin(cache.get_or_create, "made", lambda: time.sleep(1000))
while cache.info().misses < 1:
    time.sleep(0.001)
begin(cache.get_or_create, "made", int)

async def make():
    await asyncio.sleep(1000)

begin(lambda: asyncio.run(cache.aget_or_create("made by a task", make)))
while cache.info().misses + cache.info().waits < 3:
    time.sleep(0.001)
Last(cache) if Last is not list else None
atexit.register(cache.get_or_create, "at exit", int)
"""
    )


@pytest.mark.slow
def test_the_interpreter_ends_though_daemons_change_a_cache_in_use() -> None:
    for _ in range(3):
        run(
            LAST_WORDS
            + """
cache = PatternCache(3)

def hammer():
    turn = 0
    while True:
        turn += 1
        cache.put(turn % 5, turn)
        cache.get_or_create(turn % 7, list)

Last(cache)
sys.setswitchinterval(1e-6)
for _ in range(4):
    begin(hammer)
while cache.info().evictions < 100:
    time.sleep(0.001)
"""
        )


def test_the_interpreter_ends_though_a_stopped_thread_holds_the_lock() -> None:
    run(
        LAST_WORDS
        + """
class Key:
    def __hash__(self):
        if cache._store.interrupted:  # with the lock held
            inside.set()
            time.sleep(1000)
        return 1

inside = threading.Event()
cache = PatternCache()
Last(cache)
begin(cache.put, Key(), 1)
assert inside.wait(60)
"""
    )
