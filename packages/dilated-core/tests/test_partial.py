"""attend and merge: partials of key sets joined in any grouping equal one softmax over all, with gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_core import Partial, attend, merge
from dilated_core.partial import merge_in_place


@settings(max_examples=60)
@given(
    cuts=st.lists(st.integers(0, 17), max_size=4).map(sorted),
    rows=st.integers(1, 7),
    kernel=st.sampled_from(["auto", "math"]),
    seed=st.integers(0, 999),
)
def test_merged_parts_equal_the_whole(cuts: list[int], rows: int, kernel: str, seed: int) -> None:
    """Cut the keys anywhere (empty parts too): out, lse and all gradients are those of one softmax."""
    torch.manual_seed(seed)
    query = torch.randn(2, rows, 3, 8, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 17, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    whole = attend(query, key, value, kernel="math")
    bounds = [0, *cuts, 17]
    parts = [attend(query, key[:, a:b], value[:, a:b], kernel=kernel) for a, b in itertools.pairwise(bounds)]
    joined = merge(*parts)
    cotangents = [torch.randn_like(tensor) for tensor in whole]
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(list(p), (query, key, value), cotangents) for p in (joined, whole)]
    for name, a, b in zip(("dq", "dk", "dv"), *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=name)


def test_attend_gradcheck() -> None:
    tensors = [torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *qkv: tuple(attend(*qkv, is_causal=True)), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lse_gradient_keeps_its_precision_in_half(dtype: torch.dtype) -> None:
    """The lse's cotangent passes through tensors of the inputs' dtype; it is split so that little is lost."""
    query, key, value = (torch.randn(1, 33, 2, 16).to(dtype).requires_grad_() for _ in range(3))
    cotangent = 100 * torch.randn(1, 2, 33)
    lse = attend(query, key, value).lse
    assert lse.dtype == torch.float32
    ours = torch.autograd.grad(lse, (query, key), cotangent)
    doubles = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    exact = torch.autograd.grad(attend(*doubles, kernel="math").lse, doubles[:2], cotangent.double())
    tolerance = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5
    for a, b in zip(ours, exact, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def test_no_key_at_all() -> None:
    query = torch.randn(1, 3, 2, 4, requires_grad=True)
    nothing = torch.empty(1, 0, 2, 4)
    out, lse = merge(*[attend(query, nothing, nothing)] * 2)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))
    (gradient,) = torch.autograd.grad(out, query, torch.randn_like(out))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_merge_counts_a_key_as_often_as_it_comes() -> None:
    """The same partial m times changes no output and adds log m to the lse."""
    part = attend(*torch.randn(3, 1, 5, 2, 8, dtype=torch.float64).unbind())
    joined = merge(part, part, part)
    torch.testing.assert_close(joined.out, part.out, rtol=0, atol=1e-15)
    torch.testing.assert_close(joined.lse, part.lse + math.log(3))


def test_merge_survives_extreme_lse() -> None:
    big = Partial(torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), 1e4))
    small = Partial(torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -1e4))
    out, lse = merge(small, big)
    assert torch.equal(out, torch.ones_like(out))
    assert lse.item() == 1e4


@pytest.mark.parametrize(("old", "new"), [(-math.inf, -math.inf), (-math.inf, 1.0), (2.0, -math.inf), (2.0, 3.0)])
def test_merge_in_place_is_merge(old: float, new: float) -> None:
    first = Partial(torch.randn(1, 1, 1, 4), torch.tensor(old).view(1, 1, 1))
    second = Partial(torch.randn(1, 1, 1, 4), torch.tensor(new).view(1, 1, 1))
    if old == -math.inf:
        first = Partial(torch.zeros_like(first.out), first.lse)
    expected = merge(first, second)
    out, lse = first.out.clone(), first.lse.clone()
    merge_in_place(out, lse, second.out, second.lse)
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(lse, expected.lse)


GOOD = Partial(torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3))
BAD_MERGES = {
    "nothing": ([], ValueError, "partials: expected at least one"),
    "a tuple": ([tuple(GOOD)], TypeError, r"partials\[0\]: expected a Partial, got tuple"),
    "three dims": ([Partial(GOOD.out[0], GOOD.lse)], ValueError, r"partials\[0\].out: expected 4 dimensions"),
    "lse layout": (
        [Partial(GOOD.out, torch.zeros(2, 3, 4))],
        ValueError,
        r"partials\[0\].lse: expected shape",
    ),
    "shapes": (
        [GOOD, Partial(torch.zeros(2, 3, 4, 9), GOOD.lse)],
        ValueError,
        r"partials\[1\].out: expected the shape",
    ),
    "dtypes": (
        [GOOD, Partial(GOOD.out.double(), GOOD.lse)],
        TypeError,
        r"partials\[1\].out: expected the dtype",
    ),
}


@pytest.mark.parametrize(("partials", "error", "message"), BAD_MERGES.values(), ids=BAD_MERGES)
def test_merge_errors(partials: list[Partial], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        merge(*partials)
