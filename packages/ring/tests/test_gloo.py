"""dilated_ring_attention on real processes over gloo: the oracle's results, any kind of group, and the bytes sent.

Starting processes takes longer than what they compute, so each start runs many cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import run_processes
from ring_cases import EXCHANGES, MASKS, MIXED_CASES, Case, Results, assert_close, joined, oracle, run_rank
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

from dilated_core import dilated_attention
from dilated_core.plan import SEMANTICS
from dilated_ring import dilated_ring_attention, make_plan
from dilated_ring.comm import Comm, ProcessGroupComm, Record, RecordingComm, run_ranks
from dilated_ring.plan import even_bounds

pytestmark = pytest.mark.slow

# A mask and refetch or not come with each, in turns.
COMBINATIONS = list(itertools.product(SEMANTICS, (False, True), EXCHANGES))


def cases_over(ranks: int) -> list[Case]:
    """Problems over as many shards: primes, shared heads, empty and uneven shards, less positions than ranks."""
    mixed = replace(MIXED_CASES[0], kv_heads=2).over(ranks)
    found = []
    for number, (semantics, is_causal, exchange) in enumerate(COMBINATIONS):
        mask = MASKS[number % len(MASKS)]
        case = replace(mixed, is_causal=is_causal, exchange=exchange, mask=mask, refetch=number % 3 == 0)
        found.append(case.meaning(semantics))
    prime = Case(1, even_bounds(97, ranks), 5, 8, (16, 50, 97), (1, 3, 4))
    uneven = replace(prime, bounds=(0, *sorted((17 * rank * rank) % 97 for rank in range(ranks - 1)), 97))
    few = replace(prime, bounds=even_bounds(ranks - 1, ranks))
    for case in (prime, uneven, few):
        found += [replace(case, exchange="heads"), replace(case, exchange="gather", is_causal=True, refetch=True)]
    return found


def run_all(rank: int, cases: list[Case], dtype: torch.dtype) -> list[Results]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # NaN where nothing was written
    return [run_rank(case, dtype, None, with_lse=True) for case in cases]


@pytest.mark.parametrize(
    ("ranks", "some"), [(2, slice(None)), (3, slice(0, None, 2)), (4, slice(1, None, 2)), (8, slice(0, None, 2))]
)
def test_processes_agree_with_the_oracle(ranks: int, some: slice, tmp_path: Path) -> None:
    """Two ranks in every case, more in every other one."""
    cases = cases_over(ranks)[some]
    by_rank = run_processes(ranks, run_all, cases, torch.float64, tmp_path=tmp_path)
    for case, *parts in zip(cases, *by_rank, strict=True):
        assert_close(case, torch.float64, joined(parts), oracle(case, torch.float64, with_lse=True))


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run_every_dtype(rank: int, cases: list[Case]) -> list[list[Results]]:
    return [run_all(rank, cases, dtype) for dtype in DTYPES]


def test_every_dtype(tmp_path: Path) -> None:
    cases = [replace(case, head_dim=32) for case in cases_over(2)[::2]]
    by_rank = run_processes(2, run_every_dtype, cases, tmp_path=tmp_path)
    for dtype, *results in zip(DTYPES, *by_rank, strict=True):
        for case, *parts in zip(cases, *results, strict=True):
            assert_close(case, dtype, joined(parts), oracle(case, dtype, with_lse=True))


def run_known_bounds(rank: int, case: Case) -> list[Results]:
    """With bounds given, agreed on or not."""
    return [
        run_rank(case, torch.float64, None, with_lse=True, bounds=case.bounds, verify=verify)
        for verify in (True, False)
    ]


def test_bounds_given_and_no_agreement(tmp_path: Path) -> None:
    case = cases_over(3)[-2]
    by_rank = run_processes(3, run_known_bounds, case, tmp_path=tmp_path)
    for parts in zip(*by_rank, strict=True):
        assert_close(case, torch.float64, joined(parts), oracle(case, torch.float64, with_lse=True))


# ------------------------------------------------------------------------------------------------ groups

SUBGROUPS = ((1, 3), (2, 0))


def run_in_groups(rank: int, case: Case) -> dict[str, Results]:
    """Two groups of two at a time: made from ranks, and as dimensions of a mesh; and a sum over all beside them."""
    groups = [distributed.new_group(list(ranks)) for ranks in SUBGROUPS]
    own = next(group for group, ranks in zip(groups, SUBGROUPS, strict=True) if rank in ranks)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    results = {
        "subgroup": run_rank(case, torch.float64, own),
        "mesh": run_rank(case, torch.float64, mesh["sequence"]),
        "other dimension": run_rank(case, torch.float64, mesh["data"]),
        "comm": run_rank(case, torch.float64, ProcessGroupComm(own)),
    }
    total = torch.ones(1)
    distributed.all_reduce(total)
    assert total.item() == 4
    return results


def test_subgroups_and_dimensions_of_a_mesh(tmp_path: Path) -> None:
    """Ranks are those in the group, in the order that the group gives them."""
    case = replace(MIXED_CASES[0].over(2), bounds=(0, 15, 41))
    results = run_processes(4, run_in_groups, case, tmp_path=tmp_path)
    expected = oracle(case, torch.float64)
    members = {
        # PyTorch sorts a group's ranks.
        "subgroup": [sorted(ranks) for ranks in SUBGROUPS],
        "comm": [sorted(ranks) for ranks in SUBGROUPS],
        "mesh": [[0, 1], [2, 3]],
        "other dimension": [[0, 2], [1, 3]],
    }
    for kind, groups in members.items():
        for ranks in groups:
            assert_close(case, torch.float64, joined([results[rank][kind] for rank in ranks]), expected)


# ------------------------------------------------------------------------------------------------ bytes


def recorded(comm: Comm, case: Case) -> list[Record]:
    """Every exchange of one forward and backward, as the rank saw it."""
    recording = RecordingComm(comm)
    run_rank(case, torch.float32, recording, with_lse=True)
    return recording.records


def record(rank: int, cases: list[Case]) -> list[list[Record]]:
    group = distributed.group.WORLD
    assert group is not None
    return [recorded(ProcessGroupComm(group), case) for case in cases]


def test_processes_send_what_threads_send_and_the_plan_says(tmp_path: Path) -> None:
    """Exchange by exchange, byte by byte; what one sends is what the other gets."""
    ranks = 4
    cases = cases_over(ranks)
    on_gloo = run_processes(ranks, record, cases, tmp_path=tmp_path)
    for case, *by_rank in zip(cases, *on_gloo, strict=True):
        assert run_ranks(ranks, lambda comm, case=case: recorded(comm, case)) == by_rank, case
        for exchanges in zip(*by_rank, strict=True):
            assert len({each.purpose for each in exchanges}) == 1
            for source in range(ranks):
                for destination in range(ranks):
                    assert exchanges[source].sent[destination] == exchanges[destination].received[source]
        assert_as_planned(case, by_rank)


def assert_as_planned(case: Case, by_rank: list[list[Record]]) -> None:
    """Of every rank, phase and branch, what RingPlan.bytes says."""
    plan = make_plan(
        case.bounds,
        *case.pattern,
        case.heads,
        kv_heads=case.kv_heads,
        is_causal=case.is_causal,
        semantics=case.semantics,
        exchange=case.exchange,
    )
    for phase in ("forward", "backward"):
        planned = plan.bytes(
            torch.float32,
            case.head_dim,
            batch=case.batch,
            phase=phase,
            masked=case.mask != "none",
            refetch=case.refetch,
            with_lse=True,
        )
        for rank, records in enumerate(by_rank):
            for branch in range(len(case.segment_lengths)):
                own = [each for each in records if (each.purpose.phase, each.purpose.branch) == (phase, branch)]
                assert sum(sum(each.received) for each in own) == planned.received[rank][branch], (case, phase)
                assert sum(sum(each.sent) for each in own) == planned.sent[rank][branch], (case, phase)


# ------------------------------------------------------------------------------------------------ training


def train(
    attention: Callable[..., Tensor], case: Case, positions: slice, *, sharded: bool, steps: int = 4
) -> list[Tensor]:
    """The weights of three projections after a few steps, on these positions of the sequence."""
    torch.manual_seed(0)
    leaves = [torch.randn(case.head_dim, case.head_dim, dtype=torch.float64).requires_grad_() for _ in range(3)]
    sequence, target, *_ = (tensor[:, positions] for tensor in case.problem(torch.float64))
    for _ in range(steps):
        out = attention(*(sequence @ leaf for leaf in leaves), *case.pattern)
        grads = torch.autograd.grad((out - target).pow(2).sum(), leaves)
        for leaf, grad in zip(leaves, grads, strict=True):
            if sharded:
                distributed.all_reduce(grad)
            leaf.data.sub_(grad, alpha=1e-3)
    return [leaf.detach() for leaf in leaves]


def train_sharded(rank: int, case: Case) -> list[Tensor]:
    def attention(*arguments: object) -> Tensor:
        return dilated_ring_attention(*arguments, exchange=case.exchange)  # type: ignore[call-overload,no-any-return]

    return train(attention, case, case.shard(rank), sharded=True)


def test_training_is_that_of_one_process_and_gives_the_same_bits_again(tmp_path: Path) -> None:
    case = Case(1, (0, 20, 20, 41), 4, 8, (8, 20, 90), (1, 3, 7), exchange="heads")
    alone = train(dilated_attention, case, slice(0, case.seq), sharded=False)
    first, again = (run_processes(case.ranks, train_sharded, case, tmp_path=tmp_path) for _ in range(2))
    for rank in range(case.ranks):
        for ours, same, ours_on_0, expected in zip(first[rank], again[rank], first[0], alone, strict=True):
            assert torch.equal(ours, same)
            assert torch.equal(ours, ours_on_0)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
