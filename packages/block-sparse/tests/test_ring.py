"""block_sparse_ring_attention over ranks that are threads: the oracle's results, the plan's bytes, errors on all."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from ring_cases import (
    CASES,
    KINDS,
    MASKS,
    SHARES,
    Case,
    Results,
    assert_close,
    cases,
    check,
    joined,
    oracle,
    run,
    run_rank,
)
from torch import Tensor, nn

from dilated_block_sparse import block_sparse_attention
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.modules import BlockSparseMultiheadAttention
from dilated_block_sparse.ring import (
    BlockSparseRingAttention,
    BlockSparseRingMultiheadAttention,
    BlockSparseRingPlan,
    block_bounds,
    block_sparse_ring_attention,
)
from dilated_core import AuxRequest
from dilated_memory_pool import MemoryPool
from dilated_pattern_cache import PatternCache
from dilated_ring import DisagreementError, PeerError
from dilated_ring.comm import Comm, Record, RecordingComm, run_ranks
from dilated_ring.plan import even_bounds

FLOAT64 = torch.float64
MIXED = Case(2, (0, 16, 32, 45), (8, 4), 4, 8, kv_heads=2, share="query")

# ------------------------------------------------------------------------------------------------ the oracle


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_oracle(case: Case, is_causal: bool) -> None:
    check(replace(case, is_causal=is_causal))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("share", SHARES)
def test_masks_shared_heads_and_gathering_again(share: str, mask: str) -> None:
    case = replace(MIXED, share=share, mask=mask)
    check(case)
    check(replace(case, is_causal=True, refetch=True))


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_with_nothing_little_or_all_to_exchange(kind: str) -> None:
    check(replace(MIXED, kind=kind))
    check(replace(MIXED, kind=kind, is_causal=True, mask="random"))


@pytest.mark.parametrize("ranks", range(1, 9))
def test_any_number_of_ranks(ranks: int) -> None:
    case = Case(1, (0, 61), (4, 4), 4, 8, kv_heads=2, share="key", density=0.3).over(ranks)
    assert case.ranks == ranks
    check(replace(case, is_causal=ranks % 2 == 0, mask="random"))
    check(replace(case, is_causal=ranks % 2 == 1, bounds=even_bounds(61, ranks)))


@settings(max_examples=30)
@given(cases())
def test_any_small_problem(case: Case) -> None:
    check(case)


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"))
@given(cases(ranks=8))
def test_any_of_many_small_problems(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    case = replace(MIXED, head_dim=32, mask="random")
    check(case, dtype)
    check(replace(case, is_causal=True, refetch=True), dtype)


def test_gradients_are_those_of_one_process() -> None:
    case = replace(MIXED, is_causal=True)
    *qkv, cotangent = case.problem(FLOAT64)
    leaves = [tensor.requires_grad_() for tensor in qkv]
    out, aux = block_sparse_attention(*leaves, case.layout(), **case.options(), return_aux=AuxRequest(lse=True))
    assert aux.lse is not None
    lse_cotangent = case.lse_cotangent().masked_fill(aux.lse == -torch.inf, 0.0)
    grads = torch.autograd.grad([out, aux.lse], leaves, [cotangent, lse_cotangent])
    assert_close(case, FLOAT64, run(case), Results(out.detach(), aux.lse.detach(), *grads))


def test_the_same_bits_again() -> None:
    case = replace(MIXED, mask="random")
    first, again = (run(case, torch.float32) for _ in range(2))
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


def test_values_of_ones_give_ones() -> None:
    case = replace(MIXED, kind="first")

    def work(comm: Comm) -> Tensor:
        query, key, value, _ = (tensor[:, case.shard(comm.rank)] for tensor in case.problem(FLOAT64))
        return block_sparse_ring_attention(
            query, key, torch.ones_like(value), case.layout(), group=comm, **case.options()
        )

    out = torch.cat(run_ranks(case.ranks, work), 1)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-14)


def test_a_batch_of_none() -> None:
    case = replace(MIXED, batch=0)
    results = run(case)
    assert results.out.shape == (0, 45, 4, 8)
    assert results.dk.shape == (0, 45, 2, 8)


def test_lengths_of_none() -> None:
    layout = BlockLayout.from_rows([], 0, 0, block_size=4)

    def work(comm: Comm) -> Tensor:
        return block_sparse_ring_attention(*torch.zeros(3, 1, 0, 2, 8).unbind(), layout, group=comm)

    assert [out.shape for out in run_ranks(2, work)] == [(1, 0, 2, 8)] * 2


def test_autocast_decides_the_dtype() -> None:
    case = replace(MIXED, batch=1)

    def work(comm: Comm) -> Tensor:
        query, key, value, _ = (tensor[:, case.shard(comm.rank)] for tensor in case.problem(torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            return block_sparse_ring_attention(query, key, value, case.layout(), group=comm, **case.options())

    assert {out.dtype for out in run_ranks(case.ranks, work)} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------ bytes


def recorded(case: Case, dtype: torch.dtype, **options: Any) -> list[list[Record]]:
    """Every exchange of one forward and backward, as each rank saw it."""

    def work(comm: Comm) -> list[Record]:
        recording = RecordingComm(comm)
        run_rank(case, dtype, recording, **options)
        return recording.records

    return run_ranks(case.ranks, work)


def plan_of(case: Case) -> BlockSparseRingPlan:
    return BlockSparseRingPlan(case.layout(), case.bounds, kv_heads=case.key_heads, is_causal=case.is_causal)


def assert_bytes(case: Case, dtype: torch.dtype) -> None:
    """What each rank sends each other one is what the plan says, both phases."""
    plan, records = plan_of(case), recorded(case, dtype)
    for phase in ("forward", "backward"):
        sizes = {"batch": case.batch, "phase": phase, "masked": case.mask != "none", "refetch": case.refetch}
        table, figures = plan.matrix(dtype, case.head_dim, **sizes), plan.bytes(dtype, case.head_dim, **sizes)
        for rank in range(case.ranks):
            own = [record for record in records[rank] if record.purpose.phase == phase]
            for peer in range(case.ranks):
                assert sum(record.sent[peer] for record in own) == table[rank][peer], (case, phase, rank, peer)
                assert sum(record.received[peer] for record in own) == table[peer][rank], (case, phase, rank, peer)
            assert sum(sum(record.received) for record in own) == figures.of(rank)
            assert sum(sum(record.sent) for record in own) == figures.sent[rank][0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_sent_is_what_the_plan_says(case: Case) -> None:
    assert_bytes(case, torch.float32)
    assert_bytes(replace(case, refetch=True, is_causal=True, mask="random"), torch.bfloat16)


@settings(max_examples=15)
@given(cases())
def test_any_small_problem_sends_what_the_plan_says(case: Case) -> None:
    assert_bytes(case, FLOAT64)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("bounds", [MIXED.bounds, (0, 5, 7, 7, 30, 45)], ids=["whole", "cut"])
def test_a_rank_gets_exactly_the_keys_that_its_rows_keep(bounds: tuple[int, ...], share: str, is_causal: bool) -> None:
    case = replace(MIXED, bounds=bounds, share=share, is_causal=is_causal)
    group = case.heads // case.key_heads
    live = case.layout().to_dense().repeat_interleave(case.heads // case.layout().heads, 0)
    if is_causal:
        live = live.tril()
    live = live.unflatten(0, (case.key_heads, group)).any(1)
    shards = [case.shard(rank) for rank in range(case.ranks)]
    # Key and value, float32, batch 2.
    number = 2 * 4 * case.head_dim * case.batch
    table = [[int(live[:, rows, keys].any(1).sum()) * number for rows in shards] for keys in shards]
    for rank in range(case.ranks):
        table[rank][rank] = 0
    assert plan_of(case).matrix(torch.float32, case.head_dim, batch=case.batch) == table


def test_a_block_that_one_head_keeps_travels_in_that_head_alone() -> None:
    nothing, one = [[0], [1], [2], [3]], [[0], [1], [2], [0, 3]]
    layout = BlockLayout.from_rows([nothing, one, nothing], 16, 16, block_size=4)
    plan = BlockSparseRingPlan(layout, 4, kv_heads=3)
    assert plan.matrix(torch.float32, 8) == [[0, 0, 0, 2 * 4 * 8 * 4], [0] * 4, [0] * 4, [0] * 4]
    shared = BlockSparseRingPlan(BlockLayout.from_rows(one, 16, 16, block_size=4), 4, kv_heads=3)
    assert shared.bytes(torch.float32, 8).total == 3 * plan.bytes(torch.float32, 8).total


def test_a_block_that_lies_on_several_ranks_comes_in_parts() -> None:
    layout = BlockLayout.from_rows([[0], [0]], 16, 16, block_size=8)
    plan = BlockSparseRingPlan(layout, (0, 3, 7, 16))
    row = 2 * 4  # key and value of one number, float32
    assert plan.matrix(torch.float32, 1) == [[0, 3 * row, 3 * row], [4 * row, 0, 4 * row], [row, row, 0]]


@pytest.mark.parametrize("kind", ["diagonal", "empty"])
def test_where_nothing_travels_the_ranks_only_agree(kind: str) -> None:
    case = replace(MIXED, kind=kind)
    assert not plan_of(case).travels
    for records in recorded(case, FLOAT64):
        assert {record.purpose.phase for record in records} == {"agreement"}


def test_one_exchange_moves_keys_and_values_and_one_brings_their_gradients() -> None:
    for records in recorded(replace(MIXED, mask="random"), FLOAT64):
        found = [str(record.purpose) for record in records if record.purpose.phase != "agreement"]
        assert found == ["keys and values, forward", "padding, forward", "gradients of keys and values, backward"]


def test_causal_ranks_get_nothing_of_later_ones() -> None:
    case = replace(MIXED, kind="full", is_causal=True)
    plan = plan_of(case)
    assert [plan.peers(rank).receives_from for rank in range(3)] == [(), (0,), (0, 1)]
    assert [plan.peers(rank).sends_to for rank in range(3)] == [(1, 2), (2,), ()]
    assert plan.bytes(torch.float32, 8).of(0) == 0


def test_without_gradients_the_ranks_exchange_once() -> None:
    def work(comm: Comm) -> list[str]:
        recording = RecordingComm(comm)
        query, key, value, _ = (tensor[:, MIXED.shard(comm.rank)] for tensor in MIXED.problem(FLOAT64))
        options = {"bounds": MIXED.bounds, "verify": False, **MIXED.options()}
        block_sparse_ring_attention(query, key, value, MIXED.layout(), group=recording, **options)
        return [record.purpose.what for record in recording.records]

    assert run_ranks(3, work) == [["keys and values"]] * 3


# ------------------------------------------------------------------------------------------------ plans


def test_bounds_are_shards_of_whole_blocks_as_equal_as_can_be() -> None:
    layout = replace(MIXED, bounds=(0, 45), block_size=(4, 6)).layout()
    assert block_bounds(layout, 3) == (0, 24, 36, 45)
    assert block_bounds(layout, 6) == (0, 12, 24, 36, 45, 45, 45)
    assert BlockSparseRingPlan(layout, 3).bounds == (0, 24, 36, 45)


def test_a_plan_describes_itself() -> None:
    plan = plan_of(MIXED)
    page = plan.describe(torch.float32, 8)
    assert page.startswith("45 tokens on 3 ranks; 2 key heads of 8, float32, not causal; layouts of 4 heads")
    assert len([line for line in page.splitlines() if line.split()[:1] in (["0"], ["1"], ["2"])]) == 3
    assert "receives most" in page
    assert "has most live blocks" in page
    assert "Nothing travels." in plan_of(replace(MIXED, kind="diagonal")).describe()
    assert sum(plan.live(rank) for rank in range(3)) == plan.layout.live


def test_a_million_tokens_are_planned_without_a_table_of_blocks_by_blocks() -> None:
    length, blocks = 1 << 20, 1 << 13
    rows = torch.arange(blocks)
    columns = torch.stack([torch.zeros_like(rows), rows - 1, rows], 1)
    kept = (columns >= 0) & torch.stack([rows > 1, rows > 0, rows >= 0], 1)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    layout = BlockLayout(indptr, columns[kept], length, length, block_size=128)
    plan = BlockSparseRingPlan(layout, 64, kv_heads=8, is_causal=True)
    assert plan.peers(5) == ((6,), (0, 4))
    assert plan.bytes(torch.bfloat16, 64).of(5) == 2 * 128 * 2 * 8 * 64 * 2
    far = plan.for_rank(5).far
    assert far is not None
    assert (far.layout.q_blocks, far.layout.kv_blocks, far.layout.live) == (128, 2, 129)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": "local"}, TypeError, "layout: expected a BlockLayout, got str"),
        ({"kv_heads": 0}, ValueError, "kv_heads: expected a positive int"),
        ({"kv_heads": 3}, ValueError, "layout: expected 1 head or a multiple of the 3 key heads, got 4"),
        ({"sequence": 0}, ValueError, "sequence: expected a positive int"),
        ({"sequence": (0, 30, 20, 45)}, ValueError, "bounds: expected positions that rise from 0 to the length"),
        ({"sequence": (0, 16)}, ValueError, r"bounds: expected to end at the 45 positions of layout, got \[0, 16\]"),
        ({"is_causal": 1}, TypeError, "is_causal: expected a bool"),
    ],
    ids=str,
)
def test_a_plan_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"layout": MIXED.layout(), "sequence": 3, "kv_heads": 2, "is_causal": False, **change}
    with pytest.raises(error, match=message):
        BlockSparseRingPlan(arguments.pop("layout"), arguments.pop("sequence"), **arguments)


def test_a_plan_refuses_other_numbers() -> None:
    plan = plan_of(MIXED)
    with pytest.raises(ValueError, match="rank: expected a number below 3, got 3"):
        plan.peers(3)
    with pytest.raises(TypeError, match="dtype: expected one of"):
        plan.bytes(torch.int8, 8)
    with pytest.raises(ValueError, match="phase: expected one of"):
        plan.bytes(torch.float32, 8, phase="sideways")


# ------------------------------------------------------------------------------------------------ errors and agreement


def outcomes(ranks: int, call: Callable[[Comm], object]) -> list[object]:
    """What each rank returns or raises."""

    def work(comm: Comm) -> object:
        try:
            return call(comm)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            return error

    return run_ranks(ranks, work)


def calls(changes: Sequence[dict[str, Any]], case: Case = MIXED) -> list[object]:
    """Each rank's outcome, called with changes of its own."""

    def work(comm: Comm) -> object:
        dtype = changes[comm.rank].get("dtype", FLOAT64)
        query, key, value, _ = (tensor[:, case.shard(comm.rank)] for tensor in case.problem(dtype))
        arguments = {"query": query, "key": key, "value": value, "layout": case.layout(), **case.options()}
        arguments |= {name: new for name, new in changes[comm.rank].items() if name != "dtype"}
        return block_sparse_ring_attention(**arguments, group=comm)

    return outcomes(case.ranks, work)


BAD = [
    ({"layout": None}, TypeError, "layout: expected a BlockLayout, got NoneType"),
    ({"layout": BlockLayout.from_rows([[0]], 4, 8)}, ValueError, "layout: expected as many keys as rows"),
    (
        {"layout": BlockLayout.from_rows([[[0]]] * 3, 4, 4)},
        ValueError,
        "layout: expected 1 or 2 or 4 heads for query's 4, got 3",
    ),
    ({"bounds": (0, 16, 32, 46)}, ValueError, "bounds: expected to end at the 45 positions of layout"),
    ({"bounds": (0, 8, 32, 45)}, ValueError, "query: expected the 8 positions that bounds give rank 0, got 16"),
    ({"bounds": (0, 45)}, ValueError, "bounds: expected world_size"),
    ({"is_causal": None}, TypeError, "is_causal: expected a bool"),
    ({"refetch": 1}, TypeError, "refetch: expected a bool"),
    ({"verify": 1}, TypeError, "verify: expected a bool"),
    ({"enable_gqa": False}, ValueError, "key: expected the heads of query, 4, got 2"),
    ({"scale": "big"}, TypeError, "scale: expected a float or None"),
    ({"kernel": "none"}, ValueError, "kernel: expected one of"),
    ({"key_padding_mask": torch.ones(2, 3)}, TypeError, "key_padding_mask: expected a bool tensor"),
    ({"return_aux": True}, TypeError, "return_aux: expected an AuxRequest"),
    ({"allocator": 3}, TypeError, "allocator: expected an object"),
    ({"query": torch.zeros(3)}, ValueError, "query: expected 4 dimensions"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[next(iter(each[0])) for each in BAD])
def test_who_refuses_says_why_and_the_others_hear_of_it(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    first, *others = calls([change, {}, {}])
    assert isinstance(first, error)
    assert not isinstance(first, DisagreementError)
    assert message in str(first)
    for other in others:
        assert isinstance(other, DisagreementError)
        assert message in str(other)
        assert "rank 0 refused its arguments" in str(other)


OTHER = replace(MIXED, seed=5).layout()
DIFFERENT = [
    ({"layout": OTHER}, f"layout is {MIXED.layout().key()} on ranks 0 and 2, {OTHER.key()} on rank 1"),
    ({"is_causal": True}, "is_causal is False on ranks 0 and 2, True on rank 1"),
    ({"scale": 0.5}, "scale is 0.35355339059327373 on ranks 0 and 2, 0.5 on rank 1"),
    ({"dtype": torch.float32}, "dtype is torch.float64 on ranks 0 and 2, torch.float32 on rank 1"),
    ({"bounds": MIXED.bounds}, "bounds is None on ranks 0 and 2, (0, 16, 32, 45) on rank 1"),
    ({"return_aux": AuxRequest(lse=True)}, "return_aux.lse is False on ranks 0 and 2, True on rank 1"),
    ({"key_padding_mask": torch.ones(2, 16, dtype=torch.bool)}, "key_padding_mask is None on ranks 0 and 2, given on"),
]


@pytest.mark.parametrize(("change", "message"), DIFFERENT, ids=[next(iter(each[0])) for each in DIFFERENT])
def test_ranks_that_are_called_differently_all_say_so(change: dict[str, Any], message: str) -> None:
    for outcome in calls([{}, change, {}]):
        assert isinstance(outcome, DisagreementError)
        assert message in str(outcome)


def test_shards_of_another_length_than_the_layout_are_refused_on_every_rank() -> None:
    shorter = replace(MIXED, bounds=(0, 16, 32, 40)).layout()
    for outcome in calls([{"layout": shorter}] * 3):
        assert type(outcome) is ValueError
        assert "bounds: expected to end at the 40 positions of layout, got [0, 16, 32, 45]" in str(outcome)


def test_ranks_may_differ_in_the_kernel() -> None:
    assert all(isinstance(outcome, Tensor) for outcome in calls([{"kernel": "math"}, {}, {}]))


def test_backwards_in_another_order_are_told_apart() -> None:
    def work(comm: Comm) -> object:
        query, key, value, cotangent = (tensor[:, MIXED.shard(comm.rank)] for tensor in MIXED.problem(FLOAT64))
        query = query.requires_grad_()
        options = {"group": comm, **MIXED.options()}
        outs = [block_sparse_ring_attention(query, key, value, MIXED.layout(), **options) for _ in range(2)]
        return [torch.autograd.grad(out, query, cotangent) for out in (outs if comm.rank else outs[::-1])]

    for outcome in outcomes(3, work):
        assert isinstance(outcome, DisagreementError)
        assert "call is" in str(outcome)


def test_a_backward_that_cannot_be_on_one_rank_does_not_keep_the_others_waiting() -> None:
    def work(comm: Comm) -> object:
        query, key, value, cotangent = (tensor[:, MIXED.shard(comm.rank)] for tensor in MIXED.problem(FLOAT64))
        query = query.requires_grad_()
        out = block_sparse_ring_attention(query, key, value, MIXED.layout(), group=comm, **MIXED.options())
        if comm.rank == 1:
            key.zero_()
        return torch.autograd.grad(out, query, cotangent)

    first, second, third = outcomes(3, work)
    assert type(second) is RuntimeError
    assert "modified by an inplace operation" in str(second)
    assert all(isinstance(other, DisagreementError) for other in (first, third))


class Failing:
    """An allocator that has no memory on one rank."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.rank == 1:
            raise MemoryError("no memory left")
        return torch.empty(size, dtype=dtype, device=device)


class Forgetful:
    """A store that fails on one rank when a plan is to be made."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def get_or_create(self, key: Hashable, create: Callable[[], object]) -> object:
        if self.rank == 1:
            raise MemoryError("no room for a plan")
        return create()


def test_a_rank_that_fails_to_plan_lets_the_others_go() -> None:
    def work(comm: Comm) -> str:
        query, key, value, _ = (tensor[:, MIXED.shard(comm.rank)] for tensor in MIXED.problem(FLOAT64))
        options = {"group": comm, "patterns": Forgetful(comm.rank), **MIXED.options()}
        try:
            block_sparse_ring_attention(query, key, value, replace(MIXED, kind="full").layout(), **options)
        except (MemoryError, PeerError) as error:
            return type(error).__name__
        return "nothing"

    assert run_ranks(3, work) == ["PeerError", "MemoryError", "PeerError"]


def test_a_rank_that_fails_in_the_midst_lets_the_others_go() -> None:
    def work(comm: Comm) -> str:
        query, key, value, _ = (tensor[:, MIXED.shard(comm.rank)] for tensor in MIXED.problem(FLOAT64))
        options = {"group": comm, "allocator": Failing(comm.rank), **MIXED.options()}
        try:
            block_sparse_ring_attention(query, key, value, replace(MIXED, kind="full").layout(), **options)
        except (MemoryError, PeerError) as error:
            return type(error).__name__
        return "nothing"

    assert run_ranks(3, work) == ["PeerError", "MemoryError", "PeerError"]


def test_a_second_derivative_is_refused() -> None:
    def work(comm: Comm) -> str:
        query, key, value, cotangent = (tensor[:, MIXED.shard(comm.rank)] for tensor in MIXED.problem(FLOAT64))
        query = query.requires_grad_()
        out = block_sparse_ring_attention(query, key, value, MIXED.layout(), group=comm, **MIXED.options())
        (grad,) = torch.autograd.grad(out, query, cotangent, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not defined"):
            grad.sum().backward()
        return "refused"

    assert run_ranks(3, work) == ["refused"] * 3


# ------------------------------------------------------------------------------------------------ lent resources


class Counting:
    """An allocator and a store of plans that notes what it is asked for."""

    def __init__(self) -> None:
        self.allocated, self.kept, self.made = 0, dict[Hashable, Any](), list[Hashable]()

    def empty(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.allocated += 1
        return torch.full(size, torch.nan if dtype.is_floating_point else 7, dtype=dtype, device=device)

    def get_or_create(self, key: Hashable, create: Callable[[], Any]) -> Any:
        if key not in self.kept:
            self.kept[key] = create()
            self.made.append(key)
        return self.kept[key]


def test_lent_memory_and_kept_plans_change_nothing() -> None:
    case = replace(MIXED, mask="random")
    expected = oracle(case, FLOAT64)
    stores = [Counting() for _ in range(case.ranks)]
    made = []
    for _ in range(2):

        def work(comm: Comm) -> Results:
            return run_rank(case, FLOAT64, comm, allocator=stores[comm.rank], patterns=stores[comm.rank])

        assert_close(case, FLOAT64, joined(run_ranks(case.ranks, work)), expected)
        made.append([len(store.made) for store in stores])
    assert made[0] == made[1]
    for store in stores:
        assert store.allocated > 0
        assert any(str(key).startswith("('dilated_block_sparse.rank_plan'") for key in store.made)


def test_a_pool_and_a_pattern_cache_change_nothing() -> None:
    case = replace(MIXED, bounds=(0, 13, 30, 45), is_causal=True)
    expected, cache = oracle(case, FLOAT64), PatternCache()
    for _ in range(2):
        with MemoryPool("host") as pool:
            assert_close(case, FLOAT64, run(case, allocator=pool, patterns=cache), expected)
    assert cache.info().hits > 0


def test_a_plan_is_kept_with_its_layout() -> None:
    case = replace(MIXED, seed=77)
    layout = case.layout()  # made once, before the ranks ask for it at the same time
    run(case)
    before = dict(layout.plans)
    assert len(before) == case.ranks
    run(case)
    assert layout.plans.keys() == before.keys()
    assert all(layout.plans[key] is plan for key, plan in before.items())


# ------------------------------------------------------------------------------------------------ modules


def pattern(length: int) -> BlockLayout:
    """A window of two blocks of 8."""
    rows = [[row] if row == 0 else [row - 1, row] for row in range(-(-length // 8))]
    return BlockLayout.from_rows(rows, length, length, block_size=8)


class Positions(nn.Module):
    """A rotary that adds the position, so that a wrong start shows."""

    def forward(self, query: Tensor, key: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        places = torch.arange(start, start + query.shape[1], dtype=query.dtype)[None, :, None, None]
        return query + places.sin(), key + places.cos()


BOUNDS = (0, 16, 23, 45)


def whole_and_shards(
    layout: Any, *, causal: bool, given: bool, **options: Any
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Output, input gradient and weight gradients of the whole sequence in one place, and of ranks with its weights."""
    torch.manual_seed(3)
    whole = BlockSparseMultiheadAttention(32, 4, layout, kv_heads=2, dtype=FLOAT64, is_causal=causal, **options)
    tokens, cotangent = torch.randn(2, 2, 45, 32, dtype=FLOAT64).unbind()
    padding = torch.rand(2, 45) < 0.2

    def step(module: nn.Module, positions: slice) -> list[Tensor]:
        rows = tokens[:, positions].clone().requires_grad_()
        out, _ = module(rows, key_padding_mask=padding[:, positions])
        return [out.detach(), *torch.autograd.grad(out, [rows, *module.parameters()], cotangent[:, positions])]

    def work(comm: Comm) -> list[Tensor]:
        bounds = BOUNDS if given else None
        with torch.random.fork_rng():
            module = BlockSparseRingMultiheadAttention(
                32, 4, layout, kv_heads=2, dtype=FLOAT64, is_causal=causal, group=comm, bounds=bounds, **options
            )
        module.load_state_dict(whole.state_dict())
        return step(module, slice(*BOUNDS[comm.rank : comm.rank + 2]))

    return step(whole, slice(0, 45)), run_ranks(3, work)


@pytest.mark.parametrize("given", [False, True], ids=["asked", "bounds"])
@pytest.mark.parametrize("layout", [pattern(45), pattern], ids=["layout", "function"])
@pytest.mark.parametrize("rotary", [None, Positions()], ids=["plain", "rotary"])
def test_the_multihead_module_is_that_of_one_process(layout: Any, rotary: nn.Module | None, given: bool) -> None:
    (out, grad, *weights), by_rank = whole_and_shards(layout, causal=True, given=given, rotary=rotary)
    torch.testing.assert_close(torch.cat([each[0] for each in by_rank], 1), out, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([each[1] for each in by_rank], 1), grad, rtol=0, atol=1e-12)
    for expected, *parts in zip(weights, *(each[2:] for each in by_rank), strict=True):
        torch.testing.assert_close(sum(parts), expected, rtol=0, atol=1e-11)


def test_state_dicts_load_in_both_directions() -> None:
    one, other = BlockSparseMultiheadAttention(32, 4, pattern), BlockSparseRingMultiheadAttention(32, 4, pattern)
    other.load_state_dict(one.state_dict())
    one.load_state_dict(other.state_dict())
    assert list(one.state_dict()) == list(other.state_dict())


def test_modules_refuse_dropout() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout: expected 0\.0, block-sparse attention over many ranks"):
        BlockSparseRingAttention(pattern, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout: expected 0\.0"):
        BlockSparseRingMultiheadAttention(32, 4, pattern, dropout=0.1)
    with pytest.raises(ValueError, match="dropout: expected a probability"):
        BlockSparseRingMultiheadAttention(32, 4, pattern, dropout=1.5)


def test_a_module_refuses_bounds_of_another_sequence() -> None:
    with pytest.raises(ValueError, match=r"bounds: expected to end at the 45 positions of layout, got \[0, 20, 44\]"):
        BlockSparseRingAttention(pattern(45), bounds=(0, 20, 44))


def test_a_module_is_copied_with_its_group_and_pickled_without_one() -> None:
    def work(comm: Comm) -> str:
        module = BlockSparseRingAttention(pattern(45), group=comm)
        assert copy.deepcopy(module).group is comm
        with pytest.raises(TypeError, match="group: expected None, the default group, where a module is pickled"):
            pickle.dumps(module)
        return repr(module)

    (shown,) = run_ranks(1, work)
    assert "group=VirtualComm, bounds=None, refetch=False, verify=True" in shown
    again = pickle.loads(pickle.dumps(BlockSparseRingAttention(pattern(45), bounds=BOUNDS)))
    assert again.bounds == BOUNDS
    assert again.group is None


def test_a_function_that_fails_on_one_rank_does_not_keep_the_others_waiting() -> None:
    def work(comm: Comm) -> object:
        def broken(length: int) -> BlockLayout:
            if comm.rank == 1:
                raise ValueError(f"no layout for {length}")
            return pattern(length)

        module = BlockSparseRingAttention(broken, group=comm)
        return module(*torch.zeros(3, 1, 8, 2, 4).unbind())

    first, second, third = outcomes(3, work)
    assert type(second) is ValueError
    for other in (first, third):
        assert isinstance(other, DisagreementError)
        assert "no layout for 24" in str(other)


def test_a_projection_that_fails_on_one_rank_does_not_keep_the_others_waiting() -> None:
    def work(comm: Comm) -> object:
        module = BlockSparseRingMultiheadAttention(32, 4, pattern(24), group=comm)
        return module(torch.zeros(1, 8, 32, dtype=FLOAT64 if comm.rank == 1 else torch.float32))

    first, second, third = outcomes(3, work)
    assert type(second) is TypeError
    assert all(isinstance(other, DisagreementError) for other in (first, third))


def test_a_module_whose_layout_is_a_function_takes_any_length() -> None:
    def work(comm: Comm) -> list[tuple[int, ...]]:
        module = BlockSparseRingAttention(pattern, group=comm)
        return [tuple(module(*torch.zeros(3, 1, length, 2, 4).unbind()).shape) for length in (8, 16, 8)]

    assert run_ranks(2, work) == [[(1, 8, 2, 4), (1, 16, 2, 4), (1, 8, 2, 4)]] * 2


# ------------------------------------------------------------------------------------------------ compile


@pytest.mark.slow
def test_a_compiled_function_breaks_its_graph_and_goes_on() -> None:
    layout, shard = pattern(45), slice(0, 45)
    tokens = torch.randn(3, 1, 45, 2, 8, dtype=FLOAT64)

    def work(comm: Comm) -> tuple[Tensor, Tensor]:
        def double(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return 2 * block_sparse_ring_attention(2 * query, key, value, layout, group=comm)

        torch._dynamo.reset()
        qkv = tokens[:, :, shard].unbind()
        return torch.compile(double, backend="eager")(*qkv), double(*qkv)

    ((compiled, eager),) = run_ranks(1, work)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=0)
