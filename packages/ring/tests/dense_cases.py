"""What the tests of ring_attention share: dense problems, run over any ranks, for comparison with the oracle.

A dense attention is a dilated one with one branch that has one segment and rate 1: a Case of ``ring_cases``. How it is
cut into shards says a Way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from ring_cases import LAYOUTS, Case, Results, assert_close, oracle
from torch import Tensor

from dilated_core import AuxRequest
from dilated_ring.comm import Comm, VirtualComm, run_ranks
from dilated_ring.comm.virtual import _Hall
from dilated_ring.dense import Team, ring_attention, shard, unshard
from dilated_ring.plan import even_bounds

PATIENCE = 60.0  # seconds that ranks wait for each other


@dataclass(frozen=True)
class Way:
    """How an attention is run: on a team of ``ring`` times ``heads`` ranks.

    Attributes:
        heads: ranks that exchange heads; 1 for a ring alone.
        balance: "contiguous" or "head_tail".
        mesh: whether the team has both dimensions, even if one is 1.
    """

    ring: int = 1
    heads: int = 1
    balance: str = "contiguous"
    mesh: bool = False

    def __str__(self) -> str:
        return f"{self.ring}x{self.heads}{'mesh' * self.mesh}-{self.balance}"

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return self.ring * self.heads


def dense(
    batch: int, seq: int, heads: int, head_dim: int, *, bounds: tuple[int, ...] | None = None, **options: Any
) -> Case:
    """A dense problem; with ``bounds``, of contiguous shards."""
    return Case(batch, bounds or (0, seq), heads, head_dim, (max(seq, 1),), (1,), **options)


def run_team(way: Way, work: Callable[[Team], Any]) -> list[Any]:
    """``work(team)`` of ranks that are threads, each with doors of its own to its ring and to its row."""
    rings = [_Hall(way.ring, PATIENCE) for _ in range(way.heads)]
    rows = [_Hall(way.heads, PATIENCE) for _ in range(way.ring)]
    both = way.mesh or (way.ring > 1 and way.heads > 1)

    def on_rank(comm: Comm) -> Any:
        row, column = divmod(comm.rank, way.heads)
        ring, heads = VirtualComm(rings[column], row), VirtualComm(rows[row], column)
        try:
            if both:
                return work(Team(ring, heads))
            return work(Team(heads=heads) if way.heads > 1 else Team(ring))
        finally:
            rings[column].leave(row)
            rows[row].leave(column)

    return run_ranks(way.size, on_rank, timeout=PATIENCE)


def errors_of(way: Way, work: Callable[[Team], object]) -> list[Exception | None]:
    """What each rank raises."""

    def caught(team: Team) -> Exception | None:
        try:
            work(team)
        except Exception as error:
            return error
        return None

    return run_team(way, caught)


def parts(case: Case, way: Way, rank: int, tensors: Sequence[Tensor], dim: int = 1) -> list[Tensor]:
    """The rank's shard of whole tensors."""
    if way.balance == "contiguous" and case.ranks == way.size:
        return [
            tensor.narrow(dim, case.shard(rank).start, case.shard(rank).stop - case.shard(rank).start)
            for tensor in tensors
        ]
    return [shard(tensor, rank, way.size, dim=dim, balance=way.balance) for tensor in tensors]


def run_rank(
    case: Case, dtype: torch.dtype, group: Any, way: Way, rank: int, *, with_lse: bool = False, **options: Any
) -> Results:
    """This rank's rows of ring_attention and its gradients, under a random cotangent (of the lse too, if asked)."""
    *qkv, cotangent = parts(case, way, rank, case.problem(dtype))
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    real = case.key_padding_mask()
    arguments: dict[str, Any] = {
        "is_causal": case.is_causal,
        "enable_gqa": case.kv_heads is not None,
        "scale": case.scale,
        "balance": way.balance,
        "key_padding_mask": None if real is None else parts(case, way, rank, [real])[0],
        "return_aux": AuxRequest(lse=True),
        **options,
    }
    out, aux = ring_attention(*leaves, group=group, **arguments)
    outputs, cotangents = [out], [cotangent]
    if with_lse:
        (lse_cotangent,) = parts(case, way, rank, [case.lse_cotangent()], dim=2)
        outputs.append(aux.lse)
        # Rows without a key have lse -inf, whose gradient is 0: give them no cotangent.
        cotangents.append(lse_cotangent.to(aux.lse).masked_fill(aux.lse == -torch.inf, 0.0))
    return Results(out.detach(), aux.lse.detach(), *torch.autograd.grad(outputs, leaves, cotangents))


def joined(results: Sequence[Results], way: Way) -> Results:
    """The results of all ranks as those of the whole sequence."""
    columns = zip(*(each.each() for each in results), strict=True)
    dims = (1, 2, 1, 1, 1)
    return Results(*(unshard(column, dim=dim, balance=way.balance) for column, dim in zip(columns, dims, strict=True)))


def run(case: Case, way: Way, dtype: torch.dtype = torch.float64, *, with_lse: bool = True, **options: Any) -> Results:
    """All ranks' rows, put together, of ranks that are threads."""

    def work(team: Team) -> Results:
        return run_rank(case, dtype, team, way, team.rank, with_lse=with_lse, **options)

    return joined(run_team(way, work), way)


def check(case: Case, way: Way, dtype: torch.dtype = torch.float64, *, with_lse: bool = True, **options: Any) -> None:
    """Run the case and compare it with the oracle."""
    results = run(case, way, dtype, with_lse=with_lse, **options)
    assert_close(case, dtype, results, oracle(case, dtype, with_lse=with_lse))


@st.composite
def problems(draw: st.DrawFn, ways: st.SearchStrategy[Way]) -> tuple[Case, Way]:
    """Any small dense problem and a way to run it; contiguous shards of any lengths, empty ones too."""
    way = draw(ways)
    seq = draw(st.integers(1, 40))
    bounds = even_bounds(seq, way.size)
    if way.balance == "contiguous":
        cuts = draw(st.lists(st.integers(0, seq), min_size=way.size - 1, max_size=way.size - 1))
        bounds = (0, *sorted(cuts), seq)
    heads = draw(st.integers(1, 6))
    divisors = [kv_heads for kv_heads in range(1, heads) if heads % kv_heads == 0]
    case = dense(
        draw(st.integers(1, 3)),
        seq,
        heads,
        draw(st.sampled_from([1, 3, 8])),
        bounds=bounds,
        is_causal=draw(st.booleans()),
        kv_heads=draw(st.sampled_from([None, *divisors])),
        mask=draw(st.sampled_from(["none", "random", "right", "shards"])),
        scale=draw(st.sampled_from([None, None, 0.0, -0.3])),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**20)),
    )
    return case, way
