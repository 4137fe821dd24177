"""What the tests of dilated_ring_attention share: tolerances, problems cut into shards, comparison with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, distributed

from dilated_core import AuxRequest, dilated_attention, reference
from dilated_core.plan import SEMANTICS
from dilated_ring import dilated_ring_attention
from dilated_ring.comm import Comm, run_ranks
from dilated_ring.plan import even_bounds

# Largest deviation from the float64 oracle, relative to the oracle's largest magnitude: those of dilated-core's tests.
FORWARD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}

MASKS = ("none", "random", "right", "shards")
LAYOUTS = ("plain", "head-major", "dim-major", "sliced", "expanded")
EXCHANGES = ("auto", "gather", "heads")
NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One attention over shards; its id reads like B2-N(0,10,31)-H4kv2-D8-w(8,32)-r(1,4)-causal-heads.

    Attributes:
        bounds: where shards start and end; of the last, the sequence ends.
        kv_heads: key and value heads, None for as many as query heads.
        mask: of the keys. "random" keeps 7 in 10; "right" pads at the right, a random amount in each batch row, and
            the last of several batch rows altogether; "shards" pads every other shard altogether, the first one too.
            What padding holds is NaN and infinity, but for the oracle.
        layout: how query, key, value and the cotangent lie in memory; "expanded" ones share one head's numbers.
        refetch: as the argument of dilated_ring_attention.
    """

    batch: int
    bounds: tuple[int, ...]
    heads: int
    head_dim: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    is_causal: bool = False
    semantics: str = "paper"
    kv_heads: int | None = None
    mask: str = "none"
    exchange: str = "auto"
    refetch: bool = False
    scale: float | None = None
    layout: str = "plain"
    seed: int = 0

    def __str__(self) -> str:
        shared = "" if self.kv_heads is None else f"kv{self.kv_heads}"
        w, r, bounds = (",".join(map(str, each)) for each in (self.segment_lengths, self.dilation_rates, self.bounds))
        words = [
            f"B{self.batch}-N({bounds})-H{self.heads}{shared}-D{self.head_dim}-w({w})-r({r})",
            "causal" * self.is_causal,
            self.semantics * (self.semantics != "paper"),
            self.mask * (self.mask != "none"),
            self.exchange * (self.exchange != "auto"),
            "refetch" * self.refetch,
            "" if self.scale is None else f"scale{self.scale:g}",
            self.layout * (self.layout != "plain"),
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
    def pattern(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """segment_lengths and dilation_rates."""
        return self.segment_lengths, self.dilation_rates

    def shard(self, rank: int) -> slice:
        """The rank's positions."""
        return slice(self.bounds[rank], self.bounds[rank + 1])

    def over(self, ranks: int) -> Case:
        """The same sequence in as many shards, as equal as can be."""
        return replace(self, bounds=even_bounds(self.seq, ranks))

    def meaning(self, semantics: str) -> Case:
        """The same with other semantics; torchscale's several segments made multiples of their rate, as it demands."""
        lengths = self.segment_lengths
        if semantics == "torchscale":
            lengths = tuple(
                w if w >= self.seq else r * -(-w // r) for w, r in zip(lengths, self.dilation_rates, strict=True)
            )
        return replace(self, semantics=semantics, segment_lengths=lengths)

    def problem(self, dtype: torch.dtype, *, poisoned: bool = True) -> list[Tensor]:
        """query, key, value and a cotangent of out, as heads are shared, padding is filled and all is laid out here."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (4, self.batch, self.seq, self.heads, self.head_dim)
        query, key, value, cotangent = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).unbind()
        key, value = (tensor[:, :, : self.kv_heads].clone() for tensor in (key, value))
        real = self.key_padding_mask()
        if real is not None and poisoned:
            key[~real], value[~real] = torch.nan, torch.inf
        return [_lay_out(tensor, self.layout) for tensor in (query, key, value, cotangent)]

    def key_padding_mask(self) -> Tensor | None:
        """(batch, seq), True where the key is real; None for no mask."""
        if self.mask == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 2)
        if self.mask == "random":
            return torch.rand(self.batch, self.seq, generator=generator) < 0.7
        if self.mask == "shards":
            real = torch.ones(self.batch, self.seq, dtype=torch.bool)
            for rank in range(0, self.ranks, 2):
                real[:, self.shard(rank)] = False
            return real
        lengths = torch.randint(self.seq + 1, (self.batch, 1), generator=generator)
        if self.batch > 1:
            lengths[-1] = 0
        return torch.arange(self.seq) < lengths

    def lse_cotangent(self) -> Tensor:
        """A random cotangent for the lse, (batch, heads, seq), float64."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.batch, self.heads, self.seq, generator=generator, dtype=torch.float64)

    def options(self) -> dict[str, Any]:
        """What is to be computed, as keyword arguments that dilated_attention takes too; the mask is not among them."""
        return {
            "is_causal": self.is_causal,
            "semantics": self.semantics,
            "enable_gqa": self.kv_heads is not None,
            "scale": self.scale,
        }


def _lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values (but for "expanded") in other storage."""
    if layout == "head-major":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "dim-major":
        return tensor.transpose(1, 3).contiguous().transpose(1, 3)
    if layout == "sliced":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "expanded":
        return tensor[:, :, :1].expand_as(tensor)
    return tensor


@st.composite
def cases(draw: st.DrawFn, *, seq: int = 60, ranks: int = 6) -> Case:
    """Any small problem over any shards, empty ones too, with any options that float64 can be checked with."""
    length = draw(st.integers(1, seq))
    cuts = draw(st.lists(st.integers(0, length), max_size=ranks - 1))
    branches = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 90), min_size=branches, max_size=branches))
    heads = draw(st.integers(1, 9))
    divisors = [kv_heads for kv_heads in range(1, heads) if heads % kv_heads == 0]
    case = Case(
        batch=draw(st.integers(1, 3)),
        bounds=(0, *sorted(cuts), length),
        heads=heads,
        head_dim=draw(st.sampled_from([1, 2, 3, 8, 16])),
        segment_lengths=tuple(lengths),
        dilation_rates=tuple(draw(st.integers(1, min(length, 12))) for length in lengths),
        is_causal=draw(st.booleans()),
        kv_heads=draw(st.sampled_from([None, *divisors])),
        mask=draw(st.sampled_from(MASKS)),
        exchange=draw(st.sampled_from(EXCHANGES)),
        refetch=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 0.0, -0.3, 0.1])),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**20)),
    )
    return case.meaning(draw(st.sampled_from(SEMANTICS)))


# ------------------------------------------------------------------------------------------------ running


@dataclass(frozen=True)
class Results:
    """out, lse (None where it was not asked for) and the gradients of one run."""

    out: Tensor
    lse: Tensor | None
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def each(self) -> list[Tensor]:
        """All that there are."""
        found = [getattr(self, field.name) for field in fields(self)]
        return [result for result in found if result is not None]


def run_rank(case: Case, dtype: torch.dtype, group: Any, *, with_lse: bool = False, **options: Any) -> Results:
    """This rank's rows of dilated_ring_attention, and its gradients under random cotangents.

    Args:
        group: as dilated_ring_attention takes it.
        with_lse: whether to ask for the lse, and give it a cotangent too.
        options: more arguments of dilated_ring_attention.
    """
    shard = case.shard(group.rank if isinstance(group, Comm) else _rank_of(group))
    *qkv, cotangent = (tensor[:, shard] for tensor in case.problem(dtype))
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    real = case.key_padding_mask()
    arguments: dict[str, Any] = {
        **case.options(),
        "exchange": case.exchange,
        "refetch": case.refetch,
        "key_padding_mask": None if real is None else real[:, shard],
        **options,
    }
    if not with_lse:
        out = dilated_ring_attention(*leaves, *case.pattern, group=group, **arguments)
        return Results(out.detach(), None, *torch.autograd.grad(out, leaves, cotangent))
    out, aux = dilated_ring_attention(*leaves, *case.pattern, group=group, return_aux=AuxRequest(lse=True), **arguments)
    grads = _gradients(out, aux.lse, leaves, cotangent, case.lse_cotangent()[:, :, shard])
    return Results(out.detach(), aux.lse.detach(), *grads)


def _rank_of(group: Any) -> int:
    if group is None or isinstance(group, distributed.ProcessGroup):
        return distributed.get_rank(group)
    return int(group.get_local_rank())


def run(case: Case, dtype: torch.dtype, *, with_lse: bool = False, **options: Any) -> Results:
    """All ranks' rows, put together, of ranks that are threads."""
    return joined(
        run_ranks(case.ranks, lambda comm: run_rank(case, dtype, comm, with_lse=with_lse, **options), timeout=120)
    )


def joined(parts: Sequence[Results]) -> Results:
    """The results of all ranks as those of the whole sequence."""
    out, lse, *grads = ([getattr(part, name) for part in parts] for name in NAMES)
    whole_lse = None if lse[0] is None else torch.cat(lse, 2)
    return Results(torch.cat(out, 1), whole_lse, *(torch.cat(grad, 1) for grad in grads))


def run_alone(case: Case, dtype: torch.dtype, *, with_lse: bool = False, **options: Any) -> Results:
    """The same by dilated_core.dilated_attention: the whole sequence in one place."""
    *qkv, cotangent = case.problem(dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    arguments = {**case.options(), "key_padding_mask": case.key_padding_mask(), "return_aux": AuxRequest(lse=True)}
    out, aux = dilated_attention(*leaves, *case.pattern, **arguments, **options)  # type: ignore[call-overload]
    lse_cotangent = case.lse_cotangent() if with_lse else None
    return Results(out.detach(), aux.lse.detach(), *_gradients(out, aux.lse, leaves, cotangent, lse_cotangent))


def oracle(case: Case, dtype: torch.dtype, *, with_lse: bool = False) -> Results:
    """The same in float64 by the definition, from the inputs as ``dtype`` rounds them."""
    bounds = case.bounds if case.mask == "shards" else (0, case.seq)
    # What the definition knows nothing of is left out, so that it is computed once.
    return _oracle(replace(case, bounds=bounds, exchange="auto", refetch=False), dtype, with_lse)


@lru_cache(maxsize=8)
def _oracle(case: Case, dtype: torch.dtype, with_lse: bool) -> Results:
    *qkv, cotangent = (tensor.double() for tensor in case.problem(dtype, poisoned=False))
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    query, key, value = leaves
    if case.kv_heads is not None:
        key, value = (tensor.repeat_interleave(case.heads // case.kv_heads, dim=2) for tensor in (key, value))
    out, lse = reference.dilated_attention(
        query,
        key,
        value,
        *case.pattern,
        is_causal=case.is_causal,
        scale=case.scale,
        semantics=case.semantics,
        key_padding_mask=case.key_padding_mask(),
    )
    lse_cotangent = case.lse_cotangent() if with_lse else None
    return Results(out.detach(), lse.detach(), *_gradients(out, lse, leaves, cotangent, lse_cotangent))


def _gradients(
    out: Tensor, lse: Tensor, leaves: list[Tensor], cotangent: Tensor, lse_cotangent: Tensor | None
) -> tuple[Tensor, ...]:
    outputs, cotangents = [out], [cotangent]
    if lse_cotangent is not None:
        # Rows without a key have lse -inf, whose gradient is 0: give them no cotangent.
        outputs.append(lse)
        cotangents.append(lse_cotangent.to(lse).masked_fill(lse == -torch.inf, 0.0))
    return torch.autograd.grad(outputs, leaves, cotangents)


# ------------------------------------------------------------------------------------------------ comparing


def deviation(result: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the largest expected magnitude; infinite where either is not finite."""
    assert result.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (result.double() - expected.double()).abs().max().item()
    scale = max(expected.abs().max().item(), floor, torch.finfo(torch.float64).tiny)
    return difference / scale if difference == difference else float("inf")


def deviations(case: Case, dtype: torch.dtype, results: Results, expected: Results) -> dict[str, float]:
    """Of out, lse, dq, dk and dv, each by its name."""
    found = {"out": deviation(results.out, expected.out)}
    if results.lse is not None and expected.lse is not None:
        no_key = expected.lse == -torch.inf
        assert torch.equal(results.lse == -torch.inf, no_key), f"rows with no key of {case}"
        # An error of lse is one of the softmax's weights, whatever its size: measured against 1.
        lses = (lse.masked_fill(no_key, 0.0) for lse in (results.lse, expected.lse))
        found["lse"] = deviation(*lses, floor=1.0)
    # dq and dk may vanish (a row with one key has no choice), dv does not: its size says how small counts as nothing.
    # In half precision they err by what out was rounded by, times the cotangent: a share of dv, however small they are.
    steep = _steepness(case)
    floor = (1.0 if dtype.itemsize == 2 else 0.1) * steep * max(expected.dv.abs().flatten().tolist(), default=0.0)
    for name in ("dq", "dk", "dv"):
        found[name] = deviation(getattr(results, name), getattr(expected, name), floor=floor)
    return found


def assert_close(case: Case, dtype: torch.dtype, results: Results, expected: Results, *, slack: float = 1.0) -> None:
    """Compare out, lse, dq, dk and dv, each alone and by name; ``slack`` widens the tolerances."""
    assert results.out.dtype == dtype
    assert results.lse is None or results.lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, difference in deviations(case, dtype, results, expected).items():
        tolerance = (FORWARD_TOLERANCE if name in ("out", "lse") else GRADIENT_TOLERANCE)[dtype]
        assert difference <= slack * _steepness(case) * tolerance, f"{name} of {case}: {difference}"


def _steepness(case: Case) -> float:
    """Larger scores than usual are as much less exact, and so are the weights and what is multiplied with the scale."""
    return 1.0 if case.scale is None else max(1.0, abs(case.scale) * case.head_dim**0.5)


def check(case: Case, dtype: torch.dtype = torch.float64, *, with_lse: bool = True, **options: Any) -> None:
    """Run the case on ranks that are threads, and compare it with the oracle."""
    results = run(case, dtype, with_lse=with_lse, **options)
    assert_close(case, dtype, results, oracle(case, dtype, with_lse=with_lse))


# Shapes that catch what round numbers hide: primes, raggedness, shards that are empty, uneven, cut at, just before and
# just after a segment's edge, less positions than ranks, w > N, more phases than heads, branches twice, rows that no
# branch covers.
CASES = [
    Case(1, (0, 1), 1, 1, (1,), (1,)),
    Case(1, (0, 0, 1), 1, 1, (1,), (1,)),
    Case(1, (0, 1, 2, 2, 2, 3, 3), 2, 4, (3,), (1,)),
    Case(2, even_bounds(97, 4), 3, 8, (16, 50, 97), (1, 3, 5)),
    Case(1, even_bounds(101, 7), 7, 8, (8, 25, 200), (1, 3, 9)),
    Case(1, even_bounds(3, 5), 4, 2, (2, 8), (1, 2)),
    Case(2, (0, 0, 0, 31), 5, 8, (5, 12), (1, 5)),
    Case(1, (0, 29, 29), 3, 3, (6, 64), (4, 7)),
    Case(1, (0, 13, 13, 14, 53), 4, 8, (7, 30, 53), (1, 2, 13)),
    Case(1, (0, 16, 32, 48, 64), 8, 16, (16, 32, 64), (1, 2, 4)),
    Case(1, (0, 15, 33, 47, 64), 8, 16, (16, 32, 64), (1, 2, 4)),
    Case(1, (0, 1, 63, 64), 2, 8, (64, 64), (1, 1)),
    Case(1, (0, 5, 11, 12, 30, 41), 3, 4, (9, 90), (8, 11)),
]
# For all combinations of options: with a branch of rate 1 and without, ragged ends, heads that can be shared.
MIXED_CASES = [
    Case(3, (0, 11, 11, 30, 41), 4, 8, (8, 20, 90), (1, 3, 7)),
    Case(2, (0, 13, 30), 6, 5, (7, 12), (3, 4)),
]
