"""Packed sequences: one call equals a call for each sequence, bit for bit, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from core_cases import MASKS, Case, Results, assert_close, cases, oracle, packed, run
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_core import AuxRequest, DilatedAttention, MultiheadDilatedAttention, dilated_attention
from dilated_core.plan import SEMANTICS

# Longer and shorter than segments, a single token, and empty ones at both ends and in between.
LENGTHS = [0, 23, 1, 0, 8, 0]
CASE = Case(1, 1, 4, 8, (8, 20), (1, 3))


def separately(case: Case, dtype: torch.dtype, **options: object) -> Results:
    """Call with one sequence after the other; results joined in the order of the packed call."""
    *qkv, cotangent = case.problem(dtype)
    lse_cotangent, real = case.lse_cotangent(), case.key_padding_mask()
    every: list[list[torch.Tensor]] = []
    for start, stop in pairwise(case.cu_seqlens().tolist()):
        leaves = [tensor[:, start:stop].detach().requires_grad_() for tensor in qkv]
        arguments = {**case.options(), "cu_seqlens": None, "return_aux": AuxRequest(lse=True), **options}
        arguments["key_padding_mask"] = None if real is None else real[:, start:stop]
        out, aux = dilated_attention(*leaves, *case.pattern, **arguments)
        reached = lse_cotangent[:, :, start:stop].to(aux.lse).masked_fill(aux.lse == -torch.inf, 0.0)
        gradients = torch.autograd.grad([out, aux.lse], leaves, [cotangent[:, start:stop], reached])
        every.append([out, aux.lse, *gradients])
    return Results(*(torch.cat(parts, 2 if index == 1 else 1) for index, parts in enumerate(zip(*every, strict=True))))


def assert_packing_changes_nothing(case: Case, dtype: torch.dtype, **options: object) -> None:
    together, alone = run(case, dtype, with_lse=True, **options), separately(case, dtype, **options)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(together, name), getattr(alone, name)), f"{name} of {case}"


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [None, 2], ids=["own-keys", "shared-keys"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_packed_is_separate(
    semantics: str, kv_heads: int | None, mask: str, is_causal: bool, dtype: torch.dtype, fused: bool
) -> None:
    case = replace(CASE, semantics=semantics, kv_heads=kv_heads, mask=mask, is_causal=is_causal)
    assert_packing_changes_nothing(packed(case, LENGTHS), dtype, fused=fused)


@settings(max_examples=25)
@given(case=cases(options=True), lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))
def test_any_packing(case: Case, lengths: list[int]) -> None:
    """Equal to the separate calls, and to the definition applied to each sequence."""
    case = packed(case, lengths)
    assert_packing_changes_nothing(case, torch.float64)
    expected = oracle(case, torch.float64, with_lse=True)
    assert_close(case, torch.float64, run(case, torch.float64, with_lse=True), expected)


def test_int32_and_int64_offsets() -> None:
    case = packed(CASE, LENGTHS)
    query, key, value, _ = case.problem(torch.float32)
    options = {dtype: {"cu_seqlens": case.cu_seqlens(dtype)} for dtype in (torch.int32, torch.int64)}
    results = [dilated_attention(query, key, value, *case.pattern, **each) for each in options.values()]
    assert torch.equal(*results)


def test_one_sequence_packed_is_that_sequence() -> None:
    case = replace(CASE, seq=53, mask="random")
    alone, together = run(case, torch.float32), run(replace(case, packed=(53,)), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(alone.each(), together.each(), strict=True))


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_no_tokens(offsets: list[int], fused: bool) -> None:
    empty = torch.zeros(1, 0, 4, 8, requires_grad=True)
    out = dilated_attention(empty, empty, empty, [2], [1], cu_seqlens=torch.tensor(offsets), fused=fused)
    assert out.shape == empty.shape
    assert torch.autograd.grad(out, empty, out)[0].shape == empty.shape


def test_modules_take_packed_sequences() -> None:
    case = packed(CASE, LENGTHS)
    query, key, value, _ = case.problem(torch.float32)
    attended = DilatedAttention(*case.pattern)(query, key, value, cu_seqlens=case.cu_seqlens())
    assert torch.equal(attended, run(case, torch.float32).out)

    module, sequence = MultiheadDilatedAttention(16, 4, *case.pattern, is_causal=True), torch.randn(1, case.seq, 16)
    alone = [module(part)[0] for part in sequence.split(case.packed, 1)]
    torch.testing.assert_close(module(sequence, cu_seqlens=case.cu_seqlens())[0], torch.cat(alone, 1))


FAULTS = {
    "falling": [0, 5, 3, 9],
    "end too early": [0, 5, 8],
    "end too late": [0, 5, 10],
    "start after 0": [1, 9],
    "negative": [0, -1, 9],
    "start only": [0],
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("offsets", FAULTS.values(), ids=FAULTS)
def test_offsets_that_do_not_fit(offsets: list[int], fused: bool) -> None:
    x = torch.zeros(1, 9, 2, 4)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected offsets that rise from 0 to the 9 tokens, got \["):
        dilated_attention(x, x, x, [4], [1], cu_seqlens=torch.tensor(offsets), fused=fused)


def test_many_offsets_are_shown_by_their_ends() -> None:
    x = torch.zeros(1, 9, 2, 4)
    with pytest.raises(ValueError, match=r"got \[10, 9, 8, 7, '...', 3, 2, 1\]"):
        dilated_attention(x, x, x, [4], [1], cu_seqlens=torch.arange(10, 0, -1))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_a_call_without_tokens_checks_its_offsets_too(fused: bool) -> None:
    x = torch.zeros(1, 0, 2, 4)
    with pytest.raises(ValueError, match=r"rise from 0 to the 0 tokens, got \[0, 9\]"):
        dilated_attention(x, x, x, [4], [1], cu_seqlens=torch.tensor([0, 9]), fused=fused)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_torchscale_refuses_what_one_sequence_would(fused: bool) -> None:
    """Segments of 9 at rate 2: placed where one holds the sequence, refused where the second sequence needs two."""
    x = torch.zeros(1, 20, 2, 4)
    options = {"semantics": "torchscale", "fused": fused}
    dilated_attention(x, x, x, [9], [2], cu_seqlens=torch.tensor([0, 9, 13, 20]), **options)
    with pytest.raises(ValueError, match="multiple of dilation_rates"):
        dilated_attention(x, x, x, [9], [2], cu_seqlens=torch.tensor([0, 9, 20]), **options)
