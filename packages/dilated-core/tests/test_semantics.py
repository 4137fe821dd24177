"""torchscale and grouped against formulas written out here, sharing nothing with the package or its oracle."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_cases import (
    FORWARD_TOLERANCE,
    GRADIENT_TOLERANCE,
    MIXED_CASES,
    PATHS,
    Case,
    assert_close,
    cases,
    deviation,
    oracle,
    run,
)
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import pad

from dilated_core import DilatedAttention, dilated_attention, reference

NOWHERE = -1e8  # what torchscale writes as the lse of places that a branch does not compute


def torchscale(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    """What microsoft/torchscale's DilatedAttention computes, step by step: pad, gather, attend, scatter, mix.

    Every row of the padded tensors is attended, zeros among them.
    """
    batch, seq, heads, head_dim = query.shape
    outs, lses = [], []
    for length, rate in zip(*case.pattern, strict=True):
        length = min(length, seq)
        to_segments, to_rate = -seq % length, -length % rate
        segments = (seq + to_segments) // length
        block = math.ceil(heads / rate)  # heads that share a phase

        def gather(x: Tensor) -> Tensor:
            """(batch, seq, heads, head_dim) -> (batch, segments, rows, heads, head_dim): each head's own grid."""
            x = pad(x, (0, 0, 0, 0, 0, to_segments)).unflatten(1, (segments, length))  # noqa: B023
            x = pad(x, (0, 0, 0, 0, 0, to_rate))  # noqa: B023
            phases = [x[:, :, head // block :: rate, head] for head in range(heads)]  # noqa: B023
            return torch.stack(phases, 3)

        q, k, v = gather(query), gather(key), gather(value)
        scores = torch.einsum("bsqhd,bskhd->bshqk", q, k) / math.sqrt(head_dim)
        if case.is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        lse = torch.logsumexp(scores, -1)
        attended = torch.einsum("bshqk,bskhd->bsqhd", torch.exp(scores - lse.unsqueeze(-1)), v)

        out = query.new_zeros(batch, segments, length + to_rate, heads, head_dim)
        out_lse = query.new_full((batch, segments, length + to_rate, heads), NOWHERE)
        for head in range(heads):
            out[:, :, head // block :: rate, head] = attended[:, :, :, head]
            out_lse[:, :, head // block :: rate, head] = lse[:, :, head]
        outs.append(out[:, :, :length].flatten(1, 2)[:, :seq])
        lses.append(out_lse[:, :, :length].flatten(1, 2)[:, :seq])
    with torch.no_grad():
        weights = torch.softmax(torch.stack(lses), 0)
    return (weights.unsqueeze(-1) * torch.stack(outs)).sum(0)


def assert_equals(formula: Tensor, case: Case, leaves: list[Tensor], cotangent: Tensor, **options: object) -> None:
    ours = dilated_attention(*leaves, *case.pattern, is_causal=case.is_causal, semantics=case.semantics, **options)
    assert deviation(ours, formula) <= FORWARD_TOLERANCE[torch.float64], f"out of {case}"
    gradients = (torch.autograd.grad(out, leaves, cotangent, retain_graph=True) for out in (ours, formula))
    for name, got, expected in zip(("dq", "dk", "dv"), *gradients, strict=True):
        assert deviation(got, expected, floor=1.0) <= GRADIENT_TOLERANCE[torch.float64], f"{name} of {case}"


def assert_is_torchscale(case: Case) -> None:
    *qkv, cotangent = case.problem(torch.float64)
    leaves = [leaf.requires_grad_() for leaf in qkv]
    for options in PATHS.values():
        assert_equals(torchscale(*leaves, case), case, leaves, cotangent, **options)


@settings(max_examples=60)
@given(case=cases())
def test_torchscale_is_torchscale(case: Case) -> None:
    """Forward and gradients, the zero keys of both paddings, causal or not, and weights that take no gradient."""
    assert_is_torchscale(case.meaning("torchscale"))


TORCHSCALE_CASES = [
    Case(1, 21, 4, 8, (8,), (2,)),  # a last segment filled up with zero rows
    Case(2, 21, 4, 8, (64,), (4,)),  # one segment, filled up to the rate
    Case(1, 3, 4, 8, (8,), (8,)),  # phases that have no real row
    Case(1, 40, 3, 8, (8, 16, 64), (1, 2, 4)),  # fewer heads than phases
    Case(1, 33, 16, 4, (8, 16), (2, 4)),  # more heads than phases
    Case(1, 33, 5, 4, (8, 16), (2, 4)),  # blocks of heads that do not come out even
]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", TORCHSCALE_CASES, ids=str)
def test_torchscale_in_its_corners(case: Case, is_causal: bool) -> None:
    assert_is_torchscale(replace(case, is_causal=is_causal, semantics="torchscale"))


def test_the_oracle_is_torchscale() -> None:
    for case in TORCHSCALE_CASES:
        query, key, value, _ = case.problem(torch.float64)
        ours, _ = reference.dilated_attention(query, key, value, *case.pattern, semantics="torchscale")
        assert deviation(ours, torchscale(query, key, value, case)) <= FORWARD_TOLERANCE[torch.float64]


def test_the_mixture_takes_no_gradient() -> None:
    """The paper's gradient flows through the weights of the mixture, torchscale's does not: they differ.

    One head starts at 0 in both, and 16 tokens need no padding, so the outputs are the same.
    """
    results = [
        run(Case(1, 16, 1, 8, (4, 16), (1, 4), semantics=name), torch.float64) for name in ("paper", "torchscale")
    ]
    assert deviation(results[0].out, results[1].out) <= FORWARD_TOLERANCE[torch.float64]
    assert deviation(results[0].dq, results[1].dq) > 1e-2


def test_shapes_that_torchscale_misplaces_are_refused() -> None:
    x = torch.zeros(1, 20, 2, 4)
    message = r"segment_lengths\[1\]: .*multiple of dilation_rates\[1\] = 4 .*got 10 for 20 tokens"
    for options in PATHS.values():
        for is_causal in (False, True):
            with pytest.raises(ValueError, match=message):
                dilated_attention(x, x, x, [4, 10], [2, 4], semantics="torchscale", is_causal=is_causal, **options)
    with pytest.raises(ValueError, match=message):
        DilatedAttention([4, 10], [2, 4], semantics="torchscale")(x, x, x)
    short = x[:, :10]  # one segment: nothing to misplace
    assert dilated_attention(short, short, short, [4, 10], [2, 4], semantics="torchscale").shape == short.shape


# ------------------------------------------------------------------------------------------------ grouped


def grouped(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    """Each group of heads runs its own branch, at the branch's own phase; what it does not reach is 0; then divided."""
    branches, seq, heads = len(case.segment_lengths), case.seq, case.heads
    sizes = [heads // branches + (branch < heads % branches) for branch in range(branches)]
    out, first = torch.zeros_like(query), 0
    for branch, (size, length, rate) in enumerate(zip(sizes, *case.pattern, strict=True)):
        mine = slice(first, first + size)
        for start in range(0, seq, length):
            rows = torch.tensor(range(start + branch % rate, min(start + length, seq), rate), dtype=torch.int64)
            q, k, v = (tensor[:, rows, mine] for tensor in (query, key, value))
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(query.shape[-1])
            if case.is_causal:
                scores = scores.masked_fill(rows > rows[:, None], -math.inf)
            out[:, rows, mine] = torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v)
        first += size
    return out / branches


@settings(max_examples=60)
@given(case=cases())
def test_grouped_is_each_group_alone(case: Case) -> None:
    case = replace(case, semantics="grouped")
    *qkv, cotangent = case.problem(torch.float64)
    leaves = [leaf.requires_grad_() for leaf in qkv]
    for options in PATHS.values():
        assert_equals(grouped(*leaves, case), case, leaves, cotangent, **options)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_grouped_sums(is_causal: bool) -> None:
    """Values of one give 1 / branches in every place on its group's grid and 0 in every other."""
    case = Case(2, 23, 5, 8, (4, 10, 23), (1, 2, 3), is_causal=is_causal, semantics="grouped")
    query, key, _, _ = case.problem(torch.float64)
    out = dilated_attention(query, key, torch.ones_like(key), *case.pattern, **case.options())
    position, expected = torch.arange(23), torch.zeros(23, 5, dtype=torch.float64)
    expected[:, [0, 1]] = 1 / 3  # five heads over three branches: 2, 2, 1
    expected[(position % 10) % 2 == 1, 2:4] = 1 / 3
    expected[position % 3 == 2, 4] = 1 / 3
    torch.testing.assert_close(out, expected[None, :, :, None].expand_as(out), rtol=0, atol=1e-15)


def test_fewer_heads_than_groups() -> None:
    """Branches beyond the heads have no one to run them; the division is by all branches nevertheless."""
    case = replace(MIXED_CASES[0], heads=2, semantics="grouped")
    for options in PATHS.values():
        assert_close(case, torch.float64, run(case, torch.float64, **options), oracle(case, torch.float64))


def test_one_branch_grouped_is_the_branch() -> None:
    query, key, value, _ = MIXED_CASES[0].problem(torch.float64)
    one = [dilated_attention(query, key, value, [8], [1], semantics=name) for name in ("paper", "grouped")]
    assert torch.equal(*one)
