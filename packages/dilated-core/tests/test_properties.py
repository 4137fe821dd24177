"""What must hold of any attention of this kind, checked without the oracle."""

from __future__ import annotations

import torch
from core_cases import Case, cases
from hypothesis import given, settings
from torch import Tensor

from dilated_core import dilated_attention
from dilated_core.plan import make_tiles


def reach(case: Case) -> Tensor:
    """(heads, query position, key position), bool: who may see whom, walked tile by tile through the plan."""
    seen = torch.zeros(case.heads, case.seq, case.seq, dtype=torch.bool)
    for tile in make_tiles(case.segment_lengths, case.dilation_rates, case.seq, case.heads):
        for segment in range(tile.segments):
            for group in range(tile.groups):
                for phase in range(tile.phases):
                    head = tile.first_head + group * tile.rate + phase
                    first = tile.start + segment * tile.segment_length + phase
                    rows = torch.arange(tile.rows) * tile.rate + first
                    seen[head, rows[:, None], rows[None, :]] = True
    if case.is_causal:
        seen &= torch.ones(case.seq, case.seq, dtype=torch.bool).tril()
    return seen


@settings(max_examples=60)
@given(case=cases())
def test_values_of_one_give_exactly_one(case: Case) -> None:
    """Weights sum to 1 in every row that has a key; a row without one gives 0."""
    query, key = case.tensors(2, torch.float64)
    out = dilated_attention(
        query, key, torch.ones_like(key), case.segment_lengths, case.dilation_rates, is_causal=case.is_causal
    )
    expected = reach(case).any(-1).T[None, :, :, None].expand_as(out).double()
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-15)


@settings(max_examples=40)
@given(case=cases())
def test_a_changed_token_changes_only_what_may_see_it(case: Case) -> None:
    """Change one token's key and value: bit for bit, only the rows that may see it move."""
    query, key, value, other = case.tensors(4, torch.float64)
    token = case.seed % case.seq
    options = {"is_causal": case.is_causal}
    before = dilated_attention(query, key, value, case.segment_lengths, case.dilation_rates, **options)
    key, value = key.clone(), value.clone()
    key[:, token], value[:, token] = other[:, token], other[:, token] + 3.0
    after = dilated_attention(query, key, value, case.segment_lengths, case.dilation_rates, **options)
    changed = (before != after).any(-1).any(0)  # (seq, heads)
    assert torch.equal(changed.T, reach(case)[:, :, token])


@settings(max_examples=40)
@given(case=cases())
def test_causal_never_looks_ahead(case: Case) -> None:
    """Rows before a token are bit for bit the same whatever comes at and after it."""
    tensors, others = case.tensors(3, torch.float32), case.tensors(6, torch.float32)[3:]
    token = case.seed % case.seq
    before = dilated_attention(*tensors, case.segment_lengths, case.dilation_rates, is_causal=True)
    for tensor, other in zip(tensors, others, strict=True):
        tensor[:, token:] = other[:, token:]
    after = dilated_attention(*tensors, case.segment_lengths, case.dilation_rates, is_causal=True)
    assert torch.equal(before[:, :token], after[:, :token])


def test_deterministic() -> None:
    """The same inputs give the same bits, forward and backward."""
    case = Case(2, 301, 4, 16, (32, 128, 400), (1, 3, 5))
    results = []
    for _ in range(2):
        *leaves, cotangent = case.tensors(4, torch.float32)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = dilated_attention(*leaves, case.segment_lengths, case.dilation_rates)
        results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_grouped_heads_equal_repeated_heads() -> None:
    case = Case(2, 53, 6, 8, (8, 32), (1, 3), is_causal=True)
    query, cotangent = case.tensors(2, torch.float64)
    key, value = (tensor[:, :, :2].clone().requires_grad_() for tensor in case.tensors(4, torch.float64)[2:])
    pattern = (case.segment_lengths, case.dilation_rates)
    grouped = dilated_attention(query, key, value, *pattern, is_causal=True, enable_gqa=True)
    repeated = dilated_attention(
        query, *(tensor.repeat_interleave(3, dim=2) for tensor in (key, value)), *pattern, is_causal=True
    )
    assert torch.equal(grouped, repeated)
    for a, b in zip(*(torch.autograd.grad(out, (key, value), cotangent) for out in (grouped, repeated)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
