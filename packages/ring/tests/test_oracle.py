"""dilated_ring_attention against the float64 oracle, on ranks that are threads: out, lse, dq, dk and dv apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_cases import (
    CASES,
    EXCHANGES,
    LAYOUTS,
    MASKS,
    MIXED_CASES,
    Case,
    assert_close,
    cases,
    check,
    deviation,
    deviations,
    joined,
    oracle,
    run,
    run_alone,
    run_rank,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dilated_core import AuxRequest, reference
from dilated_core.plan import SEMANTICS
from dilated_ring import dilated_ring_attention, make_plan
from dilated_ring.comm import Comm, run_ranks
from dilated_ring.plan import even_bounds

both_exchanges = pytest.mark.parametrize("exchange", EXCHANGES[1:])
both_ways = pytest.mark.parametrize("refetch", [False, True], ids=["kept", "refetched"])
causal_or_not = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])


@pytest.mark.parametrize(
    ("dtype", "refetch"),
    [(torch.float64, False), (torch.float64, True), (torch.float32, True)],
    ids=["float64-kept", "float64-refetched", "float32-refetched"],
)
@both_exchanges
@causal_or_not
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case: Case, is_causal: bool, exchange: str, dtype: torch.dtype, refetch: bool) -> None:
    check(replace(case, is_causal=is_causal, exchange=exchange, refetch=refetch), dtype, with_lse=False)


@both_exchanges
@causal_or_not
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("case", [MIXED_CASES[0], *(replace(case, kv_heads=2) for case in MIXED_CASES)], ids=str)
def test_every_combination_of_options(case: Case, semantics: str, mask: str, is_causal: bool, exchange: str) -> None:
    """Cotangents of out and of lse; padding holds NaN and infinity, in whole shards and whole batch rows too."""
    case = replace(case, mask=mask, is_causal=is_causal, exchange=exchange).meaning(semantics)
    check(replace(case, refetch=is_causal))


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_each_branch_has_its_own_exchange(semantics: str) -> None:
    case = replace(MIXED_CASES[0], mask="random", kv_heads=2).meaning(semantics)
    for exchanges in itertools.product(EXCHANGES[1:], repeat=3):
        # Causal or not by turns: every two branches meet in every way, and each way in both.
        check(replace(case, is_causal=exchanges.count("heads") % 2 == 0), exchange=exchanges)


@settings(max_examples=80)
@given(case=cases(), with_lse=st.booleans())
def test_any_problem_float64(case: Case, with_lse: bool) -> None:
    check(case, with_lse=with_lse)


@settings(max_examples=30)
@given(case=cases(), with_lse=st.booleans())
def test_any_problem_float32(case: Case, with_lse: bool) -> None:
    check(case, torch.float32, with_lse=with_lse)


@both_exchanges
@causal_or_not
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_a_bound_anywhere(semantics: str, is_causal: bool, exchange: str) -> None:
    """Between two ranks at every position: at segments' edges, beside them, in them, at both ends."""
    case = Case(1, (0, 21), 3, 2, (6, 9, 30), (1, 2, 5), is_causal, exchange=exchange).meaning(semantics)
    for bound in range(case.seq + 1):
        check(replace(case, bounds=(0, bound, case.seq)))


@both_exchanges
def test_any_number_of_ranks(exchange: str) -> None:
    """From one to more than there are positions."""
    case = Case(1, (0, 11), 4, 3, (4, 11), (1, 3), kv_heads=2, mask="random", exchange=exchange)
    for ranks in (*range(1, 9), 11, 13, 16):
        check(case.over(ranks))


@both_exchanges
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 13])
def test_any_number_of_heads(heads: int, exchange: str) -> None:
    """Fewer heads than ranks leave some ranks without a share; more phases than heads leave phases without a head."""
    for rate in (1, 2, 7, 19):
        check(Case(1, even_bounds(37, 5), heads, 3, (20, 37), (rate, rate), exchange=exchange))


@both_exchanges
@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0, 1e-3])
@causal_or_not
def test_any_scale(is_causal: bool, scale: float, exchange: str) -> None:
    for mask in ("none", "random"):
        check(replace(MIXED_CASES[0], is_causal=is_causal, scale=scale, exchange=exchange, mask=mask))


@both_exchanges
@pytest.mark.parametrize("kv_heads", [None, 2], ids=["own-keys", "shared-keys"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str, kv_heads: int | None, exchange: str) -> None:
    """Transposed storage, a last stride other than 1, slices, expanded heads: of the inputs and of the cotangent."""
    for semantics in ("paper", "torchscale") if kv_heads is None else ("grouped",):
        check(replace(MIXED_CASES[0], layout=layout, kv_heads=kv_heads, exchange=exchange).meaning(semantics))


@both_exchanges
@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (0, 0, 3, 1)], ids=str)
def test_nothing_to_attend(shape: tuple[int, ...], semantics: str, exchange: str) -> None:
    """No batch rows, or no positions on any rank."""
    batch, seq, heads, head_dim = shape
    case = Case(batch, even_bounds(seq, 3), heads, head_dim, (2, 4), (1, 2), exchange=exchange).meaning(semantics)
    results = run(case, torch.float32, with_lse=True)
    assert results.out.shape == results.dq.shape == results.dk.shape == results.dv.shape == shape
    assert results.lse is not None
    assert results.lse.shape == (batch, heads, seq)


@both_exchanges
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_no_rank_has_a_real_key(semantics: str, exchange: str) -> None:
    case = replace(MIXED_CASES[0], mask="right", exchange=exchange).meaning(semantics)
    *qkv, cotangent = case.problem(torch.float64)

    def work(comm: Comm) -> list[Tensor]:
        shard = case.shard(comm.rank)
        leaves = [tensor[:, shard].detach().requires_grad_() for tensor in qkv]
        real = torch.zeros(leaves[0].shape[:2], dtype=torch.bool)
        out = dilated_ring_attention(
            *leaves, *case.pattern, group=comm, key_padding_mask=real, semantics=semantics, exchange=exchange
        )
        return [out, *torch.autograd.grad(out, leaves, cotangent[:, shard])]

    for results in run_ranks(case.ranks, work):
        assert all(not result.any() for result in results)


# ------------------------------------------------------------------------------------------------ precision

PRECISE_CASES = [
    Case(2, (0, 101, 250, 389), 6, 32, (64, 200, 389), (1, 2, 4)),
    Case(1, even_bounds(512, 4), 8, 64, (128, 256, 512), (1, 4, 6), True),
    Case(2, even_bounds(307, 5), 6, 16, (64, 400), (1, 3), kv_heads=2, mask="random"),
    Case(1, even_bounds(260, 3), 4, 32, (64, 300), (1, 4), semantics="torchscale"),
    Case(1, even_bounds(260, 3), 4, 32, (64, 300), (1, 4), True, semantics="grouped"),
]


@both_exchanges
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", PRECISE_CASES, ids=str)
def test_as_precise_as_one_process(case: Case, dtype: torch.dtype, exchange: str) -> None:
    """Sharded, at most twice as far from the oracle as dilated_attention of the whole sequence is.

    In half precision a gathered key's gradient and a row attended elsewhere are rounded once more, when they travel.
    """
    case = replace(case, exchange=exchange)
    expected = oracle(case, dtype, with_lse=True)
    results = run(case, dtype, with_lse=True)
    assert_close(case, dtype, results, expected)
    ours = deviations(case, dtype, results, expected)
    alone = deviations(case, dtype, run_alone(case, dtype, with_lse=True), expected)
    for name, difference in ours.items():
        assert difference <= 2 * alone[name] + torch.finfo(torch.float32).eps, (name, difference, alone[name])


@both_exchanges
@pytest.mark.parametrize("kernel", ["math", "cpu_flash"])
def test_any_kernel(kernel: str, exchange: str) -> None:
    check(replace(MIXED_CASES[0], exchange=exchange, is_causal=True), torch.float32, kernel=kernel)


def test_ranks_may_have_different_kernels() -> None:
    case = MIXED_CASES[0]
    kernels = ["math", "auto", "cpu_flash", "math"]
    results = joined(run_ranks(case.ranks, lambda comm: run_rank(case, torch.float64, comm, kernel=kernels[comm.rank])))
    assert_close(case, torch.float64, results, oracle(case, torch.float64))


@both_exchanges
def test_every_run_gives_the_same_bits(exchange: str) -> None:
    """Whatever the order in which ranks get on."""
    for dtype in (torch.float32, torch.bfloat16):
        case = replace(PRECISE_CASES[0], exchange=exchange)
        first = run(case, dtype, with_lse=True)
        for _ in range(3):
            again = run(case, dtype, with_lse=True)
            assert all(torch.equal(a, b) for a, b in zip(first.each(), again.each(), strict=True))


@both_exchanges
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_refetched_rows_give_the_same_bits(dtype: torch.dtype, exchange: str) -> None:
    for case in (PRECISE_CASES[0], replace(PRECISE_CASES[2], semantics="torchscale", segment_lengths=(66, 400))):
        kept, again = (
            run(replace(case, exchange=exchange, refetch=refetch), dtype, with_lse=True) for refetch in (False, True)
        )
        assert all(torch.equal(a, b) for a, b in zip(kept.each(), again.each(), strict=True))


def test_one_rank_is_dilated_attention() -> None:
    """To the bit: the same tiles in the same order."""
    for case in MIXED_CASES:
        whole = case.over(1)
        alone = run_alone(whole, torch.float32, with_lse=True)
        ours = run(whole, torch.float32, with_lse=True)
        assert all(torch.equal(a, b) for a, b in zip(ours.each(), alone.each(), strict=True))


@both_exchanges
def test_autocast(exchange: str) -> None:
    """float32 shards are attended in autocast's dtype, and the backward outside of it gives float32 gradients."""
    case = replace(PRECISE_CASES[0], exchange=exchange)
    *qkv, cotangent = case.problem(torch.float32)

    def work(comm: Comm) -> list[Tensor]:
        shard = case.shard(comm.rank)
        leaves = [tensor[:, shard].detach().requires_grad_() for tensor in qkv]
        with torch.autocast("cpu", torch.bfloat16):
            out = dilated_ring_attention(*leaves, *case.pattern, group=comm, exchange=exchange)
        assert out.dtype == torch.bfloat16
        return [out, *torch.autograd.grad(out, leaves, cotangent[:, shard].bfloat16())]

    results = [torch.cat(rows, 1) for rows in zip(*run_ranks(case.ranks, work), strict=True)]
    expected = oracle(case, torch.bfloat16)
    for result, name, tolerance in zip(results, ("out", "dq", "dk", "dv"), (2e-2, 5e-2, 5e-2, 5e-2), strict=True):
        assert deviation(result, getattr(expected, name)) < tolerance, name
    assert [result.dtype for result in results] == [torch.bfloat16, *[torch.float32] * 3]


# ------------------------------------------------------------------------------------------------ autograd


def sharded(case: Case, tensors: list[Tensor], comm: Comm) -> list[Tensor]:
    """The rank's rows of these tensors."""
    return [tensor[:, case.shard(comm.rank)].detach() for tensor in tensors]


def over_all_ranks(case: Case, work: Callable[[Comm], list[Tensor]]) -> list[Tensor]:
    """What all ranks return, each of it put together along the sequence."""
    return [torch.cat(rows, 1) for rows in zip(*run_ranks(case.ranks, work), strict=True)]


@both_ways
@both_exchanges
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv", "qv"])
def test_only_some_inputs_require_gradients(wanted: str, exchange: str, refetch: bool) -> None:
    case = MIXED_CASES[0]
    *qkv, cotangent = case.problem(torch.float64)

    def work(comm: Comm) -> list[Tensor]:
        inputs = dict(zip("qkv", sharded(case, qkv, comm), strict=True))
        leaves = [inputs[name].requires_grad_() for name in wanted]
        out = dilated_ring_attention(*inputs.values(), *case.pattern, group=comm, exchange=exchange, refetch=refetch)
        return list(torch.autograd.grad(out, leaves, cotangent[:, case.shard(comm.rank)]))

    expected = oracle(case, torch.float64)
    for name, result in zip(wanted, over_all_ranks(case, work), strict=True):
        assert deviation(result, getattr(expected, f"d{name}")) < 1e-12


def test_ranks_may_differ_in_which_inputs_require_gradients() -> None:
    """Each gets the gradients it asks for: a frozen projection on one of them."""
    case = MIXED_CASES[0]
    *qkv, cotangent = case.problem(torch.float64)
    wanted = ["q", "kv", "v", "qkv"]

    def work(comm: Comm) -> dict[str, Tensor]:
        inputs = dict(zip("qkv", sharded(case, qkv, comm), strict=True))
        leaves = [inputs[name].requires_grad_() for name in wanted[comm.rank]]
        out = dilated_ring_attention(*inputs.values(), *case.pattern, group=comm)
        grads = torch.autograd.grad(out, leaves, cotangent[:, case.shard(comm.rank)])
        return dict(zip(wanted[comm.rank], grads, strict=True))

    expected = oracle(case, torch.float64)
    for rank, grads in enumerate(run_ranks(case.ranks, work)):
        for name, grad in grads.items():
            assert deviation(grad, getattr(expected, f"d{name}")[:, case.shard(rank)], floor=0.1) < 1e-12, (rank, name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@both_exchanges
def test_without_gradients(exchange: str, mode: Callable[[], torch.no_grad]) -> None:
    case = MIXED_CASES[0]
    query, key, value, _ = case.problem(torch.float64)

    def work(comm: Comm) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in sharded(case, [query, key, value], comm)]
        with mode():
            out = dilated_ring_attention(*leaves, *case.pattern, group=comm, exchange=exchange)
        assert not out.requires_grad
        return [out.clone()]

    (out,) = over_all_ranks(case, work)
    assert deviation(out, oracle(case, torch.float64).out) < 1e-12


@both_ways
@both_exchanges
def test_several_calls_in_one_graph(exchange: str, refetch: bool) -> None:
    """Two layers and a call beside them, differentiated at once: every exchange finds its own."""
    case = MIXED_CASES[0]
    other = ((5, 41), (1, 4))
    *qkv, cotangent = case.problem(torch.float64)

    def layers(attention: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        first = attention(query, key, value, *case.pattern)
        second = attention(first, key.sin(), first + value, *other, is_causal=True)
        return second * attention(query, query, value, *other)

    def by_definition(*arguments: object, **options: bool) -> Tensor:
        return reference.dilated_attention(*arguments, **options)[0]  # type: ignore[arg-type]

    def work(comm: Comm) -> list[Tensor]:
        def attention(*arguments: object, **options: bool) -> Tensor:
            return dilated_ring_attention(*arguments, group=comm, exchange=exchange, refetch=refetch, **options)  # type: ignore[call-overload,no-any-return]

        leaves = [tensor.requires_grad_() for tensor in sharded(case, qkv, comm)]
        out = layers(attention, *leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent[:, case.shard(comm.rank)])]

    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    out = layers(by_definition, *leaves)
    expected = [out, *torch.autograd.grad(out, leaves, cotangent)]
    for name, a, b in zip(("out", "dq", "dk", "dv"), over_all_ranks(case, work), expected, strict=True):
        assert deviation(a, b.detach()) < 1e-12, name


def test_backward_twice_over_a_kept_graph() -> None:
    case = MIXED_CASES[0]
    *qkv, cotangent = case.problem(torch.float64)

    def work(comm: Comm) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in sharded(case, qkv, comm)]
        out = dilated_ring_attention(*leaves, *case.pattern, group=comm)
        own = cotangent[:, case.shard(comm.rank)]
        first = torch.autograd.grad(out, leaves, own, retain_graph=True)
        second = torch.autograd.grad(out, leaves, 2 * own)
        assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
        return list(second)

    expected = oracle(case, torch.float64)
    for name, result in zip(("dq", "dk", "dv"), over_all_ranks(case, work), strict=True):
        assert deviation(result, 2 * getattr(expected, name)) < 1e-12


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensor-hooks", "reentrant"])
@both_exchanges
def test_activation_checkpointing(exchange: str, use_reentrant: bool) -> None:
    """The forward, its exchanges too, runs again on all ranks within the backward."""
    case = MIXED_CASES[0]
    *qkv, cotangent = case.problem(torch.float64)

    def work(comm: Comm) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in sharded(case, qkv, comm)]

        def layer(*tensors: Tensor) -> Tensor:
            return dilated_ring_attention(*tensors, *case.pattern, group=comm, exchange=exchange)

        out = checkpoint(layer, *leaves, use_reentrant=use_reentrant, preserve_rng_state=False)
        out.backward(cotangent[:, case.shard(comm.rank)])
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    expected = oracle(case, torch.float64)
    for name, result in zip(("out", "dq", "dk", "dv"), over_all_ranks(case, work), strict=True):
        assert deviation(result, getattr(expected, name)) < 1e-12, name


@both_exchanges
def test_only_the_lse_is_differentiated(exchange: str) -> None:
    case = replace(MIXED_CASES[0], exchange=exchange)
    *qkv, _ = case.problem(torch.float64)
    cotangent = case.lse_cotangent()

    def work(comm: Comm) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in sharded(case, qkv, comm)]
        _, aux = dilated_ring_attention(
            *leaves, *case.pattern, group=comm, exchange=exchange, return_aux=AuxRequest(lse=True)
        )
        return list(torch.autograd.grad(aux.lse, leaves, cotangent[:, :, case.shard(comm.rank)], allow_unused=False))

    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    _, lse = reference.dilated_attention(*leaves, *case.pattern)
    expected = torch.autograd.grad(lse, leaves, cotangent, materialize_grads=True)
    for name, a, b in zip(("dq", "dk", "dv"), over_all_ranks(case, work), expected, strict=True):
        assert (a - b).abs().max() < 1e-12, name


@both_exchanges
def test_a_change_in_place_before_backward_is_noticed(exchange: str) -> None:
    case = MIXED_CASES[0]

    def work(comm: Comm) -> None:
        leaves = [tensor.requires_grad_() for tensor in sharded(case, case.problem(torch.float32)[:3], comm)]
        key = leaves[1].clone()
        out = dilated_ring_attention(leaves[0], key, leaves[2], *case.pattern, group=comm, exchange=exchange)
        key.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.backward(torch.ones_like(out))

    run_ranks(case.ranks, work)


@pytest.mark.parametrize("cotangent_depends", [True, False], ids=["cotangent-depends", "cotangent-does-not"])
def test_second_derivatives_raise(cotangent_depends: bool) -> None:
    """An error and not a zero: also of a gradient penalty, whose cotangent depends on nothing."""
    case = MIXED_CASES[0]

    def work(comm: Comm) -> None:
        leaves = [tensor.requires_grad_() for tensor in sharded(case, case.problem(torch.float64)[:3], comm)]
        out = dilated_ring_attention(*leaves, *case.pattern, group=comm)
        cotangent = torch.ones_like(out, requires_grad=cotangent_depends)
        (grad,) = torch.autograd.grad(out, leaves[0], cotangent, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivatives are not defined|once_differentiable"):
            (out.sum() + grad.pow(2).sum()).backward()

    run_ranks(case.ranks, work)


def test_against_one_process_at_length() -> None:
    """Longer than the oracle can be: eight ranks beside one, every branch of which crosses bounds or none does."""
    case = Case(1, even_bounds(8192, 8), 4, 16, (512, 1024, 3000, 8192), (1, 2, 4, 8), True)
    plan = make_plan(case.bounds, *case.pattern, case.heads, is_causal=True)
    assert plan.exchanges[:2] == ("none", "none")
    assert "none" not in plan.exchanges[2:]
    ours, alone = run(case, torch.float64, with_lse=True), run_alone(case, torch.float64, with_lse=True)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert deviation(getattr(ours, name), getattr(alone, name)) < 1e-12, name
