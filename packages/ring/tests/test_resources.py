"""Lent resources: memory for results, buffers and gathered rows, and a store of plans. No bit of a result changes."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ring_cases import EXCHANGES, MIXED_CASES, Case, Results, joined, run, run_rank
from torch import Tensor

from dilated_core import Allocator, PatternStore
from dilated_core.plan import SEMANTICS
from dilated_ring import dilated_ring_attention
from dilated_ring.comm import Comm, run_ranks

both_exchanges = pytest.mark.parametrize("exchange", EXCHANGES[1:])
both_ways = pytest.mark.parametrize("refetch", [False, True], ids=["kept", "refetched"])
CASE = MIXED_CASES[0]
KINDS = {
    "plain": CASE,
    "masked": replace(CASE, mask="random"),
    "shared-keys": replace(CASE, kv_heads=2, is_causal=True),
}
every_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)


class Lender:
    """An allocator that lends full of NaN, counts what it lent, and remembers who lies where."""

    def __init__(self) -> None:
        self.lent: list[Tensor] = []

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        poison = torch.nan if dtype.is_floating_point else 77
        tensor = torch.full(tuple(size), poison, dtype=dtype, device=device)
        self.lent.append(tensor)
        return tensor

    def owns(self, tensor: Tensor) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(address == lent.untyped_storage().data_ptr() for lent in self.lent)


class Poisoned:
    """A memory pool that overwrites what it lends again: whoever still used it would see."""

    def __init__(self, pool: Any) -> None:
        self.pool = pool

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor: Tensor = self.pool.empty(tuple(size), dtype=dtype, device=device)
        return tensor.fill_(torch.nan if dtype.is_floating_point else 77)


@pytest.fixture
def pool() -> Iterator[Any]:
    """The real one, without a size below which it steps aside."""
    memory_pool = pytest.importorskip("dilated_memory_pool")
    with memory_pool.MemoryPool("host", min_bytes=0) as made:
        yield made


class Store(dict[Hashable, Any]):
    """A store of plans that counts how often each is asked for and made."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[Hashable] = Counter()
        self.made: Counter[Hashable] = Counter()

    def get_or_create(self, key: Hashable, create: Callable[[], Any]) -> Any:
        self.asked[key] += 1
        if key not in self:
            self.made[key] += 1
            self[key] = create()
        return self[key]


def run_with(case: Case, dtype: torch.dtype, lend: Callable[[int], dict[str, Any]]) -> Results:
    """All ranks' results, each with what it is lent."""

    def work(comm: Comm) -> Results:
        return run_rank(case, dtype, comm, with_lse=True, **lend(comm.rank))

    return joined(run_ranks(case.ranks, work))


def same(first: Results, second: Results) -> bool:
    """To the bit."""
    return all(torch.equal(a, b) for a, b in zip(first.each(), second.each(), strict=True))


@both_ways
@both_exchanges
@pytest.mark.parametrize("semantics", SEMANTICS)
@every_kind
def test_lent_resources_change_no_bit(case: Case, semantics: str, exchange: str, refetch: bool) -> None:
    """Memory full of NaN, and plans kept from an earlier call, also those of other options."""
    dtype = torch.bfloat16 if refetch else torch.float64
    case = replace(case, exchange=exchange, refetch=refetch).meaning(semantics)
    lenders, stores = ([make() for _ in range(case.ranks)] for make in (Lender, Store))
    for each in (case, replace(case, is_causal=not case.is_causal), case):
        lent = run_with(each, dtype, lambda rank: {"allocator": lenders[rank], "patterns": stores[rank]})
        assert same(lent, run(each, dtype, with_lse=True))


@both_exchanges
@every_kind
def test_results_lie_in_lent_memory(case: Case, exchange: str) -> None:
    """out, lse and gradients, as no shard here is one whole tile, whose kernel's own result is the first sum."""
    case = replace(case, exchange=exchange)
    lenders = [Lender() for _ in range(case.ranks)]

    def work(comm: Comm) -> list[bool]:
        results = run_rank(case, torch.float32, comm, with_lse=True, allocator=lenders[comm.rank])
        return [lenders[comm.rank].owns(result) for result in results.each() if result.numel()]

    assert all(all(owned) for owned in run_ranks(case.ranks, work))
    assert all(len(lender.lent) > 5 for lender in lenders)


@both_exchanges
@both_ways
def test_memory_lent_again_is_never_still_in_use(exchange: str, refetch: bool, pool: Any) -> None:
    """Of all ranks together, over several calls; at the end nothing is held."""
    case = replace(CASE, mask="random", kv_heads=2, exchange=exchange, refetch=refetch)
    alone = run(case, torch.float64, with_lse=True)
    for _ in range(4):
        assert same(run(case, torch.float64, with_lse=True, allocator=Poisoned(pool)), alone)
        gc.collect()
    statistics = pool.statistics()
    assert statistics.hits > 0
    assert statistics.allocated_bytes == 0


@both_exchanges
def test_kept_rows_live_as_long_as_the_graph(exchange: str, pool: Any) -> None:
    """With refetch less is held between forward and backward; without the graph, nothing."""

    def held(refetch: bool) -> int:
        def work(comm: Comm) -> Tensor:
            leaves = [tensor[:, CASE.shard(comm.rank)].requires_grad_() for tensor in CASE.problem(torch.float64)[:3]]
            return dilated_ring_attention(
                *leaves, *CASE.pattern, group=comm, allocator=pool, refetch=refetch, exchange=exchange
            )

        outs = run_ranks(CASE.ranks, work)
        gc.collect()
        alive: int = pool.statistics().allocated_bytes
        del outs
        gc.collect()
        assert pool.statistics().allocated_bytes == 0
        return alive

    assert held(refetch=False) > held(refetch=True) > 0


@both_exchanges
@every_kind
def test_each_plan_is_made_once(case: Case, exchange: str) -> None:
    """The backward has the plan of its forward, and a second call finds it."""
    case = replace(case, exchange=exchange)
    stores = [Store() for _ in range(case.ranks)]
    for _ in range(2):
        run_with(case, torch.float32, lambda rank: {"patterns": stores[rank]})
    for store in stores:
        assert set(store.made.values()) == {1}
        # One's own name, in a store that others use too.
        assert {key[0] for key in store} == {"dilated_ring.rank_plan"}
        assert list(store.asked.values()) == [2]


def test_what_differs_in_a_plan_differs_in_its_key() -> None:
    store, calls = Store(), 0
    for case in (
        CASE,
        replace(CASE, bounds=(0, 11, 12, 30, 41)),
        replace(CASE, bounds=(0, 11, 11, 30, 40)),
        CASE.over(3),
        replace(CASE, is_causal=True),
        replace(CASE, exchange="heads"),
        replace(CASE, exchange="gather"),
        replace(CASE, semantics="grouped"),
        CASE.meaning("torchscale"),
        replace(CASE, heads=3),
        replace(CASE, kv_heads=1),
        replace(CASE, segment_lengths=(8, 20, 91)),
        replace(CASE, dilation_rates=(1, 3, 6)),
    ):
        run(case, torch.float32, patterns=store)
        calls += case.ranks
        assert len(store) == calls, case
    # Of these a plan knows nothing.
    for case in (
        replace(CASE, batch=1),
        replace(CASE, head_dim=3),
        replace(CASE, mask="random"),
        replace(CASE, scale=2.0),
    ):
        run(case, torch.float32, patterns=store)
        assert len(store) == calls, case


def test_one_store_serves_all_ranks_and_is_a_pattern_store() -> None:
    store = Store()
    assert isinstance(store, PatternStore)
    assert isinstance(Lender(), Allocator)
    first, again = (run(CASE, torch.float64, with_lse=True, patterns=store) for _ in range(2))
    assert same(first, again)
    assert len(store) == CASE.ranks
