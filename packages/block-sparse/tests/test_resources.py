"""Lent resources: memory for results and buffers, a store of plans; and how much memory an attention takes."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from ring_cases import Case as RingCase
from ring_cases import run_rank
from sparse_cases import Case, Lender, Store, lay_out, run
from torch import Tensor

from dilated_block_sparse import BlockLayout, block_sparse_attention
from dilated_block_sparse.plan import stacks
from dilated_core import kernels, measure
from dilated_core.kernels import cpu_matmul
from dilated_core.resources import BufferKind
from dilated_ring.comm import Comm, run_ranks

CASE = Case(2, 45, 4, 8, (8, 8), ("random", "local", "global"))
KINDS = {
    "plain": CASE,
    "masked": replace(CASE, mask="random"),
    "shared-keys": replace(CASE, kv_heads=2, is_causal=True),
    "each-head": replace(CASE, kv_heads=2, share="query"),
    "bias": replace(CASE, has_bias=True),
    "packed": replace(CASE, storage="packed", is_causal=True),
}
every_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)


class Typed(Lender):
    """One that lends integers too."""

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype.is_floating_point:
            return super().empty(size, dtype=dtype, device=device)
        tensor = torch.full(tuple(size), 77, dtype=dtype, device=device)
        self.lent.append(tensor)
        return tensor


class Manager:
    """A buffer manager that remembers what it lent of each kind, and is never asked for a buffer of none."""

    def __init__(self) -> None:
        self.kinds = {kind: Typed() for kind in get_args(BufferKind)}

    def allocator(self, kind: str) -> Typed:
        return self.kinds[kind]

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        raise AssertionError(f"a buffer of {tuple(size)} that is of no kind")

    def used(self) -> set[str]:
        return {kind for kind, lender in self.kinds.items() if lender.lent}

    def dtypes(self, *kinds: str) -> set[torch.dtype]:
        return {tensor.dtype for kind in kinds for tensor in self.kinds[kind].lent}


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


# ------------------------------------------------------------------------------------------------ lent


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_kind
def test_lent_resources_change_no_bit(case: Case, dtype: torch.dtype) -> None:
    """Memory full of NaN and plans kept from an earlier call, also those of other options."""
    alone, lender, store = run(case, dtype), Lender(), Store()
    for _ in range(2):
        assert run(case, dtype, allocator=lender, patterns=store).equal(alone)
        run(replace(case, is_causal=not case.is_causal), dtype, allocator=lender, patterns=store)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kind
def test_results_and_gradients_lie_in_lent_memory(case: Case, dtype: torch.dtype) -> None:
    lender = Lender()
    results = run(case, dtype, allocator=lender)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert lender.owns(getattr(results, name)), name
    assert len(lender.lent) > 5


@every_kind
def test_a_pool_is_used_and_gets_all_back(case: Case, pool: Any) -> None:
    alone = run(case, torch.float32)
    for _ in range(2):
        results = run(case, torch.float32, allocator=Poisoned(pool))
        assert results.equal(alone)
    assert pool.statistics().allocated_bytes > 0
    del results
    gc.collect()
    assert pool.statistics().allocated_bytes == 0


def test_an_error_of_the_lender_is_the_callers() -> None:
    class Full(Lender):
        def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
            raise MemoryError("the pool is full")

    with pytest.raises(MemoryError, match="the pool is full"):
        run(CASE, torch.float32, allocator=Full())


# ------------------------------------------------------------------------------------------------ kinds

QKV = ("query", "key", "value")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kind
def test_a_manager_lends_by_kind_and_changes_no_bit(case: Case, dtype: torch.dtype) -> None:
    manager, alone = Manager(), run(case, dtype)
    results = run(case, dtype, allocator=manager)
    assert results.equal(alone)
    kinds = manager.kinds
    pairs = {"out": "output", "lse": "output", "dq": "query", "dk": "key", "dv": "value"}
    for name, kind in pairs.items():
        assert kinds[kind].owns(getattr(results, name)), name
    assert len(kinds["output"].lent) == 2
    assert manager.dtypes(*QKV) == {dtype}
    masks = {"mask"} if case.mask != "none" else set()
    assert manager.used() - {"temp"} == {*QKV, "output", *masks}
    assert "temp" in manager.used() or dtype is torch.float32  # sums that are yet to be rounded


def test_each_copied_row_is_of_its_kind() -> None:
    """Queries of 1, keys of 2, values of 3: whatever is copied shows whose it is. The same buffers serve all calls."""
    manager = Manager()
    query, key, value = (torch.full((1, 45, 4, 8), float(number)) for number in (1, 2, 3))
    layout = BlockLayout.random(45, 3, block_size=4)
    block_sparse_attention(query, key, value, layout, allocator=manager)
    for number, kind in enumerate(QKV, 1):
        assert manager.kinds[kind].lent
        for tensor in manager.kinds[kind].lent:
            assert set(tensor[~tensor.isnan()].tolist()) == {float(number)}  # NaN where nothing was copied yet


@pytest.mark.parametrize("refetch", [False, True], ids=["kept", "refetched"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_ranks_are_lent_by_kind(dtype: torch.dtype, refetch: bool) -> None:
    case = RingCase(2, (0, 16, 32, 45), (8, 4), 4, 8, kv_heads=2, share="query", mask="random", refetch=refetch)
    managers = [Manager() for _ in range(case.ranks)]

    def work(comm: Comm) -> None:
        alone = run_rank(case, dtype, comm)
        lent = run_rank(case, dtype, comm, allocator=managers[comm.rank])
        for name, tensor in vars(lent).items():
            assert torch.equal(tensor, getattr(alone, name)), name

    run_ranks(case.ranks, work)
    for manager in managers:
        assert manager.used() - {"temp"} == {*QKV, "output", "comm", "mask"}
        assert "temp" in manager.used() or dtype is torch.float64
        assert manager.dtypes(*QKV) == {dtype}


def test_a_buffer_manager_counts_by_kind_and_gets_all_back() -> None:
    """The real one, of one device and of ranks."""
    attention = importlib.import_module("dilated_memory_pool.attention")
    policies = {kind: replace(policy, min_bytes=0) for kind, policy in attention.DEFAULT_POLICIES.items()}
    case = replace(CASE, mask="random")
    spread = RingCase(2, (0, 16, 32, 45), (8, 4), 4, 8)
    with attention.AttentionBufferManager("host", policies=policies) as manager:
        for _ in range(2):
            results = run(case, torch.float32, allocator=manager)
            assert results.equal(run(case, torch.float32))
            assert manager.statistics("output").allocated_bytes > 0
        run_ranks(spread.ranks, lambda comm: run_rank(spread, torch.float32, comm, allocator=manager))
        used = {kind.value for kind, numbers in manager.statistics().items() if numbers.peak_allocated_bytes > 0}
        assert used >= {*QKV, "output", "comm", "mask"}
        del results
        gc.collect()
        assert {numbers.allocated_bytes for numbers in manager.statistics().values()} == {0}


# ------------------------------------------------------------------------------------------------ plans


@every_kind
def test_each_plan_is_made_once_in_a_store(case: Case) -> None:
    """Forward and backward ask for the same one, and so do calls with an equal layout, which `run` makes anew."""
    store = Store()
    for _ in range(2):
        run(case, torch.float32, patterns=store)
        assert set(store.made.values()) == {1}
        assert len(store) == 1
    assert all(key[0].startswith("dilated_block_sparse") for key in store)  # type: ignore[index]


def test_a_pattern_cache_keeps_plans() -> None:
    cache = importlib.import_module("dilated_pattern_cache").PatternCache(max_entries=4)
    alone = run(CASE, torch.float32)
    for _ in range(2):
        assert run(CASE, torch.float32, patterns=cache).equal(alone)
    assert len(cache) == 1
    assert cache.info().misses == 1


def test_without_a_store_the_layout_keeps_its_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """One each for float32 and half precision, causal or not, whatever else differs."""
    made: list[dict[str, bool]] = []
    original = stacks.make_plan

    def counted(layout: BlockLayout, **options: bool) -> Any:
        made.append(options)
        return original(layout, **options)

    monkeypatch.setattr(stacks, "make_plan", counted)
    layout = CASE.layout()
    for case in (CASE, replace(CASE, batch=1), replace(CASE, head_dim=16), replace(CASE, mask="random")):
        for dtype in (torch.float32, torch.float64):
            run(case, dtype, layout)
    assert len(made) == 1
    run(CASE, torch.bfloat16, layout)
    run(CASE, torch.float16, layout)
    assert len(made) == 2
    run(replace(CASE, is_causal=True), torch.float32, layout)
    assert len(made) == 3


def test_where_pytorch_traces_they_step_aside_and_the_plan_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled call is one graph, asks neither, and gives what the eager call gives."""
    torch._dynamo.reset()
    made: list[BlockLayout] = []
    original = stacks.make_plan

    def counted(layout: BlockLayout, **options: bool) -> Any:
        made.append(layout)
        return original(layout, **options)

    monkeypatch.setattr(stacks, "make_plan", counted)
    lender, store, layout = Lender(), Store(), replace(CASE, seed=99).layout()

    def call(*qkv: Tensor) -> Tensor:
        return block_sparse_attention(*qkv, layout, allocator=lender, patterns=store)

    leaves = [tensor.requires_grad_() for tensor in CASE.problem(torch.float32)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        traced = compiled(*leaves)
        gradients = torch.autograd.grad(traced, leaves, torch.ones_like(traced))
    assert not lender.lent
    assert not store
    assert len(made) == 1
    eager = call(*leaves)
    assert lender.lent
    assert store
    torch.testing.assert_close(traced, eager)
    for got, expected in zip(gradients, torch.autograd.grad(eager, leaves, torch.ones_like(eager)), strict=True):
        torch.testing.assert_close(got, expected)


# ------------------------------------------------------------------------------------------------ memory

SEQ, HEADS, HEAD_DIM = 8192, 8, 64
MERGED = BlockLayout.local(SEQ, 0) | BlockLayout.global_(SEQ, 1, 0)


def memory(
    layout: BlockLayout, dtype: torch.dtype, kv_heads: int, storage: str, is_causal: bool
) -> tuple[float, float]:
    """Memory beyond the results, forward over out's bytes, backward over those of dq, dk and dv together."""
    shapes = [(1, SEQ, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
    leaves = lay_out([torch.randn(shape, dtype=dtype) for shape in shapes], storage)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    query = leaves[0]

    outs: list[Tensor] = []

    def forward() -> None:
        outs.append(block_sparse_attention(*leaves, layout, is_causal=is_causal, enable_gqa=True))

    peaks = [measure.peak_memory(forward)]
    (out,) = outs
    cotangent = torch.randn_like(out)
    peaks.append(measure.peak_memory(lambda: torch.autograd.grad(out, leaves, cotangent)))
    results = [out.nbytes + 4 * out.numel() // HEAD_DIM, sum(leaf.nbytes for leaf in leaves)]
    # What a kernel holds beside its results is its own.
    own = (
        12 * cpu_matmul.BLOCK_SCORES
        if kernels.choose("auto", query.device, dtype, HEAD_DIM).name == "cpu_matmul"
        else 0
    )
    (forward_extra, backward_extra) = (peak - result - own for peak, result in zip(peaks, results, strict=True))
    return forward_extra / out.nbytes, backward_extra / results[1]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layout", "kv_heads", "storage", "is_causal"),
    [
        (MERGED, 8, "plain", False),
        (MERGED, 2, "plain", True),
        (MERGED, 8, "packed", True),
        (BlockLayout.random(SEQ, 1, heads=8), 8, "plain", False),
    ],
    ids=["merged", "shared-keys", "packed", "each-head"],
)
def test_extra_memory_is_at_most_twice_the_results(
    layout: BlockLayout, kv_heads: int, storage: str, is_causal: bool, dtype: torch.dtype
) -> None:
    """The goal, where calls exceed one gather. Of the backward, the results are the three gradients."""
    forward, backward = memory(layout, dtype, kv_heads, storage, is_causal)
    assert forward <= 2.0, f"forward: {forward:.2f} times out"
    assert backward <= 2.0, f"backward: {backward:.2f} times the gradients"
