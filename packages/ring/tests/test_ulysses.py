"""ring_attention by exchange of heads (Ulysses), alone and beside a ring on a mesh of two dimensions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_cases import Way, check, dense, errors_of, joined, problems, run, run_rank, run_team
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_processes
from ring_cases import MASKS, Case, assert_close, deviation, oracle
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dilated_core.resources import NO_RESOURCES
from dilated_ring.comm import Comm, RecordingComm, run_ranks
from dilated_ring.dense import Team, ring_attention
from dilated_ring.dense.sharding import pieces_of
from dilated_ring.dense.ulysses import HeadExchange
from dilated_ring.errors import DisagreementError
from dilated_ring.plan import even_bounds

causal_or_not = pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
both_balances = pytest.mark.parametrize("balance", ["contiguous", "head_tail"])
SHAPES = [(1, 2), (1, 3), (1, 8), (2, 2), (2, 3), (3, 2), (4, 2)]
teams = st.builds(
    Way, st.integers(1, 3), st.integers(1, 4), st.sampled_from(["contiguous", "head_tail"]), st.booleans()
)


# ------------------------------------------------------------------------------------------------ exact


@both_balances
@causal_or_not
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seq", [1, 5, 41])
def test_forward_and_gradients(seq: int, shape: tuple[int, int], is_causal: bool, balance: str) -> None:
    """3 heads: they divide by no number of ranks here, and of 8 ranks most have none."""
    check(dense(2, seq, 3, 8, is_causal=is_causal), Way(*shape, balance), with_lse=False)


@both_balances
@causal_or_not
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("shape", "kv_heads"),
    [((1, 2), 3), ((1, 4), 1), ((2, 2), None), ((2, 2), 3)],
    ids=["1x2-shared-keys", "1x4-one-key", "2x2-own-keys", "2x2-shared-keys"],
)
def test_every_combination_of_options(
    shape: tuple[int, int], kv_heads: int | None, mask: str, is_causal: bool, balance: str
) -> None:
    bounds = even_bounds(31, shape[0] * shape[1])
    case = dense(3, 31, 6, 5, bounds=bounds, kv_heads=kv_heads, mask=mask, is_causal=is_causal)
    check(case, Way(*shape, balance))


@settings(max_examples=40)
@given(problem=problems(teams))
def test_any_problem(problem: tuple[Case, Way]) -> None:
    check(*problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (2, 2)], ids=str)
def test_other_dtypes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(dense(2, 101, 4, 16, kv_heads=2, is_causal=True, mask="random"), Way(*shape), dtype)


@pytest.mark.parametrize("shape", [(0, 9, 2, 4), (2, 0, 2, 4), (1, 9, 0, 4)], ids=["batch", "seq", "heads"])
def test_nothing_to_attend(shape: tuple[int, ...]) -> None:
    batch, seq, heads, head_dim = shape
    results = run(dense(batch, seq, heads, head_dim), Way(2, 2), with_lse=False)
    assert all(result.shape == shape and not result.any() for result in (results.out, results.dq, results.dk))


@both_balances
def test_lse_where_no_loss_uses_the_output_and_the_other_way_round(balance: str) -> None:
    """Every rank exchanges the same kinds of gradients, though each has another kind."""
    case, way = dense(1, 13, 4, 4, is_causal=True), Way(2, 2, balance)
    both = run(case, way)
    out_only = run(case, way, with_lse=False)

    def work(team: Team, wants: Callable[[int], bool]) -> Any:
        return run_rank(case, torch.float64, team, way, team.rank, with_lse=wants(team.rank))

    # The lse's gradient of even ranks, and of odd ones, add up to that of all.
    even, odd = (
        joined(run_team(way, lambda team, rest=rest: work(team, lambda rank: rank % 2 == rest)), way) for rest in (0, 1)
    )
    for name in ("dq", "dk", "dv"):
        found = getattr(even, name) + getattr(odd, name) - getattr(out_only, name)
        assert deviation(found, getattr(both, name)) < 1e-12, name


def test_the_way_back_is_the_inverse() -> None:
    """Rows to heads and back changes nothing, of tensors of several dtypes, over shards in two pieces."""
    shards = pieces_of((0, 3, 7, 11), "head_tail")

    def work(comm: Comm) -> None:
        generator = torch.Generator().manual_seed(comm.rank)
        rows = 4 if comm.rank else 3
        tensors = [
            torch.randn(2, rows, 5, 3, generator=generator),
            torch.randn(2, rows, 5, generator=generator, dtype=torch.float64),
            torch.rand(2, rows, 5, generator=generator) < 0.5,
        ]
        exchange = HeadExchange(comm, shards, 5, NO_RESOURCES)
        gathered = exchange.to_heads(tensors, "these", "there")
        assert [tensor.shape[:3] for tensor in gathered] == [(2, 11, 1 if comm.rank == 2 else 2)] * 3
        for tensor, again in zip(tensors, exchange.to_rows(gathered, "these", "back"), strict=True):
            assert torch.equal(tensor, again)

    run_ranks(3, work)


# ------------------------------------------------------------------------------------------------ traffic


def test_a_rank_receives_its_heads_and_gets_its_rows_back() -> None:
    """(m - 1) / m of a shard's q, k, v and results, and of their gradients: less the more ranks there are."""
    ranks, rows, heads, head_dim = 4, 3, 8, 4

    def work(comm: Comm) -> dict[str, int]:
        recording = RecordingComm(comm)
        query = torch.randn(1, rows, heads, head_dim, requires_grad=True)
        options: dict[str, Any] = {"bounds": range(0, 13, 3), "verify": False, "mode": "all_to_all"}
        ring_attention(query, query, query, group=recording, **options).sum().backward()
        found: dict[str, int] = {}
        for record in recording.records:
            name = f"{record.purpose.what}, {record.purpose.phase}"
            found[name] = found.get(name, 0) + sum(record.received)
        return found

    shard = (ranks - 1) * rows * heads // ranks * 4  # of a number a head and row, from the others
    expected = {
        "queries, keys and values, forward": 3 * head_dim * shard,
        "results, forward": (head_dim + 1) * shard,
        "gradients of results, backward": head_dim * shard,
        "gradients, backward": 3 * head_dim * shard,
    }
    assert run_ranks(ranks, work) == [expected] * ranks


# ------------------------------------------------------------------------------------------------ errors


def call(team: Team, heads: int = 4, **options: Any) -> Tensor:
    tensor = torch.ones(1, 3, heads, 4)
    result: Tensor = ring_attention(tensor, tensor, tensor, group=team, **options)
    return result


@pytest.mark.parametrize("different", range(4))
def test_on_a_mesh_a_difference_is_told_to_all(different: int) -> None:
    row, other = different // 2, "heads is .* on rank 0, .* on rank 1"
    found = errors_of(Way(2, 2), lambda team: call(team, heads=2 if team.rank == different else 4))
    for error in found:
        with pytest.raises(DisagreementError, match=f"in row {row} of the mesh, the ranks .*: {other}"):
            raise error or AssertionError("no error")


def test_on_a_mesh_rows_may_differ_from_each_other() -> None:
    found = errors_of(Way(2, 2), lambda team: call(team, heads=2 + team.rank // 2))
    for rank, error in enumerate(found):
        message = f"in column {rank % 2} of the mesh, the ranks .*: heads is 2 on rank 0, 3 on rank 1"
        with pytest.raises(DisagreementError, match=message):
            raise error or AssertionError("no error")


@pytest.mark.parametrize("wrong", range(4))
def test_on_a_mesh_bad_arguments_of_one_rank_are_told_to_all(wrong: int) -> None:
    found = errors_of(Way(2, 2), lambda team: call(team, scale="large" if team.rank == wrong else None))
    for rank, error in enumerate(found):
        kind, message = (TypeError, "scale: expected a float") if rank == wrong else (DisagreementError, "refused its")
        with pytest.raises(kind, match=message):
            raise error or AssertionError("no error")


def test_on_a_mesh_the_mode_is_the_mesh() -> None:
    for error in errors_of(Way(2, 2), lambda team: call(team, mode="all_to_all")):
        with pytest.raises(ValueError, match='mode: expected "ring" with a mesh of two dimensions'):
            raise error or AssertionError("no error")


def test_one_device_exchanges_with_nobody() -> None:
    tensor = torch.ones(1, 3, 2, 4)
    with pytest.raises(ValueError, match='mode: expected "ring" with ring_size, got "all_to_all"'):
        ring_attention(tensor, tensor, tensor, ring_size=2, mode="all_to_all")


# ------------------------------------------------------------------------------------------------ processes

REAL = dense(2, 31, 6, 8, kv_heads=3, is_causal=True, mask="right")


def on_processes(rank: int, shape: tuple[int, int], balance: str) -> Any:
    way = Way(*shape, balance)
    if way.ring == 1:
        return run_rank(REAL, torch.float64, None, way, rank, with_lse=True, mode="all_to_all")
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ring", "heads"))
    return run_rank(REAL, torch.float64, mesh, way, rank, with_lse=True)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "balance"), [((1, 2), "contiguous"), ((2, 2), "head_tail")], ids=str)
def test_processes(shape: tuple[int, int], balance: str, tmp_path: Path) -> None:
    results = run_processes(shape[0] * shape[1], on_processes, shape, balance, tmp_path=tmp_path)
    assert_close(REAL, torch.float64, joined(results, Way(*shape, balance)), oracle(REAL, torch.float64, with_lse=True))
