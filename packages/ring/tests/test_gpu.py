"""What a device shows: rings over one rank of NCCL and over threads, chunks, streams and graphs, against the oracle.

All but the graphs and the streams run on the CPU too, with gloo for NCCL, so that what is run on a card is right here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_cases import Way, dense, parts, run_team
from dense_cases import joined as joined_dense
from ring_cases import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, Case, Results, assert_close, deviation, joined, oracle
from torch import Tensor, distributed

from dilated_core import AuxRequest, MultiheadDilatedAttention
from dilated_core.resources import NO_RESOURCES
from dilated_core.span import Options
from dilated_ring import RingMultiheadDilatedAttention, dilated_ring_attention, ring_attention, streamed_attention
from dilated_ring.comm import Comm, ProcessGroupComm, Purpose, run_ranks
from dilated_ring.comm.agreement import _from_all
from dilated_ring.dense import Team
from dilated_ring.dense.attention import Call, Inputs, Rank, Shard
from dilated_ring.dilated import engine
from dilated_ring.plan import even_bounds, make_plan

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PLACES = [
    *(pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in (torch.float64, torch.bfloat16)),
    *(pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu) for dtype in DTYPES),
]
# A card's matrix units make a float32 product of several shorter ones, and sum in another order.
SLACK = {torch.float64: 10.0, torch.float32: 10.0, torch.bfloat16: 2.0, torch.float16: 2.0}

DILATED = [
    Case(2, (0, 97), 4, 32, (16, 50, 97), (1, 2, 4)),
    Case(1, (0, 97), 8, 64, (16, 50, 97), (1, 2, 4), is_causal=True, kv_heads=2),
    Case(2, (0, 61), 4, 16, (8, 61), (1, 3), mask="random"),
]
DENSE = [
    dense(2, 97, 4, 32),
    dense(1, 97, 8, 64, is_causal=True, kv_heads=2),
    dense(2, 61, 4, 16, is_causal=True, mask="right"),
]


@pytest.fixture
def group(device: str, tmp_path: Path) -> Iterator[None]:
    """The default group, of this process alone: NCCL's on CUDA, gloo's on the CPU."""
    place: dict[str, Any] = {"device_id": torch.device("cuda", 0)} if device == "cuda" else {}
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{tmp_path}/store",
        timeout=timedelta(seconds=60),
        rank=0,
        world_size=1,
        **place,
    )
    yield
    distributed.destroy_process_group()


def on_cpu(results: Results) -> Results:
    return Results(*(getattr(results, name).cpu() for name in ("out", "lse", "dq", "dk", "dv")))


def check(case: Case, dtype: torch.dtype, device: str, results: Results) -> None:
    slack = 1.0 if device == "cpu" else SLACK[dtype]
    assert_close(case, dtype, on_cpu(results), oracle(case, dtype, with_lse=True), slack=slack)


def differentiated(case: Case, dtype: torch.dtype, device: str, attend: Callable[..., Any]) -> Results:
    """``attend(query, key, value, **options)`` and its gradients, under random cotangents."""
    *qkv, cotangent = (tensor.to(device) for tensor in case.problem(dtype))
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    real = case.key_padding_mask()
    options = {
        "is_causal": case.is_causal,
        "enable_gqa": case.kv_heads is not None,
        "key_padding_mask": None if real is None else real.to(device),
    }
    out, aux = attend(*leaves, return_aux=AuxRequest(lse=True), **options)
    # Rows without a key have lse -inf, whose gradient is 0: give them no cotangent.
    of_lse = case.lse_cotangent().to(aux.lse).masked_fill(aux.lse == -torch.inf, 0.0)
    return Results(out.detach(), aux.lse.detach(), *torch.autograd.grad([out, aux.lse], leaves, [cotangent, of_lse]))


# ------------------------------------------------------------------------------------------------ one rank


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("case", DILATED, ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_dilated_ring_of_one_rank_is_the_definition(case: Case, dtype: torch.dtype, device: str) -> None:
    for bounds in (None, case.bounds):
        results = differentiated(
            case, dtype, device, lambda *qkv, **options: dilated_ring_attention(*qkv, *case.pattern, **options)
        )
        check(case, dtype, device, results)
        assert results.out.device.type == device, bounds


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("mode", ["ring", "all_to_all"])
@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_dense_ring_of_one_rank_is_the_definition(case: Case, dtype: torch.dtype, mode: str, device: str) -> None:
    check(case, dtype, device, differentiated(case, dtype, device, lambda *a, **o: ring_attention(*a, mode=mode, **o)))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("device", DEVICES)
def test_an_exchange_brings_what_was_sent(device: str) -> None:
    """Each dtype that travels, nothing at all, and two on their way at once."""
    comm = ProcessGroupComm(distributed.group.WORLD)  # type: ignore[arg-type]
    assert comm.device.type == device
    for dtype in (*DTYPES, torch.uint8, torch.int64):
        sent = [torch.arange(count, device=device).to(dtype) for count in (1000, 0, 7)]
        received = [torch.full_like(tensor, 9) for tensor in sent]
        transfers = [
            comm.exchange(into, tensor, [len(tensor)], [len(tensor)], Purpose("numbers", "forward"))
            for into, tensor in zip(received, sent, strict=True)
        ]
        for transfer, into, tensor in zip(transfers, received, sent, strict=True):
            transfer.wait()
            assert torch.equal(into, tensor), dtype
    header = torch.arange(8)
    assert [part.tolist() for part in _from_all(comm, header)] == [header.tolist()]


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("device", DEVICES)
def test_a_multihead_ring_of_one_rank_is_the_module_without_one(device: str) -> None:
    sizes = (64, 4, [32, 64], [1, 2])
    ring = RingMultiheadDilatedAttention(*sizes, device=device, is_causal=True)
    alone = MultiheadDilatedAttention(*sizes, device=device, is_causal=True)
    alone.load_state_dict(ring.state_dict())
    hidden = torch.randn(2, 100, 64, device=device)
    padding = torch.rand(2, 100, device=device) < 0.3
    for mask in (None, padding):
        expected = alone(hidden, key_padding_mask=mask)[0]
        torch.testing.assert_close(ring(hidden, key_padding_mask=mask)[0], expected)


# ------------------------------------------------------------------------------------------------ ranks as threads
# The engines, forward and backward. Not through autograd: it has one thread for all work on a device, in which ranks
# that wait for each other would wait for ever.

OVER_RANKS = [
    replace(case.over(ranks), exchange=exchange, refetch=refetch)
    for case, ranks, exchange, refetch in zip(
        DILATED, (3, 4, 2), ("gather", "heads", "auto"), (False, True, False), strict=True
    )
]


@pytest.mark.parametrize("case", OVER_RANKS, ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_dilated_ring_of_threads_is_the_definition(case: Case, dtype: torch.dtype, device: str) -> None:
    query, key, value, cotangent = (tensor.to(device) for tensor in case.problem(dtype))
    real = case.key_padding_mask()
    of_lse = case.lse_cotangent().to(device)
    options = Options(*case.pattern, case.semantics, case.is_causal, case.head_dim**-0.5, 0.0, "auto")
    plan = make_plan(
        case.bounds,
        *case.pattern,
        case.heads,
        kv_heads=case.kv_heads or case.heads,
        is_causal=case.is_causal,
        exchange=case.exchange,
    )

    def work(comm: Comm) -> Results:
        shard = case.shard(comm.rank)
        own = [tensor[:, shard] for tensor in (query, key, value)]
        mask = None if real is None else real[:, shard].to(device)
        rank = engine.Rank(comm, plan.for_rank(comm.rank), engine.Inputs(*own, mask, None), options, NO_RESOURCES)
        out, lse, kept = rank.forward(keep=not case.refetch)
        grad_lse = of_lse[:, :, shard].transpose(1, 2).to(lse).masked_fill(lse == -torch.inf, 0.0)
        grads = rank.backward(cotangent[:, shard], grad_lse, out, lse, kept)
        return Results(out, lse.transpose(1, 2), *grads)

    check(case, dtype, device, joined(run_ranks(case.ranks, work)))


@pytest.mark.parametrize("way", [Way(3), Way(heads=2), Way(2, 2, "head_tail")], ids=str)
@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_a_dense_ring_of_threads_is_the_definition(case: Case, way: Way, dtype: torch.dtype, device: str) -> None:
    tensors = [tensor.to(device) for tensor in case.problem(dtype)]
    real, bounds = case.key_padding_mask(), even_bounds(case.seq, way.size)
    if way.balance == "head_tail":
        lengths = [parts(case, way, rank, tensors)[0].shape[1] for rank in range(way.size)]
        bounds = tuple(sum(lengths[:rank]) for rank in range(way.size + 1))
    factor = case.head_dim**-0.5
    call = Call(case.is_causal, factor, factor, "ring", way.balance, bounds, 1, False, True, True, "auto")

    def work(team: Team) -> Results:
        query, key, value, cotangent = parts(case, way, team.rank, tensors)
        mask = None if real is None else parts(case, way, team.rank, [real])[0].to(device)
        inputs = Inputs(query, key, value, mask)
        rank = Rank(team, call, bounds, Shard.of(inputs), NO_RESOURCES)
        gathered = rank.gather(inputs, "forward")
        (out, lse), results = rank.forward(gathered)
        (of_lse,) = parts(case, way, team.rank, [case.lse_cotangent()], dim=2)
        grad_lse = of_lse.transpose(1, 2).to(lse).masked_fill(lse == -torch.inf, 0.0)
        grads = rank.backward(gathered, results, cotangent, grad_lse)
        return Results(out, lse.transpose(1, 2), *grads)

    check(case, dtype, device, joined_dense(run_team(way, work), way))


# ------------------------------------------------------------------------------------------------ one device


@pytest.mark.parametrize("case", DENSE, ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_chunks_on_one_device_are_the_definition(case: Case, dtype: torch.dtype, device: str) -> None:
    for ring_size in (1, 3, 16):
        results = differentiated(
            case, dtype, device, lambda *a, ring_size=ring_size, **o: ring_attention(*a, ring_size=ring_size, **o)
        )
        check(case, dtype, device, results)


def captured(run: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
    """A graph of ``run(*inputs)``, and the tensors that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at a first call, libraries' workspaces among it, is no part of it
        for _ in range(3):
            run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = run(*inputs)
    return graph, results


GRAPHED: dict[str, Callable[..., Any]] = {
    "chunks": lambda *qkv, **options: ring_attention(*qkv, ring_size=4, **options),
    "dilated ring": lambda *qkv, **options: dilated_ring_attention(*qkv, [64, 301], [1, 4], **options),
    "dense ring": ring_attention,
}


@pytest.mark.gpu
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", GRAPHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cuda"])
def test_a_captured_graph_replays_with_new_inputs(name: str, dtype: torch.dtype, device: str) -> None:
    def run(query: Tensor, key: Tensor, value: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        out = GRAPHED[name](*leaves, is_causal=True, enable_gqa=True)
        return out.detach(), *torch.autograd.grad(out, leaves, cotangent)

    def fresh() -> list[Tensor]:
        shapes = [(1, 301, heads, 64) for heads in (8, 2, 2, 8)]
        return [torch.randn(shape, device=device).to(dtype) for shape in shapes]

    inputs = fresh()
    graph, results = captured(run, inputs)
    for _ in range(2):
        for tensor, new in zip(inputs, fresh(), strict=True):
            tensor.copy_(new)
        graph.replay()
        for number, (found, wanted) in enumerate(zip(results, run(*inputs), strict=True)):
            tolerance = (GRADIENT_TOLERANCE if number else FORWARD_TOLERANCE)[dtype]
            assert deviation(found, wanted) <= tolerance, ("out", "dq", "dk", "dv")[number]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["chunks", "streamed"])
def test_a_side_stream_gives_what_the_default_one_gives(name: str, dtype: torch.dtype) -> None:
    """Forward and backward on a stream beside the current one, which is busy, and again while the first is not over."""
    query, key, value, cotangent = torch.randn(4, 1, 4096, 4, 64).to(dtype).unbind()
    query, cotangent = query.cuda(), cotangent.cuda()
    keys = [key, value] if name == "streamed" else [key.cuda(), value.cuda()]
    attend = streamed_attention if name == "streamed" else ring_attention

    def run() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, *keys)]
        out = attend(*leaves, ring_size=8, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]

    expected = run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    busy = torch.randn(2048, 2048, device="cuda")
    for _ in range(20):
        busy = busy @ busy
    with torch.cuda.stream(side):
        found = [run() for _ in range(3)]
    torch.cuda.current_stream().wait_stream(side)
    for results in found:
        for result, wanted in zip(results, expected, strict=True):
            assert deviation(result.cpu(), wanted.cpu()) <= GRADIENT_TOLERANCE[dtype]
