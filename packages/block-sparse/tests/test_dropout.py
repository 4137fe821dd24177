"""Dropout of weights: who decides, which and how many, and that the backward drops what the forward dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_cases import Case, Results, deviation, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dilated_block_sparse import BlockLayout, block_sparse_attention, engine, operators

CASE = Case(2, 45, 4, 8, (8, 8), ("random", "local", "global"), kv_heads=2)
KINDS = {
    "plain": replace(CASE, kv_heads=None),
    "shared-keys": CASE,
    "each-head": replace(CASE, share="query"),
    "causal": replace(CASE, is_causal=True),
    "masked": replace(CASE, mask="random"),
    "bias": replace(CASE, has_bias=True),
    "packed": replace(CASE, kv_heads=None, storage="packed"),
}
every_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)


def seeded(case: Case, seed: int, dtype: torch.dtype = torch.float32, **options: Any) -> Results:
    """All results after torch.manual_seed."""
    torch.manual_seed(seed)
    return run(case, dtype, dropout_p=0.4, **options)


# ------------------------------------------------------------------------------------------------ who decides


def test_zero_drops_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert run(CASE, torch.float32, dropout_p=0.0).equal(run(CASE, torch.float32))
    assert torch.equal(torch.get_rng_state(), before)


@every_kind
def test_the_seed_decides(case: Case) -> None:
    first, again, other = (seeded(case, seed) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not torch.equal(first.out, other.out)
    assert not torch.equal(first.dv, other.dv)


def test_the_generator_decides() -> None:
    """Its state alone: the global one neither matters nor moves."""

    def out(seed: int, global_seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        result = run(CASE, torch.float32, dropout_p=0.4, generator=torch.Generator().manual_seed(seed)).out
        assert torch.equal(torch.get_rng_state(), before)
        return result

    assert torch.equal(out(1, 1), out(1, 2))
    assert not torch.equal(out(1, 1), out(2, 1))


def test_each_call_drops_anew() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (run(CASE, torch.float32, dropout_p=0.4, generator=generator).out for _ in range(2))
    assert not torch.equal(first, second)


@every_kind
def test_the_operator_drops_what_the_function_drops(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = seeded(case, 1)
    monkeypatch.setattr(operators, "PLAIN", ())
    assert seeded(case, 1).equal(plain)


# ------------------------------------------------------------------------------------------------ which, how many


def weights(dropout_p: float, layout: BlockLayout, **options: Any) -> Tensor:
    """(batch, heads, q_len, kv_len): with the identity as values, a row of the output is a row of weights."""
    seq = layout.kv_len
    generator = torch.Generator().manual_seed(5)
    query, key = torch.randn(2, 2, seq, 4, seq, generator=generator, dtype=torch.float64)
    identity = torch.eye(seq, dtype=torch.float64)[None, :, None, :].expand(2, seq, 4, seq)
    out = block_sparse_attention(query, key, identity, layout, dropout_p=dropout_p, generator=generator, **options)
    return out.transpose(1, 2)


LAYOUT = BlockLayout.local(64, 1, block_size=8) | BlockLayout.global_(64, 1, 1, block_size=8)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_a_weight_is_dropped_or_divided_by_what_is_kept(is_causal: bool) -> None:
    whole, dropped = (weights(p, LAYOUT, is_causal=is_causal) for p in (0.0, 0.25))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75, rtol=1e-10, atol=1e-12)
    attended = whole != 0
    assert not (kept & ~attended).any()
    share = 1.0 - kept[attended].double().mean().item()
    # Four standard deviations of so many independent draws.
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / attended.sum().item()) ** 0.5


@pytest.mark.parametrize("heads", [1, 4], ids=["one-layout", "each-head"])
def test_no_two_batch_rows_heads_or_rectangles_drop_alike(heads: int) -> None:
    layout = BlockLayout.dilated(64, 2, 1, block_size=8, heads=heads)
    dropped = weights(0.5, layout).unflatten(2, (4, 16)).unflatten(4, (4, 16))
    blocks = torch.stack([dropped[:, :, at, :, at] != 0 for at in range(4)], 2).flatten(0, 2).flatten(1)
    assert len(blocks.unique(dim=0)) == len(blocks) == 2 * 4 * 4


def test_no_two_calls_drop_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one head, cut into a call for each batch row and rectangle."""
    monkeypatch.setitem(engine.GATHER_ELEMENTS, "cpu", 1)
    monkeypatch.setattr("dilated_block_sparse.engine.work.budget", lambda tensor: 1)
    dropped = (
        weights(0.5, BlockLayout.dilated(64, 2, 1, block_size=8))[:, 0].unflatten(1, (4, 16)).unflatten(3, (4, 16))
    )
    blocks = torch.stack([dropped[:, at, :, at] != 0 for at in range(4)], 1).flatten(0, 1).flatten(1)
    assert len(blocks.unique(dim=0)) == len(blocks) == 2 * 4


# ------------------------------------------------------------------------------------------------ the backward

# Of the largest gradient: rounding of the weights that are read from the output, then of the products.
ROUNDING = {torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("gathered", [None, 10], ids=["whole", "in-pieces"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_backward_drops_what_the_forward_dropped(
    dtype: torch.dtype, kv_heads: int, gathered: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """out = W v and dv = W^T g with the same W, which identity values show."""
    if gathered is not None:
        monkeypatch.setitem(engine.GATHER_ELEMENTS, "cpu", gathered)
    for heads, is_causal in ((1, False), (kv_heads, True), (4, True)):
        layout = replace(CASE, q_len=24, heads=heads, kv_heads=heads, share="query", block_size=(4, 8)).layout()
        query = torch.randn(1, 24, 4, 24, dtype=dtype)
        key = torch.randn(1, 24, kv_heads, 24, dtype=dtype)
        value = torch.eye(24, dtype=dtype)[None, :, None].repeat(1, 1, kv_heads, 1).requires_grad_()
        out = block_sparse_attention(query, key, value, layout, dropout_p=0.5, enable_gqa=True, is_causal=is_causal)
        cotangent = torch.randn_like(out)
        (gradient,) = torch.autograd.grad(out, value, cotangent)
        each_head = torch.einsum("bqhk,bqhd->bkhd", out.detach().double(), cotangent.double())
        assert deviation(gradient, each_head.unflatten(2, (kv_heads, -1)).sum(3)) < ROUNDING[dtype]


@pytest.mark.parametrize("gathered", [None, 10], ids=["whole", "in-pieces"])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 11, 4, 2, (2, 3), ("random", "global"), kv_heads=2, is_causal=True),
        Case(2, 9, 2, 2, (2, 3), ("random", "global"), mask="random", has_bias=True, share="query"),
    ],
    ids=str,
)
def test_gradients_are_those_of_what_was_kept(
    case: Case, gathered: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Central differences of the function that drops the same weights at every call."""
    if gathered is not None:
        monkeypatch.setitem(engine.GATHER_ELEMENTS, "cpu", gathered)
    leaves = [tensor.requires_grad_() for tensor in case.problem(torch.float64, poisoned=False)]
    layout = case.layout()

    def call(*tensors: Tensor) -> Tensor:
        return block_sparse_attention(
            *tensors[:3],
            layout,
            **case.options(),
            block_bias=tensors[3] if case.has_bias else None,
            enable_gqa=True,
            dropout_p=0.4,
            generator=torch.Generator().manual_seed(7),
        )

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_drops_the_same(use_reentrant: bool) -> None:
    """Recomputed in the backward, the forward drops what it dropped before."""
    layout, results = CASE.layout(), []
    for recomputed in (False, True):
        torch.manual_seed(3)
        leaves = [tensor.requires_grad_() for tensor in CASE.problem(torch.float32)]

        def call(*tensors: Tensor) -> Tensor:
            return block_sparse_attention(*tensors, layout, dropout_p=0.4, enable_gqa=True)

        out = checkpoint(call, *leaves, use_reentrant=use_reentrant) if recomputed else call(*leaves)
        assert isinstance(out, Tensor)
        out.backward(CASE.cotangents(torch.float32)[0])
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("changed", ["in-graph", "leaf"])
def test_a_compiled_backward_drops_what_its_forward_dropped(changed: str) -> None:
    """Also where key and value are views made inside the graph: the calls stay the same ones."""
    torch._dynamo.reset()
    layout = CASE.layout()

    def call(packed: Tensor, value: Tensor) -> Tensor:
        query, key, other = packed.unbind(2)
        return block_sparse_attention(query, key, other if changed == "in-graph" else value, layout, dropout_p=0.5)

    packed = torch.randn(1, 45, 3, 4, 45, dtype=torch.bfloat16)
    value = torch.eye(45, dtype=torch.bfloat16)[None, :, None].repeat(1, 1, 4, 1)
    packed[:, :, 2] = value
    leaf = (packed if changed == "in-graph" else value).requires_grad_()
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(packed, value)
    cotangent = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, leaf, cotangent)
    found = gradient[:, :, 2] if changed == "in-graph" else gradient
    wanted = torch.einsum("bqhk,bqhd->bkhd", out.detach().double(), cotangent.double())
    assert deviation(found, wanted) < ROUNDING[torch.bfloat16]
