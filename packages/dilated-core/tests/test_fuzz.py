"""Thousands of random configurations, every option at once, against the oracle: `nox -s fuzz`.

A failure is shrunk, shown, and remembered under .hypothesis for the next run. Once it is understood, it joins KEPT,
which the default tests run. FUZZ_EXAMPLES says how many configurations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from core_cases import LAYOUTS, MASKS, Case, assert_close, oracle, packed, run
from hypothesis import given, settings
from hypothesis import strategies as st

from dilated_core import kernels
from dilated_core.plan import SEMANTICS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Configuration:
    """A problem and how it is run.

    Attributes:
        gathered: elements of a tile gathered at a time; None for as many as usual.
    """

    case: Case
    dtype: torch.dtype
    fused: bool = True
    kernel: str = "auto"
    with_lse: bool = True
    gathered: int | None = None

    def __str__(self) -> str:
        words = [
            str(self.case),
            str(self.dtype).removeprefix("torch."),
            "fused" if self.fused else "composed",
            self.kernel,
            "lse" * self.with_lse,
            "" if self.gathered is None else f"gathered{self.gathered}",
        ]
        return "-".join(filter(None, words))

    def check(self) -> None:
        """Forward and gradients against the oracle."""
        with pytest.MonkeyPatch.context() as patch:
            if self.gathered is not None:
                limits = {"cpu": self.gathered, "cuda": self.gathered}
                patch.setattr("dilated_core.span.GATHER_ELEMENTS", limits)
            ours = run(self.case, self.dtype, with_lse=self.with_lse, fused=self.fused, kernel=self.kernel)
        assert_close(self.case, self.dtype, ours, oracle(self.case, self.dtype, with_lse=self.with_lse))


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """Any problem of moderate size, on any path that can run it."""
    branches = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, 200), min_size=branches, max_size=branches))
    rates = tuple(draw(st.integers(1, min(length, 16))) for length in lengths)
    heads = draw(st.integers(1, 12))
    divisors = [kv_heads for kv_heads in range(1, heads) if heads % kv_heads == 0]
    dtype = draw(st.sampled_from(DTYPES))
    case = Case(
        batch=draw(st.integers(1, 3)),
        seq=draw(st.integers(1, 160)),
        heads=heads,
        head_dim=draw(st.sampled_from([1, 2, 3, 5, 8, 16, 33, 64])),
        segment_lengths=tuple(lengths),
        dilation_rates=rates,
        is_causal=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
        kv_heads=draw(st.sampled_from([None, *divisors])),
        mask=draw(st.sampled_from(MASKS)),
        scale=draw(st.sampled_from([None, 0.0, 0.1, -0.3, 0.02] + [1.0, -2.0, 5.0] * (dtype in DTYPES[:2]))),
        layout=draw(st.sampled_from(LAYOUTS)),
        semantics=draw(st.sampled_from(SEMANTICS)),
    )
    if draw(st.booleans()):
        case = packed(case, draw(st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any)))
    able = [name for name, reason in kernels.survey(CPU, dtype, case.head_dim).items() if reason is None]
    return Configuration(
        case.meaning(case.semantics),
        dtype,
        fused=draw(st.booleans()),
        kernel=draw(st.sampled_from(["auto", *able])),
        with_lse=draw(st.booleans()),
        gathered=draw(st.sampled_from([None, None, 1, 500])),
    )


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"))
@given(configuration=configurations())
def test_any_configuration(configuration: Configuration) -> None:
    configuration.check()


WHOLE = Case(1, 8, 2, 4, (8,), (1,))
# Every failure that was ever found, as small as it was found.
KEPT = [
    # PyTorch's causal CPU kernel masks with -inf before it scales: NaN where the scale is not above 0.
    Configuration(replace(WHOLE, is_causal=True, scale=-0.3), torch.float32),
    Configuration(replace(WHOLE, is_causal=True, scale=0.0), torch.float64, fused=False),
]


@pytest.mark.parametrize("configuration", KEPT, ids=str)
def test_kept(configuration: Configuration) -> None:
    configuration.check()
