"""Lent resources: memory for results, buffers and gathered rows, and a store of plans. No bit of a result changes."""

from __future__ import annotations

import gc
import importlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from dense_cases import Way, dense
from dense_cases import run as dense_run
from ring_cases import EXCHANGES, MIXED_CASES, Case, Results, joined, run, run_rank
from torch import Tensor

from dilated_core import Allocator, AuxRequest, DilatedKVCache, PatternStore, decode_step
from dilated_core.plan import SEMANTICS
from dilated_core.resources import BufferKind
from dilated_ring import dilated_ring_attention, streamed_attention
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


class Manager:
    """A buffer manager that remembers what it lent of each kind, and is never asked for a buffer of none."""

    def __init__(self) -> None:
        self.kinds = {kind: Lender() for kind in get_args(BufferKind)}

    def allocator(self, kind: str) -> Lender:
        return self.kinds[kind]

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        raise AssertionError(f"a buffer of {tuple(size)} that is of no kind")

    def used(self) -> set[str]:
        return {kind for kind, lender in self.kinds.items() if lender.lent}

    def dtypes(self, *kinds: str) -> set[torch.dtype]:
        return {tensor.dtype for kind in kinds for tensor in self.kinds[kind].lent}

    def owns(self, results: Results) -> bool:
        """Whether each result lies in memory of its kind."""
        kinds = ("output", "output", "query", "key", "value")
        pairs = zip(kinds, results.each(), strict=True)
        return all(self.kinds[kind].owns(tensor) for kind, tensor in pairs if tensor.numel())


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
    memory_pool = importlib.import_module("dilated_memory_pool")
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
@pytest.mark.parametrize(("case", "semantics"), [*zip(KINDS.values(), SEMANTICS, strict=True)], ids=KINDS)
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


# ------------------------------------------------------------------------------------------------ kinds

QKV = {"query", "key", "value"}


@both_ways
@both_exchanges
@every_kind
def test_a_manager_lends_by_kind_and_changes_no_bit(case: Case, exchange: str, refetch: bool) -> None:
    case = replace(case, exchange=exchange, refetch=refetch)
    managers = [Manager() for _ in range(case.ranks)]

    def work(comm: Comm) -> Results:
        results = run_rank(case, torch.float32, comm, with_lse=True, allocator=managers[comm.rank])
        assert managers[comm.rank].owns(results)
        return results

    assert same(joined(run_ranks(case.ranks, work)), run(case, torch.float32, with_lse=True))
    masks = {"mask"} if case.mask != "none" else set()
    # A rank without rows needs no scratch, nor a mask.
    assert set().union(*(manager.used() for manager in managers)) == {*QKV, "output", "temp", "comm", *masks}
    for manager in managers:
        assert manager.used() >= {*QKV, "output", "comm"}
        assert manager.dtypes(*QKV, "output", "temp") == {torch.float32}
        assert manager.dtypes("mask") <= {torch.bool, torch.uint8}


@both_exchanges
def test_sums_that_are_yet_to_be_rounded_are_of_the_kind_temp(exchange: str) -> None:
    case = replace(CASE, exchange=exchange)
    manager = Manager()
    assert same(run(case, torch.bfloat16, with_lse=True, allocator=manager), run(case, torch.bfloat16, with_lse=True))
    assert torch.float32 in manager.dtypes("temp")
    assert manager.dtypes(*QKV) == {torch.bfloat16}
    assert all(tensor.ndim == 3 for tensor in manager.kinds["output"].lent if tensor.dtype == torch.float32)  # lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", [Way(), Way(3), Way(1, 3), Way(2, 2)], ids=str)
def test_dense_attention_is_lent_by_kind(way: Way, dtype: torch.dtype) -> None:
    case = dense(2, 24, 4, 8, kv_heads=2, is_causal=True, mask="random")
    manager = Manager()
    lent = dense_run(case, way, dtype, allocator=manager)
    assert same(lent, dense_run(case, way, dtype))
    assert ("comm" in manager.used()) == (way.size > 1)
    assert ("mask" in manager.used()) == (way.heads > 1)  # in a ring it is part of a message
    assert {"output", "temp"} <= manager.used()
    assert torch.float32 not in manager.dtypes(*QKV) or dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_attention_is_lent_by_kind(dtype: torch.dtype) -> None:
    *leaves, cotangent = (tensor.to(dtype).requires_grad_() for tensor in torch.randn(4, 2, 40, 2, 8))

    def run_streamed(**options: Any) -> Results:
        out, aux = streamed_attention(*leaves, ring_size=3, return_aux=AuxRequest(lse=True), **options)
        return Results(out.detach(), aux.lse.detach(), *torch.autograd.grad(out, leaves, cotangent))

    manager = Manager()
    lent = run_streamed(allocator=manager)
    assert same(lent, run_streamed())
    assert manager.owns(lent)
    assert manager.dtypes(*QKV) == {dtype}
    # On a CPU float32 sums are the results; others are float32, and rounded.
    assert manager.used() == {*QKV, "output"} | ({"temp"} if dtype is torch.bfloat16 else set())
    assert manager.dtypes("temp") <= {torch.float32}


def test_a_buffer_manager_counts_by_kind_and_gets_all_back() -> None:
    """The real one, of a ring and of decoding."""
    attention = importlib.import_module("dilated_memory_pool.attention")
    policies = {kind: replace(policy, min_bytes=0) for kind, policy in attention.DEFAULT_POLICIES.items()}
    case = replace(CASE, mask="random")
    query, key, value, _ = case.problem(torch.float64)
    with attention.AttentionBufferManager("host", policies=policies) as manager:
        for _ in range(2):
            assert same(
                run(case, torch.float64, with_lse=True, allocator=manager), run(case, torch.float64, with_lse=True)
            )
        cache = DilatedKVCache(
            *case.pattern,
            batch_size=case.batch,
            num_heads=case.heads,
            head_dim=case.head_dim,
            dtype=torch.float64,
            allocator=manager,
        )
        out = decode_step(query[:, :1], key[:, :1], value[:, :1], cache)
        assert manager.statistics("cache").allocated_bytes > 0
        used = {kind.value for kind, numbers in manager.statistics().items() if numbers.peak_allocated_bytes > 0}
        assert used == {*QKV, "output", "temp", "comm", "mask", "cache"}
        del cache, out
        gc.collect()
        assert {numbers.allocated_bytes for numbers in manager.statistics().values()} == {0}
