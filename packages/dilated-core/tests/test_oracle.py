"""Every path against the float64 oracle: out, dq, dk and dv apart, under random cotangents."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core_cases import CASES, Case, assert_close, cases, deviation, oracle, run
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dilated_core import reference

PATHS = {
    "fused": {},
    "fused-math": {"kernel": "math"},
    "composed": {"fused": False},
    "composed-math": {"fused": False, "kernel": "math"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case: Case, is_causal: bool, options: dict[str, object], dtype: torch.dtype) -> None:
    case = replace(case, is_causal=is_causal)
    assert_close(case, dtype, run(case, dtype, **options), oracle(case, dtype))


@settings(max_examples=150)
@given(case=cases())
def test_any_shape_and_pattern_float64(case: Case) -> None:
    assert_close(case, torch.float64, run(case, torch.float64), oracle(case, torch.float64))


@settings(max_examples=80)
@given(case=cases())
def test_any_shape_and_pattern_float32(case: Case) -> None:
    assert_close(case, torch.float32, run(case, torch.float32), oracle(case, torch.float32))


@settings(max_examples=60)
@given(case=cases())
def test_gradient_through_lse(case: Case) -> None:
    """The lse has an exact gradient too, in the fused path as in the plain one."""
    expected = oracle(case, torch.float64, with_lse=True)
    for fused in (True, False):
        assert_close(case, torch.float64, run(case, torch.float64, with_lse=True, fused=fused), expected)


@settings(max_examples=40)
@given(case=cases())
def test_plain_and_fused_paths_agree(case: Case) -> None:
    assert_close(case, torch.float32, run(case, torch.float32, fused=False), run(case, torch.float32))


HALF_CASES = [
    Case(1, 601, 4, 64, (601,), (1,)),
    Case(2, 509, 5, 32, (64, 128, 512), (1, 2, 4)),
    Case(1, 1024, 8, 64, (128, 256, 1024), (1, 4, 6), is_causal=True),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_within_twice_dense(case: Case, options: dict[str, object], dtype: torch.dtype) -> None:
    """Half precision errs at most twice as much as dense SDPA in that dtype errs from its own float64 result."""
    ours, exact = run(case, dtype, **options), oracle(case, dtype)
    *qkv, cotangent = case.tensors(4, dtype)
    dense = _dense(qkv, cotangent, case.is_causal)
    dense_exact = _dense([tensor.double() for tensor in qkv], cotangent.double(), case.is_causal)
    for index, name in enumerate(("out", "dq", "dk", "dv")):
        allowed = 2 * deviation(dense[index], dense_exact[index])
        assert deviation(getattr(ours, name), getattr(exact, name)) <= allowed, name


def _dense(qkv: list[Tensor], cotangent: Tensor, is_causal: bool) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in qkv]
    out = scaled_dot_product_attention(*(leaf.transpose(1, 2) for leaf in leaves), is_causal=is_causal)
    return [out.transpose(1, 2), *torch.autograd.grad(out, leaves, cotangent.transpose(1, 2))]


def test_one_whole_segment_is_dense_attention() -> None:
    """The oracle itself, against SDPA: one segment over everything, rate 1."""
    case = Case(2, 37, 3, 8, (40,), (1,), is_causal=True)
    *qkv, cotangent = case.tensors(4, torch.float64)
    dense = _dense(qkv, cotangent, True)
    exact = oracle(case, torch.float64)
    for index, name in enumerate(("out", "dq", "dk", "dv")):
        assert deviation(getattr(exact, name), dense[index]) < 1e-13, name


def test_oracle_rows_are_rows_of_the_oracle() -> None:
    case = CASES[-1]
    query, key, value = case.tensors(3, torch.float64)
    pattern = case.segment_lengths, case.dilation_rates
    out, lse = reference.dilated_attention(query, key, value, *pattern)
    rows = torch.tensor([3, 250, 0])
    some_out, some_lse = reference.dilated_attention(query, key, value, *pattern, rows=rows)
    torch.testing.assert_close(some_out, out[:, rows])
    torch.testing.assert_close(some_lse, lse[:, :, rows])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (1, 0, 2, 8), (2, 3, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...], fused: bool) -> None:
    from dilated_core import dilated_attention

    leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    out = dilated_attention(*leaves, [2, 4], [1, 2], fused=fused)
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert out.shape == shape
    assert all(grad.shape == shape for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    """Slices of a packed projection, transposed storage, last stride not 1, expanded cotangents."""
    from dilated_core import dilated_attention

    pattern = ([8, 16], [1, 3])
    packed = torch.randn(2, 29, 3, 4, 8, dtype=dtype)
    head_major = torch.randn(2, 4, 29, 8, dtype=dtype).transpose(1, 2)
    last_stride = torch.randn(2, 29, 8, 4, dtype=dtype).transpose(2, 3)
    every_other = torch.randn(2, 29, 4, 16, dtype=dtype)[..., ::2]
    shared = torch.randn(2, 29, 1, 8, dtype=dtype).expand(2, 29, 4, 8)
    sources = [*packed.unbind(2), head_major, last_stride, every_other, shared]
    for first in range(len(sources) - 2):
        chosen = sources[first : first + 3]
        strided = [tensor.detach().requires_grad_() for tensor in chosen]
        plain = [tensor.detach().contiguous().requires_grad_() for tensor in chosen]
        cotangent = torch.randn(2, 1, 1, 1, dtype=dtype).expand(2, 29, 4, 8)
        results = []
        for leaves in (strided, plain):
            out = dilated_attention(*leaves, *pattern)
            results.append([out, *torch.autograd.grad(out, leaves, cotangent)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13 if dtype == torch.float64 else 1e-2)
