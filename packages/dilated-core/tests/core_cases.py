"""What the tests of dilated-core share: tolerances, problems, hypothesis strategies, comparison with the oracle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from dilated_core import AuxRequest, dilated_attention, reference
from dilated_core.plan import SEMANTICS

# Largest deviation from the float64 oracle, relative to the oracle's largest magnitude. In half precision a few
# roundings: of each tile's result, and of what a kernel multiplies.
FORWARD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}

# How an attention may be run on a CPU, as options of dilated_attention.
PATHS = {
    "fused": {},
    "fused-math": {"kernel": "math"},
    "composed": {"fused": False},
    "composed-math": {"fused": False, "kernel": "math"},
}
MASKS = ("none", "random", "right")
LAYOUTS = ("plain", "head-major", "dim-major", "sliced", "expanded")


@dataclass(frozen=True)
class Case:
    """One attention problem; its id reads like B2-N63-H4kv2-D8-w(8,32)-r(1,4)-causal-torchscale-right.

    Attributes:
        kv_heads: key and value heads, None for as many as query heads.
        mask: of the keys. "random" keeps 7 in 10; "right" pads at the right, a random amount in each batch row, and
            the last of several batch rows altogether.
        packed: lengths of the sequences packed into a batch of 1; none for not packed.
        layout: how query, key, value and the cotangent lie in memory; "expanded" ones share one head's numbers.
    """

    batch: int
    seq: int
    heads: int
    head_dim: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    is_causal: bool = False
    seed: int = 0
    semantics: str = "paper"
    kv_heads: int | None = None
    mask: str = "none"
    packed: tuple[int, ...] = ()
    scale: float | None = None
    layout: str = "plain"

    def __str__(self) -> str:
        shared = "" if self.kv_heads is None else f"kv{self.kv_heads}"
        numbers = f"B{self.batch}-N{self.seq}-H{self.heads}{shared}-D{self.head_dim}"
        w, r, packed = (",".join(map(str, each)) for each in (self.segment_lengths, self.dilation_rates, self.packed))
        words = [
            "causal" * self.is_causal,
            self.semantics * (self.semantics != "paper"),
            self.mask * (self.mask != "none"),
            f"packed({packed})" * bool(self.packed),
            "" if self.scale is None else f"scale{self.scale:g}",
            self.layout * (self.layout != "plain"),
        ]
        return "-".join([numbers, f"w({w})", f"r({r})", *filter(None, words)])

    @property
    def pattern(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """segment_lengths and dilation_rates."""
        return self.segment_lengths, self.dilation_rates

    def meaning(self, semantics: str) -> Case:
        """The same with other semantics; torchscale's several segments made multiples of their rate, as it demands."""
        lengths, longest = self.segment_lengths, max(self.packed, default=self.seq)
        if semantics == "torchscale":
            lengths = tuple(
                w if w >= longest else r * -(-w // r) for w, r in zip(lengths, self.dilation_rates, strict=True)
            )
        return replace(self, semantics=semantics, segment_lengths=lengths)

    def tensors(self, count: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Standard normal (batch, seq, heads, head_dim) tensors, the same values in every dtype and on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (count, self.batch, self.seq, self.heads, self.head_dim)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return list(values.to(device, dtype).unbind())

    def problem(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """query, key, value and a cotangent of out, as heads are shared and laid out here."""
        query, key, value, cotangent = self.tensors(4, dtype, device)
        key, value = (tensor[:, :, : self.kv_heads].contiguous() for tensor in (key, value))
        return [_lay_out(tensor, self.layout) for tensor in (query, key, value, cotangent)]

    def key_padding_mask(self, device: str = "cpu") -> Tensor | None:
        """(batch, seq), True where the key is real; None for no mask."""
        if self.mask == "none":
            return None
        generator = torch.Generator().manual_seed(self.seed + 2)
        if self.mask == "random":
            return (torch.rand(self.batch, self.seq, generator=generator) < 0.7).to(device)
        lengths = torch.randint(self.seq + 1, (self.batch, 1), generator=generator)
        if self.batch > 1:
            lengths[-1] = 0
        return (torch.arange(self.seq) < lengths).to(device)

    def cu_seqlens(self, dtype: torch.dtype = torch.int64) -> Tensor | None:
        """Where packed sequences start and end; None for not packed."""
        return torch.tensor([0, *self.packed]).cumsum(0).to(dtype) if self.packed else None

    def options(self, device: str = "cpu") -> dict[str, object]:
        """The keyword arguments of dilated_attention that say what is to be computed."""
        return {
            "is_causal": self.is_causal,
            "semantics": self.semantics,
            "enable_gqa": self.kv_heads is not None,
            "scale": self.scale,
            "key_padding_mask": self.key_padding_mask(device),
            "cu_seqlens": self.cu_seqlens(),
        }

    def lse_cotangent(self) -> Tensor:
        """A random cotangent for the lse, (batch, heads, seq), float64."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.batch, self.heads, self.seq, generator=generator, dtype=torch.float64)


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


# Shapes that catch what round numbers hide: primes, raggedness, w > N, r that does not divide w, more phases than
# heads, more heads than phases, branches twice, places that no branch covers.
CASES = [
    Case(1, 1, 1, 1, (1,), (1,)),
    Case(2, 7, 3, 4, (7,), (1,)),
    Case(1, 13, 2, 8, (4,), (1,)),
    Case(1, 16, 4, 8, (4, 8, 16), (1, 2, 4)),
    Case(2, 31, 5, 8, (5, 12), (1, 5)),
    Case(1, 29, 3, 3, (6, 64), (4, 7)),
    Case(3, 64, 8, 16, (16, 32), (2, 3)),
    Case(1, 97, 2, 8, (97, 97), (1, 1)),
    Case(1, 101, 7, 8, (8, 25, 200), (1, 3, 9)),
    Case(2, 257, 4, 32, (64, 128, 512), (1, 2, 4)),
]
# For all combinations of options: with a branch of rate 1 and without, ragged ends, heads that can be shared.
MIXED_CASES = [Case(3, 41, 4, 8, (8, 20, 90), (1, 3, 7)), Case(2, 30, 6, 5, (7, 12), (3, 4))]


@st.composite
def cases(draw: st.DrawFn, options: bool = False) -> Case:
    """Any small problem; with ``options``, of any semantics, mask and shared heads too."""
    seq = draw(st.integers(1, 70))
    branches = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 90), min_size=branches, max_size=branches))
    rates = tuple(draw(st.integers(1, min(length, 12))) for length in lengths)
    case = Case(
        batch=draw(st.integers(1, 3)),
        seq=seq,
        heads=draw(st.integers(1, 9)),
        head_dim=draw(st.sampled_from([1, 2, 3, 8, 16])),
        segment_lengths=tuple(lengths),
        dilation_rates=rates,
        is_causal=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )
    if not options:
        return case
    divisors = [kv_heads for kv_heads in range(1, case.heads) if case.heads % kv_heads == 0]
    case = replace(case, kv_heads=draw(st.sampled_from([None, *divisors])), mask=draw(st.sampled_from(MASKS)))
    return case.meaning(draw(st.sampled_from(SEMANTICS)))


def packed(case: Case, lengths: list[int]) -> Case:
    """The same options for sequences of these lengths, packed into a batch of 1."""
    return replace(case, batch=1, seq=sum(lengths), packed=tuple(lengths)).meaning(case.semantics)


def deviation(result: Tensor, oracle: Tensor, floor: float = 0.0) -> float:
    """Largest difference over the oracle's largest magnitude; infinite where either is not finite."""
    if oracle.numel() == 0:
        return 0.0
    difference = (
        (result.detach().to("cpu", torch.float64) - oracle.detach().to("cpu", torch.float64)).abs().max().item()
    )
    scale = max(oracle.detach().abs().max().item(), floor, torch.finfo(torch.float64).tiny)
    return difference / scale if difference == difference else float("inf")


@dataclass(frozen=True)
class Results:
    """out, lse and the gradients of one run."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def each(self) -> list[Tensor]:
        """All five."""
        return [self.out, self.lse, self.dq, self.dk, self.dv]


def run(case: Case, dtype: torch.dtype, *, device: str = "cpu", with_lse: bool = False, **options: object) -> Results:
    """dilated_attention and its gradients under a random cotangent (also of the lse, if asked)."""
    *qkv, cotangent = case.problem(dtype, device)
    leaves = [tensor.requires_grad_() for tensor in qkv]
    arguments = {**case.options(device), "return_aux": AuxRequest(lse=True), **options}
    out, aux = dilated_attention(*leaves, *case.pattern, **arguments)  # type: ignore[call-overload]
    return Results(out, aux.lse, *_gradients(case, out, aux.lse, leaves, cotangent, with_lse))


@lru_cache(maxsize=4)
def oracle(case: Case, dtype: torch.dtype, *, with_lse: bool = False) -> Results:
    """The same in float64 by the definition, from the inputs as ``dtype`` rounds them."""
    *qkv, cotangent = (tensor.double() for tensor in case.problem(dtype))
    leaves = [tensor.requires_grad_() for tensor in qkv]
    query, key, value = leaves
    if case.kv_heads is not None:
        key, value = (tensor.repeat_interleave(case.heads // case.kv_heads, dim=2) for tensor in (key, value))
    real, bounds = case.key_padding_mask(), [(0, case.seq)]
    if case.packed:
        bounds = list(pairwise(torch.tensor([0, *case.packed]).cumsum(0).tolist()))
    parts = [
        reference.dilated_attention(
            *(tensor[:, start:stop] for tensor in (query, key, value)),
            *case.pattern,
            is_causal=case.is_causal,
            scale=case.scale,
            semantics=case.semantics,
            key_padding_mask=None if real is None else real[:, start:stop],
        )
        for start, stop in bounds
    ]
    out, lse = torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)
    return Results(out, lse, *_gradients(case, out, lse, leaves, cotangent, with_lse))


def _gradients(
    case: Case, out: Tensor, lse: Tensor, leaves: list[Tensor], cotangent: Tensor, with_lse: bool
) -> tuple[Tensor, ...]:
    outputs, cotangents = [out], [cotangent]
    if with_lse:
        # Rows without a key have lse -inf, whose gradient is 0: give them no cotangent.
        outputs.append(lse)
        cotangents.append(case.lse_cotangent().to(lse).masked_fill(lse == -torch.inf, 0.0))
    return torch.autograd.grad(outputs, leaves, cotangents)


def assert_close(case: Case, dtype: torch.dtype, results: Results, expected: Results, *, slack: float = 1.0) -> None:
    """Compare out, lse, dq, dk and dv, each alone and by name; ``slack`` widens the tolerances."""
    assert results.out.dtype == dtype
    # Larger scores than usual are as much less exact, and so are the weights, and what is multiplied with the scale.
    steep = 1.0 if case.scale is None else max(1.0, abs(case.scale) * case.head_dim**0.5)
    forward, gradient = (slack * steep * tolerance[dtype] for tolerance in (FORWARD_TOLERANCE, GRADIENT_TOLERANCE))
    assert deviation(results.out, expected.out) <= forward, f"out of {case}"
    no_key = (expected.lse == -torch.inf).to(results.lse.device)
    assert torch.equal(results.lse == -torch.inf, no_key), f"rows with no key of {case}"
    # An error of lse is one of the softmax's weights, whatever its size: measured against 1.
    lses = (lse.masked_fill(no_key.to(lse.device), 0.0) for lse in (results.lse, expected.lse))
    assert deviation(*lses, floor=1.0) <= forward, f"lse of {case}"
    # dq and dk may vanish (a row with one key has no choice), dv does not: its size says how small counts as nothing.
    # In half precision they err by what out was rounded by, times the cotangent: a share of dv, however small they are.
    floor = (1.0 if dtype.itemsize == 2 else 0.1) * steep * expected.dv.abs().max().item()
    for name in ("dq", "dk", "dv"):
        difference = deviation(getattr(results, name), getattr(expected, name), floor=floor)
        assert difference <= gradient, f"{name} of {case}: {difference}"
