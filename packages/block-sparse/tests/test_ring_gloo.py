"""block_sparse_ring_attention on real processes over gloo: the oracle's results, and the bytes that the plan says.

Starting processes takes longer than what they compute, so each start runs many cases.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from ring_cases import KINDS, SHARES, Case, Results, assert_close, joined, oracle, run_rank
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.modules import BlockSparseMultiheadAttention
from dilated_block_sparse.ring import BlockSparseRingMultiheadAttention, BlockSparseRingPlan
from dilated_ring import DisagreementError
from dilated_ring.comm import ProcessGroupComm, Record, RecordingComm

pytestmark = pytest.mark.slow

T = TypeVar("T")
SECONDS = 300.0  # for processes to start, to compute and to end, on a slow and busy machine


def run_processes(size: int, work: Callable[..., T], *args: object, tmp_path: Path) -> list[T]:
    """What ``work(rank, *args)`` returns in ``size`` processes that form a gloo group; none of them outlives this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed.device_mesh", "pytest", "hypothesis", "dilated_block_sparse.ring"]
    )
    processes = [
        context.Process(target=_member, args=(rank, size, tmp_path, work, args), daemon=True) for rank in range(size)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(SECONDS + 5)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    reports = [tmp_path / f"{rank}.report" for rank in range(size)]
    found = [pickle.loads(report.read_bytes()) if report.exists() else (None, "no report") for report in reports]
    assert not any(told for _, told in found), "\n".join(f"rank {rank}: {told}" for rank, (_, told) in enumerate(found))
    return [result for result, _ in found]


def _member(rank: int, size: int, folder: Path, work: Callable[..., object], args: tuple[object, ...]) -> None:
    """What a process does: join the group, work, and write down what came of it."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # NaN where nothing was written
    report: tuple[object, str]
    try:
        patience = timedelta(seconds=SECONDS / 2)
        distributed.init_process_group("gloo", f"file://{folder / 'store'}", patience, size, rank)
        report = work(rank, *args), ""
        distributed.barrier()  # so that none closes its connections while another still reads from them
        distributed.destroy_process_group()
    except BaseException:
        report = None, traceback.format_exc()
    (folder / f"{rank}.report").write_bytes(pickle.dumps(report))
    os._exit(0)  # a group that was given up may keep a thread that waits


def cases_over(ranks: int) -> list[Case]:
    """Every kind of layout, each share of heads, causal or not, empty and uneven shards, fewer blocks than ranks."""
    mixed = Case(2, (0, 61), (8, 4), 4, 8, kv_heads=2)
    found = [
        replace(mixed, kind=kind, share=share, is_causal=(number + at) % 2 == 0, refetch=at == 1, mask=mask).over(ranks)
        for number, (kind, mask) in enumerate(zip(KINDS, ("none", "random", "shards") * 2, strict=True))
        for at, share in enumerate(SHARES)
    ]
    uneven = replace(mixed, bounds=(0, *sorted((17 * rank * rank) % 61 for rank in range(ranks - 1)), 61))
    return [*found, uneven, replace(uneven, bounds=(0, 13), kind="full").over(ranks)]


def run_all(rank: int, cases: list[Case], dtype: torch.dtype) -> list[Results]:
    return [run_rank(case, dtype, None) for case in cases]


@pytest.mark.parametrize("ranks", [2, 4])
def test_processes_agree_with_the_oracle(ranks: int, tmp_path: Path) -> None:
    cases = cases_over(ranks)
    by_rank = run_processes(ranks, run_all, cases, torch.float64, tmp_path=tmp_path)
    for case, *parts in zip(cases, *by_rank, strict=True):
        assert_close(case, torch.float64, joined(parts), oracle(case, torch.float64))


def run_more(rank: int, cases: list[Case]) -> dict[str, Any]:
    """Other dtypes, known bounds, a mesh, what is recorded, and what happens where ranks differ."""
    group = distributed.group.WORLD
    assert group is not None
    found: dict[str, Any] = {str(dtype): run_all(rank, cases, dtype) for dtype in (torch.float32, torch.bfloat16)}
    found["bounds"] = [
        run_rank(case, torch.float64, None, bounds=case.bounds, verify=verify)
        for case, verify in zip(cases, (True, False), strict=True)
    ]
    found["records"] = [recorded(case, ProcessGroupComm(group)) for case in cases]
    try:
        run_rank(cases[0], torch.float64, None, is_causal=bool(rank))
    except DisagreementError as error:
        found["told"] = str(error)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("sequence", "data"))
    found["mesh"] = run_rank(cases[0], torch.float64, ProcessGroupComm(mesh["sequence"].get_group()))
    found["trained"] = train(rank)
    return found


def recorded(case: Case, comm: ProcessGroupComm) -> list[Record]:
    recording = RecordingComm(comm)
    run_rank(case, torch.float32, recording)
    return recording.records


LAYOUT = BlockLayout.from_rows([[0], [0, 1], [1, 2], [0, 2, 3]], 30, 30, block_size=8)


def train(rank: int | None) -> list[Tensor]:
    """Weights after a few steps, on rank's half of a sequence or, None, on all of it."""
    torch.manual_seed(0)
    module: BlockSparseMultiheadAttention
    options = {"dtype": torch.float64, "is_causal": True}
    if rank is None:
        module = BlockSparseMultiheadAttention(16, 2, LAYOUT, **options)  # type: ignore[arg-type]
    else:
        module = BlockSparseRingMultiheadAttention(16, 2, LAYOUT, **options)  # type: ignore[arg-type]
    positions = slice(0, 30) if rank is None else slice(16 * rank, 16 * rank + 16)
    tokens, target = (tensor[:, positions] for tensor in torch.randn(2, 1, 30, 16, dtype=torch.float64))
    parameters = list(module.parameters())
    for _ in range(3):
        out, _ = module(tokens)
        for parameter, grad in zip(
            parameters, torch.autograd.grad((out - target).pow(2).sum(), parameters), strict=True
        ):
            if rank is not None:
                distributed.all_reduce(grad)
            parameter.data.sub_(grad, alpha=1e-2)
    return [parameter.detach() for parameter in parameters]


def test_dtypes_bounds_meshes_bytes_differences_and_training(tmp_path: Path) -> None:
    cases = [
        Case(2, (0, 32, 61), (8, 4), 4, 32, kv_heads=2, share="key", mask="random"),
        Case(1, (0, 16, 45), (8, 8), 4, 32, is_causal=True, refetch=True),
    ]
    first, second = run_processes(2, run_more, cases, tmp_path=tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        for case, *parts in zip(cases, first[str(dtype)], second[str(dtype)], strict=True):
            assert_close(case, dtype, joined(parts), oracle(case, dtype))
    for case, *parts in zip(cases, first["bounds"], second["bounds"], strict=True):
        assert_close(case, torch.float64, joined(parts), oracle(case, torch.float64))
    parts = [first["mesh"], second["mesh"]]
    assert_close(cases[0], torch.float64, joined(parts), oracle(cases[0], torch.float64))
    assert first["told"] == second["told"]
    assert "is_causal is False on rank 0, True on rank 1" in first["told"]
    for case, *records in zip(cases, first["records"], second["records"], strict=True):
        plan = BlockSparseRingPlan(case.layout(), case.bounds, kv_heads=case.key_heads, is_causal=case.is_causal)
        for phase in ("forward", "backward"):
            sizes = {"batch": case.batch, "phase": phase, "masked": case.mask != "none", "refetch": case.refetch}
            figures = plan.bytes(torch.float32, case.head_dim, **sizes)
            assert figures.total > 0
            for rank, own in enumerate(records):
                received = sum(sum(record.received) for record in own if record.purpose.phase == phase)
                assert received == figures.of(rank), (case, phase)
    for ours, others, alone in zip(first["trained"], second["trained"], train(None), strict=True):
        assert torch.equal(ours, others)
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-12)
