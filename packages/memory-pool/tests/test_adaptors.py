"""Adaptors: a budget that holds for all pools on it, failures that are answered, failures on purpose."""

from __future__ import annotations

import gc
import random
import threading
import time
from contextlib import suppress
from fractions import Fraction

import pytest
from pool_checks import PATIENCE, in_threads

from dilated_memory_pool import MemoryPool, PoolLimitError, PoolMemoryError
from dilated_memory_pool.adaptors import (
    Adaptor,
    FailureCallbackAdaptor,
    FaultInjectionAdaptor,
    InjectedFault,
    LimitingAdaptor,
)
from dilated_memory_pool.backends import HostBackend

MIB = 2**20


class Witness(Adaptor):
    """Counts what is really mapped, from before it is until after it is not."""

    def __init__(self, upstream):
        super().__init__(upstream)
        self.lock = threading.Lock()  # safe in this test: nothing else runs where it is held
        self.mapped = self.peak = self.allocations = 0

    def allocate(self, nbytes):
        with self.lock:
            self.allocations += 1
            self.mapped += nbytes
            self.peak = max(self.peak, self.mapped)
        return Watched(self, self.upstream.allocate(nbytes))


class Watched:
    def __init__(self, witness, memory):
        self.witness, self.memory = witness, memory
        self.address, self.nbytes, self.lease = memory.address, memory.nbytes, memory.lease

    def __del__(self):
        nbytes = self.nbytes
        del self.lease, self.memory
        with self.witness.lock:
            self.witness.mapped -= nbytes


@pytest.fixture
def host():
    return HostBackend(huge_pages=False)


# -------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize(
    "make",
    [
        Adaptor,
        lambda upstream: LimitingAdaptor(upstream, "1GiB"),
        lambda upstream: FailureCallbackAdaptor(upstream, lambda nbytes, error: False),
        lambda upstream: FaultInjectionAdaptor(upstream, set()),
    ],
    ids=["plain", "limiting", "failure", "faults"],
)
class TestEvery:
    def test_looks_like_its_upstream(self, make, host):
        adaptor = make(host)
        names = ("name", "device", "addressable", "granule", "streams")
        assert [getattr(adaptor, name) for name in names] == [getattr(host, name) for name in names]
        assert adaptor.reasons[: len(host.reasons)] == host.reasons

    @pytest.mark.parametrize("mode", ["lightweight", "full"])
    def test_serves_a_pool(self, make, host, mode):
        pool = MemoryPool(make(make(host)), mode=mode)
        block = pool.allocate(10_000)
        memoryview(block).cast("B")[:] = bytes(10_000)
        address = block.address
        del block
        assert pool.allocate(10_000).address == address

    def test_refuses_an_upstream_that_is_none(self, make, host):
        with pytest.raises(TypeError, match="upstream: expected a backend or an adaptor, got 'host'"):
            make("host")


def test_an_adaptor_tells_the_pool_what_it_does(host):
    stack = FaultInjectionAdaptor(FailureCallbackAdaptor(LimitingAdaptor(host, "1GiB"), bool), set())
    assert MemoryPool(stack).reasons[2:5] == (
        "limiting adaptor: 1 GiB for all pools on it",
        "failure callback adaptor: asks the program before memory is refused",
        "fault injection adaptor: some allocations fail on purpose",
    )


def test_stacked_adaptors_work_from_the_inside_out(host):
    witness = Witness(host)
    asked = []

    def callback(nbytes, error):
        asked.append((nbytes, str(error)))
        return len(asked) < 3

    backend = FailureCallbackAdaptor(FaultInjectionAdaptor(LimitingAdaptor(witness, "1MiB"), {2}), callback)
    pool = MemoryPool(backend, mode="lightweight")
    kept = pool.allocate("512KiB")
    pool.allocate("512KiB")
    assert asked == [(MIB // 2, "fault injected into allocation 2, of 524288 bytes")]
    with pytest.raises(PoolMemoryError):
        pool.allocate("2MiB")
    assert witness.mapped == MIB // 2
    assert kept.nbytes == MIB // 2


# -------------------------------------------------------------------------------------------------- limiting


def test_the_budget_is_refused_with_its_numbers(host):
    budget = LimitingAdaptor(host, "3MiB")
    kept = budget.allocate(2 * MIB)
    with pytest.raises(MemoryError, match=r"the budget of 3 MiB .* is used up: 2 MiB requested, 1 MiB too many"):
        budget.allocate(2 * MIB)
    assert budget.used_bytes == 2 * MIB
    assert budget.allocate(MIB).nbytes == MIB
    del kept
    assert budget.used_bytes == 0


def test_bytes_count_until_the_memory_is_really_gone(host):
    witness = Witness(host)
    budget = LimitingAdaptor(witness, "4MiB")
    pool = MemoryPool(budget)
    block = pool.allocate("2MiB")
    view = memoryview(block)
    del block
    pool.close()
    del pool
    gc.collect()
    assert (budget.used_bytes, witness.mapped) == (2 * MIB, 2 * MIB)
    view.release()
    del view
    assert (budget.used_bytes, witness.mapped) == (0, 0)


def test_the_charge_goes_after_the_memory(host):
    seen = []

    class Memory:
        address, nbytes, lease = 0, MIB, None

        def __del__(self):
            seen.append(budget.used_bytes)

    class Upstream(Adaptor):
        def allocate(self, nbytes):
            return Memory()

    budget = LimitingAdaptor(Upstream(host), "1MiB")
    budget.allocate(MIB)
    assert seen == [MIB]
    assert budget.used_bytes == 0


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_what_the_upstream_refuses_is_not_charged(host, error):
    budget = LimitingAdaptor(FaultInjectionAdaptor(host, {1}, error), "1MiB")
    with pytest.raises(error):
        budget.allocate(MIB)
    assert budget.used_bytes == 0
    assert budget.allocate(MIB).nbytes == MIB


def test_a_pool_over_budget_gives_back_its_idle_memory_and_succeeds(host):
    pool = MemoryPool(LimitingAdaptor(host, "3MiB"))
    pool.reserve("2MiB")
    assert pool.allocate("3MiB").nbytes == 3 * MIB
    assert pool.statistics().trims == 1


def test_idle_memory_of_another_pool_stays_its_own_unless_it_is_named(host):
    budget = LimitingAdaptor(host, "3MiB")
    rich, poor = MemoryPool(budget), MemoryPool(budget)
    rich.reserve("2MiB")
    with pytest.raises(PoolMemoryError, match="the backend has no more memory") as failure:
        poor.allocate("2MiB")
    assert "budget of 3 MiB" in str(failure.value.__cause__)
    assert rich.statistics().reserved_bytes == 2 * MIB
    budget.reclaim_from(rich)
    block = poor.allocate("2MiB")
    assert rich.statistics().reserved_bytes == 0
    assert budget.used_bytes == block.nbytes == 2 * MIB


def test_no_more_is_reclaimed_than_is_missing_and_never_what_is_in_use(host):
    budget = LimitingAdaptor(host, "8MiB")
    first, second, asking = (MemoryPool(budget, mode="lightweight") for _ in range(3))
    budget.reclaim_from(first, second)
    used = first.allocate("1MiB")
    idle = [first.allocate("1MiB") for _ in range(3)]
    idle += [second.allocate("1MiB") for _ in range(4)]
    idle.clear()
    asking.allocate("2MiB")
    assert (first.statistics().reserved_bytes, second.statistics().reserved_bytes) == (2 * MIB, 4 * MIB)
    kept = asking.allocate("4MiB")
    assert first.statistics().reserved_bytes == used.nbytes
    assert budget.used_bytes <= budget.limit
    assert kept.nbytes == 4 * MIB


def test_the_budget_does_not_keep_pools_alive(host):
    budget = LimitingAdaptor(host, "2MiB")
    pool = MemoryPool(budget)
    budget.reclaim_from(pool)
    pool.reserve("1MiB")
    del pool
    gc.collect()
    assert budget.used_bytes == 0
    assert MemoryPool(budget).allocate("2MiB").nbytes == 2 * MIB


@pytest.mark.parametrize("named", [False, True], ids=["apart", "reclaiming"])
def test_a_budget_shared_by_two_pools_is_never_exceeded_by_four_threads(host, named):
    witness = Witness(host)
    budget = LimitingAdaptor(witness, "8MiB")
    pools = [MemoryPool(budget), MemoryPool(budget, mode="full", arena_bytes="1MiB")]
    if named:
        budget.reclaim_from(*pools)
    served = [0] * 4

    def work(index):
        chosen = random.Random(index)
        live = []
        for _ in range(50):
            try:
                live.append(pools[index % 2].allocate(chosen.randrange(1, 3 * MIB)))
                served[index] += 1
            except PoolMemoryError:
                live.clear()
            if len(live) > 2:
                live.pop(0)
        live.clear()
        last = time.monotonic() + PATIENCE / 2
        while named and not served[index] and time.monotonic() < last:  # the others held it all, whenever it asked
            time.sleep(0.01)
            with suppress(PoolMemoryError):
                pools[index % 2].allocate(MIB)
                served[index] += 1

    in_threads(work)
    assert all(served) if named else any(served)  # what is idle in one pool may starve the other
    assert 0 < witness.peak <= 8 * MIB
    gc.collect()  # a refusal's traceback holds frames, and they hold blocks
    for pool in pools:
        pool.trim()
    assert (budget.used_bytes, witness.mapped) == (0, 0)


def test_threads_at_the_limit_are_granted_exactly_what_fits(host):
    budget = LimitingAdaptor(host, "10MiB")
    granted = []

    def work(index):
        for _ in range(20):
            with suppress(MemoryError):
                granted.append(budget.allocate(MIB))

    in_threads(work)
    assert len(granted) == 10
    assert budget.used_bytes == budget.limit


def test_a_request_that_came_first_is_granted_whatever_came_after_it(host):
    class Charges(dict):
        def copy(self):
            return dict(self) | {"of another thread": MIB}

    budget = LimitingAdaptor(host, "1MiB")
    budget._charges = Charges()
    assert budget.allocate(MIB).nbytes == MIB


def test_a_finaliser_may_free_and_allocate_in_the_middle_of_a_request(host):
    budget = LimitingAdaptor(host, "4MiB")
    kept = [budget.allocate(MIB), budget.allocate(MIB)]

    class Charges(dict):
        def copy(self):
            if kept:
                kept.pop()
                later.append(budget.allocate(MIB))
            return dict(self)

    later = []
    charges = Charges(budget._charges)
    for memory in kept:
        memory._charges = charges
    budget._charges = charges
    memory = budget.allocate(MIB)
    assert budget.used_bytes == 3 * MIB
    assert len(later) == 2
    assert memory.nbytes == MIB


def test_a_fraction_of_the_pool_is_a_fraction_of_the_budget(host):
    assert LimitingAdaptor(host, 0.5).limit == host.total_bytes // 2
    assert MemoryPool(LimitingAdaptor(host, "8MiB"), limit=0.5).statistics().limit_bytes == 4 * MIB
    assert LimitingAdaptor(LimitingAdaptor(host, "8MiB"), "16MiB").total_bytes == 8 * MIB


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (None, TypeError, "limit: expected a number of bytes, text such as '2GiB' or a fraction, got None"),
        (1.5, ValueError, r"limit: expected a fraction in \(0, 1\], got 1.5"),
        ("much", ValueError, "limit: expected text like '4096', '64MiB' or '1.5GB', got 'much'"),
        (Fraction(1, 2), TypeError, "limit: expected a number of bytes"),
        (-1, ValueError, "limit: expected at least 0, got -1"),
    ],
)
def test_a_limit_that_is_none_is_refused(host, limit, error, message):
    with pytest.raises(error, match=message):
        LimitingAdaptor(host, limit)


# -------------------------------------------------------------------------------------------------- failure callback


def test_the_callback_is_asked_until_it_says_no(host):
    answers = [True, True, False]
    asked = []

    def callback(nbytes, error):
        asked.append((nbytes, type(error)))
        return answers[len(asked) - 1]

    adaptor = FailureCallbackAdaptor(FaultInjectionAdaptor(host, {1, 2, 3, 4}), callback)
    with pytest.raises(MemoryError, match="fault injected into allocation 3"):
        adaptor.allocate(MIB)
    assert asked == [(MIB, MemoryError)] * 3


def test_the_callback_may_free_what_the_request_needs(host):
    cache = []

    def callback(nbytes, error):
        had = bool(cache)
        cache.clear()
        pool.trim()
        return had

    pool = MemoryPool(FailureCallbackAdaptor(LimitingAdaptor(host, "4MiB"), callback))
    cache.append(pool.allocate("3MiB"))
    assert pool.allocate("4MiB").nbytes == 4 * MIB
    assert cache == []
    assert pool.statistics().ooms == 0


def test_a_pool_asks_once_before_each_of_its_own_remedies_and_once_after(host):
    asked = []
    backend = FailureCallbackAdaptor(LimitingAdaptor(host, 0), lambda nbytes, error: asked.append(nbytes))
    pool = MemoryPool(backend, mode="lightweight")
    with pytest.raises(PoolMemoryError):
        pool.allocate("1MiB")
    assert asked == [MIB] * 3


def test_the_pools_own_limit_is_not_the_callbacks_business(host):
    pool = MemoryPool(FailureCallbackAdaptor(host, lambda nbytes, error: pytest.fail("asked")), limit="1MiB")
    with pytest.raises(PoolLimitError):
        pool.allocate("2MiB")


def test_what_the_callback_raises_reaches_the_caller_and_the_pool_is_as_before(host):
    def callback(nbytes, error):
        raise LookupError("nothing to spill")

    pool = MemoryPool(FailureCallbackAdaptor(FaultInjectionAdaptor(host, {1}), callback))
    with pytest.raises(LookupError, match="nothing to spill"):
        pool.allocate("1MiB")
    assert pool.statistics().reserved_bytes == 0
    assert pool.allocate("1MiB").nbytes == MIB


def test_other_errors_are_not_the_callbacks_business(host):
    adaptor = FailureCallbackAdaptor(FaultInjectionAdaptor(host, {1}, OSError), lambda nbytes, error: True)
    with pytest.raises(OSError, match="fault injected"):
        adaptor.allocate(MIB)


def test_a_callback_must_be_callable(host):
    with pytest.raises(TypeError, match=r"callback: expected a callable with \(nbytes, error\), got 3"):
        FailureCallbackAdaptor(host, 3)


# -------------------------------------------------------------------------------------------------- faults


def test_chosen_calls_fail_and_are_recorded(host):
    flaky = FaultInjectionAdaptor(host, [2, 4])
    outcomes = []
    for nbytes in (4096, 8192, 12288, 16384, 20480):
        try:
            outcomes.append(flaky.allocate(nbytes).nbytes)
        except MemoryError as error:
            outcomes.append(str(error))
    assert outcomes == [
        4096,
        "fault injected into allocation 2, of 8192 bytes",
        12288,
        "fault injected into allocation 4, of 16384 bytes",
        20480,
    ]
    assert flaky.failed == [InjectedFault(2, 8192), InjectedFault(4, 16384)]


def test_a_function_chooses_by_number_and_bytes(host):
    flaky = FaultInjectionAdaptor(host, lambda number, nbytes: number > 1 and nbytes > 4096)
    assert flaky.allocate(8192).nbytes == 8192
    assert flaky.allocate(4096).nbytes == 4096
    with pytest.raises(MemoryError):
        flaky.allocate(8192)
    assert flaky.failed == [InjectedFault(3, 8192)]


@pytest.mark.parametrize(
    "options", [{"mode": "lightweight"}, {"mode": "full", "arena_bytes": 0}], ids=["lightweight", "full"]
)
@pytest.mark.parametrize("faults", [1, 2, 3])
def test_a_pool_survives_two_failures_in_a_row_and_reports_the_third(host, options, faults):
    flaky = FaultInjectionAdaptor(host, set(range(1, faults + 1)))
    pool = MemoryPool(flaky, **options)
    if faults < 3:
        assert pool.allocate("1MiB").nbytes == MIB
    else:
        with pytest.raises(PoolMemoryError) as failure:
            pool.allocate("1MiB")
        assert "fault injected into allocation 3" in str(failure.value.__cause__)
        assert failure.value.requested == MIB
    assert len(flaky.failed) == faults
    assert pool.statistics().ooms == (faults == 3)
    assert pool.allocate("1MiB").nbytes == MIB


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["lightweight", "full"])
def test_any_other_error_passes_through_a_pool_that_is_as_before(host, mode, error):
    pool = MemoryPool(FaultInjectionAdaptor(host, {1}, error), mode=mode, limit="64MiB")
    with pytest.raises(error, match="fault injected into allocation 1"):
        pool.allocate("1MiB")
    assert pool.statistics().reserved_bytes == 0
    assert pool.allocate("1MiB").nbytes == MIB


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (3, MemoryError, r"fail: expected a set of call numbers or a callable with \(number, nbytes\), got 3"),
        ({1}, "MemoryError", "error: expected a type of exception, got 'MemoryError'"),
        ({1}, int, "error: expected a type of exception, got <class 'int'>"),
    ],
)
def test_arguments_of_the_wrong_kind_are_refused(host, fail, error, message):
    with pytest.raises(TypeError, match=message):
        FaultInjectionAdaptor(host, fail, error)
