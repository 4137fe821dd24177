"""Every layout and option against the float64 oracle: out, lse, dq, dk, dv and dbias apart, under random cotangents."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import KINDS, MASKS, SHARES, STORAGES, THROUGH, Case, assert_close, cases, deviation, oracle, run
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dilated_block_sparse import BlockLayout, block_sparse_attention, engine, reference
from dilated_core import AuxRequest, dilated_attention, kernels

CPU = torch.device("cpu")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MIXED = Case(2, 45, 4, 8, (8, 8), ("random", "local"), kv_heads=2, mask="random")


def able(dtype: torch.dtype, head_dim: int = 8) -> list[str]:
    """Kernels that run here."""
    return [name for name, reason in kernels.survey(CPU, dtype, head_dim).items() if reason is None]


@settings(max_examples=60)
@given(case=cases())
def test_any_problem_in_float64(case: Case) -> None:
    assert_close(case, F64, run(case, F64), oracle(case, F64))


@settings(max_examples=40)
@given(
    case=cases(),
    gathered=st.sampled_from([1, 16, 200, 3000]),
    rows=st.sampled_from([1, 8, 40]),
    keys=st.sampled_from([1, 8, 40]),
)
def test_any_problem_cut_into_pieces_heads_and_batch_rows(case: Case, gathered: int, rows: int, keys: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.GATHER_ELEMENTS, "cpu", gathered)
        patch.setattr("dilated_block_sparse.plan.stacks.MOST_ROWS", rows)
        patch.setattr("dilated_block_sparse.plan.stacks.MOST_KEYS", keys)
        assert_close(case, F64, run(case, F64), oracle(case, F64))


@settings(max_examples=30)
@given(case=cases())
def test_any_problem_in_float32(case: Case) -> None:
    assert_close(case, F32, run(case, F32), oracle(case, F32))


@settings(max_examples=15)
@given(case=cases(), dtype=st.sampled_from([BF16, F16]))
def test_any_problem_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    assert_close(case, dtype, run(case, dtype), oracle(case, dtype))


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("block_size", [(8, 8), (16, 4), (5, 7)], ids=str)
def test_every_combination_of_options(
    block_size: tuple[int, int], share: str, mask: str, has_bias: bool, is_causal: bool
) -> None:
    case = replace(MIXED, block_size=block_size, share=share, mask=mask, has_bias=has_bias, is_causal=is_causal)
    assert_close(case, F64, run(case, F64), oracle(case, F64))


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_every_kind_of_layout_with_every_kernel(dtype: torch.dtype, kind: str, is_causal: bool) -> None:
    case = Case(1, 52, 4, 16, (8, 4), (kind,), kv_heads=2, mask="right", is_causal=is_causal)
    assert set(able(dtype)) >= {"math"}
    for kernel in ("auto", *able(dtype)):
        assert_close(case, dtype, run(case, dtype, kernel=kernel), oracle(case, dtype))


@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("through", THROUGH)
def test_gradients_come_through_either_result_or_both(through: str, has_bias: bool) -> None:
    case = replace(MIXED, through=through, has_bias=has_bias, is_causal=True, share="query")
    for dtype in (F64, F32):
        for kernel in able(dtype):
            assert_close(case, dtype, run(case, dtype, kernel=kernel), oracle(case, dtype))


@pytest.mark.parametrize(
    ("batch", "q_len", "kv_len"), [(0, 5, 5), (2, 0, 7), (2, 7, 0), (1, 0, 0), (2, 1, 1), (1, 1, 40)]
)
def test_nothing_to_attend_and_a_single_row(batch: int, q_len: int, kv_len: int) -> None:
    case = Case(batch, q_len, 4, 8, (8, 8), ("full",), kv_len=kv_len, kv_heads=2, mask="random")
    for each in (case, replace(case, has_bias=True)):
        assert_close(each, F64, run(each, F64), oracle(each, F64))


def test_all_rows_without_blocks_give_zero() -> None:
    for case in (replace(MIXED, kinds=("empty",)), replace(MIXED, kinds=("empty",), has_bias=True)):
        results = run(case, F32)
        assert torch.equal(results.lse, torch.full_like(results.lse, -math.inf))
        assert not any(tensor.any() for tensor in (results.out, results.dq, results.dk, results.dv))


def test_what_padding_holds_has_no_influence_and_no_gradient() -> None:
    """Also where a whole batch row is padding."""
    case = replace(MIXED, mask="right", has_bias=True)
    results, real = run(case, F64), case.key_padding_mask()
    assert real is not None
    assert not real[-1].any()
    assert not results.dk[~real].any()
    assert not results.dv[~real].any()
    assert_close(case, F64, results, oracle(case, F64))


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["own-keys", "shared-keys"])
@pytest.mark.parametrize("storage", STORAGES)
def test_any_storage(storage: str, kv_heads: int, share: str, dtype: torch.dtype) -> None:
    """Transposed, expanded, slices of a packed projection, a last stride other than 1: inputs and cotangents."""
    case = replace(MIXED, storage=storage, kv_heads=kv_heads, share=share, is_causal=True, kinds=("random", "global"))
    assert_close(case, dtype, run(case, dtype), oracle(case, dtype))


def test_bands_of_rows_are_planned_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilated_block_sparse.plan.stacks.MOST_BITS", 1)
    for is_causal in (False, True):
        case = Case(1, 150, 1, 4, (1, 1), ("strided", "global", "local"), is_causal=is_causal)
        assert_close(case, F64, run(case, F64), oracle(case, F64))


# ------------------------------------------------------------------------------------------------ what it must equal


def problem(*sizes: int, dtype: torch.dtype = F64) -> list[Tensor]:
    """Three leaves, (batch, seq, heads, head_dim)."""
    return [torch.randn(*sizes, dtype=dtype, requires_grad=True) for _ in range(3)]


def with_lse(*qkv: Tensor, layout: BlockLayout, **options: Any) -> tuple[Tensor, Tensor]:
    """out and lse."""
    out, aux = block_sparse_attention(*qkv, layout, return_aux=AuxRequest(lse=True), **options)
    assert aux.lse is not None
    return out, aux.lse


def assert_same_attention(first: Tensor, second: Tensor, leaves: list[Tensor]) -> None:
    """Two results, and their gradients under one random cotangent."""
    cotangent = torch.randn_like(first)
    grads = (torch.autograd.grad(out, leaves, cotangent, retain_graph=True) for out in (first, second))
    for found, wanted in [(first, second), *zip(*grads, strict=True)]:
        assert deviation(found.detach(), wanted.detach()) <= 1e-12


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_a_full_layout_is_dense_attention(is_causal: bool) -> None:
    leaves = problem(2, 37, 3, 8)
    layout = BlockLayout.full(37, block_size=(8, 5))
    dense = scaled_dot_product_attention(*(leaf.transpose(1, 2) for leaf in leaves), is_causal=is_causal)
    ours = block_sparse_attention(*leaves, layout, is_causal=is_causal)
    assert_same_attention(ours, dense.transpose(1, 2), leaves)
    definition = reference.block_sparse_attention(*leaves, layout, is_causal=is_causal)
    assert_same_attention(definition.out, dense.transpose(1, 2), leaves)


@settings(max_examples=30)
@given(case=cases())
def test_values_of_ones_give_ones(case: Case) -> None:
    """The weights of a row are one softmax: they sum to 1, or there is no key."""
    query, key, value, *bias = case.problem(F64)
    real = case.key_padding_mask()
    ones = torch.ones_like(value)
    if real is not None:
        ones[~real] = torch.nan
    out, lse = with_lse(
        query,
        key,
        ones,
        layout=case.layout(),
        **case.options(),
        block_bias=bias[0] if bias else None,
        enable_gqa=True,
    )
    expected = (lse > -math.inf).double().transpose(1, 2).unsqueeze(-1).expand_as(out)
    assert deviation(out, expected) <= 1e-13


def test_a_union_counts_each_key_once_and_dilated_attention_once_a_branch() -> None:
    leaves = problem(1, 16, 2, 8)
    small, large = (BlockLayout.dilated(16, length // 4, 1, block_size=4) for length in (4, 8))
    union = small | large
    once = block_sparse_attention(*leaves, union)
    assert torch.equal(once, block_sparse_attention(*leaves, large))
    twice = dilated_attention(*leaves, [4, 8], [1, 1])
    assert deviation(twice.detach(), once.detach()) > 0.01
    # The multiset is the set, with log 2 on the scores of what both branches hold.
    in_both = (union.to_blocks() & small.to_blocks())[union.to_blocks()]
    assert_same_attention(
        block_sparse_attention(*leaves, union, block_bias=math.log(2.0) * in_both.double()), twice, leaves
    )


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_dilated_branches_that_do_not_overlap_are_layouts_of_single_tokens(is_causal: bool) -> None:
    """Heads take turns with the phases: of a head, a branch has the rows of one phase alone."""
    leaves, heads, seq = problem(2, 48, 4, 8), 4, 48
    row, column = torch.arange(seq).unsqueeze(1), torch.arange(seq)
    times = torch.zeros(heads, seq, seq, dtype=torch.int64)
    lengths, rates = [12, 16], [4, 8]
    for length, rate in zip(lengths, rates, strict=True):
        for head in range(heads):
            phase = head % rate
            of_phase = (row % length % rate == phase) & (column % length % rate == phase)
            times[head] += (row // length == column // length) & of_phase
    alone = times.amax((0, 2)) <= 1
    assert 0 < alone.sum() < seq
    ours = block_sparse_attention(*leaves, BlockLayout.from_dense(times > 0, block_size=1), is_causal=is_causal)
    theirs = dilated_attention(*leaves, lengths, rates, is_causal=is_causal)
    assert ours[:, alone].abs().max() > 0.1
    assert_same_attention(ours[:, alone], theirs[:, alone], leaves)


def test_blocks_of_rows_and_keys_may_change_places() -> None:
    leaves = problem(2, 40, 2, 8)
    blocks = torch.rand(2, 5, 5) < 0.5
    rows, columns = torch.randperm(5), torch.randperm(5)

    def moved(tensor: Tensor, order: Tensor) -> Tensor:
        return tensor.unflatten(1, (5, 8))[:, order].flatten(1, 2)

    query, key, value = leaves
    plain = block_sparse_attention(query, key, value, BlockLayout.from_blocks(blocks, 40, 40, block_size=8))
    layout = BlockLayout.from_blocks(blocks[:, rows][:, :, columns], 40, 40, block_size=8)
    other = block_sparse_attention(moved(query, rows), moved(key, columns), moved(value, columns), layout)
    assert_same_attention(other, moved(plain, rows), leaves)


def test_heads_with_a_layout_each_are_as_if_alone() -> None:
    leaves = problem(1, 30, 3, 8)
    layout = replace(MIXED, q_len=30, heads=3, kv_heads=3, share="query").layout()
    assert layout.heads == 3
    alone = [
        block_sparse_attention(*(leaf[:, :, head : head + 1] for leaf in leaves), layout.head(head))
        for head in range(3)
    ]
    assert_same_attention(block_sparse_attention(*leaves, layout), torch.cat(alone, 2), leaves)


def test_a_finer_layout_of_the_same_pairs_gives_the_same() -> None:
    leaves, coarse = problem(1, 45, 2, 8), replace(MIXED, heads=1, kv_heads=1).layout()
    fine = BlockLayout.from_dense(coarse.to_dense(), block_size=(4, 2))
    for is_causal in (False, True):
        both = (block_sparse_attention(*leaves, layout, is_causal=is_causal) for layout in (coarse, fine))
        assert_same_attention(*both, leaves)


def test_blocks_after_the_diagonal_do_not_matter_where_it_is_causal() -> None:
    leaves, layout = problem(1, 45, 2, 8), replace(MIXED, kinds=("random", "global"), block_size=(8, 5)).layout()
    both = (block_sparse_attention(*leaves, each, is_causal=True) for each in (layout, layout.causal()))
    assert_same_attention(*both, leaves)


def test_a_bias_of_zero_is_none_and_an_equal_one_moves_the_lse_alone() -> None:
    leaves, layout = problem(1, 45, 2, 8), replace(MIXED, has_bias=True).layout()
    out, lse = with_lse(*leaves, layout=layout)
    for level in (0.0, 3.0):
        moved, moved_lse = with_lse(*leaves, layout=layout, block_bias=torch.full((layout.live,), level, dtype=F64))
        assert_same_attention(moved, out, leaves)
        assert deviation(moved_lse.detach(), lse.detach() + level) <= 1e-13


def test_key_heads_shared_by_all_layouts_equal_key_heads_repeated() -> None:
    query, key, value = problem(2, 45, 6, 8)
    key, value = (tensor.detach()[:, :, :2].requires_grad_() for tensor in (key, value))
    layout = replace(MIXED, heads=6, share="query").layout()
    for is_causal in (False, True):
        shared = block_sparse_attention(query, key, value, layout, enable_gqa=True, is_causal=is_causal)
        repeated = (tensor.repeat_interleave(3, 2) for tensor in (key, value))
        own = block_sparse_attention(query, *repeated, layout, is_causal=is_causal)
        assert_same_attention(shared, own, [query, key, value])


def test_autocast_casts_as_sdpa_does() -> None:
    query, key, value = (leaf.detach() for leaf in problem(1, 45, 4, 8, dtype=F32))
    layout = MIXED.layout()
    with torch.autocast("cpu", BF16):
        out = block_sparse_attention(query, key, value, layout)
        mixed = block_sparse_attention(query, key.bfloat16(), value, layout)
        assert block_sparse_attention(query.double(), key.double(), value.double(), layout).dtype == F64
    assert out.dtype == mixed.dtype == BF16
    assert torch.equal(out, mixed)
    assert torch.equal(out, block_sparse_attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), layout))


def test_nothing_is_returned_beside_out_that_was_not_asked_for() -> None:
    query, key, value = problem(1, 45, 4, 8)
    out, aux = block_sparse_attention(query, key, value, MIXED.layout(), return_aux=AuxRequest())
    assert aux.lse is None
    assert torch.equal(out, block_sparse_attention(query, key, value, MIXED.layout()))


def test_inputs_are_not_written_to() -> None:
    for case in (MIXED, replace(MIXED, scale=0.0, has_bias=True), replace(MIXED, scale=-0.3, storage="packed")):
        tensors = case.problem(F64)
        before = [tensor.clone() for tensor in tensors]
        bias = tensors[3] if case.has_bias else None
        block_sparse_attention(*tensors[:3], case.layout(), **case.options(), block_bias=bias, enable_gqa=True)
        for tensor, was in zip(tensors, before, strict=True):
            assert torch.equal(tensor.nan_to_num(), was.nan_to_num())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_large_bias_counts_whole_in_half_precision(dtype: torch.dtype) -> None:
    """Divided by the scale it has more digits than the dtype: what rounding loses would change weights by a tenth."""
    layout = MIXED.layout()
    tensors = [torch.randn(1, 45, 2, 8).to(dtype) for _ in range(3)]
    bias = (64.0 + torch.randn(layout.live)).to(dtype)
    out = block_sparse_attention(*tensors, layout, block_bias=bias)
    exact = reference.block_sparse_attention(*(each.double() for each in tensors), layout, block_bias=bias.double()).out
    assert deviation(out, exact) <= 2e-2
