"""torch.compile over processes: one whole graph, forward and backward, equal to what runs uncompiled on every rank.

What a process compiles first takes seconds, and what it compiles then does not: so two processes do all that two can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from ring_cases import MIXED_CASES, Case, deviation
from torch import Tensor, distributed, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.library import opcheck

from dilated_core import AuxRequest, MultiheadDilatedAttention
from dilated_factory.models import RotaryPositions
from dilated_ring import dilated_ring_attention, ring_attention
from dilated_ring.comm import Comm, run_ranks
from dilated_ring.modules import RingMultiheadDilatedAttention
from dilated_ring.plan import even_bounds

pytestmark = pytest.mark.slow

RANKS = 2
CASE = replace(MIXED_CASES[0], kv_heads=2).over(RANKS)
UNEVEN = replace(CASE, bounds=(0, 11, 41))
SECONDS = 900.0  # for half a minute's work of each process, on a slow and busy machine

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
    "dropout": (replace(UNEVEN, exchange="heads"), {"dropout_p": 0.4}),
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


# ------------------------------------------------------------------------------------------------ groups

ALONE, PAIR = (0,), (1, 2)


def compare_groups(rank: int) -> list[float]:
    """As compare, over every kind of group that a process can name: one of the processes alone, and the two others."""
    groups = [distributed.new_group(ranks) for ranks in (ALONE, PAIR)]
    mesh = DeviceMesh("cpu", [PAIR], mesh_dim_names=("data", "sequence"))
    if rank in ALONE:
        kinds: list[Any] = [groups[0]]
        case, number = CASE.over(1), 0
    else:
        kinds = [mesh["sequence"], groups[1], mesh["sequence"].get_group()]
        case, number = UNEVEN, PAIR.index(rank)
    found = []
    for group in kinds:
        torch._dynamo.reset()
        attention = attention_of(case, number, group=group)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        results = [differentiated(each, case, number) for each in (compiled, attention)]
        found += [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]
    return found


def test_meshes_and_groups_are_traced(tmp_path: Path) -> None:
    """In a group of one process nothing travels, and a graph still is one."""
    alone, *pair = run_processes(3, compare_groups, tmp_path=tmp_path, timeout=SECONDS)
    for found, groups in ((alone, 1), *((each, 3) for each in pair)):
        assert len(found) == 5 * groups
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
        grad_lse = None if seed is None and real_or_none is None else torch.randn_like(lse)
        arguments = (torch.randn_like(out), grad_lse, *plain, out, lse)
        opcheck(operators.dilated_ring_attention_backward.default, arguments, extras)
    return "checked"


# ------------------------------------------------------------------------------------------------ dense

# name -> (the shape of the mesh, None for the default group; more arguments)
DENSE: dict[str, tuple[tuple[int, ...] | None, dict[str, Any]]] = {
    "ring": (None, {"is_causal": True}),
    "ring-mesh": ((2,), {"is_causal": True}),
    "heads": (None, {"mode": "all_to_all"}),
    "heads-mesh": ((1, 2), {}),
}


def compare_dense(rank: int) -> dict[str, float]:
    """As compare, of ring_attention: by a ring, and by heads, which in a graph are exchanged anew in the backward."""
    rows = 5 + rank
    real = torch.arange(rows).view(1, -1) % 3 > 0
    found = {}
    for name, (shape, options) in DENSE.items():
        torch._dynamo.reset()
        heads, masked = (4, None) if options.get("is_causal") else (3, real)
        query, key, value, cotangent = torch.randn(4, 1, rows, heads, 8, dtype=torch.float64).unbind()
        group = None if shape is None else init_device_mesh("cpu", shape)

        def attention(
            query: Tensor, key: Tensor, value: Tensor, group: Any = group, options: Any = options, real: Any = masked
        ) -> Tensor:
            out, aux = ring_attention(
                2 * query, key, value, group=group, key_padding_mask=real, return_aux=AuxRequest(lse=True), **options
            )
            return out * aux.lse.transpose(1, 2).unsqueeze(-1)

        results = []
        for function in (torch.compile(attention, fullgraph=True, backend="aot_eager"), attention):
            leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
            out = function(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, cotangent)])
        for result, ours, eager in zip(("out", "dq", "dk", "dv"), *results, strict=True):
            found[f"{name}, {result}"] = deviation(ours, eager)
    return found


# ------------------------------------------------------------------------------------------------ modules

MODULE_BOUNDS = (0, 23, 53)


def make_module(kind: type[MultiheadDilatedAttention], **options: Any) -> MultiheadDilatedAttention:
    """The same weights at every call; those of biases and norms too are none that a fault could hide behind."""
    torch.manual_seed(0)
    rotary = RotaryPositions(6)
    module = kind(
        24, 4, [8, 20, 64], [1, 3, 4], dtype=torch.float64, rotary=rotary, kv_heads=2, is_causal=True, **options
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def module_problem() -> list[Tensor]:
    """Tokens, a cotangent, and which tokens are padding, of the whole sequence."""
    torch.manual_seed(1)
    tokens, cotangent = torch.randn(2, 2, MODULE_BOUNDS[-1], 24, dtype=torch.float64).unbind()
    return [
        tokens,
        cotangent,
        torch.stack([torch.rand(MODULE_BOUNDS[-1]) < 0.3, torch.arange(MODULE_BOUNDS[-1]) >= 35]),
    ]


def run_module(module: nn.Module, tokens: Tensor, cotangent: Tensor, padding: Tensor) -> list[Tensor]:
    """out, and the gradients of the tokens and of every parameter."""
    leaf = tokens.detach().clone().requires_grad_()
    out, _ = module(leaf, key_padding_mask=padding)
    return [out.detach(), *torch.autograd.grad(out, [leaf, *module.parameters()], cotangent)]


def run_compiled_module(rank: int) -> list[Tensor]:
    """This rank's share; in a graph, bounds have to be told."""
    torch._dynamo.reset()
    module = make_module(RingMultiheadDilatedAttention, bounds=MODULE_BOUNDS)
    shard = [tensor[:, MODULE_BOUNDS[rank] : MODULE_BOUNDS[rank + 1]] for tensor in module_problem()]
    results = run_module(torch.compile(module, fullgraph=True, backend="aot_eager"), *shard)
    unknown = torch.compile(make_module(RingMultiheadDilatedAttention), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"bounds: expected positions under torch\.compile"):
        unknown(shard[0])
    return results


# ------------------------------------------------------------------------------------------------ what was found


def compile_everything(rank: int) -> dict[str, Any]:
    """What each of the tests below looks at."""
    return {
        "aot_eager": compare(rank, "aot_eager", [*VARIANTS]),
        "inductor": compare(rank, "inductor", ["dropout"]),
        "lengths": compare_lengths(rank),
        "operators": check_operators(rank),
        "dense": compare_dense(rank),
        "module": run_compiled_module(rank),
        "mixed": mix(rank, 1),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found. An error of one rank is told with its traceback, which says in what it was raised."""
    return run_processes(RANKS, compile_everything, tmp_path=tmp_path_factory.mktemp("compiled"), timeout=SECONDS)


@pytest.mark.parametrize(("backend", "variants"), [("aot_eager", len(VARIANTS)), ("inductor", 1)])
def test_one_graph_gives_what_runs_uncompiled(backend: str, variants: int, found: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(found):
        assert len(each[backend]) == 5 * variants
        for what, difference in each[backend].items():
            assert difference < 1e-12, (rank, what, difference)


def test_two_graphs_serve_every_length(found: list[dict[str, Any]]) -> None:
    for each in found:
        differences, graphs = each["lengths"]
        assert max(differences) < 1e-11
        assert graphs == 2


def test_a_rank_that_compiles_among_ranks_that_do_not_is_named(found: list[dict[str, Any]]) -> None:
    """It would gather rows again in the backward, and the others would not."""
    for each in found:
        assert "DisagreementError: the ranks were called with different arguments" in each["mixed"]
        assert "on rank 1" in each["mixed"]


def test_opcheck(found: list[dict[str, Any]]) -> None:
    assert [each["operators"] for each in found] == ["checked"] * RANKS


def test_one_graph_of_a_dense_ring_and_of_heads(found: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(found):
        assert len(each["dense"]) == 4 * len(DENSE)
        for what, difference in each["dense"].items():
            assert difference < 1e-12, (rank, what, difference)


def test_a_module_compiles_to_one_graph(found: list[dict[str, Any]]) -> None:
    """Shards are the whole: rows side by side, gradients of parameters summed."""
    whole = make_module(MultiheadDilatedAttention)
    names = ["out", "tokens", *(name for name, _ in whole.named_parameters())]
    expected = run_module(whole, *module_problem())
    # A constant added to all keys changes nothing: the gradient of k_proj.bias is all rounding.
    floor = 0.1 * max(gradient.abs().max().item() for gradient in expected[2:])
    for name, wanted, *shares in zip(names, expected, *(each["module"] for each in found), strict=True):
        together = torch.cat(shares, 1) if name in ("out", "tokens") else sum(shares)
        assert deviation(together, wanted, floor=0.0 if name == "out" else floor) < 1e-12, name
