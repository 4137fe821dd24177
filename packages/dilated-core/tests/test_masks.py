"""key_padding_mask: what padding holds never matters, and what is left is the attention of the real keys."""

from __future__ import annotations

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
    deviation,
    oracle,
    run,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dilated_core import AuxRequest, DilatedAttention, MultiheadDilatedAttention, attend, dilated_attention
from dilated_core.plan import SEMANTICS

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CASE = replace(MIXED_CASES[0], mask="random", kv_heads=2)


def everything(case: Case, leaves: list[Tensor], cotangent: Tensor, **options: object) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of these inputs, with cotangents of out and of lse."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    arguments = {**case.options(), "return_aux": AuxRequest(lse=True), **options}
    out, aux = dilated_attention(*leaves, *case.pattern, **arguments)  # type: ignore[call-overload]
    reached = case.lse_cotangent().to(aux.lse).masked_fill(aux.lse == -torch.inf, 0.0)
    gradients = torch.autograd.grad([out, aux.lse], leaves, [cotangent, reached])
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, aux.lse, *gradients), strict=True))


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_what_padding_holds_has_no_influence(
    semantics: str, is_causal: bool, dtype: torch.dtype, options: dict[str, object]
) -> None:
    """NaN and infinities in padded keys and values: the same bits everywhere, and no gradient into them."""
    for mask in ("random", "right"):
        case = replace(CASE, is_causal=is_causal, mask=mask).meaning(semantics)
        query, key, value, cotangent = case.problem(dtype)
        clean = everything(case, [query, key, value], cotangent, **options)
        padding = ~case.key_padding_mask()
        key[padding], value[padding] = torch.inf, torch.nan
        dirty = everything(case, [query, key, value], cotangent, **options)
        for name, result in dirty.items():
            assert torch.equal(result, clean[name]), name
        for name in ("dk", "dv"):
            assert (dirty[name][padding] == 0).all(), name
            assert dirty[name][~padding].any(), name


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("semantics", ["paper", "grouped"])
def test_rows_with_no_key(semantics: str, is_causal: bool, options: dict[str, object]) -> None:
    """The last batch row is padding alone: 0, -inf, and no gradient to or from it."""
    case = replace(CASE, is_causal=is_causal, mask="right", semantics=semantics)
    query, key, value, cotangent = case.problem(torch.float32)
    results = everything(case, [query, key, value], cotangent, **options)
    assert (results.pop("lse")[-1] == -torch.inf).all()
    for name, result in results.items():
        assert (result[-1] == 0).all(), name


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
def test_torchscale_rows_with_no_key_but_zeros(fused: bool) -> None:
    """Where torchscale pads, a row whose keys are all masked still meets its zero keys: 0, and the log of their number.

    10 tokens at rate 4 are padded to 12: three keys for each row. Phases 0 and 1 (heads 0 and 1) have three real ones,
    phases 2 and 3 two and one zero.
    """
    x = torch.randn(1, 10, 4, 8)
    out, aux = dilated_attention(
        x, x, x, [10], [4], semantics="torchscale", key_padding_mask=torch.zeros(1, 10, dtype=torch.bool), fused=fused,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert (out == 0).all()
    expected = torch.full((1, 4, 10), -torch.inf)
    expected[0, 2, 2::4] = expected[0, 3, 3::4] = 0.0
    assert torch.equal(aux.lse, expected)


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_all_real_is_no_mask(semantics: str, dtype: torch.dtype, options: dict[str, object]) -> None:
    case = replace(CASE, mask="none").meaning(semantics)
    mask = torch.ones(case.batch, case.seq, dtype=torch.bool)
    assert_close(case, dtype, run(case, dtype, key_padding_mask=mask, **options), run(case, dtype, **options))


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("semantics", ["paper", "grouped"])
@pytest.mark.parametrize("length", [1, 7, 20, 40])
def test_padding_at_the_right_is_the_shorter_sequence(
    length: int, semantics: str, is_causal: bool, options: dict[str, object]
) -> None:
    """On the real rows, forward and backward. (Not with torchscale, whose padding is attended.)"""
    long = replace(CASE, is_causal=is_causal, mask="none", semantics=semantics)
    *qkv, cotangent = long.problem(torch.float64)
    cotangent[:, length:] = 0.0
    leaves = [tensor.requires_grad_() for tensor in qkv]
    mask = torch.arange(long.seq).expand(long.batch, -1) < length
    padded = dilated_attention(*leaves, *long.pattern, **{**long.options(), "key_padding_mask": mask}, **options)
    short = dilated_attention(*(leaf[:, :length] for leaf in leaves), *long.pattern, **long.options(), **options)
    assert deviation(padded[:, :length], short) <= FORWARD_TOLERANCE[torch.float64]
    gradients = (
        torch.autograd.grad(padded, leaves, cotangent),
        torch.autograd.grad(short, leaves, cotangent[:, :length]),
    )
    for name, ours, expected in zip(("dq", "dk", "dv"), *gradients, strict=True):
        assert deviation(ours, expected, floor=1.0) <= GRADIENT_TOLERANCE[torch.float64], name


@pytest.mark.parametrize("options", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_one_segment_is_sdpa_with_the_same_mask(is_causal: bool, options: dict[str, object]) -> None:
    case = Case(3, 37, 4, 8, (64,), (1,), is_causal=is_causal, mask="random")
    query, key, value, _ = case.problem(torch.float64)
    allowed = case.key_padding_mask()[:, None, None, :].expand(-1, 1, case.seq, -1)
    if is_causal:
        allowed = allowed.tril()
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask=allowed)
    expected = dense.transpose(1, 2).masked_fill(~allowed.any(-1).transpose(1, 2)[..., None], 0.0)
    ours = dilated_attention(query, key, value, *case.pattern, **case.options(), **options)
    assert deviation(ours, expected) <= FORWARD_TOLERANCE[torch.float64]


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_attend_takes_a_mask(is_causal: bool) -> None:
    """One tile, with cross-attention's own number of keys where it is not causal."""
    query, key, value = torch.randn(2, 5, 3, 8), *torch.randn(2, 2, 5 if is_causal else 9, 3, 8)
    mask = torch.rand(key.shape[:2]) < 0.6
    mask[:, 0] = True
    key[~mask], value[~mask] = torch.nan, torch.inf
    allowed = mask[:, None, None, :].expand(-1, 1, query.shape[1], -1)
    allowed = allowed.tril() if is_causal else allowed
    clean = (tensor.masked_fill(~mask[:, :, None, None], 0.0).transpose(1, 2) for tensor in (key, value))
    expected = scaled_dot_product_attention(query.transpose(1, 2), *clean, attn_mask=allowed).transpose(1, 2)
    out, _ = attend(query, key, value, key_padding_mask=mask, is_causal=is_causal)
    assert deviation(out, expected) <= FORWARD_TOLERANCE[torch.float32]


def test_any_strides_of_the_mask() -> None:
    case = replace(CASE, mask="random")
    mask = case.key_padding_mask()
    expected = run(case, torch.float32)
    layouts = (mask.T.contiguous().T, mask.repeat_interleave(2, 1)[:, ::2])
    for same in layouts:
        results = run(case, torch.float32, key_padding_mask=same)
        assert all(torch.equal(a, b) for a, b in zip(results.each(), expected.each(), strict=True))
    one_for_all = mask[:1].expand_as(mask)
    ours = run(case, torch.float32, key_padding_mask=one_for_all)
    assert torch.equal(ours.out, run(case, torch.float32, key_padding_mask=one_for_all.contiguous()).out)


def test_module_takes_the_functions_mask() -> None:
    case = replace(CASE, semantics="grouped")
    query, key, value, _ = case.problem(torch.float32)
    module = DilatedAttention(*case.pattern, enable_gqa=True, semantics="grouped")
    attended = module(query, key, value, key_padding_mask=case.key_padding_mask())
    assert torch.equal(attended, run(case, torch.float32).out)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_multihead_takes_torchs_mask(is_causal: bool) -> None:
    """True means padding there: nn.MultiheadAttention with the same mask and weights, in rows that have a key."""
    ours = MultiheadDilatedAttention(24, 3, [64], [1], layer_norm=False, dtype=torch.float64)
    theirs = nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.zero_()
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    sequence, padding = torch.randn(2, 37, 24, dtype=torch.float64), torch.rand(2, 37) < 0.4
    future = torch.ones(37, 37, dtype=torch.bool).triu(1) if is_causal else None
    expected, _ = theirs(sequence, sequence, sequence, key_padding_mask=padding, attn_mask=future, need_weights=False)
    has_key = (~padding).cummax(1).values if is_causal else (~padding).any(1, keepdim=True).expand_as(padding)
    output, _ = ours(sequence, key_padding_mask=padding, is_causal=is_causal)
    assert deviation(output[has_key], expected[has_key]) <= FORWARD_TOLERANCE[torch.float64]


def test_half_precision_with_a_mask() -> None:
    """Where each path has its own way to leave keys out."""
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3)):  # a few roundings
        for options in PATHS.values():
            ours, exact = run(CASE, dtype, **options), oracle(CASE, dtype)
            for name in ("out", "dq", "dk", "dv"):
                assert deviation(getattr(ours, name), getattr(exact, name)) <= tolerance, name
