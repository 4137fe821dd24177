"""The plan: every live pair in exactly one rectangle, `fresh` and `once` true to their words, and few rectangles."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import Case, Store, cases
from torch import Tensor

from dilated_block_sparse import BlockLayout
from dilated_block_sparse.plan import Axis, HeadPlan, Stack, make_plan, plan_of

CPU = torch.device("cpu")


def tokens(axis: Axis) -> Tensor:
    """(rectangles, tokens of one), as an axis is defined."""
    starts = torch.tensor(axis.starts)
    return (starts.unsqueeze(-1) + torch.arange(axis.size)).flatten(1)[:, : axis.length]


def indexed(axis: Axis, first: int, last: int) -> Tensor:
    """The same of some rectangles, as the engine gathers them."""
    stretches, size = axis.index(first, last, CPU)
    return (stretches.unsqueeze(-1) * size + torch.arange(size)).view(last - first, axis.length)


def counted(head: HeadPlan, q_len: int, kv_len: int) -> Tensor:
    """How often each pair is attended, (q_len, kv_len)."""
    times = torch.zeros(q_len, kv_len, dtype=torch.int64)
    for stack in head.stacks:
        for rows, keys in zip(tokens(stack.rows), tokens(stack.keys), strict=True):
            pairs = torch.ones(len(rows), len(keys), dtype=torch.int64)
            if stack.is_causal:
                assert torch.equal(rows, keys)
                pairs = pairs.tril()
            flat = (rows.unsqueeze(1) * kv_len + keys).flatten()
            times.view(-1).index_add_(0, flat, pairs.flatten())
    return times


def assert_true_to_its_words(head: HeadPlan, q_len: int) -> None:
    """Rows of a stack are apart, fresh rows were in no stack before, spans and indices are what the axis says."""
    visits = torch.zeros(q_len, dtype=torch.int64)
    for stack in head.stacks:
        rows = tokens(stack.rows).flatten()
        assert len(rows.unique()) == len(rows), "a row twice in one stack"
        assert stack.fresh == (not visits[rows].any()), "fresh"
        visits[rows] += 1
        for axis in (stack.rows, stack.keys):
            wanted = tokens(axis)
            assert wanted.shape == (stack.count, axis.length)
            for first in range(stack.count):
                last = min(first + 3, stack.count)
                assert torch.equal(indexed(axis, first, last), wanted[first:last]), "index"
            if axis.span is not None:
                assert torch.equal(wanted.flatten(), torch.arange(axis.span.start, axis.span.stop)), "span"
    assert head.once == bool((visits <= 1).all()), "once"


def assert_exact(layout: BlockLayout, **options: bool) -> None:
    """Each live pair once, no other pair, in the plan of every head."""
    plan = make_plan(layout, **options)
    assert len(plan) == layout.heads
    live = layout.to_dense().long()
    if options.get("is_causal"):
        live = live.tril()
    for head, wanted in zip(plan, live, strict=True):
        assert torch.equal(counted(head, layout.q_len, layout.kv_len), wanted)
        assert_true_to_its_words(head, layout.q_len)


@settings(max_examples=60)
@given(case=cases(), half=st.booleans(), by_row_block=st.booleans())
def test_every_live_pair_is_attended_once(case: Case, half: bool, by_row_block: bool) -> None:
    assert_exact(case.layout(), is_causal=case.is_causal, half=half, by_row_block=by_row_block)


@settings(max_examples=40)
@given(
    case=cases(),
    rows=st.sampled_from([1, 8, 40]),
    keys=st.sampled_from([1, 8, 40]),
    by_row_block=st.booleans(),
)
def test_rectangles_that_are_cut_lose_nothing(case: Case, rows: int, keys: int, by_row_block: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dilated_block_sparse.plan.stacks.MOST_ROWS", rows)
        patch.setattr("dilated_block_sparse.plan.stacks.MOST_KEYS", keys)
        assert_exact(case.layout(), is_causal=case.is_causal, by_row_block=by_row_block)


@settings(max_examples=20)
@given(case=cases(), is_causal=st.booleans())
def test_sharing_of_columns_loses_nothing_where_calls_cost_much(case: Case, is_causal: bool) -> None:
    """Where each call costs as much as a long one does, the planner shares whatever it can, at every stride."""
    case = replace(case, is_causal=is_causal, kv_len=None, block_size=(2, 2))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FULL_PRECISION", "HALF_PRECISION"):
            cost = getattr(sys.modules["dilated_block_sparse.plan.stacks"], name)
            patch.setattr(f"dilated_block_sparse.plan.stacks.{name}", cost._replace(key=200, row=0, call=0))
        assert_exact(case.layout(), is_causal=is_causal)


@settings(max_examples=30)
@given(case=cases())
def test_by_row_block_no_rectangle_holds_rows_of_two_blocks(case: Case) -> None:
    layout = case.layout()
    for head in make_plan(layout, is_causal=case.is_causal, by_row_block=True):
        for stack in head.stacks:
            blocks = tokens(stack.rows) // layout.block_size[0]
            assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))


@pytest.mark.parametrize(
    ("starts", "length", "size"),
    [
        (((14,), (21,), (35,)), 2, 1),  # as parts at the diagonal start: the first at a multiple of the size, not all
        (((0, 8), (16, 32)), 8, 4),
        (((0, 8),), 7, 1),
    ],
)
def test_an_index_is_of_stretches_only_where_all_start_at_multiples(
    starts: tuple[tuple[int, ...], ...], length: int, size: int
) -> None:
    axis = Axis(starts, 4 if len(starts[0]) > 1 else 2, length)
    assert axis.index(0, len(starts), CPU)[1] == size
    assert torch.equal(indexed(axis, 0, len(starts)), tokens(axis))


# ------------------------------------------------------------------------------------------------ what it finds


def only_stack(layout: BlockLayout, **options: bool) -> Stack:
    """Of a plan of one head and one stack."""
    (head,) = make_plan(layout, **options)
    (stack,) = head.stacks
    return stack


@pytest.mark.parametrize("seq", [64, 61])
def test_a_full_layout_is_one_rectangle(seq: int) -> None:
    stack = only_stack(BlockLayout.full(seq, block_size=(8, 16)))
    assert (stack.count, stack.rows.span, stack.keys.span) == (1, slice(0, seq), slice(0, seq))
    assert (stack.is_causal, stack.fresh) == (False, True)


@pytest.mark.parametrize("block_size", [(8, 8), (8, 16), (16, 8), (7, 5)], ids=str)
def test_a_full_causal_layout_is_one_causal_square(block_size: tuple[int, int]) -> None:
    stack = only_stack(BlockLayout.full(61, block_size=block_size), is_causal=True)
    assert (stack.count, stack.rows.span, stack.keys.span) == (1, slice(0, 61), slice(0, 61))
    assert stack.is_causal


def test_an_empty_layout_has_no_stack() -> None:
    for seq in (0, 61):
        for is_causal in (False, True):
            assert (
                make_plan(BlockLayout.empty(seq, block_size=8, heads=2), is_causal=is_causal)
                == (HeadPlan((), True),) * 2
            )


def test_rows_with_the_same_columns_are_one_rectangle() -> None:
    """A dilated pattern: as many rectangles as residues, none of which is merged with another."""
    (head,) = make_plan(BlockLayout.dilated(96, 12, 3, block_size=8))
    assert head.once
    assert sum(stack.count for stack in head.stacks) == 3
    assert {(stack.rows.length, stack.keys.length) for stack in head.stacks} == {(32, 32)}


def test_equal_rectangles_are_one_stack() -> None:
    stack = only_stack(BlockLayout.dilated(96, 4, 1, block_size=8))
    assert (stack.count, stack.rows.length, stack.keys.length) == (3, 32, 32)


def test_neighbours_in_a_window_share_columns() -> None:
    """There are longer calls than blocks of rows, though no two rows have the same columns."""
    layout = BlockLayout.local(4096, 8, block_size=64)
    (head,) = make_plan(layout)
    longest = max(stack.rows.length for stack in head.stacks)
    assert longest >= 4 * 64
    pairs = sum(stack.count * stack.rows.length * stack.keys.length for stack in head.stacks)
    assert pairs == layout.to_dense().sum()


def test_rows_a_stride_apart_share_columns() -> None:
    """A strided pattern beside a window: what residues have in common is attended by their rows together."""
    (head,) = make_plan(BlockLayout.strided(4096, 8, block_size=32))
    apart = [
        stack
        for stack in head.stacks
        for starts in stack.rows.starts
        if len(starts) > 1 and starts[1] - starts[0] == 256
    ]
    assert apart


def test_bands_of_rows_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = replace(Case(1, 150, 1, 4, (1, 1)), kinds=("strided", "global", "local")).layout()
    whole = make_plan(layout)
    monkeypatch.setattr("dilated_block_sparse.plan.stacks.MOST_BITS", 1)
    assert make_plan(layout) != whole
    for is_causal in (False, True):
        assert_exact(layout, is_causal=is_causal)


def test_a_window_over_a_million_tokens_takes_few_stacks_and_little_memory() -> None:
    layout = BlockLayout.local(1 << 20, 4) | BlockLayout.global_(1 << 20, 1, 1)
    for is_causal in (False, True):
        (head,) = make_plan(layout, is_causal=is_causal)
        stacks = head.stacks
        rectangles = sum(stack.count for stack in stacks)
        assert len(stacks) <= 64
        assert rectangles <= 2 * layout.q_blocks
        axes = [axis for stack in stacks for axis in (stack.rows, stack.keys)]
        # A tuple and its numbers, each of which is counted as if nothing shared it.
        starts = {id(each): sys.getsizeof(each) + 32 * len(each) for axis in axes for each in axis.starts}
        assert sum(starts.values()) < 8 << 20


# ------------------------------------------------------------------------------------------------ kept


def test_a_plan_is_kept_with_the_layout_or_in_the_store() -> None:
    layout, store = BlockLayout.local(64, 1, block_size=8), Store()
    options = {"is_causal": True, "half": False, "by_row_block": False}
    first = plan_of(layout, None, **options)
    assert plan_of(layout, None, **options) is first
    assert plan_of(layout, None, **{**options, "half": True}) is not first
    stored = plan_of(layout, store, **options)
    assert stored == first
    same = BlockLayout.local(64, 1, block_size=8)
    assert plan_of(same, store, **options) is stored
    assert not same.plans
    assert set(store.made.values()) == {1}


def test_what_a_plan_depends_on_is_in_its_key() -> None:
    store = Store()
    layouts = [
        BlockLayout.local(64, 1, block_size=8),
        BlockLayout.local(63, 1, block_size=8),
        BlockLayout.local(64, 2, block_size=8),
        BlockLayout.local(64, 1, block_size=(8, 4)),
        BlockLayout.local(64, 1, block_size=8, heads=2),
    ]
    calls = 0
    for layout in layouts:
        for is_causal in (False, True):
            for half in (False, True):
                for by_row_block in (False, True):
                    calls += 1
                    options = {"is_causal": is_causal, "half": half, "by_row_block": by_row_block}
                    assert plan_of(layout, store, **options) == make_plan(layout, **options)
    assert len(store) == calls
