"""One limit over all kinds: what lies idle in one makes room for another, exactly, and the error has all numbers."""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import Any

import pytest
from fake_device import FakeBackend, FakeDevice
from pool_checks import in_threads

from dilated_memory_pool import PoolLimitError, PoolMemoryError
from dilated_memory_pool.attention import DEFAULT_POLICIES, AttentionBufferManager, BufferKind
from dilated_memory_pool.backends import HostBackend, Memory

torch = pytest.importorskip("torch")

PAGE = mmap.PAGESIZE
EVERYTHING_POOLED = {kind: replace(policy, min_bytes=0) for kind, policy in DEFAULT_POLICIES.items()}


def make(pages: int | None, backend: Any = "host") -> AttentionBufferManager:
    limit = None if pages is None else pages * PAGE
    return AttentionBufferManager(backend, limit=limit, policies=EVERYTHING_POOLED)


def take(manager: AttentionBufferManager, pages: int, kind: BufferKind | str) -> Any:
    return manager.empty(pages * PAGE, dtype=torch.uint8, kind=kind)


def reserved(manager: AttentionBufferManager, *kinds: str) -> list[int]:
    """In pages."""
    return [manager.statistics(kind).reserved_bytes // PAGE for kind in kinds]


def test_idle_memory_of_one_kind_makes_room_for_another_and_what_is_in_use_stays() -> None:
    manager = make(8)
    key = take(manager, 3, "key").fill_(1)
    take(manager, 4, "query")
    scores = take(manager, 4, "scores").fill_(2)
    assert reserved(manager, "key", "query", "scores") == [3, 0, 4]
    assert torch.equal(key, torch.ones_like(key))
    assert torch.equal(scores, torch.full_like(scores, 2))


def test_no_more_is_given_back_than_is_missing_and_first_where_most_is_idle() -> None:
    manager = make(16)
    idle = [take(manager, pages, "query") for pages in (2, 3, 4)]
    idle.append(take(manager, 3, "key"))
    addresses = [tensor.data_ptr() for tensor in idle]
    while idle:
        del idle[0]  # in this order: the query of 2 pages is the longest unused
    kept = take(manager, 6, "scores")  # 12 pages are idle and 4 were never reserved: 2 are missing
    assert reserved(manager, "query", "key", "scores") == [7, 3, 6]
    assert [take(manager, pages, "query").data_ptr() for pages in (3, 4)] == addresses[1:3]
    assert kept.nbytes == 6 * PAGE


def test_a_kind_at_the_limit_gives_back_its_own_idle_memory_too() -> None:
    manager = make(8)
    take(manager, 5, "query")
    assert take(manager, 8, "query").nbytes == 8 * PAGE
    assert reserved(manager, "query") == [8]


@pytest.mark.usefixtures("no_gc")
def test_garbage_of_one_kind_is_collected_for_another() -> None:
    manager = make(8)

    class Cycle:
        def __init__(self) -> None:
            self.tensor, self.itself = take(manager, 8, "query"), self

    Cycle()
    assert reserved(manager, "query") == [8]
    assert take(manager, 8, "weights").nbytes == 8 * PAGE
    assert reserved(manager, "query") == [0]


def test_the_error_has_the_numbers_of_all_kinds() -> None:
    manager = make(8)
    kept = [take(manager, 3, "query"), take(manager, 2, "scores")]
    take(manager, 1, "scores")  # idle: given back in the attempt
    take(manager, 2, "weights")
    kept.append(take(manager, 1, "weights"))  # half of that arena: the other half is idle and cannot be given back
    assert reserved(manager, "query", "scores", "weights") == [3, 3, 2]
    with pytest.raises(PoolLimitError, match="limit is reached") as caught:
        manager.empty((4, PAGE + 1), dtype=torch.uint8, kind="output")
    error = caught.value
    assert (error.requested, error.limit) == (4 * (PAGE + 1), 8 * PAGE)
    assert (error.allocated, error.reserved, error.largest_free) == (6 * PAGE, 7 * PAGE, PAGE)
    assert len(kept) == 3


def test_a_request_above_the_limit_costs_the_idle_memory_of_others_nothing_lasting() -> None:
    manager = make(8)
    with pytest.raises(PoolLimitError) as caught:
        take(manager, 9, "query")
    error = caught.value
    assert (error.requested, error.allocated, error.reserved, error.largest_free) == (9 * PAGE, 0, 0, 0)
    assert take(manager, 8, "query").nbytes == 8 * PAGE


def test_the_limit_can_be_changed() -> None:
    manager = make(8)
    kept = take(manager, 5, "query")
    take(manager, 3, "key")
    manager.set_limit(6 * PAGE)
    assert reserved(manager, "query", "key") == [5, 0]
    with pytest.raises(PoolLimitError) as caught:
        take(manager, 2, "key")
    assert caught.value.limit == 6 * PAGE
    manager.set_limit(None)
    assert take(manager, 9, "key").nbytes == 9 * PAGE
    assert manager.statistics("key").limit_bytes is None
    assert kept.nbytes == 5 * PAGE


class SmallHost(HostBackend):
    """A machine with few pages."""

    def __init__(self, pages: int) -> None:
        super().__init__(huge_pages=False)
        self.left = pages

    def allocate(self, nbytes: int) -> Any:
        if nbytes > self.left * PAGE:
            raise MemoryError("no page left")
        self.left -= nbytes // PAGE
        memory: Memory = super().allocate(nbytes)
        return Returning(self, memory)


class Returning:
    """Memory whose pages are free again when it dies."""

    def __init__(self, host: SmallHost, memory: Memory) -> None:
        self.host, self.memory = host, memory
        self.address, self.nbytes, self.lease = memory.address, memory.nbytes, memory.lease

    def __del__(self) -> None:
        self.host.left += self.nbytes // PAGE


@pytest.mark.parametrize(
    ("addressable", "stream"), [(True, 1), (True, 2), (False, 2)], ids=["pinned-own", "pinned-other", "gpu-other"]
)
def test_memory_that_waits_for_a_stream_is_waited_for_before_another_kind_is_refused(
    addressable: bool, stream: int
) -> None:
    device = FakeDevice()
    manager = make(8, FakeBackend(device, addressable))
    with device.stream(1):
        query = take(manager, 8, "query").fill_(1)
    if stream != 1:
        manager.record_stream(query, stream)
    seen: list[bool] = []
    device.enqueue(lambda: seen.append(True), stream)
    del query
    assert manager.statistics("query").waiting_bytes == 8 * PAGE
    scores = take(manager, 8, "scores")
    assert seen == [True], "the work on the stream came first"
    assert scores.nbytes == 8 * PAGE
    assert reserved(manager, "query", "scores") == [0, 8]


def test_kinds_make_room_where_the_backend_itself_has_no_more() -> None:
    manager = make(None, SmallHost(8))
    take(manager, 5, "query")
    kept = take(manager, 6, "scores")
    assert reserved(manager, "query", "scores") == [0, 6]
    with pytest.raises(PoolMemoryError, match="backend has no more") as caught:
        take(manager, 3, "key")
    error = caught.value
    assert not isinstance(error, PoolLimitError)
    assert (error.requested, error.allocated, error.reserved, error.limit) == (3 * PAGE, 6 * PAGE, 6 * PAGE, None)
    assert kept.nbytes == 6 * PAGE


@pytest.mark.usefixtures("no_gc")
def test_a_dropped_manager_gives_its_memory_back_without_the_garbage_collector() -> None:
    machine = SmallHost(8)
    manager = make(8, machine)
    take(manager, 2, "query")
    kept = take(manager, 3, "scores").fill_(7)
    del manager
    assert machine.left == 5
    assert torch.equal(kept, torch.full_like(kept, 7))
    del kept
    assert machine.left == 8


def test_many_threads_at_the_limit_never_exceed_it_nor_one_another() -> None:
    threads, rounds, pages = 8, 40, 3
    manager = make(threads * pages)
    kinds = list(BufferKind)

    def work(number: int) -> None:
        for turn in range(rounds):
            kind = kinds[(number + turn) % len(kinds)]
            tensor = take(manager, 1 + (number + turn) % pages, kind).fill_(number)
            assert sum(now.reserved_bytes for now in manager.statistics().values()) >= tensor.nbytes
            assert bool((tensor == number).all())
            del tensor

    in_threads(work, threads)
    assert sum(now.peak_reserved_bytes > threads * pages * PAGE for now in manager.statistics().values()) == 0
    assert sum(now.allocated_bytes for now in manager.statistics().values()) == 0
