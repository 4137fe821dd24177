"""What the tests of block_sparse_ring_attention share: problems cut into shards, ranks, comparison with the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, distributed

from dilated_block_sparse import reference
from dilated_block_sparse.layout import BlockLayout
from dilated_block_sparse.ring import block_bounds, block_sparse_ring_attention
from dilated_core import AuxRequest
from dilated_ring.comm import Comm, run_ranks

# Largest deviation from the float64 oracle, relative to the oracle's largest magnitude: those of dilated-core's tests.
FORWARD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}

KINDS = ("random", "local", "first", "diagonal", "full", "empty")
MASKS = ("none", "random", "shards")
SHARES = ("all", "key", "query")


@dataclass(frozen=True)
class Case:
    """One attention over shards; its id reads like B2-N(0,16,45)-b8x4-H4kv2-D8-random0.4-key-causal.

    Attributes:
        bounds: where shards start and end; of the last, the sequence ends.
        kv_heads: key and value heads, None for as many as query heads.
        kind: of the layout; "random" ones keep ``density`` of the blocks.
        share: whether the layout is one for "all" heads, one a "key" head or one a "query" head.
        mask: of the keys. "random" keeps 7 in 10; "shards" pads every other shard altogether, the first one too. What
            padding holds is NaN and infinity, but for the oracle.
        strided: whether query, key and value are views of other storage.
    """

    batch: int
    bounds: tuple[int, ...]
    block_size: tuple[int, int]
    heads: int
    head_dim: int
    kv_heads: int | None = None
    kind: str = "random"
    density: float = 0.4
    share: str = "all"
    is_causal: bool = False
    mask: str = "none"
    refetch: bool = False
    scale: float | None = None
    strided: bool = False
    seed: int = 0

    def __str__(self) -> str:
        shared = "" if self.kv_heads is None else f"kv{self.kv_heads}"
        bounds, size = ",".join(map(str, self.bounds)), "x".join(map(str, self.block_size))
        words = [
            f"B{self.batch}-N({bounds})-b{size}-H{self.heads}{shared}-D{self.head_dim}-{self.kind}",
            f"{self.density:g}" * (self.kind == "random"),
            self.share,
            "causal" * self.is_causal,
            self.mask * (self.mask != "none"),
            "refetch" * self.refetch,
            "" if self.scale is None else f"scale{self.scale:g}",
            "strided" * self.strided,
        ]
        return "-".join(filter(None, words))

    @property
    def seq(self) -> int:
        """Positions in the whole sequence."""
        return self.bounds[-1]

    @property
    def ranks(self) -> int:
        """How many shards there are."""
        return len(self.bounds) - 1

    @property
    def key_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def shard(self, rank: int) -> slice:
        """The rank's positions."""
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def over(self, ranks: int) -> Case:
        """The same sequence in as many shards, as equal as can be."""
        return replace(self, bounds=block_bounds(self.layout(), ranks))

    def layout(self) -> BlockLayout:
        """Of the whole sequence."""
        return _layout(replace(self, bounds=(0, self.seq)))

    def problem(self, dtype: torch.dtype, *, poisoned: bool = True) -> list[Tensor]:
        """query, key, value and a cotangent of out."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (4, self.batch, self.seq, self.heads, self.head_dim)
        query, key, value, cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()
        key, value = (tensor[:, :, : self.key_heads].clone() for tensor in (key, value))
        real = self.key_padding_mask()
        if real is not None and poisoned:
            key[~real], value[~real] = torch.nan, torch.inf
        tensors = [query, key, value, cotangent]
        if self.strided:
            return [tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in tensors]
        return tensors

    def key_padding_mask(self) -> Tensor | None:
        """(batch, seq), True where the key is real; None for no mask."""
        if self.mask == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 2)
        if self.mask == "random":
            return torch.rand(self.batch, self.seq, generator=generator) < 0.7
        real = torch.ones(self.batch, self.seq, dtype=torch.bool)
        for rank in range(0, self.ranks, 2):
            real[:, self.shard(rank)] = False
        return real

    def lse_cotangent(self) -> Tensor:
        """A random cotangent for the lse, (batch, heads, seq), float64."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.batch, self.heads, self.seq, generator=generator, dtype=torch.float64)

    def options(self) -> dict[str, Any]:
        """What is to be computed, as keyword arguments that block_sparse_attention takes too; the mask is not there."""
        return {"is_causal": self.is_causal, "scale": self.scale, "enable_gqa": self.kv_heads is not None}


@lru_cache(maxsize=64)
def _layout(case: Case) -> BlockLayout:
    rows, columns = (-(-case.seq // size) for size in case.block_size)
    heads = {"all": 1, "key": case.key_heads, "query": case.heads}[case.share]
    row_start = torch.arange(rows)[:, None] * case.block_size[0]
    key_start = torch.arange(columns)[None] * case.block_size[1]
    step = math.lcm(*case.block_size)
    generator = torch.Generator().manual_seed(case.seed + 3)
    blocks = {
        "random": torch.rand(heads, rows, columns, generator=generator) < case.density,
        "local": ((row_start - key_start).abs() <= 2 * max(case.block_size)).expand(heads, -1, -1),
        "first": (key_start < case.block_size[1]).expand(heads, rows, -1),
        "diagonal": (row_start // step == key_start // step).expand(heads, -1, -1),
        "full": torch.ones(heads, rows, columns, dtype=torch.bool),
        "empty": torch.zeros(heads, rows, columns, dtype=torch.bool),
    }[case.kind]
    return BlockLayout.from_blocks(blocks, case.seq, case.seq, block_size=case.block_size)


@st.composite
def cases(draw: st.DrawFn, *, ranks: int = 6) -> Case:
    """Any small problem over any shards, of whole blocks or not, empty ones too, with any options."""
    block_size = draw(st.sampled_from([(1, 1), (4, 4), (8, 4), (2, 6), (5, 5)]))
    length = draw(st.integers(1, 50))
    step = draw(st.sampled_from([1, math.lcm(*block_size)]))
    cuts = draw(st.lists(st.integers(0, -(-length // step)), max_size=ranks - 1))
    heads = draw(st.integers(1, 6))
    divisors = [kv_heads for kv_heads in range(1, heads) if heads % kv_heads == 0]
    return Case(
        batch=draw(st.integers(1, 2)),
        bounds=(0, *(min(cut * step, length) for cut in sorted(cuts)), length),
        block_size=block_size,
        heads=heads,
        head_dim=draw(st.sampled_from([1, 3, 8])),
        kv_heads=draw(st.sampled_from([None, *divisors])),
        kind=draw(st.sampled_from(["random", "random", "random", *KINDS])),
        density=draw(st.sampled_from([0.1, 0.4, 0.8])),
        share=draw(st.sampled_from(SHARES)),
        is_causal=draw(st.booleans()),
        mask=draw(st.sampled_from(MASKS)),
        refetch=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 0.0, -0.3])),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


# ------------------------------------------------------------------------------------------------ running


@dataclass(frozen=True)
class Results:
    """out, lse and the gradients of one run."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def run_rank(case: Case, dtype: torch.dtype, group: Any, **options: Any) -> Results:
    """This rank's rows of block_sparse_ring_attention, and its gradients under random cotangents of out and lse."""
    shard = case.shard(group.rank if isinstance(group, Comm) else distributed.get_rank(group))
    *qkv, cotangent = (tensor[:, shard] for tensor in case.problem(dtype))
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    real = case.key_padding_mask()
    arguments: dict[str, Any] = {
        **case.options(),
        "refetch": case.refetch,
        "key_padding_mask": None if real is None else real[:, shard],
        "return_aux": AuxRequest(lse=True),
        **options,
    }
    out, aux = block_sparse_ring_attention(*leaves, case.layout(), group=group, **arguments)
    grads = _gradients(out, aux.lse, leaves, cotangent, case.lse_cotangent()[:, :, shard])
    return Results(out.detach(), aux.lse.detach(), *grads)


def run(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> Results:
    """All ranks' rows, put together, of ranks that are threads."""
    return joined(run_ranks(case.ranks, lambda comm: run_rank(case, dtype, comm, **options)))


def joined(parts: Sequence[Results]) -> Results:
    """The results of all ranks as those of the whole sequence."""
    out, lse, *grads = ([getattr(part, name) for part in parts] for name in ("out", "lse", "dq", "dk", "dv"))
    return Results(torch.cat(out, 1), torch.cat(lse, 2), *(torch.cat(grad, 1) for grad in grads))


def oracle(case: Case, dtype: torch.dtype) -> Results:
    """The same in float64 by the definition, from the inputs as ``dtype`` rounds them."""
    *qkv, cotangent = (tensor.double() for tensor in case.problem(dtype, poisoned=False))
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    out, lse = reference.block_sparse_attention(
        *leaves,
        case.layout(),
        is_causal=case.is_causal,
        scale=case.scale,
        key_padding_mask=case.key_padding_mask(),
    )
    return Results(out.detach(), lse.detach(), *_gradients(out, lse, leaves, cotangent, case.lse_cotangent()))


def _gradients(
    out: Tensor, lse: Tensor, leaves: list[Tensor], cotangent: Tensor, lse_cotangent: Tensor
) -> tuple[Tensor, ...]:
    # Rows without a key have lse -inf, whose gradient is 0: give them no cotangent.
    cotangents = [cotangent, lse_cotangent.to(lse).masked_fill(lse == -torch.inf, 0.0)]
    return torch.autograd.grad([out, lse], leaves, cotangents)


# ------------------------------------------------------------------------------------------------ comparing


def assert_close(case: Case, dtype: torch.dtype, results: Results, expected: Results) -> None:
    """Compare out, lse, dq, dk and dv, each alone and by name."""
    assert results.out.dtype == dtype
    assert results.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    no_key = expected.lse == -torch.inf
    assert torch.equal(results.lse == -torch.inf, no_key), f"rows with no key of {case}"
    forward, gradient = FORWARD_TOLERANCE[dtype], GRADIENT_TOLERANCE[dtype]
    assert _deviation(results.out, expected.out) <= forward, f"out of {case}"
    # An error of lse is one of the softmax's weights, whatever its size: measured against 1.
    lses = (lse.masked_fill(no_key, 0.0) for lse in (results.lse, expected.lse))
    assert _deviation(*lses, floor=1.0) <= forward, f"lse of {case}"
    # dq and dk may vanish (a row with one key has no choice), dv does not: its size says how small counts as nothing.
    # In half precision they err by what out was rounded by, times the cotangent: a share of dv, however small they are.
    floor = (1.0 if dtype.itemsize == 2 else 0.1) * max(expected.dv.abs().flatten().tolist(), default=0.0)
    for name in ("dq", "dk", "dv"):
        difference = _deviation(getattr(results, name), getattr(expected, name), floor=floor)
        assert difference <= gradient, f"{name} of {case}: {difference}"


def _deviation(result: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest expected magnitude; infinite where either is not finite."""
    assert result.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (result.double() - expected.double()).abs().max().item()
    scale = max(expected.abs().max().item(), floor, torch.finfo(torch.float64).tiny)
    return difference / scale if difference == difference else float("inf")


def check(case: Case, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    """Run the case on ranks that are threads, and compare it with the oracle."""
    assert_close(case, dtype, run(case, dtype, **options), oracle(case, dtype))


# Shapes that catch what round numbers hide: a ragged end, empty shards, fewer blocks than ranks, blocks that are not
# square either way, shards that cut blocks or are shorter than one, shared key heads, layouts of key and query heads.
CASES = [
    Case(1, (0, 1), (1, 1), 1, 1, kind="full"),
    Case(2, (0, 16, 32, 45), (8, 4), 4, 8, kv_heads=2, share="key"),
    Case(1, (0, 0, 8, 8, 24, 29), (4, 4), 3, 3, share="query"),
    Case(2, (0, 12, 24, 31, 31), (2, 6), 4, 8, kv_heads=2, share="query"),
    Case(1, (0, 5, 10, 15, 20, 25, 30, 33), (5, 5), 2, 8),
    Case(1, (0, 4, 7, 7, 7), (4, 4), 2, 4, kind="full"),
    Case(1, (0, 16, 40), (8, 8), 6, 8, kv_heads=1, share="query", density=0.2),
    Case(2, (0, 13, 30, 45), (8, 4), 4, 8, kv_heads=2, share="query"),
    Case(1, (0, 3, 3, 5, 29, 30), (4, 4), 3, 4, share="key"),
    Case(1, (0, 3, 7, 11, 12, 31), (2, 6), 2, 8, kind="full"),
    Case(1, (0, 1, 2, 4, 5), (8, 8), 2, 8, kind="full"),
]
