"""Every failure once: after it nothing is lost, the books are right and the lock is free."""

from __future__ import annotations

import gc
import math
import signal
import sys
import threading
import time
from contextlib import suppress
from itertools import count
from typing import Any, Literal

import pytest
import torch
from conftest import MakePool
from fake_device import FakeBackend, FakeDevice
from faults import FailingBackend, Strike
from pool_checks import PATIENCE, assert_consistent, assert_drained, piece_of

from dilated_memory_pool import MemoryPool, PoolEvent, PoolLimitError, PoolMemoryError

LIMIT = 2**20
pytestmark = pytest.mark.usefixtures("no_gc")


def exercise(pool: MemoryPool) -> None:
    """Hits, misses, splitting and joining, views, small ones, tensors and blocks, trims, a limit that is reached."""
    first, second, third = pool.allocate(9000), pool.allocate(5000), pool.empty((50, 40))
    del second
    again, view = pool.allocate(4800), third[1:]
    del first, third
    pool.statistics()
    joined = pool.empty(3000, dtype=torch.float64)
    del view
    pool.trim(100_000)
    del again, joined
    pool.snapshot()
    pool.reset_peaks()
    held = [pool.allocate(200_000) for _ in range(3)]
    held.pop()
    held.append(pool.allocate(400_000))  # makes room
    with suppress(PoolLimitError):
        pool.allocate(2 * LIMIT)
    held.clear()
    pool.trim()


def assert_unharmed(pool: MemoryPool, device: FakeDevice) -> None:
    """Another thread finds the lock free; nothing is lost, nor held, nor counted twice; the pool still works."""
    gc.collect()  # what was interrupted may be in cycles

    def elsewhere() -> None:
        pool.allocate(1000)
        done.set()

    done = threading.Event()
    threading.Thread(target=elsewhere, daemon=True).start()
    assert done.wait(PATIENCE), "the lock is held"
    owners = [pool.allocate(n) for n in (9000, 5000, 5000, 70_000)] + [pool.empty(100)]
    pieces = [piece_of(owner, tag) for tag, owner in enumerate(owners)]
    assert_consistent(pool)
    assert all(piece.intact() for piece in pieces)
    del owners
    assert device.live_bytes == pool.statistics().reserved_bytes
    assert_drained(pool)
    assert device.live_bytes == 0


# ------------------------------------------------------------------------------------------ the backend


@pytest.mark.slow
@pytest.mark.parametrize("error", [MemoryError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("streams", [False, True], ids=["host", "streams"])
def test_a_backend_may_fail_at_any_allocation(
    make_on_host: MakePool, error: type[BaseException], streams: bool
) -> None:
    for fails_at in count():
        device = FakeDevice()
        fake = FakeBackend(device)
        if not streams:
            fake.streams = None
        backend = FailingBackend(fake, fails_at, error)
        pool = make_on_host(backend=backend, limit=LIMIT)
        with suppress(error):
            exercise(pool)
        failed, backend.armed = backend.calls > fails_at, False
        assert_unharmed(pool, device)
        if not failed:
            assert fails_at >= 3
            break


def test_a_backend_that_has_no_more_is_told_apart_from_the_limit(make_on_host: MakePool) -> None:
    pool = make_on_host(backend=FakeBackend(FakeDevice(capacity=400_000)), limit=LIMIT, size_classes="exact")
    block = pool.allocate(200_000)
    with pytest.raises(PoolMemoryError, match="the backend has no more memory") as caught:
        pool.allocate(500_000)
    assert not isinstance(caught.value, PoolLimitError)
    assert isinstance(caught.value.__cause__, MemoryError)
    del block
    assert_drained(pool)


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_a_backend_that_has_no_more_is_given_all_that_is_idle_however_high_the_limit(
    make_on_host: MakePool, limit: int | None
) -> None:
    pool = make_on_host(backend=FakeBackend(FakeDevice(capacity=400_000)), limit=limit, size_classes="exact")
    pool.allocate(300_000)
    assert pool.allocate(350_000).nbytes == 350_000
    assert pool.statistics().trims == 1
    assert_drained(pool)


# ------------------------------------------------------------------------------------------ the pool's own code


def strike(make: MakePool, at: float, every: Literal["line", "opcode"], streams: bool) -> Strike:
    """Interrupt one run, and see that it did no harm."""
    device = FakeDevice()
    backend = FakeBackend(device)
    if not streams:
        backend.streams = None
    pool = make(backend=backend, limit=LIMIT)
    pool.empty(1)  # imports what tensors need
    pool.trim()
    strike = Strike(at, every)
    strike.run(lambda: exercise(pool))
    try:
        assert_unharmed(pool, device)
    except AssertionError as error:
        raise AssertionError(f"interrupted at {strike.where}") from error
    return strike


@pytest.mark.slow
@pytest.mark.parametrize("streams", [False, True], ids=["host", "streams"])
def test_an_interrupt_at_any_line_loses_nothing(make_on_host: MakePool, streams: bool) -> None:
    passed = strike(make_on_host, math.inf, "line", streams).passed
    first_time = {place: at for at, place in reversed(list(enumerate(passed)))}
    assert len(first_time) > 100
    for place, at in first_time.items():
        assert strike(make_on_host, at, "line", streams).where == place


@pytest.mark.fuzz
@pytest.mark.parametrize("streams", [False, True], ids=["host", "streams"])
@pytest.mark.parametrize("every", ["line", "opcode"])
def test_an_interrupt_at_any_time_loses_nothing(make_on_host: MakePool, every: Any, streams: bool) -> None:
    """At a bytecode is more than can happen: newer CPythons look for signals after calls and jumps only."""
    for at in count():
        if strike(make_on_host, at, every, streams).where is None:
            break


# ------------------------------------------------------------------------------------------ signals and finalisers


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")
def test_a_signal_handler_may_allocate_at_any_moment(make_on_host: MakePool) -> None:
    pool = make_on_host()
    kept: list[Any] = []
    signals, armed = 0, True

    def allocate(*_: object) -> None:
        nonlocal signals
        kept.append(pool.empty(1000 + len(kept) % 3 * 1000))
        kept.append(pool.allocate(5000))
        pool.statistics()
        pool.trim(2**16)
        del kept[:-20]
        signals += 1
        if armed:  # only now: on a slow machine a steady timer would interrupt its own handler, without end
            signal.setitimer(signal.ITIMER_REAL, 1e-4)

    last = time.monotonic() + PATIENCE
    before = signal.signal(signal.SIGALRM, allocate)
    signal.setitimer(signal.ITIMER_REAL, 1e-4)
    try:
        while signals < 1000 or pool.statistics().bypasses == 0:
            exercise(pool)
            assert time.monotonic() < last, "no signal came inside the pool"
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    kept.clear()
    assert_drained(pool)


@pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")
def test_an_interrupt_during_the_last_use_of_a_tensor_reaches_the_caller(make_on_host: MakePool) -> None:
    # The tensor dies with the long call, before the bytecode at which Python looks for signals: the first one.
    pool, side = make_on_host(), 1000
    weight = torch.ones(side, side)
    pool.reserve(weight.nbytes)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(5):
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the second call is for a fast machine
                signal.setitimer(signal.ITIMER_REAL, 0.005)
                torch.matmul(pool.empty((side, side), dtype=torch.float32), weight)
                time.sleep(PATIENCE)
            gc.collect()  # where the signal came before the long call, pytest's record of it keeps the pool's frames
            assert pool.statistics().allocated_bytes == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert_drained(pool)


class Restless:
    """Garbage that uses the pool in every way when it is finalised, wherever that may be."""

    def __init__(self, pool: MemoryPool) -> None:
        self.pool, self.me, self.block = pool, self, pool.allocate(3000)
        memoryview(self.block).cast("B")[:] = b"\1" * 3000

    def __del__(self) -> None:
        new, tensor = self.pool.allocate(3000), self.pool.empty(750)
        tensor.fill_(0)
        memoryview(new).cast("B")[:] = b"\2" * 3000
        self.pool.statistics()
        self.pool.snapshot()
        self.pool.trim(2**16)
        intact.append(bytes(self.block) == b"\1" * 3000)


intact: list[bool] = []


@pytest.mark.slow
@pytest.mark.parametrize("observed", [False, True])
def test_finalisers_may_use_the_pool_in_the_middle_of_it(
    make_on_host: MakePool, eager_gc: None, observed: bool
) -> None:
    gc.enable()
    pool = make_on_host(limit=LIMIT)
    if observed and pool.mode == "full":
        pool = make_on_host(limit=LIMIT, observers=[lambda event: pool.statistics()])
    intact.clear()
    for _ in range(100):
        Restless(pool)
        exercise(pool)
    gc.collect()
    assert intact == [True] * 100
    assert_drained(pool)


def test_observers_and_finalisers_of_other_threads_do_not_wait_for_one_another() -> None:
    """A finaliser inside the pool holds its lock: it must not wait for an observer, who may wait for that lock."""

    def observer(event: PoolEvent) -> None:
        if threading.current_thread() is telling:
            told.set()
            assert inside.wait(PATIENCE)
            pool.statistics()

    class InsideThePool(FakeBackend):
        """A stream is asked for in the middle of every request."""

        def current(self) -> int:
            if threading.current_thread() is not telling and not inside.is_set():
                assert told.wait(PATIENCE)
                inside.set()
                pool.statistics()
                pool.trim()
            return 0

    told, inside = threading.Event(), threading.Event()
    device = FakeDevice()
    backend = InsideThePool(device)
    device.current = backend.current  # type: ignore[method-assign]
    pool = MemoryPool(backend, mode="full", observers=[observer])
    telling = threading.Thread(target=lambda: pool.trim() or pool.allocate(1), daemon=True)
    requesting = threading.Thread(target=pool.allocate, args=(1,), daemon=True)
    telling.start()
    assert told.wait(PATIENCE)
    requesting.start()
    for thread in (telling, requesting):
        thread.join(PATIENCE)
        assert not thread.is_alive(), "deadlock"


def test_a_pool_may_be_closed_from_within(make_on_host: MakePool) -> None:
    device = FakeDevice()
    closing = False

    def current() -> int:
        if closing:
            pool.close()
        return 0

    device.current = current  # type: ignore[method-assign]
    pool = make_on_host(backend=FakeBackend(device))
    pool.allocate(5000)
    closing = True
    owner = pool.allocate(5000)
    piece = piece_of(owner, 1)
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.allocate(5000)
    assert piece.intact()
    del owner
    assert_drained(pool)
    assert device.live_bytes == 0
