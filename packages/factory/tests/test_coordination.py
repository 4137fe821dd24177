from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from coordination_ranks import MIB, SECONDS, at_once, coordinators, eventually, run_ranks, told
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import distributed
from torch.distributed import FileStore, HashStore, Store, TCPStore

from dilated_factory.coordination import GroupLimitError, GroupMemoryError, PoolCoordinator, pressure
from dilated_factory.coordination import ledger as ledgers
from dilated_factory.coordination.ledger import Ledger
from dilated_factory.coordination.line import Line
from dilated_factory.resources import SharedResources
from dilated_memory_pool import MemoryPool, PoolLimitError, PoolMemoryError
from dilated_memory_pool.adaptors import Adaptor, LimitingAdaptor
from dilated_memory_pool.attention import AttentionBufferManager
from dilated_memory_pool.backends import HostBackend, Memory

UNIT = 64 * 1024


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "_WATCH_SECONDS", 0.001)
    monkeypatch.setattr(pressure, "_WAIT_SECONDS", 0.001)


def make_pool(coordinator: PoolCoordinator, backend: Any = "host") -> MemoryPool:
    return coordinator.pool(backend, min_bytes=0, mode="lightweight")


def refused(pool: MemoryPool, nbytes: int | str) -> GroupMemoryError:
    with pytest.raises(PoolMemoryError) as caught:
        pool.allocate(nbytes)
    error = told(caught.value)
    assert isinstance(error, GroupMemoryError)
    return error


def all_back(ranks: list[PoolCoordinator], pools: list[MemoryPool]) -> bool:
    for pool in pools:
        pool.trim()
    if set(ranks[0].reserved().values()) == {0}:
        return True
    gc.collect()  # errors of refused requests may still hold what the threads had
    return False


class Meter(Adaptor):
    """Host memory for all ranks of a test: what is mapped, and the most there ever was."""

    def __init__(self) -> None:
        super().__init__(HostBackend())
        self.mapped: dict[object, int] = {}
        self.peak = 0

    def allocate(self, nbytes: int) -> Memory:
        key = object()
        self.mapped[key] = nbytes
        memory = super().allocate(nbytes)
        weakref.finalize(memory, self.mapped.pop, key, None)
        self.peak = max(self.peak, sum(self.mapped.copy().values()))
        return memory


# ------------------------------------------------------------------------------------------ threads as ranks


@pytest.fixture(params=["hash", "tcp", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "hash":
        return HashStore()
    if request.param == "file":
        return FileStore(str(tmp_path / "store"), -1)
    return TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=SECONDS), wait_for_workers=False)


def test_a_rank_that_is_short_gets_what_lies_idle_on_another(store: Store) -> None:
    with coordinators(2, store, limit="8MiB") as (first, second):
        short, rich = make_pool(first), make_pool(second)
        rich.reserve("6MiB")
        block = short.allocate("4MiB")
        assert rich.statistics().reserved_bytes == 0
        assert first.reserved() == {0: 4 * MIB, 1: 0}
        del block
        assert short.trim() == 4 * MIB
        assert eventually(lambda: second.reserved() == {0: 0, 1: 0})


def test_memory_in_use_is_refused_with_the_names_of_those_who_hold_it(store: Store) -> None:
    with coordinators(3, store, limit="8MiB") as ranks:
        pools = [make_pool(rank) for rank in ranks]
        held = [pools[1].allocate("4MiB"), pools[2].allocate("2MiB")]
        pools[2].reserve("1MiB")
        error = refused(pools[0], "3MiB")
        assert isinstance(error, GroupLimitError)
        assert isinstance(error, PoolLimitError)
        assert (error.rank, error.requested, error.limit) == (0, 3 * MIB, 8 * MIB)
        assert error.reserved_by_rank == {0: 0, 1: 4 * MIB, 2: 2 * MIB}
        assert (error.given_back, error.silent) == (MIB, ())
        text = str(error)
        assert text.startswith("rank 0: the common limit of 8 MiB is reached: requested 3 MiB")
        assert "rank 1 reserves 4 MiB, rank 2 reserves 2 MiB" in text
        assert "the other ranks gave back 1 MiB" in text
        assert pickle.loads(pickle.dumps(error)).args == error.args
        del held[0]
        pools[0].allocate("3MiB")


def test_a_backend_that_refuses_makes_the_other_ranks_trim_too() -> None:
    device = LimitingAdaptor(HostBackend(), "8MiB")
    with coordinators(2, scope="group") as ranks:
        short, rich = (make_pool(rank, device) for rank in ranks)
        rich.reserve("6MiB")
        block = short.allocate("4MiB")
        assert rich.statistics().reserved_bytes == 0
        error = refused(rich, "6MiB")
        assert not isinstance(error, PoolLimitError)
        assert isinstance(error.__cause__, MemoryError)
        assert str(error).startswith("rank 1: the backend has no more memory: requested 6 MiB; rank 0 reserves 4 MiB")
        assert error.allocated == 0
        del block


def test_a_rank_trims_its_own_pools_before_it_asks_others() -> None:
    with coordinators(2, limit="8MiB") as (first, second):
        short, idle, other = make_pool(first), make_pool(first), make_pool(second)
        idle.reserve("3MiB")
        other.reserve("3MiB")
        short.allocate("4MiB")
        assert idle.statistics().reserved_bytes == 0
        assert other.statistics().reserved_bytes == 3 * MIB


def test_a_rank_gives_no_more_than_is_missing() -> None:
    with coordinators(2, limit="8MiB") as (first, second):
        short, rich = make_pool(first), make_pool(second)
        blocks = [rich.allocate("1MiB") for _ in range(8)]
        del blocks
        block = short.allocate("3MiB")
        assert first.reserved() == {0: 3 * MIB, 1: 5 * MIB}
        del block


def test_a_buffer_manager_gives_back_what_it_holds_idle() -> None:
    with (
        coordinators(2, limit="8MiB") as (first, second),
        AttentionBufferManager(second.coordinated("host")) as manager,
    ):
        second.watch(manager)
        scores = manager.empty(6 * MIB, dtype=torch.uint8, kind="scores")
        assert refused(make_pool(first), "4MiB").reserved_by_rank[1] == 6 * MIB
        del scores
        make_pool(first).allocate("4MiB")


def test_shared_resources_of_the_ranks_make_room_for_each_other() -> None:
    with coordinators(2, limit="16MiB") as ranks:
        short, rich = (SharedResources(coordinator=rank) for rank in ranks)
        rows = rich.pool("cpu", "lightweight").empty(8 * MIB, dtype=torch.uint8)
        scores = rich.manager("cpu").empty(4 * MIB, dtype=torch.uint8, kind="scores")
        del rows, scores
        assert sum(ranks[0].reserved().values()) >= 12 * MIB
        short.pool("cpu", "lightweight").empty(14 * MIB, dtype=torch.uint8)
        assert ranks[0].reserved()[1] <= 2 * MIB


def test_more_than_the_limit_is_refused_without_asking_anyone() -> None:
    with coordinators(2, limit="1MiB") as (first, second):
        rich = make_pool(second)
        rich.reserve("1MiB")
        assert isinstance(refused(make_pool(first), "2MiB"), GroupLimitError)
        assert rich.statistics().reserved_bytes == MIB


def test_ranks_elsewhere_have_a_budget_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {0: "a", 1: "b", 2: "a"}
    store, made = HashStore(), {}

    def make(rank: int) -> Callable[[], None]:
        def work() -> None:
            made[rank] = PoolCoordinator(
                store=store, rank=rank, world_size=3, limit=limits[names[rank]], timeout=SECONDS
            )

        return work

    limits = {"a": "4MiB", "b": "2MiB"}
    place = threading.local()
    monkeypatch.setattr("dilated_factory.coordination.members.socket.gethostname", lambda: place.name)

    def there(rank: int) -> Callable[[], None]:
        def work() -> None:
            place.name = names[rank]
            make(rank)()

        return work

    at_once([there(rank) for rank in range(3)])
    assert [made[rank].ranks for rank in range(3)] == [(0, 2), (1,), (0, 2)]
    pools = [make_pool(made[rank]) for rank in range(3)]
    pools[0].reserve("4MiB")
    pools[1].reserve("2MiB")
    assert made[1].reserved() == {1: 2 * MIB}
    block = pools[2].allocate("4MiB")
    assert made[0].reserved() == {0: 0, 2: 4 * MIB}
    del block
    for rank in range(3):
        made[rank].close()


STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["allocate", "allocate", "free", "trim"]), st.integers(1, 6)),
    max_size=20,
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_a_request_fails_only_where_memory_in_use_leaves_no_room(steps: list[tuple[int, str, int]]) -> None:
    meter, limit = Meter(), 8 * UNIT
    with coordinators(3, limit=limit) as ranks:
        pools = [make_pool(rank, meter) for rank in ranks]
        held: list[list[Any]] = [[], [], []]
        for rank, step, number in steps:
            if step == "allocate":
                in_use = sum(block.nbytes for blocks in held for block in blocks)
                if in_use + number * UNIT <= limit:
                    held[rank].append(pools[rank].allocate(number * UNIT))
                else:
                    assert isinstance(refused(pools[rank], number * UNIT), GroupLimitError)
            elif step == "free" and held[rank]:
                del held[rank][number % len(held[rank])]
            elif step == "trim":
                pools[rank].trim()
            reserved = ranks[rank].reserved()
            assert sum(reserved.values()) <= limit
            assert all(reserved[other] >= pool.statistics().reserved_bytes for other, pool in enumerate(pools))
        held.clear()
        assert eventually(lambda: all_back(ranks, pools))
    assert meter.peak <= limit


@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(programs=st.lists(st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=15), min_size=4, max_size=4))
def test_ranks_at_once_never_exceed_the_limit_and_all_charges_return(
    programs: list[list[tuple[bool, int]]],
) -> None:
    meter, limit = Meter(), 10 * UNIT
    with coordinators(2, limit=limit) as ranks:
        pools = [make_pool(rank, meter) for rank in ranks]

        def work(pool: MemoryPool, program: list[tuple[bool, int]]) -> Callable[[], None]:
            def run() -> None:
                held: list[Any] = []
                for keep, number in program:
                    try:
                        held.append(pool.allocate(number * UNIT))
                    except PoolMemoryError as error:
                        assert isinstance(told(error), GroupLimitError)  # noqa: PT017  # refusals are part of the game
                        held.clear()
                    if not keep:
                        held.clear()

            return run

        at_once([work(pools[place % 2], program) for place, program in enumerate(programs)])
        assert eventually(lambda: all_back(ranks, pools))
    assert meter.peak <= limit


def test_ranks_that_are_short_at_once_serve_each_other() -> None:
    with coordinators(4, limit="16MiB") as ranks:
        pools = [make_pool(rank) for rank in ranks]
        for pool in pools:
            pool.reserve("4MiB")
        blocks = at_once([lambda pool=pool: pool.allocate("4000KiB") for pool in pools])
        assert sum(ranks[0].reserved().values()) <= 16 * MIB
        del blocks


# ------------------------------------------------------------------------------------------ charges


def test_an_arena_costs_one_round_trip_and_an_allocation_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "_WATCH_SECONDS", SECONDS)  # the thread that watches keeps quiet
    calls: list[str] = []
    ask = Line._ask
    with coordinators(1, limit="64MiB") as (alone,):
        pool = make_pool(alone)
        pool.reserve("1MiB")
        monkeypatch.setattr(Line, "_ask", lambda line, question: calls.append("call") or ask(line, question))
        blocks = [pool.allocate("2MiB") for _ in range(5)]
        assert len(calls) == 5
        blocks.clear()
        blocks += [pool.allocate("2MiB") for _ in range(5)]
        assert len(calls) == 5
        monkeypatch.undo()


def test_memory_freed_by_the_garbage_collector_is_given_back() -> None:
    with coordinators(1, limit="8MiB") as (alone,):
        pool = make_pool(alone)
        cycle: list[Any] = [pool.allocate("4MiB"), pool]
        cycle.append(cycle)
        del pool, cycle
        gc.collect()
        assert eventually(lambda: alone.reserved() == {0: 0})


def test_threads_of_a_rank_that_fit_together_are_never_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "_PATIENCE_SECONDS", SECONDS)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        ledger = Ledger(Line(store := HashStore(), 0, store), (0,), 4)

        def work() -> int:
            refused = 0
            for _ in range(150):
                ticket = ledger.ticket()
                refused += bool(ledger.charge(ticket, 1))
                ledger.discharge(ticket)
            return refused

        assert at_once([work] * 4) == [0] * 4
    finally:
        sys.setswitchinterval(interval)
    assert ledger.settle(ledger.table())
    assert ledger.table().reserved == {0: 0}


def test_a_charge_that_fits_waits_for_a_thread_that_is_in_the_middle_of_one_for_long() -> None:
    begun, waited_for = threading.Event(), threading.Event()

    class Slow(Line):
        def get(self, key: str) -> str:
            if threading.current_thread() is slow and not begun.is_set():
                begun.set()  # in the middle of a charge
                assert waited_for.wait(SECONDS)
                time.sleep(0.5)  # as where the machine lets it wait
            return super().get(key)

    ledger = Ledger(Slow(store := HashStore(), 0, store), (0,), 2)
    ticket = ledger.ticket()
    assert ledger.charge(ticket, 2) == 0
    ledger.discharge(ticket)  # the table does not say so yet, and cannot before the charge of the other thread ends
    found: list[int] = []
    slow = threading.Thread(target=lambda: found.append(ledger.charge(ledger.ticket(), 1)), daemon=True)
    slow.start()
    assert begun.wait(SECONDS)
    waited_for.set()
    assert ledger.charge(ledger.ticket(), 1) == 0
    slow.join(SECONDS)
    assert found == [0]


def test_a_charge_in_the_middle_of_another_of_its_thread_does_not_wait_for_it() -> None:
    class Nested(Line):
        inner: Callable[[], int] | None = None

        def exchange(self, key: str, expected: str, desired: str) -> str:
            if self.inner is not None:
                inner, self.inner = self.inner, None
                found.append(inner())  # as a finaliser would that the collector runs here
            return super().exchange(key, expected, desired)

    found: list[int] = []
    line = Nested(store := HashStore(), 0, store)
    ledger = Ledger(line, (0,), 10)
    line.inner = lambda: ledger.charge(ledger.ticket(), 10) or ledger.charge(ledger.ticket(), 1)
    assert ledger.charge(ledger.ticket(), 1) == 1
    assert found == [1]


class InterruptedLine(Line):
    """Ctrl-C right after the store has taken a charge."""

    interrupted = False

    def exchange(self, key: str, expected: str, desired: str) -> str:
        answer = super().exchange(key, expected, desired)
        if self.interrupted:
            self.interrupted = False
            raise KeyboardInterrupt
        return answer


def test_an_interrupted_charge_does_not_stay() -> None:
    store = HashStore()
    line = InterruptedLine(store, 0, store)
    ledger = Ledger(line, (0,), 10)
    line.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        ledger.charge(ledger.ticket(), 7)
    assert ledger.table().reserved == {0: 7}
    assert ledger.charge(ledger.ticket(), 6) == 0
    assert ledger.table().reserved == {0: 6}


def test_what_a_backend_raises_leaves_no_charge() -> None:
    class Broken(Adaptor):
        def allocate(self, nbytes: int) -> Memory:
            raise OSError("broken")

    with coordinators(1, limit="8MiB") as (alone,):
        with pytest.raises(OSError, match="broken"):
            make_pool(alone, Broken(HostBackend())).allocate("1MiB")
        assert eventually(lambda: alone.reserved() == {0: 0})


# ------------------------------------------------------------------------------------------ leaving


def test_a_rank_that_left_is_not_waited_for_and_counts_what_it_still_holds() -> None:
    with coordinators(2, limit="8MiB") as (first, second):
        pool = make_pool(second)
        block = pool.allocate("3MiB")
        pool.reserve("2MiB")
        second.close()
        assert first.reserved() == {0: 0, 1: 3 * MIB}  # what was idle is gone
        error = refused(make_pool(first), "6MiB")
        assert (error.reserved_by_rank, error.silent) == ({0: 0, 1: 3 * MIB}, ())
        with pytest.raises(RuntimeError, match="rank 1: the pool coordinator is closed"):
            pool.allocate("1MiB")
        del block
        pool.trim()
        assert first.reserved() == {0: 0, 1: 0}
        assert "closed" in repr(second)


def test_a_coordinator_nobody_holds_ends_its_thread_and_gives_its_charges_back() -> None:
    store = HashStore()
    with coordinators(2, store, limit="8MiB") as ranks:
        pool = make_pool(ranks[1])
        block = pool.allocate("2MiB")
        thread = ranks[1]._pressure._thread
        first = ranks[0]
    del ranks
    assert not thread.is_alive()
    assert first.reserved() == {0: 0, 1: 2 * MIB}
    del pool, block
    assert eventually(lambda: gc.collect() >= 0 and first.reserved() == {0: 0, 1: 0})


def test_a_dropped_coordinator_ends_its_thread() -> None:
    coordinator = PoolCoordinator(store=HashStore(), rank=0, world_size=1)
    thread = coordinator._pressure._thread
    pool = make_pool(coordinator)
    del coordinator
    assert thread.is_alive()  # the pool's backend holds it
    del pool
    gc.collect()
    assert eventually(lambda: not thread.is_alive())


def test_an_observer_that_raises_does_not_end_the_watching_thread(caplog: pytest.LogCaptureFixture) -> None:
    def observer(event: Any) -> None:
        if event.kind == "release":
            raise ValueError("observed")

    with coordinators(2, limit="8MiB") as (first, second):
        pool = second.pool("host", min_bytes=0, arena_bytes=0, observers=[observer])
        pool.reserve("6MiB")
        with caplog.at_level(logging.ERROR, logger="dilated_factory"):
            make_pool(first).allocate("4MiB")
        assert "could not be trimmed" in caplog.text
        assert second._pressure._thread.is_alive()


def test_closing_does_not_wait_for_a_store_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, asked, calls = threading.Event(), threading.Event(), []
    ask = Line._ask

    def wait(line: Line, question: Callable[[], Any]) -> Any:
        calls.append(threading.current_thread().name)
        asked.set()
        assert silent.wait(SECONDS)
        return ask(line, question)

    with coordinators(1, limit="8MiB", timeout=0.05) as (alone,):
        pool = make_pool(alone)
        block = pool.allocate("1MiB")
        monkeypatch.setattr(Line, "_ask", wait)
        assert asked.wait(SECONDS)  # the thread that watches is stuck
        alone.close()
        del block
        pool.trim()
        assert set(calls) == {"dilated pool coordinator, rank 0"}
        with pytest.raises(RuntimeError, match="rank 0: the pool coordinator is closed"):
            pool.allocate("1MiB")
        monkeypatch.setattr(Line, "_ask", ask)
        silent.set()
        alone._pressure._thread.join(SECONDS)


def test_a_store_that_fails_for_a_moment_does_not_end_the_watching_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    failing, failed, ask = threading.Event(), threading.Event(), Line._ask

    def fail(line: Line, question: Callable[[], Any]) -> Any:
        if failing.is_set() and threading.current_thread().name == "dilated pool coordinator, rank 1":
            failed.set()
            raise RuntimeError("the connection was reset")
        return ask(line, question)

    monkeypatch.setattr(pressure, "_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(Line, "_ask", fail)
    with coordinators(2, limit="8MiB") as (short, rich):
        idle = rich.pool("host", min_bytes=0, arena_bytes=0)
        idle.reserve("6MiB")
        failing.set()
        assert failed.wait(SECONDS)
        failing.clear()
        block = make_pool(short).allocate("4MiB")
        assert idle.statistics().reserved_bytes <= 4 * MIB
        del block


def test_a_request_is_served_once_where_the_store_fails_before_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    failures, put = [1, 2], Line.set

    def fail(line: Line, key: str, value: str) -> None:
        if failures and key == "answer/1" and threading.current_thread().name == "dilated pool coordinator, rank 1":
            failures.pop()
            raise RuntimeError("the connection was reset")
        put(line, key, value)

    monkeypatch.setattr(pressure, "_RETRY_SECONDS", 0.001)
    with coordinators(2, limit="8MiB") as (short, rich):
        idle = rich.pool("host", min_bytes=0, arena_bytes=0)
        blocks = [idle.allocate("2MiB") for _ in range(3)]
        del blocks
        monkeypatch.setattr(Line, "set", fail)
        block = make_pool(short).allocate("4MiB")
        assert not failures
        assert idle.statistics().reserved_bytes == 4 * MIB
        del block


def test_a_store_that_is_gone_is_an_error_that_names_the_rank() -> None:
    server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=SECONDS), wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=SECONDS))
    with coordinators(1, client, limit="8MiB", timeout=0.2) as (alone,):
        pool = make_pool(alone)
        block = pool.allocate("1MiB")
        del server
        with pytest.raises(RuntimeError, match="rank 0: the pool coordinator's store does not answer"):
            pool.allocate("1MiB")
        assert eventually(lambda: not alone._pressure._thread.is_alive())
        del block


# ------------------------------------------------------------------------------------------ arguments


def test_without_a_process_group_the_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"init_process_group first, or give store=, rank= and world_size="):
        PoolCoordinator()
    with pytest.raises(ValueError, match=r"init_process_group first, or give store=, rank= and world_size="):
        PoolCoordinator(store=HashStore())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": "node"}, ValueError, "scope: expected one of"),
        ({"limit": 0.5}, TypeError, "limit"),
        ({"limit": "much"}, ValueError, "limit"),
        ({"limit": -1}, ValueError, "limit"),
        ({"timeout": 0}, ValueError, "timeout: expected positive"),
        ({"timeout": float("inf")}, ValueError, "timeout: expected positive"),
        ({"timeout": "1s"}, TypeError, "timeout: expected seconds"),
        ({"device": "cpu"}, ValueError, "device: expected with scope='device' alone"),
        ({"store": None}, ValueError, "rank, world_size: expected together with store="),
        ({"store": "localhost"}, TypeError, "store: expected a torch.distributed Store"),
        ({"rank": 1}, ValueError, "rank: expected 0 to 0"),
        ({"rank": True}, TypeError, "rank: expected an int"),
        ({"world_size": None}, ValueError, "rank, world_size: expected both or neither"),
        ({"group": "world"}, ValueError, "rank: expected the group's own"),
    ],
)
def test_a_bad_argument_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PoolCoordinator(**{"store": HashStore(), "rank": 0, "world_size": 1, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no CUDA device")
def test_scope_device_needs_a_device() -> None:
    with pytest.raises(ValueError, match="device: expected one where there is no CUDA device"):
        PoolCoordinator(store=HashStore(), rank=0, world_size=1, scope="device")
    with PoolCoordinator(store=HashStore(), rank=0, world_size=1, scope="device", device="cpu") as coordinator:
        assert coordinator.covers(HostBackend())


def test_ranks_that_do_not_come_are_named() -> None:
    with pytest.raises(TimeoutError, match=r"rank 1: ranks \[0, 2\] made no PoolCoordinator within 0.05 s"):
        PoolCoordinator(store=HashStore(), rank=1, world_size=3, timeout=0.05)


def test_a_late_rank_does_not_meet_one_that_gave_up() -> None:
    store = HashStore()

    def make(rank: int, timeout: float = 0.05) -> PoolCoordinator:
        return PoolCoordinator(store=store, rank=rank, world_size=2, timeout=timeout)

    with pytest.raises(TimeoutError, match=r"rank 0: ranks \[1\] made no PoolCoordinator"):
        make(0)
    with pytest.raises(TimeoutError, match=r"rank 1: too late: rank 0 gave up after 0\.05 s"):
        make(1)
    for coordinator in at_once([lambda rank=rank: make(rank, SECONDS) for rank in range(2)]):  # both again
        assert coordinator.ranks == (0, 1)
        coordinator.close()


def test_ranks_must_agree() -> None:
    def errors(*options: dict[str, Any]) -> list[str]:
        store = HashStore()

        def make(rank: int) -> Callable[[], str]:
            def work() -> str:
                with pytest.raises(ValueError, match="of all ranks") as caught:
                    PoolCoordinator(store=store, rank=rank, world_size=2, timeout=SECONDS, **options[rank])
                return str(caught.value)

            return work

        return at_once([make(0), make(1)])

    assert errors({"limit": 1}, {"limit": 2})[1].endswith("got 2 bytes of rank 1 and 1 of rank 0")
    assert errors({}, {"scope": "group"})[0].endswith("got 'host' of 0 and 'group' of 1")


def test_memory_that_the_scope_does_not_share_is_refused() -> None:
    class Elsewhere(Adaptor):
        def __init__(self) -> None:
            super().__init__(HostBackend())
            self.device = "cuda:3"

    with coordinators(1) as (alone,):
        assert not alone.covers(Elsewhere())
        with pytest.raises(ValueError, match="upstream: expected host memory, which scope='host' counts, got host on"):
            alone.coordinated(Elsewhere())
        with pytest.raises(TypeError, match="pool: expected a MemoryPool or"):
            alone.watch("pool")  # type: ignore[arg-type]
    with coordinators(1, scope="group") as (alone,):
        assert alone.covers(Elsewhere())


def test_coordinators_made_one_after_another_are_apart() -> None:
    store = HashStore()
    with coordinators(2, store, limit="8MiB") as ranks, coordinators(2, store, limit="2MiB") as others:
        make_pool(ranks[0]).reserve("6MiB")
        pool = make_pool(others[0])
        pool.reserve("2MiB")
        assert others[1].reserved() == {0: 2 * MIB, 1: 0}


# ------------------------------------------------------------------------------------------ processes


def give_and_refuse(rank: int, store: Store) -> tuple[int, str]:
    with PoolCoordinator(limit="8MiB", timeout=SECONDS) as coordinator:
        pool = make_pool(coordinator)
        if rank == 1:
            pool.reserve("6MiB")
        distributed.barrier()
        block = pool.allocate("4MiB") if rank == 0 else None
        distributed.barrier()
        reserved = pool.statistics().reserved_bytes
        if rank == 0:
            del block
            pool.trim()
        distributed.barrier()
        block = pool.allocate("5MiB") if rank == 1 else None
        distributed.barrier()
        message = str(refused(pool, "4MiB")) if rank == 0 else ""
        distributed.barrier()
        return reserved, message


@pytest.mark.slow
def test_a_process_gets_what_is_idle_in_another_and_hears_what_is_in_use() -> None:
    (first, message), (second, _) = run_ranks(2, give_and_refuse, gloo=True)
    assert (first, second) == (4 * MIB, 0)
    assert "rank 0: the common limit of 8 MiB is reached: requested 4 MiB" in message
    assert "rank 1 reserves 5 MiB; the other ranks gave back 0 B" in message


def short_together(rank: int, store: Store) -> tuple[bool, dict[int, int], tuple[int, ...]]:
    pair = distributed.new_group([1, 2])
    with PoolCoordinator(limit="12MiB", timeout=SECONDS) as coordinator:
        pool = make_pool(coordinator)
        pool.reserve("4MiB")
        distributed.barrier()
        try:
            block = pool.allocate("6MiB")
        except PoolMemoryError:
            block = None
        distributed.barrier()
        reserved = coordinator.reserved()
        distributed.barrier()
        got = block is not None
        del block
        pool.close()
    if rank == 0:
        with pytest.raises(ValueError, match="group: expected a group that rank 0 is in"):
            PoolCoordinator(pair)
        return got, reserved, ()
    with PoolCoordinator(pair, limit="2MiB", timeout=SECONDS) as coordinator:
        return got, reserved, coordinator.ranks


@pytest.mark.slow
def test_processes_that_are_short_at_once_share_what_there_is_and_a_subgroup_keeps_its_names() -> None:
    results = run_ranks(3, short_together, gloo=True)
    assert sorted(got for got, _, _ in results) == [False, True, True]
    for _, reserved, _ in results:
        assert sorted(reserved.values()) == [0, 6 * MIB, 6 * MIB]
    assert [ranks for _, _, ranks in results] == [(), (1, 2), (1, 2)]


LIVE: list[Any] = []  # beyond the end of a test's work


def end_or_die(rank: int, store: Store, killed: bool) -> Any:
    coordinator = PoolCoordinator(store=store, rank=rank, world_size=2, limit="8MiB", timeout=SECONDS)
    if killed and rank == 0:
        # A rank that is slow to begin is waited for, one that is known to be dead only for a moment.
        coordinator.timeout = coordinator._pressure._timeout = 0.5
    pool = make_pool(coordinator)
    LIVE.extend((coordinator, pool))
    if rank == 1:
        LIVE.append(pool.allocate("6MiB"))
        store.set("allocated", "1")
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return None
    store.wait(["allocated"], timedelta(seconds=SECONDS))
    if killed:
        store.wait(["dead"], timedelta(seconds=SECONDS))
        return refused(pool, "4MiB")
    return eventually(lambda: coordinator.reserved() == {0: 0, 1: 0})


@pytest.mark.slow
def test_a_killed_process_is_named_and_its_memory_counts() -> None:
    error = run_ranks(2, end_or_die, True, gloo=False, dying=1)[0]
    assert isinstance(error, GroupLimitError)
    assert (error.silent, error.reserved_by_rank) == ((1,), {0: 0, 1: 6 * MIB})
    assert "no answer within 0.5 s from rank 1" in str(error)


@pytest.mark.slow
def test_a_process_that_ends_gives_its_charges_back() -> None:
    assert run_ranks(2, end_or_die, False, gloo=False)[0]


def fork(rank: int, store: Store) -> tuple[int, dict[int, int]]:
    with PoolCoordinator(store=store, rank=0, world_size=1, limit="8MiB", timeout=SECONDS) as coordinator:
        pool = make_pool(coordinator)
        block = pool.allocate("4MiB")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            code = 1
            try:
                with pytest.warns(RuntimeWarning, match="forked from rank 0 and is no rank"):
                    pool.allocate("6MiB")  # over the limit: not counted
                with pytest.raises(RuntimeError, match="forked from rank 0"):
                    coordinator.reserved()
                del block
                pool.trim()
                coordinator.close()
                code = 0
            finally:
                os._exit(code)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.01)
        else:
            os.kill(child, signal.SIGKILL)
            raise AssertionError("the child did not end")
        pool.allocate("2MiB")
        return os.waitstatus_to_exitcode(status), coordinator.reserved()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_leaves_its_parents_charges_and_connection_alone() -> None:
    code, reserved = run_ranks(1, fork, gloo=False)[0]
    assert (code, reserved) == (0, {0: 6 * MIB})
