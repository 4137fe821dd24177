"""Thousands of random configurations, every option at once, against the oracle: `nox -s fuzz`.

A failure is shrunk, shown, and remembered under .hypothesis for the next run. Once it is understood, it joins KEPT,
which the default tests run. FUZZ_EXAMPLES says how many configurations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from dense_cases import Way, problems
from dense_cases import check as check_dense
from hypothesis import given, settings
from hypothesis import strategies as st
from ring_cases import EXCHANGES, LAYOUTS, MASKS, Case, check
from test_dense import rings
from test_ulysses import teams

from dilated_core import kernels
from dilated_core.plan import SEMANTICS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Configuration:
    """A problem over shards, and how it is run.

    Attributes:
        bounds_given: whether the ranks are told where shards start and end.
        verify: whether they agree all the same.
    """

    case: Case
    dtype: torch.dtype
    kernel: str = "auto"
    with_lse: bool = True
    bounds_given: bool = False
    verify: bool = True

    def __str__(self) -> str:
        words = [
            str(self.case),
            str(self.dtype).removeprefix("torch."),
            self.kernel,
            "lse" * self.with_lse,
            "bounds" * self.bounds_given,
            "unverified" * (not self.verify),
        ]
        return "-".join(filter(None, words))

    def check(self) -> None:
        """Forward and gradients against the oracle."""
        options = {
            "kernel": self.kernel,
            "verify": self.verify,
            "bounds": self.case.bounds if self.bounds_given else None,
        }
        check(self.case, self.dtype, with_lse=self.with_lse, **options)


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    """Any problem of moderate size over up to nine ranks, in any way that can run it."""
    seq = draw(st.integers(1, 160))
    cuts = draw(st.lists(st.integers(0, seq), max_size=8))
    branches = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, 200), min_size=branches, max_size=branches))
    heads = draw(st.integers(1, 12))
    divisors = [kv_heads for kv_heads in range(1, heads) if heads % kv_heads == 0]
    dtype = draw(st.sampled_from(DTYPES))
    case = Case(
        batch=draw(st.integers(1, 3)),
        bounds=(0, *sorted(cuts), seq),
        heads=heads,
        head_dim=draw(st.sampled_from([1, 2, 3, 5, 8, 16, 33, 64])),
        segment_lengths=tuple(lengths),
        dilation_rates=tuple(draw(st.integers(1, min(length, 16))) for length in lengths),
        is_causal=draw(st.booleans()),
        kv_heads=draw(st.sampled_from([None, *divisors])),
        mask=draw(st.sampled_from(MASKS)),
        exchange=draw(st.sampled_from(EXCHANGES)),
        refetch=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.0, 0.1, -0.3, 0.02] + [1.0, -2.0, 5.0] * (dtype in DTYPES[:2]))),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**20)),
    )
    able = [name for name, reason in kernels.survey(CPU, dtype, case.head_dim).items() if reason is None]
    return Configuration(
        case.meaning(draw(st.sampled_from(SEMANTICS))),
        dtype,
        kernel=draw(st.sampled_from(["auto", *able])),
        with_lse=draw(st.booleans()),
        bounds_given=draw(st.booleans()),
        verify=draw(st.booleans()),
    )


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"))
@given(configuration=configurations())
def test_any_configuration(configuration: Configuration) -> None:
    configuration.check()


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"))
@given(problem=problems(rings))
def test_any_dense_ring(problem: tuple[Case, Way]) -> None:
    check_dense(*problem)


@pytest.mark.fuzz
@settings(settings.get_profile("fuzz"))
@given(problem=problems(teams))
def test_any_dense_attention_by_heads(problem: tuple[Case, Way]) -> None:
    check_dense(*problem)


SMALL = Case(1, (0, 3, 3, 8), 2, 4, (8,), (1,))
# Every failure that was ever found, as small as it was found; and one of each way to run, so that none rots.
KEPT = [
    Configuration(replace(SMALL, is_causal=True, scale=-0.3), torch.float32),
    Configuration(replace(SMALL, exchange="heads", mask="right"), torch.float64, with_lse=False, bounds_given=True),
    Configuration(replace(SMALL, layout="expanded"), torch.bfloat16, "math", bounds_given=True, verify=False),
]


@pytest.mark.parametrize("configuration", KEPT, ids=str)
def test_kept(configuration: Configuration) -> None:
    configuration.check()
