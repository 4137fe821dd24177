"""Inputs that are no numbers, scores that are huge, and many threads: how far the damage goes, and that it is dense's.

Found by experiment on the CPU, for every kernel here and for SDPA's own. What is not finite in

- a query spoils that query's row alone;
- a key spoils the rows that may see it (SDPA's math kernel spoils all rows of a causal call, no kernel here does);
- a value spoils the rows that may see it and, causal, the earlier rows of the same tile too: kernels multiply the whole
  block, and a weight of 0 times NaN is NaN. Dense SDPA does the same.

Nothing ever leaves a tile: rows that share no segment and grid with a token keep their bits.

Damage may also be hidden. An infinite query or key may score -inf, and is then a key of weight 0. And PyTorch's flash
operator on the CPU takes a row that is all NaN, and shorter than a vector of the processor (8 scores in float64, 16 in
float32), for one with no key, and gives it 0 and lse 0: so does SDPA. The math kernel hides nothing.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch
from core_cases import PATHS, Case, assert_close, cases, deviation, oracle, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dilated_core import MultiheadDilatedAttention, dilated_attention, reference

NOT_FINITE = [torch.nan, torch.inf, -torch.inf]
PARTS = ("query", "key", "value")
causal_or_full = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
each_path = pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)


def spoiled(tensors: list[Tensor], part: str, token: int, number: float) -> list[Tensor]:
    """query, key and value, one token of one of them no number."""
    tensors = [tensor.clone() for tensor in tensors]
    tensors[PARTS.index(part)][:, token] = number
    return tensors


def merely_unseen(part: str, number: float) -> bool:
    """May this score -inf, and so be a key of weight 0 like any other that is not attended?"""
    return part != "value" and math.isinf(number)


def dense(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return scaled_dot_product_attention(*heads_first, is_causal=is_causal).transpose(1, 2)


@each_path
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@causal_or_full
@pytest.mark.parametrize("number", NOT_FINITE)
@pytest.mark.parametrize("part", PARTS)
def test_one_segment_is_spoiled_as_dense_attention_is(
    part: str, number: float, is_causal: bool, dtype: torch.dtype, options: dict[str, object]
) -> None:
    """The same rows, and beside them the same numbers."""
    token, case = 17, Case(2, 40, 3, 8, (40,), (1,))
    *qkv, _ = case.problem(dtype)
    qkv = spoiled(qkv, part, token, number)
    ours, theirs = dilated_attention(*qkv, *case.pattern, is_causal=is_causal, **options), dense(*qkv, is_causal)
    rows = torch.zeros(40, dtype=torch.bool)
    rows[{"query": slice(token, token + 1), "key": slice(token * is_causal, None), "value": slice(None)}[part]] = True
    lost = ~ours.isfinite().all(-1)
    assert not lost[:, ~rows].any()
    if not merely_unseen(part, number):
        assert lost[:, rows].all()
        assert torch.equal(lost, ~theirs.isfinite().all(-1))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours[:, ~rows], theirs[:, ~rows], rtol=0, atol=tolerance)


@settings(max_examples=60)
@given(case=cases(), part=st.sampled_from(PARTS), number=st.sampled_from(NOT_FINITE))
def test_only_rows_that_may_see_a_token_are_spoiled(case: Case, part: str, number: float) -> None:
    """Of several branches: no other row, bit for bit; and by the math kernel every such row."""
    *qkv, _ = case.problem(torch.float32)
    token = case.seed % case.seq
    seen, in_tile = (
        (reference.multiplicity(case.seq, case.heads, *case.pattern, is_causal=is_causal) > 0).transpose(0, 1)
        for is_causal in (case.is_causal, False)
    )  # (query, head, key)
    attends = torch.zeros(case.seq, case.heads, dtype=torch.bool)
    attends[token] = seen.any(-1)[token]
    must = attends if part == "query" else seen[:, :, token]
    may = in_tile[:, :, token] if part == "value" else must
    for options in PATHS.values():
        before = dilated_attention(*qkv, *case.pattern, is_causal=case.is_causal, **options)
        after = dilated_attention(
            *spoiled(qkv, part, token, number), *case.pattern, is_causal=case.is_causal, **options
        )
        rows = ~after.isfinite().all(-1)
        if options.get("kernel") == "math" and not merely_unseen(part, number):
            assert rows[:, must].all()
        assert not rows[:, ~may].any()
        assert torch.equal(before[:, ~may], after[:, ~may])


@settings(max_examples=40)
@given(case=cases(), part=st.sampled_from(PARTS), number=st.sampled_from(NOT_FINITE))
def test_gradients_are_spoiled_within_two_steps(case: Case, part: str, number: float) -> None:
    """A row spoils the gradients of the keys it shares a tile with, so a token those of its neighbours' neighbours."""
    *qkv, cotangent = case.problem(torch.float32)
    token = case.seed % case.seq
    near = (reference.multiplicity(case.seq, case.heads, *case.pattern) > 0).float()
    rows = near[:, :, token] > 0
    rows[:, token] = True
    keys = ((near.transpose(1, 2) @ rows.float().unsqueeze(-1)).squeeze(-1) > 0) | rows  # (head, key)
    for options in PATHS.values():
        leaves = [leaf.requires_grad_() for leaf in spoiled(qkv, part, token, number)]
        out = dilated_attention(*leaves, *case.pattern, is_causal=case.is_causal, **options)
        dq, dk, dv = torch.autograd.grad(out, leaves, cotangent)
        assert dq[:, ~rows.T].isfinite().all()
        assert dk[:, ~keys.T].isfinite().all()
        assert dv[:, ~keys.T].isfinite().all()


@each_path
@causal_or_full
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_scores(sign: float, is_causal: bool, options: dict[str, object]) -> None:
    """Scores beyond 1e4, which a softmax that forgot to shift turns into inf / inf; with a scale below 0 too."""
    case = Case(2, 45, 4, 8, (8, 20, 45), (1, 3, 2), is_causal=is_causal, scale=sign * 1e3)
    query, key, _, _ = case.problem(torch.float64)
    assert torch.einsum("bqhd,bkhd->bhqk", query, key).abs().max() * 1e3 > 1e4
    ours, exact = run(case, torch.float64, with_lse=True, **options), oracle(case, torch.float64, with_lse=True)
    for name in ("out", "lse", "dq", "dk", "dv"):
        # Scores are right to 16 digits, so weights, their exponentials, to 16 - 4.
        assert deviation(getattr(ours, name), getattr(exact, name)) < 1e-10, name
    for name, result in vars(run(case, torch.bfloat16, **options)).items():
        assert result.isfinite().all(), name


@each_path
@causal_or_full
@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scale_of_zero_and_below(dtype: torch.dtype, scale: float, is_causal: bool, options: dict[str, object]) -> None:
    """SDPA's causal kernel on the CPU masks with -inf before it scales, and gives NaN for these."""
    case = Case(2, 45, 4, 8, (8, 20, 45), (1, 3, 2), is_causal=is_causal, scale=scale, mask="random", kv_heads=2)
    for problem in (case, replace(case, mask="none")):
        expected = oracle(problem, dtype, with_lse=True)
        assert_close(problem, dtype, run(problem, dtype, with_lse=True, **options), expected)


@causal_or_full
def test_huge_scores_are_dense_attention(is_causal: bool) -> None:
    """One segment in float32, beside SDPA: both are right to the three digits that float32 leaves of such weights."""
    case = Case(2, 45, 4, 8, (45,), (1,), is_causal=is_causal)
    query, key, value, _ = case.problem(torch.float32)
    query = query * 3e3
    exact = dense(query.double(), key.double(), value.double(), is_causal)
    assert deviation(dense(query, key, value, is_causal), exact) < 1e-2
    for options in PATHS.values():
        assert (
            deviation(dilated_attention(query, key, value, *case.pattern, is_causal=is_causal, **options), exact) < 1e-2
        )


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"semantics": "torchscale"}, {"is_causal": True}], ids=str)
def test_threads_give_the_bits_of_one(options: dict[str, object]) -> None:
    """One module in eight threads at once, forward and backward."""
    module = MultiheadDilatedAttention(32, 4, [8, 32], [1, 4], kv_heads=2, **options)  # type: ignore[arg-type]
    sequences, cotangents = torch.randn(2, 8, 2, 67, 32).unbind()
    padding = torch.rand(8, 2, 67) < 0.2

    def results(number: int, barrier: Barrier | None = None) -> list[Tensor]:
        if barrier is not None:
            barrier.wait(timeout=300)
        leaf = sequences[number].clone().requires_grad_()
        out, _ = module(leaf, key_padding_mask=padding[number])
        return [out, *torch.autograd.grad(out, [leaf, *module.parameters()], cotangents[number])]

    # Alone in a thread of its own too: how many processors a thread works with is its own setting.
    with ThreadPoolExecutor(1) as alone:
        expected = list(alone.map(results, range(8)))
    for _ in range(3):
        barrier = Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda number: results(number, barrier), range(8)))  # noqa: B023
        for ours, theirs in zip(together, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@each_path
def test_deterministic(options: dict[str, object]) -> None:
    """The same inputs give the same bits, forward and backward, on several processors too."""
    case = replace(Case(2, 301, 4, 16, (32, 128, 400), (1, 3, 5)), kv_heads=2, mask="random")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = (run(case, torch.float32, with_lse=True, **options) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first.each(), second.each(), strict=True))


def test_a_query_that_is_no_number_beside_a_single_key() -> None:
    """What the flash operator hides, as SDPA on it does; where this fails, PyTorch has changed, for the better."""
    query, key, value = spoiled([*torch.randn(3, 1, 1, 2, 8)], "query", 0, torch.nan)
    assert dense(query, key, value, False).isfinite().all()
    assert dilated_attention(query, key, value, [8], [1], kernel="cpu_flash").isfinite().all()
    assert dilated_attention(query, key, value, [8], [1], kernel="math").isnan().all()
