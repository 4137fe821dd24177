"""Observers: told everything, in order, by any thread; and what the three that come with the package make of it."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import signal
import threading
import time
from io import StringIO

import pytest
from pool_checks import PATIENCE, in_threads

from dilated_memory_pool import MemoryPool, PoolEvent, PoolMemoryError
from dilated_memory_pool.observers import (
    Counters,
    JsonLinesLog,
    LeakTracker,
    StatisticsObserver,
    json_lines,
    read,
    replay,
)

PAGE = 4096
MIB = 2**20


def full(*observers, **options):
    return MemoryPool("host", mode="full", observers=observers, arena_bytes="1MiB", **options)


def churn(pool, index, rounds=200):
    """Allocate and free at random, and leave nothing; the bytes asked for altogether."""
    chosen = random.Random(index)
    live = []
    total = 0
    for _ in range(rounds):
        live.append(pool.allocate(chosen.randrange(1, 60_000)))
        total += live[-1].nbytes
        if len(live) > 10:
            live.pop(chosen.randrange(len(live)))
    return total


def in_child(work):
    """Run ``work()`` in a forked child; whether it returned True."""
    child = os.fork()
    if not child:
        signal.alarm(PATIENCE)  # a child that hangs has failed
        try:
            os._exit(0 if work() is True else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


# -------------------------------------------------------------------------------------------------- the events


def test_events_come_in_the_order_of_what_happened_with_its_sizes():
    events = []
    pool = full(events.append, limit="1MiB")
    block = pool.allocate(5000)
    address = block.address
    del block
    with pytest.raises(MemoryError):
        pool.allocate("2MiB")
    me = threading.get_ident()
    assert events == [
        PoolEvent("reserve", address, MIB, 0, me),
        PoolEvent("allocate", address, 2 * PAGE, 5000, me),
        PoolEvent("free", address, 2 * PAGE, 5000, me),
        PoolEvent("release", address, MIB, 0, me),
        PoolEvent("failure", 0, 2 * MIB, 2 * MIB, me),
    ]


def test_under_four_threads_every_free_has_its_allocate_and_no_two_live_spans_overlap():
    events = []
    pool = full(events.append)
    in_threads(lambda index: churn(pool, index))
    pool.trim()
    arenas, live = {}, {}
    for event in events:
        if event.kind == "reserve":
            arenas[event.address] = event.nbytes
        elif event.kind == "release":
            assert arenas.pop(event.address) == event.nbytes
        elif event.kind == "allocate":
            end = event.address + event.nbytes
            assert any(arena <= event.address and end <= arena + nbytes for arena, nbytes in arenas.items())
            assert all(end <= other or event.address >= other + nbytes for other, (nbytes, _) in live.items())
            live[event.address] = event.nbytes, event.requested
        else:
            assert event.kind == "free"
            assert live.pop(event.address) == (event.nbytes, event.requested)
    assert not live
    assert not arenas
    assert sum(event.kind == "allocate" for event in events) == 4 * 200


def test_an_event_names_the_thread_that_caused_it():
    events = []
    pool = full(events.append)
    idents = [0] * 4

    def work(index):
        idents[index] = threading.get_ident()
        for _ in range(100):
            pool.allocate(100 + index)

    in_threads(work)
    allocated = [event for event in events if event.kind == "allocate"]
    assert len(allocated) == 400
    assert all(event.thread == idents[event.requested - 100] for event in allocated)


def test_what_an_observer_raises_reaches_the_caller_and_the_pool_is_as_before():
    failing = True

    def observer(event):
        if failing and event.kind == "allocate":
            raise RuntimeError(f"no more than {event.requested}")

    pool = full(observer)
    with pytest.raises(RuntimeError, match="no more than 5000"):
        pool.allocate(5000)
    gc.collect()
    numbers = pool.statistics()
    assert (numbers.requested_bytes, numbers.allocated_bytes, numbers.misses) == (0, 0, 1)
    failing = False
    block = pool.allocate(5000)
    assert pool.statistics().requested_bytes == 5000
    assert pool.owns(block)


def test_an_observer_may_use_the_pool_itself():
    events, kept = [], []

    def observer(event):
        events.append(event)
        if event.kind == "allocate" and event.requested == 1000:
            kept.append(pool.allocate(2000))
            pool.statistics()
            pool.trim()

    pool = full(observer)
    block = pool.allocate(1000)
    assert [(event.kind, event.requested) for event in events] == [
        ("reserve", 0),
        ("allocate", 1000),
        ("allocate", 2000),
    ]
    assert pool.statistics().requested_bytes == 3000
    assert pool.owns(block)
    assert pool.owns(kept[0])


def test_observers_that_use_the_pool_from_four_threads_do_not_lock_one_another_out():
    def observer(event):
        pool.statistics()

    pool = full(observer)
    in_threads(lambda index: churn(pool, index, rounds=50))
    assert pool.statistics().requested_bytes == 0


# -------------------------------------------------------------------------------------------------- statistics


def test_counters_are_current_peak_and_total_of_counts_and_bytes():
    observer = StatisticsObserver()
    pool = full(observer)
    first, second = pool.allocate(100), pool.allocate(200)
    del first
    third = pool.allocate(50)
    assert observer.counters == Counters(
        current_count=2, current_bytes=250, peak_count=2, peak_bytes=300, total_count=3, total_bytes=350
    )
    del second, third


def test_a_section_counts_its_block_alone_while_those_around_it_go_on():
    observer = StatisticsObserver()
    pool = full(observer)
    before = pool.allocate(1000)
    with observer.section(pool) as outer:
        kept = pool.allocate(10)
        with observer.section(pool) as inner:
            pool.allocate(500)
            del before
    pool.allocate(7000)
    assert inner == Counters(-1, -1000, 1, 500, 1, 500)
    assert outer == Counters(0, -990, 2, 510, 2, 510)
    assert observer.counters == Counters(2, 7010, 3, 7010, 4, 8510)
    del kept


def test_sections_of_different_threads_may_overlap():
    observer = StatisticsObserver()
    pool = full(observer)
    first = observer.section(pool)
    second = observer.section(pool)
    one = first.__enter__()
    two = second.__enter__()
    kept = pool.allocate(10)
    first.__exit__(None, None, None)
    more = pool.allocate(20)
    second.__exit__(None, None, None)
    assert (one.total_bytes, two.total_bytes) == (10, 30)
    del kept, more


def test_a_section_without_its_pool_does_not_hear_of_the_last_frees():
    observer = StatisticsObserver()
    pool = full(observer)
    with observer.section() as deaf, observer.section(pool) as hearing:
        pool.allocate(10)
    assert hearing.current_bytes == 0
    with observer.section() as deaf:
        pool.allocate(10)
    assert deaf.current_bytes == 10


def test_counts_are_exact_under_four_threads():
    observer = StatisticsObserver()
    pools = [full(observer), full(observer)]
    totals = [0] * 4

    def work(index):
        totals[index] = churn(pools[index % 2], index)

    in_threads(work)
    for pool in pools:
        pool.statistics()
    counters = observer.counters
    assert (counters.total_count, counters.total_bytes) == (4 * 200, sum(totals))
    assert (counters.current_count, counters.current_bytes) == (0, 0)


@needs_fork
def test_a_child_forked_while_the_counters_are_held_goes_on_counting():
    observer = StatisticsObserver()
    pool = full(observer)
    with observer._lock:
        thread = threading.Thread(target=lambda: results.append(in_child(count)))

        def count():
            pool.allocate(10)
            return observer.counters.total_count == 1

        results = []
        thread.start()
        thread.join()
    assert results == [True]


# -------------------------------------------------------------------------------------------------- log


def test_a_log_reads_back_as_the_events_that_were_told(tmp_path):
    events = []
    with JsonLinesLog(tmp_path / "log") as log:
        pool = full(events.append, log)
        in_threads(lambda index: churn(pool, index))
    logged = list(read(tmp_path / "log"))
    assert [entry.event for entry in logged] == events
    times = [entry.time for entry in logged]
    assert times == sorted(times)
    assert times[0] >= 0


def test_the_first_line_says_when_who_and_which_version(tmp_path):
    from dilated_memory_pool import __version__

    JsonLinesLog(tmp_path / "log").close()
    header = json.loads((tmp_path / "log").read_text())
    assert sorted(header) == ["format", "pid", "start", "version"]
    assert (header["pid"], header["version"]) == (os.getpid(), __version__)
    assert header["start"].endswith("+00:00")


def test_lines_are_held_back_until_there_are_many_or_the_log_is_flushed(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "_SECONDS", math.inf)
    log = JsonLinesLog(tmp_path / "log")
    pool = full(log)
    block = pool.allocate(10)
    assert len((tmp_path / "log").read_text().splitlines()) == 1
    log.flush()
    assert len((tmp_path / "log").read_text().splitlines()) == 3
    for _ in range(600):
        block = pool.allocate(10)
    assert len((tmp_path / "log").read_text().splitlines()) > 500
    log.close()
    # A header, an arena, and a block whose free is told by the allocation after the one that let go of it.
    assert len((tmp_path / "log").read_text().splitlines()) == 2 + 601 + 599
    assert block.nbytes == 10


def test_lines_are_not_held_back_for_longer_than_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "_SECONDS", 0.0)
    log = JsonLinesLog(tmp_path / "log")
    full(log).allocate(10)
    assert [entry.event.requested for entry in read(tmp_path / "log")] == [0, 10]
    log.close()


def test_a_full_disk_is_told_to_the_caller_and_the_pool_goes_on(monkeypatch):
    class Full(StringIO):
        full = False

        def write(self, text):
            if self.full:
                raise OSError("no space left on device")
            return super().write(text)

    monkeypatch.setattr(json_lines, "_LINES", 1)
    file = Full()
    log = JsonLinesLog(file)
    pool = full(log)
    file.full = True
    with pytest.raises(OSError, match="no space left on device"):
        pool.allocate(10)
    file.full = False
    block = pool.allocate(20)
    assert pool.statistics().requested_bytes == 20
    assert block.nbytes == 20
    log.close()


def test_a_log_that_is_dropped_is_written(tmp_path):
    full(JsonLinesLog(tmp_path / "log")).allocate(10)
    gc.collect()
    assert [entry.event.kind for entry in read(tmp_path / "log")] == ["reserve", "allocate"]


def test_events_after_closing_are_not_recorded(tmp_path):
    with JsonLinesLog(tmp_path / "log") as log:
        pool = full(log)
        pool.allocate(10)
    log.close()
    pool.allocate(20)
    assert [entry.event.requested for entry in read(tmp_path / "log")] == [0, 10]


def test_a_file_of_ones_own_is_flushed_and_left_open():
    file = StringIO()
    with JsonLinesLog(file) as log:
        block = full(log).allocate(10)
    assert not file.closed
    assert json.loads(file.getvalue().splitlines()[2]) | {"time": 0} == {
        "time": 0,
        "thread": threading.get_ident(),
        "kind": "allocate",
        "address": hex(block.address),
        "nbytes": PAGE,
        "requested": 10,
    }


@needs_fork
@pytest.mark.parametrize("own_file", [False, True], ids=["path", "file"])
def test_a_forked_child_writes_nothing_into_its_parents_log(tmp_path, own_file):
    target = open(tmp_path / "log", "w") if own_file else tmp_path / "log"  # noqa: SIM115
    log = JsonLinesLog(target)
    pool = full(log)
    block = pool.allocate(10)

    def child():
        for _ in range(1000):
            pool.allocate(20)
        log.flush()
        log.close()
        if own_file:
            target.close()
        return True

    assert in_child(child)
    block = pool.allocate(30)
    log.close()
    if own_file:
        target.close()
    assert [entry.event.requested for entry in read(tmp_path / "log")] == [0, 10, 30]
    assert block.nbytes == 30


def test_reading_leaves_out_a_last_line_that_was_cut_off(tmp_path):
    with JsonLinesLog(tmp_path / "log") as log:
        full(log).allocate(10)
    text = (tmp_path / "log").read_text()
    (tmp_path / "log").write_text(text[:-20])
    assert [entry.event.kind for entry in read(tmp_path / "log")] == ["reserve"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 of .*log is not JSON"),
        ("[1]\n", "line 1 of .*log is not a JSON object"),
        ('{"format": "other"}\n', "is not a log of pool events"),
        ('{"format": "dilated_memory_pool.events"}\n{"time": 1}\n', "line 2 of .*log is not an event"),
        ('{"format": "dilated_memory_pool.events"}\nnothing\n', "line 2 of .*log is not JSON: 'nothing'"),
    ],
    ids=["empty", "list", "other", "no event", "no JSON"],
)
def test_reading_says_which_line_is_not_of_a_log(tmp_path, text, message):
    (tmp_path / "log").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read(tmp_path / "log"))


def test_a_log_wants_a_path_or_a_file():
    with pytest.raises(TypeError, match="path_or_file: expected a path or a text file open for writing, got 3"):
        JsonLinesLog(3)


def test_replaying_makes_the_same_requests_of_another_pool(tmp_path):
    with JsonLinesLog(tmp_path / "log") as log:
        pool = full(log)
        kept = [pool.allocate(3 * MIB), pool.allocate(5000)]
        for _ in range(10):
            pool.allocate(MIB + 1)
        numbers = pool.statistics()
    assert replay(tmp_path / "log", full()) == numbers
    binned = replay(tmp_path / "log", MemoryPool("host", mode="lightweight", size_classes=["2MiB", "8MiB"]))
    assert (binned.requested_bytes, binned.allocated_bytes) == (3 * MIB + 5000, 10 * MIB)
    assert (binned.hits, binned.misses, binned.peak_reserved_bytes) == (9, 3, 12 * MIB)
    assert len(kept) == 2


def test_replaying_counts_what_the_pool_refuses_and_goes_on(tmp_path):
    with JsonLinesLog(tmp_path / "log") as log:
        pool = full(log)
        pool.allocate(3 * MIB)
        kept = pool.allocate(100)
    numbers = replay(tmp_path / "log", MemoryPool("host", limit="1MiB"))
    assert (numbers.ooms, numbers.requested_bytes) == (1, 100)
    assert kept.nbytes == 100


# -------------------------------------------------------------------------------------------------- leaks


def line_of(marker):
    """The number of the one line of this file that ends with ``marker``."""
    with open(__file__) as file:
        return next(number for number, line in enumerate(file, 1) if line.rstrip().endswith(f"# {marker}"))


def test_a_leak_is_traced_to_its_line():
    tracker = LeakTracker()
    pool = full(tracker)
    kept = [pool.allocate(1000) for _ in range(3)]  # the leak
    kept.append(pool.allocate(9000))  # the larger leak
    large, small = tracker.live(pool)
    assert (small.count, small.requested_bytes) == (3, 3000)
    assert (large.count, large.requested_bytes) == (1, 9000)
    assert (small.stack[0].filename, small.stack[0].lineno) == (__file__, line_of("the leak"))
    assert (large.stack[0].filename, large.stack[0].lineno) == (__file__, line_of("the larger leak"))
    assert large.stack[0].name == "test_a_leak_is_traced_to_its_line"
    assert not any("dilated_memory_pool" in frame.filename.split(os.sep) for frame in small.stack)
    report = tracker.report(pool)
    assert report.startswith("live allocations: 4, of 12 KiB, from 2 places\n\n8.8 KiB in 1 allocations, made at\n")
    assert f"    {__file__}:{line_of('the larger leak')} in test_a_leak_is" in report
    with pytest.raises(AssertionError, match="live allocations: 4"):
        tracker.assert_none(pool)
    kept.clear()
    tracker.assert_none(pool)
    assert tracker.report() == "live allocations: 0, of 0 B, from 0 places"


def test_a_tensor_lives_as_long_as_a_view_of_it():
    pytest.importorskip("torch")
    tracker = LeakTracker()
    pool = full(tracker, min_bytes=0)
    view = pool.empty(1000)[10:]
    assert [leak.requested_bytes for leak in tracker.live(pool)] == [4000]
    del view
    tracker.assert_none(pool)


def test_without_its_pool_a_tracker_still_lists_what_just_died():
    tracker = LeakTracker()
    pool = full(tracker)
    pool.allocate(10)
    assert len(tracker.live()) == 1
    assert len(tracker.live(pool)) == 0


def test_stacks_are_those_of_the_allocating_threads_whichever_thread_tells():
    tracker = LeakTracker()
    pool = full(lambda event: time.sleep(0.0005), tracker)  # slow, so that one thread tells for the others
    kept = []

    def worker0():
        kept.extend(pool.allocate(1) for _ in range(50))

    def worker1():
        kept.extend(pool.allocate(2) for _ in range(50))

    def worker2():
        kept.extend(pool.allocate(3) for _ in range(50))

    def worker3():
        kept.extend(pool.allocate(4) for _ in range(50))

    workers = [worker0, worker1, worker2, worker3]
    in_threads(lambda index: workers[index]())
    found = sorted((leak.requested_bytes, leak.count, leak.stack[1].name) for leak in tracker.live(pool))
    assert found == [(50 * n, 50, f"worker{n - 1}") for n in (1, 2, 3, 4)]


def test_a_stack_has_no_more_frames_than_asked_for():
    tracker = LeakTracker(depth=2)
    pool = full(tracker)

    def deep(n):
        return deep(n - 1) if n else pool.allocate(10)

    block = deep(10)
    assert [frame.name for frame in tracker.live(pool)[0].stack] == ["deep", "deep"]
    assert block.nbytes == 10


@pytest.mark.parametrize("depth", [0, -1, 1.5, "16"])
def test_a_depth_is_a_positive_whole_number(depth):
    with pytest.raises(ValueError, match="depth: expected a positive whole number of frames, got"):
        LeakTracker(depth)


def test_requests_that_are_refused_leave_nothing_in_any_observer():
    statistics, tracker = StatisticsObserver(), LeakTracker()
    pool = full(statistics, tracker, limit="1MiB")
    with pytest.raises(PoolMemoryError):
        pool.allocate("2MiB")
    assert statistics.counters == Counters()
    tracker.assert_none()
