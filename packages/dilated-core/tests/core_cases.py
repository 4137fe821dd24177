"""What the tests of dilated-core share: tolerances, shapes, hypothesis strategies, comparison with the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from dilated_core import AuxRequest, dilated_attention, reference

# Largest deviation from the float64 oracle, relative to the oracle's largest magnitude.
FORWARD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@dataclass(frozen=True)
class Case:
    """One attention problem; its id reads like B2-N63-H4-D8-w(8,32)-r(1,4)-causal."""

    batch: int
    seq: int
    heads: int
    head_dim: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    is_causal: bool = False
    seed: int = 0

    def __str__(self) -> str:
        numbers = f"B{self.batch}-N{self.seq}-H{self.heads}-D{self.head_dim}"
        w, r = (",".join(map(str, values)) for values in (self.segment_lengths, self.dilation_rates))
        return f"{numbers}-w({w})-r({r})" + "-causal" * self.is_causal

    def tensors(self, count: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Standard normal (batch, seq, heads, head_dim) tensors, the same values in every dtype and on every device."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (count, self.batch, self.seq, self.heads, self.head_dim)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return list(values.to(device, dtype).unbind())

    def lse_cotangent(self) -> Tensor:
        """A random cotangent for the lse, (batch, heads, seq), float64."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.batch, self.heads, self.seq, generator=generator, dtype=torch.float64)


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


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small problem."""
    seq = draw(st.integers(1, 70))
    branches = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 90), min_size=branches, max_size=branches))
    rates = tuple(draw(st.integers(1, min(length, 12))) for length in lengths)
    return Case(
        batch=draw(st.integers(1, 3)),
        seq=seq,
        heads=draw(st.integers(1, 9)),
        head_dim=draw(st.sampled_from([1, 2, 3, 8, 16])),
        segment_lengths=tuple(lengths),
        dilation_rates=rates,
        is_causal=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


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
    """out, dq, dk, dv of one run."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def run(case: Case, dtype: torch.dtype, *, device: str = "cpu", with_lse: bool = False, **options: object) -> Results:
    """dilated_attention and its gradients under a random cotangent (also of the lse, if asked)."""
    *qkv, cotangent = case.tensors(4, dtype, device)
    leaves = [tensor.requires_grad_() for tensor in qkv]
    out, aux = dilated_attention(
        *leaves,
        case.segment_lengths,
        case.dilation_rates,
        is_causal=case.is_causal,
        return_aux=AuxRequest(lse=True),
        **options,  # type: ignore[arg-type]
    )
    assert aux.lse is not None
    return Results(out, *_gradients(case, out, aux.lse, leaves, cotangent, with_lse))


def oracle(case: Case, dtype: torch.dtype, *, with_lse: bool = False) -> Results:
    """The same in float64 by the definition, from the inputs as ``dtype`` rounds them."""
    *qkv, cotangent = (tensor.double() for tensor in case.tensors(4, dtype))
    leaves = [tensor.requires_grad_() for tensor in qkv]
    out, lse = reference.dilated_attention(*leaves, case.segment_lengths, case.dilation_rates, is_causal=case.is_causal)
    return Results(out, *_gradients(case, out, lse, leaves, cotangent, with_lse))


def _gradients(
    case: Case, out: Tensor, lse: Tensor, leaves: list[Tensor], cotangent: Tensor, with_lse: bool
) -> tuple[Tensor, ...]:
    outputs, cotangents = [out], [cotangent]
    if with_lse:
        # Rows without a key have lse -inf, whose gradient is 0: give them no cotangent.
        outputs.append(lse)
        cotangents.append(case.lse_cotangent().to(lse).masked_fill(lse == -torch.inf, 0.0))
    return torch.autograd.grad(outputs, leaves, cotangents)


def assert_close(case: Case, dtype: torch.dtype, results: Results, expected: Results) -> None:
    """Compare out, dq, dk and dv, each alone and by name."""
    assert results.out.dtype == dtype
    assert deviation(results.out, expected.out) <= FORWARD_TOLERANCE[dtype], f"out of {case}"
    # dq and dk may vanish (a row with one key has no choice), dv does not: its size says how small counts as nothing.
    floor = 0.1 * expected.dv.abs().max().item()
    for name in ("dq", "dk", "dv"):
        difference = deviation(getattr(results, name), getattr(expected, name), floor=floor)
        assert difference <= GRADIENT_TOLERANCE[dtype], f"{name} of {case}: {difference}"
