"""Full mode on two NUMA nodes, as far as one can show it: whose arenas serve whom, and what is bound."""

from __future__ import annotations

import pytest

import dilated_memory_pool.pool as pool_module
from dilated_memory_pool import MemoryPool
from dilated_memory_pool.numa import Numa, Topology


class TwoNodes(Numa):
    """Threads run where ``here`` says; what is asked of the kernel is written down, and really asked for node 0."""

    here = 0

    def __init__(self) -> None:
        super().__init__(Topology(nodes=(0, 1), node_of_cpu={0: 0, 1: 1}))
        self.bound: list[tuple[int, int, int]] = []

    def current_node(self) -> int:
        return self.here

    def bind(self, address: int, nbytes: int, node: int) -> bool:
        self.bound.append((address, nbytes, node))
        return super().bind(address, nbytes, node)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> TwoNodes:
    nodes = TwoNodes()
    monkeypatch.setattr(pool_module, "Numa", lambda: nodes)
    return nodes


def test_an_arena_serves_the_node_it_was_made_on(nodes: TwoNodes) -> None:
    pool = MemoryPool("host", mode="full", arena_bytes="1MiB")
    first = pool.allocate(4096).address
    nodes.here = 1
    second = pool.allocate(4096).address
    assert second != first
    assert pool.allocate(4096).address == second
    nodes.here = 0
    assert pool.allocate(4096).address == first
    assert {arena.locality for arena in pool.snapshot().arenas} == {"0", "1"}


def test_an_arena_is_bound_to_its_node_before_it_is_used(nodes: TwoNodes) -> None:
    pool = MemoryPool("host", mode="full", arena_bytes="1MiB")
    nodes.here = 1
    block = pool.allocate(4096)
    [arena] = pool.snapshot().arenas
    assert nodes.bound == [(arena.address, arena.nbytes, 1)]
    nodes.here = 0
    other = pool.allocate(4096)
    memoryview(other).cast("B")[:] = bytes(4096)
    if not nodes.binding_reason:
        assert nodes.node_of(other.address) == 0
    assert block.nbytes == other.nbytes


def test_the_reasons_say_so(nodes: TwoNodes) -> None:
    [numa] = [reason for reason in MemoryPool("host", mode="full").reasons if reason.startswith("NUMA")]
    how = f"by first touch alone: {nodes.binding_reason}" if nodes.binding_reason else "bound by libnuma"
    assert numa == f"NUMA: arenas local to nodes, {how}"


def test_one_node_is_a_reason_too() -> None:
    numa = Numa()
    if numa.active:
        pytest.skip("this machine has several NUMA nodes")
    assert f"NUMA: off, {numa.reason}" in MemoryPool("host", mode="full").reasons


def test_lightweight_mode_has_no_nodes(nodes: TwoNodes) -> None:
    pool = MemoryPool("host", mode="lightweight")
    first = pool.allocate(4096).address
    nodes.here = 1
    assert pool.allocate(4096).address == first
    assert nodes.bound == []
