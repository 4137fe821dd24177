"""Rotary and XPOS positions: what a score may depend on, at which lengths and in which dtypes."""

from __future__ import annotations

import cmath
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dilated_factory.models import RotaryPositions, XPOSPositions
from dilated_factory.models.positions import create_positions

HEAD_DIM = 8


def scores_of_one_pair(positions: RotaryPositions, length: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Scores (length, length) when every row holds the same random query and the same random key."""
    generator = torch.Generator().manual_seed(length)
    query, key = torch.randn(2, 1, 1, 1, positions.head_dim, dtype=dtype, generator=generator)
    query, key = positions(*(row.expand(1, length, 1, -1) for row in (query, key)))
    return torch.einsum("nd,md->nm", query[0, :, 0], key[0, :, 0])


@pytest.mark.parametrize("positions", [RotaryPositions(HEAD_DIM), XPOSPositions(HEAD_DIM)], ids=["rotary", "xpos"])
@pytest.mark.parametrize("length", [1, 2, 61, 700])
def test_scores_depend_on_the_distance_only(positions: RotaryPositions, length: int) -> None:
    scores = scores_of_one_pair(positions, length)
    for distance in {0, 1, length // 2, length - 1} - {length}:
        along = scores.diagonal(-distance)
        assert torch.allclose(along, along[0].expand_as(along), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("positions", [RotaryPositions(HEAD_DIM), XPOSPositions(HEAD_DIM)], ids=["rotary", "xpos"])
def test_parts_score_as_the_whole(positions: RotaryPositions, dtype: torch.dtype) -> None:
    """A prompt, single tokens, a chunk: each with its start."""
    query, key = torch.randn(2, 1, 301, 1, HEAD_DIM, dtype=dtype)
    cuts = [0, 200, 201, 202, 301]
    parts = [positions(query[:, a:b], key[:, a:b], start=a) for a, b in pairwise(cuts)]
    whole, joined = positions(query, key), [torch.cat(side, dim=1) for side in zip(*parts, strict=True)]
    scores, expected = (torch.einsum("bnhd,bmhd->nm", *pair).tril() for pair in (joined, whole))
    # float64 reaches factors of e^355, which its exponents round to 355 eps.
    assert torch.allclose(scores, expected, rtol=0, atol={torch.float64: 1e-11, torch.float32: 1e-5}[dtype])


def test_xpos_parts_may_reach_the_longest_and_no_further() -> None:
    positions, rows = XPOSPositions(2), torch.ones(1, 1, 1, 2)
    longest = positions.longest(torch.float32)
    for start in (0, longest - 1):
        query, key = positions(rows, rows, start=start)
        assert torch.isclose((query.double() * key.double()).sum(), torch.tensor(2.0, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"{longest + 1} tokens are too many"):
        positions(rows, rows, start=longest)


def test_rotary_is_a_complex_phase() -> None:
    positions = RotaryPositions(HEAD_DIM)
    rows = torch.randn(1, 5, 1, HEAD_DIM, dtype=torch.float64)
    turned, _ = positions(rows, rows)
    for n in range(5):
        for j in range(HEAD_DIM // 2):
            phase = cmath.exp(1j * n * 10000.0 ** (-2 * j / HEAD_DIM))
            expected = complex(*rows[0, n, 0, 2 * j : 2 * j + 2].tolist()) * phase
            assert cmath.isclose(complex(*turned[0, n, 0, 2 * j : 2 * j + 2].tolist()), expected, rel_tol=1e-12)


def test_xpos_multiplies_a_pair_by_zeta_to_the_distance() -> None:
    length, distance = 900, 700
    rotary, xpos = RotaryPositions(2), XPOSPositions(2)  # one pair of channels: zeta = 0.4 / 1.4
    plain, decayed = (scores_of_one_pair(positions, length)[distance, 0] for positions in (rotary, xpos))
    assert torch.isclose(decayed / plain, torch.tensor((0.4 / 1.4) ** (distance / 512), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_that_of_the_dtype_even_far_out(dtype: torch.dtype) -> None:
    """Angles computed in the rows' own dtype would be off by whole turns here."""
    length = 4096
    rows = torch.randn(1, length, 1, HEAD_DIM, dtype=torch.float64).to(dtype)
    for positions in (RotaryPositions(HEAD_DIM), XPOSPositions(HEAD_DIM)):
        exact, _ = positions(rows.double(), rows.double())
        turned, _ = positions(rows, rows)
        error = (turned.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert turned.dtype == dtype
        assert error.max() < 4 * torch.finfo(dtype).eps


def test_float32_angles_hold_at_a_million_tokens() -> None:
    length = 1_000_003
    rows = torch.ones(1, length, 1, 2)
    turned, _ = RotaryPositions(2)(rows, rows)
    last = length - 1
    assert math.isclose(turned[0, last, 0, 0].item(), math.cos(last) - math.sin(last), abs_tol=1e-6)


def test_autocast_changes_nothing() -> None:
    rows = torch.randn(1, 50, 2, HEAD_DIM)
    for positions in (RotaryPositions(HEAD_DIM), XPOSPositions(HEAD_DIM)):
        expected = positions(rows, rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = positions(rows, rows)
        assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_xpos_is_finite_at_its_longest_and_refuses_one_token_more(dtype: torch.dtype) -> None:
    positions = XPOSPositions(2)
    longest = positions.longest(dtype)
    assert longest == {torch.float16: 4532, torch.bfloat16: 36259, torch.float32: 36260}[dtype]
    rows = torch.ones(1, longest, 1, 2, dtype=dtype)
    query, key = positions(rows, rows)
    assert query.isfinite().all()
    assert key.isfinite().all()
    assert (query[0, [0, -1], 0].double() * key[0, [0, -1], 0].double()).sum(-1).sub(2).abs().max() < 0.1
    with pytest.raises(ValueError, match=f"{longest + 1} tokens are too many.*scale_base=513") as caught:
        positions(torch.ones(1, longest + 1, 1, 2, dtype=dtype), torch.ones(1, longest + 1, 1, 2, dtype=dtype))
    assert "rotary" in str(caught.value)
    wider = XPOSPositions(2, scale_base=513)
    wider(torch.ones(1, longest + 1, 1, 2, dtype=dtype), torch.ones(1, longest + 1, 1, 2, dtype=dtype))


def test_positions_hold_no_state_and_compile_whole() -> None:
    for positions in (RotaryPositions(HEAD_DIM), XPOSPositions(HEAD_DIM)):
        assert not positions.state_dict()
        assert not list(positions.parameters())
        rows = torch.randn(1, 33, 2, HEAD_DIM, dtype=torch.float64)
        compiled = torch.compile(positions, fullgraph=True, backend="aot_eager")
        for expected, found in zip(positions(rows, rows), compiled(rows, rows), strict=True):
            assert torch.allclose(expected, found, rtol=1e-14, atol=1e-14)


def test_gradient_is_the_turn_undone() -> None:
    query, key = torch.randn(2, 1, 7, 2, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(XPOSPositions(HEAD_DIM), (query, key))


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: RotaryPositions(7), "head_dim: expected a positive even number.*got 7"),
        (lambda: RotaryPositions(0), "head_dim: expected a positive even number.*got 0"),
        (lambda: RotaryPositions(8, base=1.0), "base: expected a number above 1, got 1.0"),
        (lambda: XPOSPositions(8, scale_base=0), "scale_base: expected a positive distance in tokens, got 0"),
        (lambda: create_positions("alibi", 8), "positions: expected one of 'xpos', 'rotary', 'none', got 'alibi'"),
        (lambda: RotaryPositions(8)(torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)), r"query: expected .*got \(1, 3, 8\)"),
        (lambda: RotaryPositions(8)(torch.zeros(1, 3, 1, 8), torch.zeros(1, 3, 1, 4)), r"key: expected .*head_dim=8"),
        (lambda: RotaryPositions(8)(torch.zeros(1, 3, 1, 8), torch.zeros(1, 4, 1, 8)), "key: .*seq 3, got seq 4"),
        (lambda: RotaryPositions(8)(*torch.zeros(2, 1, 3, 1, 8), start=-1), "start: expected a position.*got -1"),
    ],
)
def test_errors_name_the_argument(create: object, message: str) -> None:
    assert callable(create)
    with pytest.raises(ValueError, match=message):
        create()
