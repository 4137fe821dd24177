"""Every path against the float64 oracle: out, dq, dk and dv apart, under random cotangents."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from core_cases import (
    CASES,
    LAYOUTS,
    MASKS,
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
from torch.nn.functional import scaled_dot_product_attention

from dilated_core import dilated_attention, reference
from dilated_core.plan import SEMANTICS


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case: Case, is_causal: bool, dtype: torch.dtype, options: dict[str, object]) -> None:
    case = replace(case, is_causal=is_causal)
    assert_close(case, dtype, run(case, dtype, **options), oracle(case, dtype))


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [None, 2], ids=["own-keys", "shared-keys"])
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("case", MIXED_CASES, ids=str)
def test_every_combination_of_options(
    case: Case,
    semantics: str,
    kv_heads: int | None,
    mask: str,
    is_causal: bool,
    dtype: torch.dtype,
    options: dict[str, object],
) -> None:
    """out, lse and every gradient, with cotangents of out and of lse."""
    case = replace(case, kv_heads=kv_heads, mask=mask, is_causal=is_causal).meaning(semantics)
    assert_close(case, dtype, run(case, dtype, with_lse=True, **options), oracle(case, dtype, with_lse=True))


@settings(max_examples=60)
@given(case=cases(options=True))
def test_any_problem_float64(case: Case) -> None:
    assert_close(case, torch.float64, run(case, torch.float64), oracle(case, torch.float64))


@settings(max_examples=40)
@given(case=cases(options=True))
def test_any_problem_float32(case: Case) -> None:
    assert_close(case, torch.float32, run(case, torch.float32), oracle(case, torch.float32))


@settings(max_examples=30)
@given(case=cases(options=True))
def test_gradient_through_lse(case: Case) -> None:
    """The lse has an exact gradient too, in the fused path as in the plain one."""
    expected = oracle(case, torch.float64, with_lse=True)
    for fused in (True, False):
        assert_close(case, torch.float64, run(case, torch.float64, with_lse=True, fused=fused), expected)


@settings(max_examples=25)
@given(case=cases(options=True))
def test_plain_and_fused_paths_agree(case: Case) -> None:
    assert_close(case, torch.float32, run(case, torch.float32, fused=False), run(case, torch.float32))


HALF_CASES = [
    Case(1, 601, 2, 64, (601,), (1,)),
    Case(1, 509, 5, 32, (64, 128, 512), (1, 2, 4)),
    Case(1, 640, 6, 64, (128, 256, 640), (1, 4, 6), is_causal=True),
    Case(2, 389, 6, 32, (64, 200), (1, 4), semantics="torchscale", kv_heads=2, mask="random"),
    Case(2, 307, 5, 16, (64, 400), (1, 3), is_causal=True, semantics="grouped", mask="right"),
]


# "auto" may have another kernel for half precision than flash, which is then asked for by name.
HALF_PATHS = {**PATHS, "fused-flash": {"kernel": "cpu_flash"}}


@pytest.mark.parametrize("options", HALF_PATHS.values(), ids=HALF_PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
def test_half_precision_beside_dense(case: Case, dtype: torch.dtype, options: dict[str, object]) -> None:
    """Half precision errs at most twice as much as dense SDPA in that dtype errs from its own float64 result.

    The plain path, which rounds each tile, torchscale's zero keys and the mixture, errs at most three times as much.
    """
    times = 3 if options.get("fused") is False and case.semantics == "torchscale" else 2
    ours, exact = run(case, dtype, **options), oracle(case, dtype)
    for name, of_dense in _errors_of_dense(case, dtype).items():
        assert deviation(getattr(ours, name), getattr(exact, name)) <= times * of_dense, name


@lru_cache(maxsize=1)
def _errors_of_dense(case: Case, dtype: torch.dtype) -> dict[str, float]:
    *qkv, cotangent = case.tensors(4, dtype)
    rounded = _dense(qkv, cotangent, case.is_causal)
    exact = _dense([tensor.double() for tensor in qkv], cotangent.double(), case.is_causal)
    return dict(zip(("out", "dq", "dk", "dv"), map(deviation, rounded, exact), strict=True))


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
    leaves = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    out = dilated_attention(*leaves, [2, 4], [1, 2], fused=fused)
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out))
    assert out.shape == shape
    assert all(grad.shape == shape for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kv_heads", [None, 2], ids=["own-keys", "shared-keys"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, kv_heads: int | None, dtype: torch.dtype) -> None:
    """Transposed storage, a last stride other than 1, slices, expanded heads: of the inputs and of the cotangent."""
    for semantics in SEMANTICS:
        case = replace(MIXED_CASES[0], layout=layout, kv_heads=kv_heads, mask="random").meaning(semantics)
        for options in PATHS.values():
            assert_close(case, dtype, run(case, dtype, **options), oracle(case, dtype))


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_tiles_gathered_in_parts(semantics: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for a segment or a batch row at a time, as long sequences need it: the same attention."""
    case = replace(MIXED_CASES[0], seq=63, kv_heads=2, mask="random").meaning(semantics)
    for elements in (1, 300, 1500):
        monkeypatch.setattr("dilated_core.span.GATHER_ELEMENTS", {"cpu": elements, "cuda": elements})
        for problem in (case, replace(case, mask="none")):
            assert_close(problem, torch.float64, run(problem, torch.float64), oracle(problem, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_strides(dtype: torch.dtype) -> None:
    """Slices of a packed projection, transposed storage, last stride not 1, expanded cotangents."""
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
