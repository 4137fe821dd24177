"""Dropout over shards: each rank by random numbers of its own; the backward drops what the forward dropped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_processes
from ring_cases import EXCHANGES, MIXED_CASES, Case, Results, deviation, joined, run, run_alone, run_rank
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dilated_core.plan import SEMANTICS
from dilated_ring import dilated_ring_attention
from dilated_ring.comm import Comm, run_ranks
from dilated_ring.plan import even_bounds

both_exchanges = pytest.mark.parametrize("exchange", EXCHANGES[1:])
causal_or_not = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
CASE = MIXED_CASES[0]
KINDS = {
    "plain": CASE,
    "causal": replace(CASE, is_causal=True),
    "shared-keys-padded": replace(CASE, kv_heads=2, mask="random"),
    "grouped": CASE.meaning("grouped"),
    "torchscale": CASE.meaning("torchscale"),
}
every_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)


def seeded(case: Case, *seeds: int, dropout_p: float = 0.4, dtype: torch.dtype = torch.float64) -> Results:
    """All ranks' results; rank i draws by a generator of seed i, the only seed where there is one."""

    def work(comm: Comm) -> Results:
        generator = torch.Generator().manual_seed(seeds[comm.rank % len(seeds)])
        return run_rank(case, dtype, comm, with_lse=True, dropout_p=dropout_p, generator=generator)

    return joined(run_ranks(case.ranks, work))


def same(first: Results, second: Results) -> bool:
    """To the bit."""
    return all(torch.equal(a, b) for a, b in zip(first.each(), second.each(), strict=True))


# ------------------------------------------------------------------------------------------------ which and how many


def weights(case: Case, dropout_p: float, *, scores: float = 1.0) -> Tensor:
    """(heads, seq, seq): with the identity as values, a row of the output is a row of weights. All ranks' seeds equal.

    Args:
        scores: of which size; 0 for weights that are equal.
    """
    query, key, _, _ = replace(case, head_dim=case.seq).problem(torch.float64)
    identity = torch.eye(case.seq, dtype=torch.float64)[None, :, None].expand(key.shape)

    def work(comm: Comm) -> Tensor:
        shard = case.shard(comm.rank)
        return dilated_ring_attention(
            query[:, shard] * scores, key[:, shard], identity[:, shard], *case.pattern, group=comm, **case.options(),
            dropout_p=dropout_p, generator=torch.Generator().manual_seed(5), exchange=case.exchange,
        )  # fmt: skip

    return torch.cat(run_ranks(case.ranks, work), 1)[0].transpose(0, 1)


@both_exchanges
@causal_or_not
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_a_weight_is_dropped_or_enlarged(dropout_p: float, is_causal: bool, exchange: str) -> None:
    """Each is 0 or weight / (1 - p), and as many are 0 as p says, within five standard deviations."""
    case = Case(1, (0, 20, 45, 64), 4, 8, (64,), (1,), is_causal, exchange=exchange)
    whole, dropped = weights(case, 0.0), weights(case, dropout_p)
    alive, kept = whole > 0, dropped != 0
    assert not kept[~alive].any()
    torch.testing.assert_close(dropped[kept], whole[kept] / (1 - dropout_p), rtol=1e-12, atol=0)
    number = int(alive.sum())
    share = 1 - int(kept.sum()) / number
    assert abs(share - dropout_p) < 5 * (dropout_p * (1 - dropout_p) / number) ** 0.5


@both_exchanges
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("segment_length", [4, 8, 16, 32], ids=lambda w: f"w{w}")
def test_ranks_with_the_same_seed_drop_differently(segment_length: int, kv_heads: int, exchange: str) -> None:
    """Also segments and heads do, whether a segment lies in a shard or crosses."""
    case = Case(1, even_bounds(32, 4), 4, 8, (segment_length,), (1,), exchange=exchange, kv_heads=kv_heads)
    found = weights(case, 0.5, scores=0.0) != 0
    size = min(segment_length, 8)
    tiles = [
        tuple(found[head, row : row + size, start : start + segment_length].flatten().tolist())
        for head in range(4)
        for row in range(0, 32, size)
        for start in [row // segment_length * segment_length]
    ]
    assert len(set(tiles)) == len(tiles)


@both_exchanges
def test_branches_drop_apart(exchange: str) -> None:
    """A pair that two branches join has two weights, each dropped by itself: halves remain."""
    case = Case(1, even_bounds(32, 2), 2, 8, (32, 32), (1, 1), exchange=exchange)
    values = {round(value * 32, 9) for value in weights(case, 0.5, scores=0.0).flatten().tolist()}
    assert values == {0.0, 1.0, 2.0}


@both_exchanges
@every_kind
def test_lse_is_that_of_all_weights(case: Case, exchange: str) -> None:
    case = replace(case, exchange=exchange)
    whole, dropped = run(case, torch.float64, with_lse=True).lse, seeded(case, 3).lse
    torch.testing.assert_close(dropped, whole, rtol=0, atol=1e-13)


@both_exchanges
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_mean_is_the_output_without(semantics: str, exchange: str) -> None:
    """Over many seeds, in every place within five standard errors: dropout changes no expectation."""
    case = Case(1, (0, 7, 12, 19), 4, 3, (4, 19), (1, 2), kv_heads=2, mask="random", exchange=exchange)
    case = case.meaning(semantics)
    query, key, value, _ = case.problem(torch.float64)
    real = case.key_padding_mask()
    assert real is not None

    def work(comm: Comm) -> Tensor:
        shard = case.shard(comm.rank)
        generator = torch.Generator().manual_seed(comm.rank)
        return torch.stack(
            [
                dilated_ring_attention(
                    query[:, shard], key[:, shard], value[:, shard], *case.pattern, group=comm, **case.options(),
                    key_padding_mask=real[:, shard], dropout_p=0.3, generator=generator, exchange=exchange,
                )
                for _ in range(80)
            ]
        )  # fmt: skip

    draws = torch.cat(run_ranks(case.ranks, work), 2)
    expected = run_alone(case, torch.float64).out
    error = draws.std(0) / len(draws) ** 0.5
    # A row of one key is far from normally distributed, hence the width; rounding alone where nothing varies.
    assert ((draws.mean(0) - expected).abs() <= 5 * error + 1e-12).all()
    assert error.max() > 0


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("refetch", [False, True], ids=["kept", "refetched"])
@both_exchanges
@every_kind
def test_backward_drops_what_the_forward_dropped(case: Case, exchange: str, refetch: bool) -> None:
    """out is linear in value: out = W v, so <gradient of v, dv> is <cotangent, W dv>, exactly."""
    case = replace(case, exchange=exchange, refetch=refetch)
    query, key, value, cotangent = case.problem(torch.float64)
    real = case.key_padding_mask()
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def work(comm: Comm) -> tuple[float, float]:
        shard = case.shard(comm.rank)

        def attend(values: Tensor) -> Tensor:
            return dilated_ring_attention(
                query[:, shard], key[:, shard], values, *case.pattern, group=comm, **case.options(), dropout_p=0.4,
                generator=torch.Generator().manual_seed(7), exchange=exchange, refetch=refetch,
                key_padding_mask=None if real is None else real[:, shard],
            )  # fmt: skip

        leaf = value[:, shard].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(attend(leaf), leaf, cotangent[:, shard])
        return (gradient * direction[:, shard]).sum().item(), (
            attend(direction[:, shard]) * cotangent[:, shard]
        ).sum().item()

    by_gradient, by_output = (sum(terms) for terms in zip(*run_ranks(case.ranks, work), strict=True))
    size = direction.norm() * cotangent.norm()
    assert abs(by_gradient - by_output) < 1e-13 * size


@both_exchanges
@pytest.mark.parametrize(
    "case",
    [*list(KINDS.values())[:4], replace(CASE, segment_lengths=(41,), dilation_rates=(3,)).meaning("torchscale")],
    ids=[*list(KINDS)[:4], "torchscale-one-branch"],  # of several, the weights of the mixture take no gradient
)
def test_gradients_are_those_of_what_was_kept(case: Case, exchange: str) -> None:
    """Central differences, along a random direction, of the function that drops the same weights at every call."""
    case = replace(case, exchange=exchange)
    *qkv, cotangent = (tensor.nan_to_num(0.0, 0.0, 0.0) for tensor in case.problem(torch.float64))
    generator = torch.Generator().manual_seed(11)
    directions = [torch.randn(tensor.shape, generator=generator, dtype=torch.float64) for tensor in qkv]
    real = case.key_padding_mask()
    step = 1e-5

    def work(comm: Comm) -> tuple[float, float]:
        shard = case.shard(comm.rank)
        own, along = [[tensor[:, shard].detach() for tensor in tensors] for tensors in (qkv, directions)]

        def loss(*tensors: Tensor) -> Tensor:
            out = dilated_ring_attention(
                *tensors, *case.pattern, group=comm, **case.options(), dropout_p=0.4,
                generator=torch.Generator().manual_seed(7), exchange=exchange,
                key_padding_mask=None if real is None else real[:, shard],
            )  # fmt: skip
            return (out * cotangent[:, shard]).sum()

        ahead, behind = (
            loss(*(tensor + sign * step * way for tensor, way in zip(own, along, strict=True))).item()
            for sign in (1, -1)
        )
        grads = torch.autograd.grad(loss(*(tensor.requires_grad_() for tensor in own)), own)
        slope = sum((grad * way).sum().item() for grad, way in zip(grads, along, strict=True))
        return slope, (ahead - behind) / (2 * step)

    by_gradient, by_difference = (sum(terms) for terms in zip(*run_ranks(case.ranks, work), strict=True))
    assert abs(by_gradient - by_difference) < 1e-6 * max(1.0, abs(by_difference))


# ------------------------------------------------------------------------------------------------ the seed


@both_exchanges
@every_kind
def test_generators_decide(case: Case, exchange: str) -> None:
    """The same ones give the same bits, rows kept or gathered again; one rank's other seed gives others."""
    case = replace(case, exchange=exchange)
    first = seeded(case, 1, 2, 3, 4)
    assert same(first, seeded(case, 1, 2, 3, 4))
    assert same(first, seeded(replace(case, refetch=True), 1, 2, 3, 4))
    assert not torch.equal(first.out, seeded(case, 1, 2, 3, 5).out)
    assert not torch.equal(first.out, run(case, torch.float64).out)


def test_each_call_drops_anew() -> None:
    def work(comm: Comm) -> bool:
        generator = torch.Generator().manual_seed(1)
        outs = [run_rank(CASE, torch.float32, comm, dropout_p=0.4, generator=generator).out for _ in range(2)]
        return outs[0].numel() == 0 or not torch.equal(*outs)

    assert all(run_ranks(CASE.ranks, work))


def test_the_global_generator_moves_only_where_it_is_drawn_from() -> None:
    before = torch.get_rng_state()
    run(CASE, torch.float32)
    seeded(CASE, 1)
    assert torch.equal(torch.get_rng_state(), before)
    run(CASE, torch.float32, dropout_p=0.4)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both_exchanges
def test_any_dtype(exchange: str, dtype: torch.dtype) -> None:
    """The same weights are dropped whatever the dtype, so that float64 tells how exact the rest is."""
    case = replace(CASE, exchange=exchange)
    results, exact = (seeded(case, 1, dtype=each) for each in (dtype, torch.float64))
    # Inputs are rounded here, and not for the oracle's part.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.03}[dtype]
    for name in ("out", "dq", "dk", "dv"):
        assert deviation(getattr(results, name), getattr(exact, name)) < tolerance, name


# ------------------------------------------------------------------------------------------------ processes


def drop_on_processes(rank: int, case: Case) -> tuple[Results, bool]:
    """What generators decide here; and whether a checkpointed call drops again what it dropped."""
    generator = torch.Generator().manual_seed(3)
    *qkv, cotangent = (tensor[:, case.shard(rank)].detach() for tensor in case.problem(torch.float64))
    runs = []
    for recomputed in (False, True):
        torch.manual_seed(rank)
        leaves = [tensor.clone().requires_grad_() for tensor in qkv]

        def call(*tensors: Tensor) -> Tensor:
            return dilated_ring_attention(*tensors, *case.pattern, dropout_p=0.4, exchange=case.exchange)

        out = checkpoint(call, *leaves, use_reentrant=False) if recomputed else call(*leaves)
        out.backward(cotangent)
        runs.append([out.detach(), *(leaf.grad for leaf in leaves)])
    again = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    return run_rank(case, torch.float64, None, with_lse=True, dropout_p=0.4, generator=generator), again


@pytest.mark.slow
@both_exchanges
def test_processes_drop_what_threads_drop(exchange: str, tmp_path: Path) -> None:
    case = replace(CASE, exchange=exchange)
    parts, again = zip(*run_processes(case.ranks, drop_on_processes, case, tmp_path=tmp_path), strict=True)
    assert same(joined(parts), seeded(case, 3))
    assert all(again)
