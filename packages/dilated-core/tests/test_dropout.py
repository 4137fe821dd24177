"""Dropout of attention weights: when, which, how many, and that the backward drops what the forward dropped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core_cases import MIXED_CASES, Case, deviation, packed, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dilated_core import AuxRequest, DilatedAttention, MultiheadDilatedAttention, attend, dilated_attention
from dilated_core.kernels import Dropout, Problem
from dilated_core.kernels.math import Math
from dilated_core.plan import SEMANTICS

CASE = MIXED_CASES[0]
both_paths = pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])


def seeded(case: Case, seed: int, dropout_p: float = 0.4, **options: object) -> list[Tensor]:
    """out, lse, dq, dk, dv after torch.manual_seed."""
    torch.manual_seed(seed)
    return run(case, torch.float32, with_lse=True, dropout_p=dropout_p, **options).each()


# ------------------------------------------------------------------------------------------------ when


@both_paths
def test_none_in_eval_and_none_at_zero(fused: bool) -> None:
    case, sequence = CASE, torch.randn(2, 41, 16)
    query, key, value, _ = case.problem(torch.float32)
    module = DilatedAttention(*case.pattern, attention_dropout=0.4, fused=fused)
    plain = dilated_attention(query, key, value, *case.pattern, fused=fused)
    assert torch.equal(module.eval()(query, key, value), plain)
    assert not torch.equal(module.train()(query, key, value), plain)
    assert torch.equal(dilated_attention(query, key, value, *case.pattern, dropout_p=0.0, fused=fused), plain)

    multihead = MultiheadDilatedAttention(16, 4, *case.pattern, dropout=0.4, fused=fused)
    assert not torch.equal(multihead(sequence)[0], multihead(sequence)[0])
    multihead.eval()
    assert torch.equal(multihead(sequence)[0], multihead(sequence)[0])


def test_zero_draws_nothing() -> None:
    """A call without dropout leaves the random numbers of the program as they were."""
    before = torch.get_rng_state()
    run(CASE, torch.float32, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), before)


@both_paths
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_seed_decides(semantics: str, fused: bool) -> None:
    case = replace(CASE, kv_heads=2, mask="random").meaning(semantics)
    first, again, other = (seeded(case, seed, fused=fused) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@both_paths
def test_the_generator_decides(fused: bool) -> None:
    """Its state alone: the global one neither matters nor moves."""

    def out(seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        result = run(CASE, torch.float32, dropout_p=0.4, generator=generator, fused=fused).out
        assert torch.equal(torch.get_rng_state(), before)
        return result

    assert torch.equal(out(1, 1), out(1, 2))
    assert not torch.equal(out(1, 1), out(2, 1))


@both_paths
def test_each_call_drops_anew(fused: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (run(CASE, torch.float32, dropout_p=0.4, generator=generator, fused=fused).out for _ in range(2))
    assert not torch.equal(first, second)


def test_each_call_of_a_compiled_module_drops_anew() -> None:
    torch._dynamo.reset()
    module = DilatedAttention(*CASE.pattern, attention_dropout=0.4)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    query, key, value, cotangent = CASE.problem(torch.float32)
    outs, gradients = [], []
    for _ in range(3):
        leaf = value.detach().requires_grad_()
        outs.append(compiled(query, key, leaf))
        gradients.append(torch.autograd.grad(outs[-1], leaf, cotangent)[0])
    for results in (outs, gradients):
        assert not torch.equal(results[0], results[1])
        assert not torch.equal(results[1], results[2])
    torch.manual_seed(3)
    once = compiled(query, key, value)
    torch.manual_seed(3)
    assert torch.equal(once, compiled(query, key, value))


# ------------------------------------------------------------------------------------------------ which and how many


def weights(dropout_p: float, is_causal: bool, fused: bool, seq: int = 64) -> Tensor:
    """(heads, seq, seq): with the identity as values, a row of the output is a row of weights."""
    torch.manual_seed(5)
    query, key = torch.randn(2, 1, seq, 4, seq, dtype=torch.float64)
    identity = torch.eye(seq, dtype=torch.float64)[None, :, None, :].expand(1, seq, 4, seq)
    out = dilated_attention(query, key, identity, [16], [1], is_causal=is_causal, dropout_p=dropout_p, fused=fused)
    return out[0].transpose(0, 1)


@both_paths
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_a_weight_is_dropped_or_enlarged(dropout_p: float, is_causal: bool, fused: bool) -> None:
    """Each is 0 or weight / (1 - p), and as many are 0 as p says, within five standard deviations."""
    whole, dropped = weights(0.0, is_causal, fused), weights(dropout_p, is_causal, fused)
    alive = whole > 0
    kept = dropped != 0
    assert not kept[~alive].any()
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - dropout_p), rtol=1e-12, atol=0)
    number = int(alive.sum())
    share = 1 - int(kept.sum()) / number
    assert abs(share - dropout_p) < 5 * (dropout_p * (1 - dropout_p) / number) ** 0.5


@both_paths
@pytest.mark.parametrize("offsets", [None, [0, 8, 16, 24, 32]], ids=["one-sequence", "packed"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_two_tiles_drop_the_same(dtype: torch.dtype, kv_heads: int, offsets: list[int] | None, fused: bool) -> None:
    """Heads, segments, branches and packed sequences each have their own random numbers."""
    scores = torch.zeros(1, 32, 4, 32, dtype=dtype)
    identity = torch.eye(32, dtype=dtype)[None, :, None].expand(1, 32, kv_heads, 32)
    out = dilated_attention(
        scores, scores[:, :, :kv_heads], identity, [8], [1], dropout_p=0.5, enable_gqa=True, fused=fused,
        cu_seqlens=None if offsets is None else torch.tensor(offsets),
    )  # fmt: skip
    tiles = [out[0, start : start + 8, head, start : start + 8] for head in range(4) for start in range(0, 32, 8)]
    assert len({tuple((tile != 0).flatten().tolist()) for tile in tiles}) == 16


@both_paths
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_lse_is_that_of_all_weights(semantics: str, fused: bool) -> None:
    case = replace(CASE, mask="random").meaning(semantics)
    whole = run(case, torch.float64, fused=fused).lse
    torch.testing.assert_close(run(case, torch.float64, fused=fused, dropout_p=0.5).lse, whole, rtol=0, atol=1e-13)


@both_paths
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_mean_is_the_output_without(semantics: str, fused: bool) -> None:
    """Over many seeds, in every place within five standard errors: dropout changes no expectation."""
    case = replace(Case(1, 19, 4, 3, (4, 10), (1, 2)), mask="random", kv_heads=2).meaning(semantics)
    query, key, value, _ = case.problem(torch.float64)
    draws = torch.stack(
        [
            dilated_attention(query, key, value, *case.pattern, **case.options(), dropout_p=0.3, fused=fused)
            for _ in range(300)
        ]
    )
    expected = dilated_attention(query, key, value, *case.pattern, **case.options(), fused=fused)
    error = draws.std(0) / len(draws) ** 0.5
    # A row of one key is far from normally distributed, hence the width; rounding alone where nothing varies.
    assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    assert error.max() > 0


# ------------------------------------------------------------------------------------------------ gradients

SMALL = Case(1, 9, 4, 2, (4, 6), (1, 2))
GRADIENT_CASES = [
    SMALL,
    replace(SMALL, is_causal=True, kv_heads=2),
    replace(SMALL, mask="random"),
    replace(SMALL, semantics="grouped", kv_heads=2, mask="random"),
    replace(SMALL, seq=8, kv_heads=1),
    packed(replace(SMALL, kv_heads=2), [4, 0, 5]),
]


def checked(case: Case, qkv: list[Tensor], fused: bool) -> tuple[Tensor, Tensor]:
    """out and lse (0 where -inf), each time with the same weights dropped."""
    out, aux = dilated_attention(
        *qkv, *case.pattern, **case.options(), dropout_p=0.4, generator=torch.Generator().manual_seed(7),
        fused=fused, return_aux=AuxRequest(lse=True),
    )  # type: ignore[call-overload]  # fmt: skip
    return out, torch.where(aux.lse == -torch.inf, 0.0, aux.lse)


@both_paths
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_are_those_of_what_was_kept(case: Case, fused: bool) -> None:
    """Central differences of the function that drops the same weights at every call."""
    leaves = [leaf.requires_grad_() for leaf in case.problem(torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *qkv: checked(case, list(qkv), fused), leaves, fast_mode=True)


@pytest.mark.parametrize("case", [replace(SMALL, batch=2), replace(SMALL, kv_heads=2, mask="random")], ids=str)
def test_tiles_gathered_in_parts_drop_the_same_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilated_core.span.GATHER_ELEMENTS", {"cpu": 10, "cuda": 10})
    leaves = [leaf.requires_grad_() for leaf in case.problem(torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *qkv: checked(case, list(qkv), True), leaves, fast_mode=True)


@both_paths
def test_torchscale_gradients_are_those_of_what_was_kept(fused: bool) -> None:
    """Its weights of the mixture take no gradient, so differences are taken of one branch, and of the values of two."""
    one = Case(1, 11, 4, 2, (4,), (2,), semantics="torchscale", kv_heads=2)
    leaves = [leaf.requires_grad_() for leaf in one.problem(torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *qkv: checked(one, list(qkv), fused), leaves, fast_mode=True)
    two = replace(SMALL, semantics="torchscale")
    query, key, value, _ = two.problem(torch.float64)
    assert torch.autograd.gradcheck(lambda v: checked(two, [query, key, v], fused), value.requires_grad_())


def test_attend_drops_and_differentiates() -> None:
    leaves = [torch.randn(1, 6, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def seeded_attend(*qkv: Tensor) -> tuple[Tensor, ...]:
        return attend(*qkv, dropout_p=0.4, generator=torch.Generator().manual_seed(7), is_causal=True)

    assert torch.autograd.gradcheck(seeded_attend, leaves)


# Of the largest gradient: rounding of the weights that are read from the output, then of the products.
ROUNDING = {torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@both_paths
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_backward_drops_what_the_forward_dropped(dtype: torch.dtype, kv_heads: int, fused: bool) -> None:
    """out = W v and dv = W^T g with the same W, which identity values show."""
    query = torch.randn(1, 24, 4, 24, dtype=dtype)
    key = torch.randn(1, 24, kv_heads, 24, dtype=dtype)
    value = torch.eye(24, dtype=dtype)[None, :, None].repeat(1, 1, kv_heads, 1).requires_grad_()
    options = {"dropout_p": 0.5, "enable_gqa": True, "fused": fused}
    out = dilated_attention(query, key, value, [8, 24], [1, 3], **options)
    cotangent = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, value, cotangent)
    each_head = torch.einsum("bqhk,bqhd->bkhd", out.double(), cotangent.double())
    expected = each_head.unflatten(2, (kv_heads, -1)).sum(3)
    assert deviation(gradient, expected) < ROUNDING[dtype]


@both_paths
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_drops_the_same(use_reentrant: bool, fused: bool) -> None:
    """Recomputed in the backward, the forward drops what it dropped before."""
    results = []
    for recomputed in (False, True):
        torch.manual_seed(3)
        *qkv, cotangent = CASE.problem(torch.float32)
        leaves = [leaf.requires_grad_() for leaf in qkv]

        def call(*tensors: Tensor) -> Tensor:
            return dilated_attention(*tensors, *CASE.pattern, dropout_p=0.4, fused=fused)

        out = checkpoint(call, *leaves, use_reentrant=use_reentrant) if recomputed else call(*leaves)
        out.backward(cotangent)
        results.append([out, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------ who and who not


@both_paths
def test_kernels_that_cannot_drop_refuse(fused: bool) -> None:
    query, key, value, _ = CASE.problem(torch.float32)
    options = {"dropout_p": 0.1, "fused": fused}
    with pytest.raises(ValueError, match=r'kernel: "cpu_flash" cannot run .* it drops no probabilities'):
        dilated_attention(query, key, value, *CASE.pattern, kernel="cpu_flash", **options)
    with pytest.raises(ValueError, match="it drops no probabilities"):
        attend(query, key, value, dropout_p=0.1, kernel="cpu_flash")
    dilated_attention(query, key, value, *CASE.pattern, kernel="math", **options)


def test_torch_func_says_that_it_cannot_map_over_dropout() -> None:
    query, key, value = torch.randn(3, 5, 1, 8, 2, 4).unbind()
    with pytest.raises(ValueError, match="dropout cannot be mapped over"):
        torch.func.vmap(lambda *qkv: dilated_attention(*qkv, [4], [1], dropout_p=0.5), randomness="different")(
            query, key, value
        )


def test_all_bits_of_a_seed_count() -> None:
    """A generator on the CPU reads 32 of them."""
    query = torch.ones(1, 1, 4, 8)
    value = torch.randn(1, 1, 64, 8)
    plain = Problem(query, torch.ones_like(value), value, False, 1.0)
    outs = [
        Math().forward(plain._replace(dropout=Dropout(0.5, 7 + (place << shift))))[0]
        for shift in (20, 40)
        for place in (1, 2, 3, 1 << 14)
    ]
    assert len(torch.stack(outs).flatten(1).unique(dim=0)) == len(outs)
