"""torch.compile over processes: one whole graph, forward and backward, equal to what runs uncompiled on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from ring_cases import MIXED_CASES, Case, run_rank
from torch import Tensor, distributed, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.library import opcheck

from dilated_core import AuxRequest
from dilated_ring import dilated_ring_attention
from dilated_ring.comm import Comm, run_ranks
from dilated_ring.plan import even_bounds

pytestmark = pytest.mark.slow

RANKS = 2
CASE = replace(MIXED_CASES[0], kv_heads=2).over(RANKS)
UNEVEN = replace(CASE, bounds=(0, 11, 41))
SECONDS = 240.0  # a first compilation loads much of PyTorch, and two processes do it at once

# name -> (case, more arguments)
VARIANTS: dict[str, tuple[Case, dict[str, Any]]] = {
    "uneven": (UNEVEN, {}),
    "bounds": (UNEVEN, {"bounds": UNEVEN.bounds}),
    "bounds-unverified": (UNEVEN, {"bounds": UNEVEN.bounds, "verify": False}),
    "empty-shard": (replace(CASE, bounds=(0, 0, 41)), {}),
    "causal-heads": (replace(CASE, is_causal=True, exchange="heads"), {}),
    "torchscale-gather": (replace(CASE, exchange="gather").meaning("torchscale"), {}),
    "grouped-masked": (replace(CASE, mask="random").meaning("grouped"), {}),
    "exchange-of-each": (CASE, {"exchange": ("gather", "heads", "auto")}),
    "negative-scale": (replace(CASE, scale=-0.3), {}),
    "dropout": (replace(CASE, exchange="heads"), {"dropout_p": 0.4}),
}


def attention_of(case: Case, rank: int, **arguments: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """Attention between other operations: (query, key, value) -> (out, lse)."""
    real = case.key_padding_mask()
    options = {**case.options(), "exchange": case.exchange, **arguments}
    if real is not None:
        options["key_padding_mask"] = real[:, case.shard(rank)]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = dilated_ring_attention(
            query.sin(), key * 2, value, *case.pattern, return_aux=AuxRequest(lse=True), **options
        )
        return out.tanh(), aux.lse

    return attention


def differentiated(attention: Callable[..., tuple[Tensor, Tensor]], case: Case, rank: int) -> list[Tensor]:
    """out, lse, dq, dk, dv under random cotangents of both; the same random numbers every time."""
    torch.manual_seed(rank)
    *qkv, cotangent = (tensor[:, case.shard(rank)] for tensor in case.problem(torch.float64, poisoned=False))
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    out, lse = attention(*leaves)
    lse = torch.where(lse == -torch.inf, 0.0, lse)
    cotangents = [cotangent, case.lse_cotangent()[:, :, case.shard(rank)]]
    return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, cotangents)]


def compare(rank: int, backend: str, variants: list[str]) -> dict[str, float]:
    """Largest difference between compiled and uncompiled, of every variant and result."""
    found = {}
    for variant in variants:
        torch._dynamo.reset()
        case, arguments = VARIANTS[variant]
        attention = attention_of(case, rank, **arguments)
        compiled = torch.compile(attention, fullgraph=True, backend=backend)
        results = zip(differentiated(compiled, case, rank), differentiated(attention, case, rank), strict=True)
        for name, (ours, eager) in zip(("out", "lse", "dq", "dk", "dv"), results, strict=True):
            assert ours.shape == eager.shape
            assert ours.stride() == eager.stride() or ours.numel() == 0 or name != "out"
            found[f"{variant}, {name}"] = (ours - eager).abs().max().item() if ours.numel() else 0.0
    return found


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_gives_what_runs_uncompiled(backend: str, tmp_path: Path) -> None:
    variants = list(VARIANTS) if backend == "aot_eager" else ["uneven", "dropout"]
    for rank, found in enumerate(run_processes(RANKS, compare, backend, variants, tmp_path=tmp_path, timeout=SECONDS)):
        assert len(found) == 5 * len(variants)
        for what, difference in found.items():
            assert difference < 1e-12, (rank, what, difference)


# ------------------------------------------------------------------------------------------------ groups


def compare_groups(rank: int) -> list[float]:
    """As compare, over every kind of group that a process can name."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    pairs = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    found = []
    for group in (mesh["sequence"], pairs[rank // 2], mesh["sequence"].get_group()):
        torch._dynamo.reset()
        attention = attention_of(UNEVEN, rank % 2, group=group)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        results = [differentiated(each, UNEVEN, rank % 2) for each in (compiled, attention)]
        found += [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]
    return found


def test_meshes_and_groups_are_traced(tmp_path: Path) -> None:
    for found in run_processes(4, compare_groups, tmp_path=tmp_path, timeout=SECONDS):
        assert len(found) == 15
        assert max(found) < 1e-12


def refused_by_a_trace(comm: Comm) -> str:
    torch._dynamo.reset()
    attention = attention_of(UNEVEN, comm.rank, group=comm)
    with pytest.raises(Exception, match=r"group: expected a process group under torch\.compile") as caught:
        torch.compile(attention, fullgraph=True, backend="aot_eager")(*UNEVEN.problem(torch.float64)[:3])
    return str(caught.value)


def test_a_graph_holds_no_other_comm() -> None:
    """A graph knows its group by name, and threads have none."""
    assert "VirtualComm" in run_ranks(1, refused_by_a_trace)[0]


# ------------------------------------------------------------------------------------------------ lengths


class Layer(nn.Module):
    """A sequence-parallel layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 3 * 24, dtype=torch.float64)
        self.outer = nn.Linear(24, 24, dtype=torch.float64)

    def forward(self, sequence: Tensor) -> Tensor:
        query, key, value = self.inner(sequence).unflatten(-1, (3, 3, 8)).unbind(2)
        out = dilated_ring_attention(query, key, value, [8, 16, 64], [1, 2, 5], is_causal=True)
        return sequence + self.outer(out.flatten(2))


def compare_lengths(rank: int) -> tuple[list[float], int]:
    """A module compiled once, over shards of many lengths, unequal among ranks; and how many graphs that took."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    layer = Layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for seq in (41, 60, 33, 97, 64, 20):
        low, high = even_bounds(seq, RANKS)[rank : rank + 2]
        sequence, cotangent = torch.randn(2, 1, seq, 24, dtype=torch.float64)[:, :, low:high].unbind()
        results = []
        for each in (compiled, layer):
            layer.zero_grad()
            each(sequence).backward(cotangent)
            results.append([parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None])
        assert len(results[0]) == len(results[1]) == 4
        found += [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]
    return found, counters["stats"]["unique_graphs"]


def test_two_graphs_serve_every_length(tmp_path: Path) -> None:
    for found, graphs in run_processes(RANKS, compare_lengths, tmp_path=tmp_path, timeout=SECONDS):
        assert max(found) < 1e-11
        assert graphs == 2


# ------------------------------------------------------------------------------------------------ together


def mix(rank: int, compiled_rank: int) -> str:
    """One rank compiles, the other does not."""
    attention = attention_of(UNEVEN, rank)
    if rank == compiled_rank:
        torch._dynamo.reset()
        attention = torch.compile(attention, fullgraph=True, backend="aot_eager")
    try:
        differentiated(attention, UNEVEN, rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def test_a_rank_that_compiles_among_ranks_that_do_not_is_named(tmp_path: Path) -> None:
    """It would gather rows again in the backward, and the others would not."""
    for told in run_processes(RANKS, mix, 1, tmp_path=tmp_path, timeout=SECONDS):
        assert "DisagreementError: the ranks were called with different arguments" in told
        assert "on rank 1" in told


# ------------------------------------------------------------------------------------------------ operators


def check_operators(rank: int) -> str:
    """PyTorch's rules for operators, which all ranks check at once: each check runs them as often on each."""
    operators = torch.ops.dilated_ring
    group = distributed.group.WORLD
    assert group is not None
    shape = (2, (11, 30)[rank], 4, 8)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    plain = [leaf.detach() for leaf in leaves]
    real = torch.arange(shape[1]).expand(shape[:2]) % 5 > 0
    common = {
        "group_name": group.group_name, "with_lse": True, "segment_lengths": [8, 21], "dilation_rates": [1, 3],
        "is_causal": False, "scale": 0.3, "signed_scale": -0.3, "kernel": "auto",
    }  # fmt: skip
    for real_or_none, seed, bounds, exchange, semantics, dropout_p in (
        (None, None, [], "auto,heads", "paper", 0.0),
        (real, None, [0, 11, 41], "heads,heads", "torchscale", 0.0),
        (None, torch.tensor(7), [], "gather,gather", "grouped", 0.5),
    ):
        extras = {
            **common, "real": real_or_none, "seed": seed, "bounds": bounds, "exchange": exchange,
            "verify": not bounds, "semantics": semantics, "dropout_p": dropout_p,
        }  # fmt: skip
        opcheck(operators.dilated_ring_attention.default, tuple(leaves), extras)
        out, lse = operators.dilated_ring_attention(*plain, **extras)
        for grad_lse in (None, torch.randn_like(lse)):
            arguments = (torch.randn_like(out), grad_lse, *plain, out, lse)
            opcheck(operators.dilated_ring_attention_backward.default, arguments, extras)
    return "checked"


def test_opcheck(tmp_path: Path) -> None:
    found = run_processes(RANKS, check_operators, tmp_path=tmp_path, timeout=SECONDS)
    assert found == ["checked"] * RANKS


def test_eager_and_compiled_share_one_answer_with_one_rank(tmp_path: Path) -> None:
    """A group of one process: nothing travels, and a graph still is one."""
    (found,) = run_processes(1, compare_alone, tmp_path=tmp_path, timeout=SECONDS)
    assert found < 1e-12


def compare_alone(rank: int) -> float:
    case = CASE.over(1)
    compiled = torch.compile(attention_of(case, rank), fullgraph=True, backend="aot_eager")
    results = [differentiated(each, case, rank) for each in (compiled, attention_of(case, rank))]
    assert run_rank(case, torch.float64, None).out.shape[1] == case.seq
    return max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
